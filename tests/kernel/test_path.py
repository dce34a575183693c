"""What diverts packets of pods although our entries are right: told, and cured by its advice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lib.diverted import (
    BRIEFLY,
    HOST,
    IP,
    NEAR,
    Pair,
    advised,
    explained,
    leftover,
    show,
    step,
)
from tests.lib.forwarding import Nodes
from tests.lib.leases import DEVICE, NETWORK, subnet
from tests.lib.traffic import pod_address


@pytest.fixture
def pair(nodes: Nodes, family: int) -> Iterator[Pair]:
    made = Pair(nodes(2), family, "kernel")
    yield made
    made.plane.close()


def cured(pair: Pair, *texts: str, way: str, rule: str = "", verdict: str = "peer") -> None:
    """The warnings are ``texts``, pings fail, and what the first one advises cures it. So says
    ``explain``, which sees the packets go ``way`` by the policy rule ``rule``."""
    # Where its own address is in the way, a node answers to the peer's.
    assert pair.reaches(BRIEFLY) == (way == "local")
    found = pair.warnings()
    assert found == texts
    said = explained(pair, ok=False)
    assert (said.verdict, said.way) == (verdict, way)
    assert step(said, "route").text == texts[0]
    assert not rule or (step(said, "rule").held, step(said, "rule").ok) == (rule, False)
    for text in found:
        pair.run(advised(text)[0])
    assert pair.plane.resync().ok  # a lease that was rejected is accepted again
    assert pair.reaches()
    assert pair.warnings() == ()
    assert explained(pair, ok=True).way == "tunnel"


# ---- policy rules ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "unreachable", "blackhole", "prohibit"])
def test_fr25_a_peer_s_subnet_in_a_table_before_main(pair: Pair, family: int, kind: str) -> None:
    taken = subnet(family, 2)
    assert pair.reaches()
    pair.ip("rule add pref 5270 lookup 52")
    words = f"{kind} {taken}" if kind else f"{taken} dev tun0"
    pair.ip(f"route add {words} table 52")

    does = "drops" if kind else "diverts"
    cured(
        pair,
        f"route {words} in table 52, which policy rule 5270 (from all lookup 52) has looked up "
        f"before table main, {does} packets of pods: '{IP[family]} route del {taken} table 52' "
        "removes it",
        way="none" if kind else "direct",
        rule="5270: from all lookup 52",
    )


def test_fr25_the_whole_network_in_a_table_before_main(pair: Pair, family: int) -> None:
    assert pair.reaches()
    pair.ip("rule add pref 5270 lookup 52")
    pair.ip(f"route add {NETWORK[family]} dev tun0 table 52")

    cured(
        pair,
        f"route {NETWORK[family]} dev tun0 in table 52, which policy rule 5270 (from all lookup "
        "52) has looked up before table main, diverts packets of pods: "
        f"'{IP[family]} route del {NETWORK[family]} table 52' removes it",
        way="direct",
        rule="5270: from all lookup 52",
    )


@pytest.mark.parametrize("words", ["local {} dev lo", "blackhole {}", "{} dev tun0"])
def test_a_peer_s_subnet_in_table_local(pair: Pair, family: int, words: str) -> None:
    """Which the kernel asks first of all; its own routes there are addresses of this node."""
    taken = subnet(family, 2)
    assert pair.reaches()
    pair.ip(f"route add {words.format(taken)} table local")

    does = "drops" if "blackhole" in words else "diverts"
    cured(
        pair,
        f"route {words.format(taken)} in table local, which policy rule 0 (from all lookup local) "
        f"has looked up before table main, {does} packets of pods: "
        f"'{IP[family]} route del {taken} table local' removes it",
        way={"local": "local", "blackhole": "none"}.get(words.partition(" ")[0], "direct"),
        verdict="own-address" if words.startswith("local") else "peer",
    )


@pytest.mark.parametrize("command", [0, 1], ids=["exempted", "removed"])
@pytest.mark.parametrize("match", ["", "not fwmark 51820", "iif pod1"])
def test_fr24_a_vpn_s_default_route(pair: Pair, family: int, match: str, command: int) -> None:
    """Either of its commands works."""
    assert pair.reaches()
    pair.ip(f"rule add {match} pref 5270 lookup 52")
    pair.ip("route add default dev tun0 table 52")
    net, ip = NETWORK[family], IP[family]

    assert not pair.reaches(BRIEFLY)
    found, *more = pair.warnings()
    rule = {
        "": "from all lookup 52",
        "not fwmark 51820": "not from all fwmark 0xca6c lookup 52",
        "iif pod1": "from all iif pod1 lookup 52",
    }[match]
    assert found == (
        f"route default dev tun0 in table 52, which policy rule 5270 ({rule}) has looked up "
        f"before table main, diverts packets of pods to {net}: '{ip} rule add pref 5269 to {net} "
        f"lookup main' exempts them, '{ip} rule del pref 5270' removes the rule"
    )
    # The tunnel's packets are of this node, and asked about as well.
    near = NEAR[family]
    assert more == [
        f"route default dev tun0 in table 52, which policy rule 5270 ({rule}) has looked up "
        f"before table main, diverts packets of the tunnel to {near}: '{ip} rule add pref 5269 to "
        f"{near} lookup main' exempts them, '{ip} rule del pref 5270' removes the rule"
    ] * (match != "iif pod1")
    said = explained(pair, ok=False)
    assert said.way == "direct"
    assert (step(said, "rule").held, step(said, "rule").ok) == (f"5270: {rule}", False)
    assert step(said, "route").text == found
    assert [step(said, "packet").text] == (more or [""])
    pair.run(advised(found)[command])
    for text in more[: 1 - command]:
        pair.run(advised(text)[command])
    assert pair.reaches()
    assert pair.warnings() == ()
    assert explained(pair, ok=True).way == "tunnel"


def test_a_rule_that_drops_packets_to_pods(pair: Pair, family: int) -> None:
    assert pair.reaches()
    pair.ip(f"rule add pref 100 to {subnet(family, 2)} unreachable")

    net = subnet(family, 2)
    cured(
        pair,
        f"policy rule 100 (from all to {net} unreachable) drops packets of pods to {net}: "
        f"'{IP[family]} rule del pref 100' removes it",
        way="none",
        rule=f"100: from all to {net} unreachable",
    )


def test_a_rule_that_drops_packets_from_pods(pair: Pair, family: int) -> None:
    assert pair.reaches()
    near, net = subnet(family, 1), NETWORK[family]
    pair.ip(f"rule add pref 100 from {near} blackhole")

    cured(
        pair,
        f"policy rule 100 (from {near} blackhole) drops packets of pods to {net}: "
        f"'{IP[family]} rule del pref 100' removes it",
        way="none",
        rule=f"100: from {near} blackhole",
    )


def test_without_the_rule_of_table_main(pair: Pair, family: int) -> None:
    assert pair.reaches()
    # Until a rule is added, the kernel asks none for IPv6 (fib6_has_custom_rules).
    pair.ip(f"rule add to {HOST[family]} lookup main")
    pair.ip("rule del pref 32766")

    assert not pair.reaches(BRIEFLY)
    with pair.fresh() as fresh:
        (found,) = show(fresh).warnings
    assert found.startswith(f"no policy rule leads IPv{family} packets of pods to table main")
    pair.run(advised(found)[0])
    assert pair.reaches()
    assert pair.warnings() == ()


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            (
                "rule add not fwmark 51820 lookup 51820",
                "rule add lookup main suppress_prefixlength 0",
                "route add default dev tun0 table 51820",
            ),
            id="fr24-wg-quick",
        ),
        pytest.param(
            (
                "rule add pref 5210 fwmark 0x80000/0xff0000 lookup main",
                "rule add pref 5230 fwmark 0x80000/0xff0000 lookup default",
                "rule add pref 5250 fwmark 0x80000/0xff0000 unreachable",
                "rule add pref 5270 lookup 52",
                "route add HOST dev tun0 table 52",
            ),
            id="tailscale",
        ),
        pytest.param(
            (
                "rule add pref 5270 lookup 52",
                "route add default dev tun0 table 52",
                "route add throw NETWORK table 52",
                "route add throw NEAR table 52",
            ),
            id="thrown-back",
        ),
        pytest.param(("rule add pref 5270 lookup 52",), id="a-table-without-routes"),
        pytest.param(
            ("rule add pref 100 from HOST lookup 100", "route add default dev tun0 table 100"),
            id="of-a-second-interface",
        ),
    ],
)
def test_rules_that_leave_pods_alone_are_no_warning(
    pair: Pair, family: int, steps: tuple[str, ...]
) -> None:
    words = {
        "NETWORK": NETWORK[family],
        "NEAR": NEAR[family],
        "HOST": {4: "100.64.0.9/32", 6: "fd7a::9/128"}[family],
    }
    for command in steps:
        for name, value in words.items():
            command = command.replace(name, value)
        pair.ip(command)

    assert pair.reaches()
    assert pair.warnings() == ()
    said = explained(pair, ok=True)
    assert said.way == "tunnel"
    assert step(said, "rule").ok
    assert "lookup main" in step(said, "rule").held


# ---- addresses --------------------------------------------------------------------------


def test_fr45_a_static_route_for_a_part_of_a_peer_s_subnet(pair: Pair, family: int) -> None:
    """The kernel prefers it to ours. One for a part of this node's own subnet is its pods'."""
    part = {4: "10.240.2.0/25", 6: "fd00:10:2::/72"}[family]
    own = {4: "10.240.1.128/25", 6: "fd00:10:1:0:8000::/72"}[family]
    pair.ip(f"route add {own} dev tun0")
    assert pair.warnings() == ()
    pair.ip(f"route add {part} dev tun0")
    assert not pair.reaches(BRIEFLY)
    report = pair.plane.sync(pair.leases)
    assert report.ok
    [text] = map(str, report.diversions[family])
    inside = f"the static route {part} dev tun0, a part of {subnet(family, 2)} of lease "
    assert text.startswith(inside)
    assert text.endswith(f"diverts packets of pods: '{IP[family]} route del {part}' removes it")
    assert text in report.warnings
    assert text in pair.plane.resync().warnings
    assert text in pair.plane.plan(pair.leases).warnings
    with pair.fresh() as fresh:
        assert text in show(fresh, pair.leases).warnings
    assert step(pair.plane.explain(pod_address(family, 2)), "route").text == text
    pair.run(advised(text)[0])
    assert pair.reaches()
    assert pair.warnings() == ()


def test_fr43_a_bridge_that_still_has_a_peer_s_subnet(pair: Pair, family: int) -> None:
    assert pair.reaches()
    held = leftover(pair, 2)
    pair.plane.sync(pair.leases)

    name = pair.far.lease.label
    cured(
        pair,
        f"bridge cni0 has {held}, in {subnet(family, 2)} of lease {name}: packets to its pods "
        "stay here: 'ip link delete cni0' removes it",
        way="direct",
        verdict="refused",
    )


def test_fr43_a_bridge_that_has_an_earlier_subnet_of_this_node(pair: Pair, family: int) -> None:
    held = leftover(pair, 9)

    (found,) = pair.warnings()
    assert found == (
        f"bridge cni0 has {held}, which is not in {subnet(family, 1)}, the subnet of this "
        "node: 'ip link delete cni0' removes it"
    )
    pair.run(advised(found)[0])
    assert pair.warnings() == ()


def test_fr26_an_address_of_a_dhcp_client_on_our_device(pair: Pair, family: int) -> None:
    """An IPv6 one on the IPv6 device a sync removes itself; an IPv4 one it leaves alone."""
    device = DEVICE[family]
    pair.host.ip(f"address add 192.168.1.125/24 dev {device}")

    (found,) = pair.warnings()
    if family == 4:
        said = pair.plane.explain("192.168.1.50")
        assert (said.verdict, said.way, said.ok) == ("outside-network", "tunnel", False)
        assert step(said, "route").text == found
    assert found == (
        f"device {device} has 192.168.1.125/24, an address of another program, which leads "
        f"192.168.1.0/24 into the tunnel: 'ip address del 192.168.1.125/24 dev {device}' removes it"
    )
    pair.run(advised(found)[0])
    assert pair.warnings() == ()
    assert pair.reaches()
