"""Which policy rules, routes and addresses divert packets of pods: cases without a kernel."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flannel_dp.errors import KernelError
from flannel_dp.kernel.links import Address, Link
from flannel_dp.kernel.rules import LOOKUP, PolicyRule, TableRoute, parse_rule, parse_table_route
from flannel_dp.node.path import (
    Diversion,
    Ground,
    diversions,
)
from flannel_dp.node.rivals import foreign_addresses, rival_devices

NETWORK = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
OTHER = {4: "192.168.9.0/24", 6: "fd00:9::/64"}
DEVICES = {1: "lo", 2: "eth0", 3: "tun0", 7: "flannel.1", 8: "cni0"}
MAIN = 32766


def subnet(family: int, number: int) -> str:
    return f"10.244.{number}.0/24" if family == 4 else f"fd00:10:244:{number}::/64"


def ground(family: int, **changes: Any) -> Ground:
    fields: dict[str, Any] = {
        "length": 24 if family == 4 else 64,
        "device": 7,
        "pods": frozenset({8}),
        "name": DEVICES.__getitem__,
    }
    return Ground(family, NETWORK[family], subnet(family, 1), **(fields | changes))


def rule(family: int, priority: int, table: int = 52, **fields: Any) -> PolicyRule:
    return PolicyRule(family, priority, fields.pop("action", LOOKUP), table, **fields)


def usual(family: int) -> list[PolicyRule]:
    return [rule(family, 0, 255), rule(family, MAIN, 254), rule(family, 32767, 253)]


def route(prefix: str, kind: str = "", device: int = 3, **fields: Any) -> TableRoute:
    fields = {"gateway": "", "nexthop": 0, "tos": 0, "metric": 0} | fields
    return TableRoute(prefix, kind, 0 if kind else device, **fields)


def default(family: int) -> str:
    return "0.0.0.0/0" if family == 4 else "::/0"


def judged(
    family: int, *rules: PolicyRule, routes: list[TableRoute] | None = None, **changes: Any
) -> list[Diversion]:
    """With the kernel's own rules, and ``routes`` in table 52."""
    every = sorted([*usual(family), *rules], key=lambda one: one.priority)
    tables = {52: routes or []}
    return diversions(every, tables, ground(family, **changes))


def commands(found: list[Diversion]) -> list[str]:
    return [part for one in found for part in one.advice.split("'")[1::2]]


FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
IP = {4: "ip", 6: "ip -6"}


@FAMILIES
def test_the_kernel_s_own_rules_divert_nothing(family: int) -> None:
    assert judged(family) == []


# ---- rules that leave the pod network alone ------------------------------------------


def harmless(family: int) -> dict[str, tuple[list[PolicyRule], list[TableRoute]]]:
    net, own, out = NETWORK[family], subnet(family, 1), OTHER[family]
    everything = route(default(family))
    bits = 32 if family == 4 else 128
    host = out.partition("/")[0]
    return {
        "fr24-wg-quick": (
            [
                rule(family, 32764, 254, suppress=0),
                rule(family, 32765, invert=True, mark=51820, mask=0xFFFFFFFF),
            ],
            [everything],
        ),
        "tailscale-peers": (
            [
                rule(family, 5210, 254, mark=0x80000, mask=0xFF0000),
                rule(family, 5230, 253, mark=0x80000, mask=0xFF0000),
                rule(family, 5250, action=7, mark=0x80000, mask=0xFF0000),
                rule(family, 5270),
            ],
            [route(f"{host}/{bits}"), route(out)],
        ),
        "exempted-by-a-rule": (
            [rule(family, 5269, 254, destination=net), rule(family, 5270)],
            [everything],
        ),
        "exempted-by-throw": ([rule(family, 5270)], [everything, route(net, "throw")]),
        "throws-only": ([rule(family, 5270)], [route(subnet(family, 2), "throw")]),
        "marked": ([rule(family, 100, mark=1, mask=0xFFFFFFFF)], [everything]),
        "not-unmarked": ([rule(family, 100, invert=True, mark=0, mask=0xFF)], [everything]),
        "from-another-network": ([rule(family, 100, source=out)], [everything]),
        "to-another-network": ([rule(family, 100, destination=out)], [everything]),
        "not-to-the-network": (
            [rule(family, 100, destination=net, invert=True)],
            [everything],
        ),
        "iif-of-another-device": ([rule(family, 100, iif="eth1")], [everything]),
        "oif": ([rule(family, 100, oif="eth0")], [everything]),
        "vrf": ([rule(family, 1000, 0, special=True)], []),
        "after-main": ([rule(family, 32767)], [everything]),
        "empty-table": ([rule(family, 100)], []),
        "goto-over-it": (
            [rule(family, 10, 0, action=2, target=200), rule(family, 100), rule(family, 200, 254)],
            [everything],
        ),
        "nop": ([rule(family, 100, 0, action=3)], []),
        "suppressed": ([rule(family, 100, suppress=0)], [everything]),
        "the-pods-of-this-node": ([rule(family, 100)], [route(own, device=8)]),
        "a-copy-of-ours": (
            [rule(family, 100)],
            [route(subnet(family, 2), device=7, gateway=subnet(family, 2).partition("/")[0])],
        ),
        "cilium-local-last": ([rule(family, 9, 255)], []),
        "an-address-of-this-node-s-subnet": (
            [rule(family, 9)],
            [route(f"{own.partition('/')[0]}/{bits}", "local")],
        ),
    }


@FAMILIES
@pytest.mark.parametrize("case", harmless(4))
def test_leaves_the_pod_network_alone(family: int, case: str) -> None:
    rules, routes = harmless(family)[case]

    assert judged(family, *rules, routes=routes) == []


# ---- rules that take packets of pods ---------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("kind", ["", "unreachable", "blackhole", "prohibit"])
def test_fr25_a_route_in_a_table_before_main(family: int, kind: str) -> None:
    taken = subnet(family, 2)
    (found,) = judged(family, rule(family, 5270), routes=[route(taken, kind)])

    words = f"{kind} {taken}" if kind else f"{taken} dev tun0"
    does = "drops" if kind else "diverts"
    assert str(found) == (
        f"route {words} in table 52, which policy rule 5270 (from all lookup 52) has looked up "
        f"before table main, {does} packets of pods: '{IP[family]} route del {taken} table 52' "
        "removes it"
    )
    assert (found.family, found.kind, found.rule, found.table) == (family, "route", 5270, "52")
    assert (found.type, found.device, found.prefix) == (kind, "" if kind else "tun0", taken)


@FAMILIES
def test_fr25_a_route_of_the_whole_network(family: int) -> None:
    found = judged(family, rule(family, 5270), routes=[route(NETWORK[family])])

    assert commands(found) == [f"{IP[family]} route del {NETWORK[family]} table 52"]


@FAMILIES
def test_fr24_a_vpn_s_default_route_in_a_table_before_main(family: int) -> None:
    """It has its purpose, so that the first advice is to exempt the pods."""
    (found,) = judged(family, rule(family, 5270), routes=[route(default(family))])

    ip, net = IP[family], NETWORK[family]
    assert str(found) == (
        "route default dev tun0 in table 52, which policy rule 5270 (from all lookup 52) has "
        f"looked up before table main, diverts packets of pods to {net}: '{ip} rule add pref 5269 "
        f"to {net} lookup main' exempts them, '{ip} rule del pref 5270' removes the rule"
    )


def taking(family: int) -> dict[str, PolicyRule]:
    net, own = NETWORK[family], subnet(family, 1)
    return {
        "all": rule(family, 100),
        "not-marked": rule(family, 100, invert=True, mark=51820, mask=0xFFFFFFFF),
        "unmarked": rule(family, 100, mark=0, mask=0xFF),
        "to-the-network": rule(family, 100, destination=net),
        "to-a-peer": rule(family, 100, destination=subnet(family, 2)),
        "from-this-node-s-pods": rule(family, 100, source=own),
        "from-a-pod": rule(family, 100, source=own.replace("/24", "/30").replace("/64", "/128")),
        "not-from-elsewhere": rule(family, 100, source=OTHER[family], invert=True),
        "iif-of-the-pods": rule(family, 100, iif="cni0"),
        "iif-of-our-device": rule(family, 100, iif="flannel.1"),
        "iif-lo": rule(family, 100, iif="lo"),
        "of-some-packets": rule(family, 100, partial=("ipproto 6",)),
    }


@FAMILIES
@pytest.mark.parametrize("case", taking(4))
def test_a_rule_that_captures_packets_of_pods(family: int, case: str) -> None:
    chosen = taking(family)[case]
    (found,) = judged(family, chosen, routes=[route(default(family))])

    assert f"policy rule 100 ({chosen})" in found.text
    assert commands([found])[-1] == f"{IP[family]} rule del pref 100"


@FAMILIES
@pytest.mark.parametrize(
    ("action", "word"), [(6, "blackhole"), (7, "unreachable"), (8, "prohibit")]
)
def test_a_rule_that_drops(family: int, action: int, word: str) -> None:
    net = NETWORK[family]
    (found,) = judged(family, rule(family, 100, 0, action=action, destination=net))

    assert str(found) == (
        f"policy rule 100 (from all to {net} {word}) drops packets of pods to {net}: "
        f"'{IP[family]} rule del pref 100' removes it"
    )


@FAMILIES
def test_main_with_a_suppressed_length_does_not_answer_for_pods(family: int) -> None:
    length = 24 if family == 4 else 64
    found = judged(
        family,
        rule(family, 100, 254, suppress=length),
        rule(family, 200),
        routes=[route(default(family))],
    )

    assert [one.rule for one in found] == [200]


@FAMILIES
def test_without_a_rule_for_main_nothing_reaches_our_routes(family: int) -> None:
    found = diversions([rule(family, 0, 255), rule(family, 32767, 253)], {}, ground(family))

    assert commands(found) == [f"{IP[family]} rule add pref 32766 lookup main"]
    assert "no policy rule leads" in str(found[0])


@FAMILIES
def test_what_a_rule_takes_whole_no_later_rule_is_asked_about(family: int) -> None:
    found = judged(family, rule(family, 100), rule(family, 200), routes=[route(default(family))])

    assert [one.rule for one in found] == [100]


@FAMILIES
def test_of_rules_with_one_number_the_command_names_the_one(family: int) -> None:
    found = judged(
        family,
        rule(family, 100, 60),
        rule(family, 100, invert=True, mark=7, mask=0xFFFFFFFF),
        routes=[route(default(family))],
    )

    assert commands(found)[-1] == (
        f"{IP[family]} rule del not pref 100 from all fwmark 0x7 lookup 52"
    )


@FAMILIES
def test_many_routes_are_counted(family: int) -> None:
    routes = [route(subnet(family, number)) for number in range(2, 32)]
    found = judged(family, rule(family, 5270), routes=routes)

    assert len(found) == 9
    one_more = judged(family, rule(family, 5270), routes=routes[:9])[-1]
    assert str(one_more).startswith("1 more route in table 52 diverts or drops packets")
    assert str(found[-1]) == (
        f"22 more routes in table 52 divert or drop packets of pods to {NETWORK[family]}: "
        f"'{IP[family]} route show table 52' lists them"
    )


@FAMILIES
def test_of_routes_to_one_prefix_the_best_metric_counts(family: int) -> None:
    taken = subnet(family, 2)
    routes = [route(taken, metric=5), route(taken, "throw", metric=1)]

    assert judged(family, rule(family, 5270), routes=routes) == []


@pytest.mark.parametrize("length", range(12))
def test_a_rule_that_is_cut_short_is_an_error(length: int) -> None:
    with pytest.raises(KernelError, match="cut short"):
        parse_rule(bytes(length), "read a rule")


# ---- packets of the tunnel ------------------------------------------------------------------

NEAR = {4: "192.0.2.0/24", 6: "2001:db8::/64"}
LOCAL = {4: "192.0.2.1", 6: "2001:db8::1"}
FAR = {4: "198.51.100.7/32", 6: "2001:db8:7::7/128"}


def of_tunnel(
    family: int, *rules: PolicyRule, routes: list[TableRoute], to: str = ""
) -> list[Diversion]:
    prefix = to or NEAR[family]
    chosen = ground(family, local=LOCAL[family], uplink=2, length=0 if to else 24)
    every = sorted([*usual(family), *rules], key=lambda one: one.priority)
    return diversions(every, {52: routes}, replace(chosen, network=prefix))


@FAMILIES
@pytest.mark.parametrize("source", ["", "local"])
def test_fr24_the_tunnel_s_own_packets_may_be_diverted(family: int, source: str) -> None:
    chosen = rule(
        family, 5270, source=f"{LOCAL[family]}/{32 if family == 4 else 128}" * bool(source)
    )
    (found,) = of_tunnel(family, chosen, routes=[route(default(family))])

    assert f"diverts packets of the tunnel to {NEAR[family]}: '" in str(found)
    assert commands([found])[0] == f"{IP[family]} rule add pref 5269 to {NEAR[family]} lookup main"


@FAMILIES
def test_fr24_wg_quick_takes_the_tunnel_s_packets_beyond_the_router(family: int) -> None:
    rules = [
        rule(family, 32764, 254, suppress=0),
        rule(family, 32765, invert=True, mark=51820, mask=0xFFFFFFFF),
    ]
    routes = [route(default(family))]
    assert of_tunnel(family, *rules, routes=routes) == []
    (found,) = of_tunnel(family, *rules, routes=routes, to=FAR[family])

    assert f"diverts packets of the tunnel to {FAR[family]}" in found.text


@FAMILIES
@pytest.mark.parametrize("case", ["uplink", "thrown", "iif", "another-source", "no-main"])
def test_the_tunnel_s_packets_are_left_alone(family: int, case: str) -> None:
    every = route(default(family))
    if case == "uplink":
        found = of_tunnel(family, rule(family, 9), routes=[route(default(family), device=2)])
    elif case == "thrown":
        found = of_tunnel(family, rule(family, 9), routes=[every, route(NEAR[family], "throw")])
    elif case == "iif":
        found = of_tunnel(family, rule(family, 9, iif="cni0"), routes=[every])
    elif case == "another-source":
        found = of_tunnel(family, rule(family, 9, source=subnet(family, 1)), routes=[every])
    else:  # told once, of the pods
        chosen = ground(family, local=LOCAL[family], uplink=2)
        found = diversions([rule(family, 0, 255)], {}, replace(chosen, network=NEAR[family]))

    assert found == []


@pytest.mark.parametrize("change", [(1, 33), (2, 33), (12, 200)], ids=["dst", "src", "attribute"])
def test_a_rule_with_a_prefix_of_another_size_is_an_error(change: tuple[int, int]) -> None:
    """A header of IPv4 with both prefixes, and an attribute for each."""
    header = bytearray([2, 24, 24, 0, 52, 0, 0, 1, 0, 0, 0, 0])
    attributes = bytearray([8, 0, 1, 0, 10, 0, 2, 0, 8, 0, 2, 0, 10, 0, 1, 0])
    parsed = parse_rule(bytes(header + attributes), "read a rule")
    assert (parsed.destination, parsed.source, parsed.table) == ("10.0.2.0/24", "10.0.1.0/24", 52)

    data = header + attributes
    data[change[0]] = change[1]
    with pytest.raises(KernelError):
        parse_rule(bytes(data), "read a rule")


@given(st.binary(max_size=120))
def test_no_message_makes_anything_but_a_rule_or_an_error(data: bytes) -> None:
    for parse in (
        lambda: str(parse_rule(data, "read a rule")),
        lambda: parse_table_route((24, data), 4, 52),
    ):
        with suppress(KernelError):
            parse()


# ---- addresses --------------------------------------------------------------------------


def at(text: str, index: int, scope: int = 0) -> Address:
    address, _, length = text.partition("/")
    return Address(index, 6 if ":" in text else 4, address, int(length), scope, 0)


def test_fr26_addresses_of_dhcp_on_our_device() -> None:
    found = foreign_addresses(
        4,
        "flannel.1",
        [
            at("10.244.1.0/32", 7),
            at("10.244.77.0/32", 7),  # a sync removes it
            at("169.254.9.9/16", 7, 253),
            at("192.168.1.125/24", 7),
            at("10.42.3.0/32", 7),
            at("fe80::1/64", 7, 253),
            at("2001:db8:5::9/64", 7),
        ],
        [subnet(4, 1)],
        NETWORK[4],
    )

    assert [str(one) for one in found] == [
        "device flannel.1 has 169.254.9.9/16, an address of another program, which leads "
        "169.254.0.0/16 into the tunnel: 'ip address del 169.254.9.9/16 dev flannel.1' removes it",
        "device flannel.1 has 192.168.1.125/24, an address of another program, which leads "
        "192.168.1.0/24 into the tunnel: 'ip address del 192.168.1.125/24 dev flannel.1' removes "
        "it",
        "device flannel.1 has 10.42.3.0/32, an address of another program: 'ip address del "
        "10.42.3.0/32 dev flannel.1' removes it",
        "device flannel.1 has 2001:db8:5::9/64, an address of another program, which leads "
        "2001:db8:5::/64 into the tunnel: 'ip address del 2001:db8:5::9/64 dev flannel.1' removes "
        "it",
    ]


def link(index: int, name: str, kind: str) -> Link:
    return Link(index, name, kind, 1450, "", True, True, 0, False, None)


def rivals(
    family: int, *found: Address, kind: str = "bridge", owned: bool = True, uplink: int = 2
) -> list[str]:
    owner = ("node2", subnet(family, 2))
    owners = {one.address: owner for one in found if owned and one.index == 9}
    links = {9: link(9, "cni0", kind)}
    return [
        str(one)
        for one in rival_devices(
            ground(family), found, links, owners, uplink=uplink, networks=[*NETWORK.values()]
        )
    ]


def host_of(family: int, number: int) -> str:
    base, _, length = subnet(family, number).partition("/")
    return f"{base.rpartition('.')[0]}.1/{length}" if family == 4 else f"{base}1/{length}"


@FAMILIES
def test_fr43_a_bridge_with_a_peer_s_subnet(family: int) -> None:
    held = host_of(family, 2)
    assert rivals(family, at(held, 9)) == [
        f"bridge cni0 has {held}, in {subnet(family, 2)} of lease node2: packets to its pods stay "
        "here: 'ip link delete cni0' removes it"
    ]


@FAMILIES
def test_fr43_a_bridge_with_a_subnet_that_is_no_longer_this_node_s(family: int) -> None:
    held = host_of(family, 9)
    assert rivals(family, at(held, 9), owned=False) == [
        f"bridge cni0 has {held}, which is not in {subnet(family, 1)}, the subnet of this "
        "node: 'ip link delete cni0' removes it"
    ]


@FAMILIES
def test_fr43_both_families_of_a_leftover_bridge_go_with_it(family: int) -> None:
    (found,) = rivals(family, at(host_of(family, 2), 9), at(host_of(10 - family, 2), 9, 0))

    assert "'ip link delete cni0'" in found


@FAMILIES
@pytest.mark.parametrize("case", ["other-addresses", "no-bridge"])
def test_fr43_no_device_is_deleted_that_has_another_use(family: int, case: str) -> None:
    held = host_of(family, 2)
    found = rivals(
        family,
        at(held, 9),
        *[at("198.51.100.7/24", 9)] * (case == "other-addresses"),
        kind="vlan" if case == "no-bridge" else "bridge",
    )

    assert [one.rpartition(": ")[2] for one in found] == [
        f"'ip address del {held} dev cni0' removes it, unless the lease is wrong"
    ]


@FAMILIES
def test_the_external_interface_s_address_is_never_to_go(family: int) -> None:
    assert rivals(family, at(host_of(family, 2), 9), uplink=9) == []


@FAMILIES
def test_fr43_docker_s_bridge_with_the_whole_network_is_no_rival(family: int) -> None:
    base, _, length = NETWORK[family].partition("/")
    held = f"{base.removesuffix('0')}1/{length}" if family == 4 else f"{base}1/{length}"

    assert rivals(family, at(held, 9), owned=False) == []


@FAMILIES
def test_the_pods_own_bridge_and_the_underlay_are_no_rivals(family: int) -> None:
    assert rivals(family, at(host_of(family, 1), 9)) == []
    assert rivals(family, at(host_of(family, 9), 9), kind="", owned=False) == []
