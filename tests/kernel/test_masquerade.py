"""Source addresses as the far side sees them, with the rules of others in place.

A node with a pod behind ``docker0``, a second node with a pod of its own, a vxlan device
between them made by iproute2, and a third host on the underlay that is "outside".
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import ConfigError, FlannelDPError, NotPermitted
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.firewall import programs
from flannel_dp.resources.firewall.choice import choose_engine
from flannel_dp.resources.firewall.engine import apply_rules, clean_rules, plan_rules
from flannel_dp.resources.firewall.rules import FamilyRules, RulesWanted, Underlay
from tests.lib.waiting import LIMIT

ENGINES = ("nft", "iptables-nft", "iptables-legacy")
KINDS = ("nft", "legacy")
PORT = 8472

NETWORK = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
SUBNET = {4: "10.244.{}.0/24", 6: "fd00:10:244:{}::/64"}
_icmp_ids = itertools.count(1000)


def address(family: int, node: int, host: int) -> str:
    """Pod network address number ``host`` of node ``node``; 0 is the overlay device's."""
    return f"10.244.{node}.{host}" if family == 4 else f"fd00:10:244:{node}::{host or ''}"


@dataclass(frozen=True)
class World:
    """One family's network: two nodes, a pod behind each, and a host outside."""

    family: int
    node: Any
    far: Any
    outside: Any
    pod: str
    far_pod: str

    @property
    def pod_address(self) -> str:
        return address(self.family, 1, 2)

    @property
    def far_address(self) -> str:
        return address(self.family, 2, 2)

    def wanted(self, **changes: Any) -> RulesWanted:
        values: dict[str, Any] = {
            "families": {
                self.family: FamilyRules(NETWORK[self.family], SUBNET[self.family].format(1))
            },
            "ip_masq": True,
        }
        return RulesWanted(**values | changes)

    def iptables(self, kind: str, rule: str) -> str:
        """Run one foreign iptables command on the node, {own} and {network} filled in."""
        rule = rule.format(own=SUBNET[self.family].format(1), network=NETWORK[self.family])
        program = f"{'iptables' if self.family == 4 else 'ip6tables'}-{kind}"
        return str(self.node.exec(program, *rule.split()))

    def sync(self, engine: str, **changes: Any) -> tuple[str, ...]:
        """Plan and apply on the node, require that nothing is left to do."""
        wanted = self.wanted(**changes)
        plan = plan_rules(wanted, engine, self.node.ns)
        apply_rules(plan, self.node.ns)
        assert plan_rules(wanted, engine, self.node.ns).changes == ()
        return plan.changes

    def rules(self) -> str:
        """Every rule on the node, counters and handles aside."""
        text: str = self.node.exec("nft", "list", "ruleset")
        for name in ("ip", "ip6"):
            if self.node.exec("cat", f"/proc/net/{name}_tables_names").strip():
                text += self.node.exec(f"{name}tables-legacy-save")
        text = re.sub(r"\[\d+:\d+\]|packets \d+ bytes \d+", "", text)
        return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def seen(world: World, client: str, server: str, target: str, source: str = "") -> set[str]:
    """The source addresses that ``server`` sees of ``client``'s TCP, UDP and ICMP."""
    calls = (_tcp, _udp, _icmp)
    return {call(world.family, client, server, target, source) for call in calls}


def _socket(ns: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    af = socket.AF_INET if family == 4 else socket.AF_INET6
    made = call_in_netns(ns, socket.socket, af, kind, protocol)
    made.settimeout(LIMIT)
    return made


def _tcp(family: int, client: str, server: str, target: str, source: str) -> str:
    with (
        _socket(server, family, socket.SOCK_STREAM) as listener,
        _socket(client, family, socket.SOCK_STREAM) as caller,
    ):
        listener.bind((target, 0))
        listener.listen()
        caller.bind((source, 0))
        caller.connect((target, listener.getsockname()[1]))
        connection, peer = listener.accept()
        connection.close()
        return str(peer[0])


def _udp(family: int, client: str, server: str, target: str, source: str) -> str:
    with (
        _socket(server, family, socket.SOCK_DGRAM) as listener,
        _socket(client, family, socket.SOCK_DGRAM) as caller,
    ):
        listener.bind((target, 0))
        caller.bind((source, 0))
        caller.sendto(b"question", (target, listener.getsockname()[1]))
        _, peer = listener.recvfrom(64)
        listener.sendto(b"answer", peer)
        assert caller.recv(64) == b"answer"
        return str(peer[0])


def _icmp(family: int, client: str, server: str, target: str, source: str) -> str:
    protocol = socket.IPPROTO_ICMP if family == 4 else socket.IPPROTO_ICMPV6
    body = next(_icmp_ids).to_bytes(2, "big") + b"\0\1" + b"who is it?!!"
    request = bytes([8 if family == 4 else 128, 0])
    total = sum(int.from_bytes((request + body)[i : i + 2], "big") for i in range(0, 18, 2))
    total = (total & 0xFFFF) + (total >> 16)
    packet = request + (~total & 0xFFFF).to_bytes(2, "big") + body
    with (
        _socket(server, family, socket.SOCK_RAW, protocol) as listener,
        _socket(client, family, socket.SOCK_RAW, protocol) as caller,
    ):
        caller.bind((source, 0))
        caller.sendto(packet, (target, 0))
        while True:
            data, peer = listener.recvfrom(256)
            if data.endswith(b"who is it?!!") and data[-len(packet)] == request[0]:
                return str(peer[0])


def _tunnel(one: Any, other: Any, number: int, family: int) -> None:
    """Half a tunnel: device and the entries for the other node, numbers 1 and 2."""
    peer = 3 - number
    name = "flannel.1" if family == 4 else "flannel-v6.1"
    bits = 32 if family == 4 else 128
    mac = f"02:00:00:00:00:0{peer}"
    gateway = address(family, peer, 0)
    steps = (
        f"link add {name} address 02:00:00:00:00:0{number} type vxlan id 1 "
        f"local {one.underlay(family)} dev eth0 dstport {PORT} nolearning",
        # Were it still tentative, the kernel would masquerade as another address.
        f"addr add {address(family, number, 0)}/{bits} dev {name} {'nodad' if bits > 32 else ''}",
        f"link set {name} up",
        f"neigh add {gateway} lladdr {mac} dev {name} nud permanent",
        f"route add {SUBNET[family].format(peer)} via {gateway} dev {name} onlink",
    )
    one.ip_batch("", *steps)
    one.bridge(f"fdb add {mac} dev {name} dst {other.underlay(family)} self permanent")


def _pod(lab: Any, host: Any, number: int, family: int) -> str:
    """A namespace behind ``docker0`` on a node."""
    ns: str = lab.namespace()
    bits = 24 if family == 4 else 64
    gateway, own = address(family, number, 1), address(family, number, 2)
    nodad = "nodad" if family == 6 else ""
    host.ip_batch(
        "",
        "link add docker0 type bridge mcast_snooping 0",
        f"link add veth0 type veth peer name eth0 netns {ns}",
    )
    inside = type(host)(ns, "eth0", "", "", 0)
    host.without_dad("docker0", "veth0")
    inside.without_dad("eth0")
    host.ip_batch(
        "",
        "link set veth0 master docker0 up",
        f"addr add {gateway}/{bits} dev docker0 {nodad}",
        "link set docker0 up",
    )
    inside.ip_batch(
        "",
        f"addr add {own}/{bits} dev eth0 {nodad}",
        "link set eth0 up",
        f"route add default via {gateway}",
    )
    return ns


def build(lab: Any, family: int, wait_until: Callable[..., None]) -> World:
    """Make the network of this module's docstring; node and pod reach the far pod."""
    node, far, outside = lab.host(), lab.host(), lab.host()
    for host in (node, far):
        host.sysctl("ipv4/ip_forward", 1)
        host.sysctl("ipv6/conf/all/forwarding", 1)
    pods = [_pod(lab, host, number, family) for number, host in ((1, node), (2, far))]
    _tunnel(node, far, 1, family)
    _tunnel(far, node, 2, family)
    wait_until(lambda: node.ping(address(family, 1, 2)) and far.ping(address(family, 2, 2)))
    return World(family, node, far, outside, *pods)


@pytest.fixture
def world(lab: Any, family: int, wait_until: Callable[..., None]) -> World:
    return build(lab, family, wait_until)


DOCKER = "-t nat -A POSTROUTING -s {own} ! -o docker0 -j MASQUERADE"


@pytest.mark.parametrize(
    ("engine", "kind"),
    [("nft", "nft"), ("nft", "legacy"), ("iptables-nft", "nft"), ("iptables-legacy", "legacy")],
)
@pytest.mark.parametrize("ip_masq", [True, False], ids=["masq", "no-masq"])
def test_pod_is_seen_as_itself_although_docker_masquerades(
    world: World, engine: str, kind: str, ip_masq: bool
) -> None:
    world.iptables(kind, DOCKER)
    hidden = seen(world, world.pod, world.far_pod, world.far_address)
    assert hidden == {address(world.family, 1, 0)}

    world.sync(engine, ip_masq=ip_masq)

    assert seen(world, world.pod, world.far_pod, world.far_address) == {world.pod_address}
    assert seen(world, world.far_pod, world.pod, world.pod_address) == {world.far_address}


@pytest.mark.parametrize("engine", ENGINES)
def test_sources_of_every_direction(world: World, engine: str) -> None:
    family = world.family
    outside = world.outside.underlay(family)
    kind = "legacy" if engine == "iptables-legacy" else "nft"
    world.outside.ip(f"route add {NETWORK[family]} via {world.node.underlay(family)}")
    # Somebody hides whatever goes into the pods' bridge.
    world.iptables(kind, "-t nat -A POSTROUTING -o docker0 -j MASQUERADE")
    bridge = {address(family, 1, 1)}
    assert seen(world, world.outside.ns, world.pod, world.pod_address) == bridge

    world.sync(engine)

    assert seen(world, world.outside.ns, world.pod, world.pod_address) == {outside}
    assert seen(world, world.far_pod, world.pod, world.pod_address) == {world.far_address}
    node = world.node.underlay(family)
    assert seen(world, world.pod, world.outside.ns, outside) == {node}
    device = {address(family, 1, 0)}
    assert seen(world, world.node.ns, world.far_pod, world.far_address, source=node) == device
    assert seen(world, world.outside.ns, world.far_pod, world.far_address) == device


@pytest.mark.parametrize("engine", ENGINES)
def test_what_kube_proxy_marked_is_left_to_it(world: World, engine: str) -> None:
    kind = "legacy" if engine == "iptables-legacy" else "nft"
    world.iptables(kind, "-t mangle -A PREROUTING -i docker0 -j MARK --set-xmark 0x4001/0x4001")
    world.iptables(kind, "-t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE")

    world.sync(engine)

    hidden = seen(world, world.pod, world.far_pod, world.far_address)
    assert hidden == {address(world.family, 1, 0)}


@pytest.mark.parametrize("engine", ENGINES)
def test_traffic_within_the_node_is_left_to_others(world: World, engine: str) -> None:
    kind = "legacy" if engine == "iptables-legacy" else "nft"
    world.iptables(kind, "-t nat -A POSTROUTING -s {own} -d {own} -j MASQUERADE")

    world.sync(engine)

    # A packet of the node's other address in the subnet, as that of a hairpin, is masqueraded.
    gateway, other = (address(world.family, 1, host) for host in (1, 9))
    bits = 24 if world.family == 4 else 64
    nodad = "nodad" if world.family == 6 else ""
    world.node.ip(f"addr add {other}/{bits} dev docker0 {nodad} preferred_lft 0")
    hidden = seen(world, world.node.ns, world.pod, world.pod_address, source=other)
    assert hidden == {gateway}


FOREIGN = (
    "-t nat -A POSTROUTING -s {own} ! -o docker0 -j MASQUERADE",
    '-t nat -A PREROUTING -p tcp --dport 80 -m comment --comment it"s -j ACCEPT',
    "-N KUBE-FORWARD",
    "-A FORWARD -j KUBE-FORWARD",
    "-A FORWARD -i eth9 -j REJECT",
    "-A INPUT -p udp --dport 53 -j ACCEPT",
    "-P OUTPUT ACCEPT",
)
FOREIGN_TABLES = """
add table inet theirs
add set inet theirs names { type ifname; elements = { "eth7" }; }
add chain inet theirs forward { type filter hook forward priority 5; policy accept; }
add rule inet theirs forward iifname @names drop
add chain inet theirs FLANNEL-DP-FWD
add rule inet theirs FLANNEL-DP-FWD accept comment "not of iptables, so not ours"
add table ip flannel-ipv4
add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority srcnat; }
add rule ip flannel-ipv4 postrtg ip saddr 10.1.0.0/16 masquerade
add table inet flannel-dp
add chain inet flannel-dp x
add table ip asleep { flags dormant; }
add chain ip asleep drops { type filter hook forward priority 6; policy drop; }
"""


def add_foreign_rules(world: World, tmp_path: Path) -> None:
    for kind in KINDS:
        for rule in FOREIGN:
            world.iptables(kind, rule)
    path = tmp_path / "foreign.nft"
    path.write_text(FOREIGN_TABLES)
    world.node.exec("nft", "-f", str(path))


@pytest.mark.parametrize("engine", ENGINES)
def test_foreign_rules_are_not_touched(world: World, engine: str, tmp_path: Path) -> None:
    add_foreign_rules(world, tmp_path)
    underlay = {world.family: Underlay(PORT, [world.far.underlay(world.family)])}
    before = world.rules()

    plan_rules(world.wanted(underlay=underlay), engine, world.node.ns)
    assert world.rules() == before

    world.sync(engine, underlay=underlay)
    ours = world.rules()
    assert ours != before
    assert all(line in ours.splitlines() for line in before.splitlines())

    removed = clean_rules(world.node.ns)
    assert removed
    assert world.rules() == before
    assert clean_rules(world.node.ns) == ()


def test_engines_take_over_from_each_other(world: World) -> None:
    underlay = {world.family: Underlay(PORT)}
    for engine in (*ENGINES, *ENGINES):
        world.sync(engine, underlay=underlay)
        text = world.rules()
        assert ("flannel-dp {" in text) == (engine == "nft")
        assert ("FLANNEL-DP-" in text) == (engine != "nft")
        assert text.count("10.244.0.0/16" if world.family == 4 else "fd00:10:244::/48") == 8

    clean_rules(world.node.ns)
    assert "flannel-dp" not in world.rules().lower()


DRIFT = {
    "nft": {
        "delete table {ip} flannel-dp": "+ nft table",
        "flush chain {ip} flannel-dp postrouting": "+ nft",
        "delete chain {ip} flannel-dp forward": "+ nft",
        "insert rule {ip} flannel-dp postrouting return": "- nft",
        "insert rule {ip} flannel-dp postrouting masquerade": "masquerade",
        "add chain {ip} flannel-dp rogue": "rogue",
        "add set {ip} flannel-dp rogue {{ type mark; }}": "- nft {ip} flannel-dp set rogue",
        "add table {ip} flannel-dp {{ flags dormant; }}": "- nft {ip} flannel-dp table flags",
        "add chain {ip} flannel-dp forward {{ policy drop; }}": "forward",
    },
    "iptables": {
        "-t nat -F FLANNEL-DP-POSTRTG": "+ ip",
        "-t nat -I POSTROUTING -j RETURN": "~ ip",
        "-t nat -F POSTROUTING": "-I POSTROUTING 1",
        "-t nat -A POSTROUTING -j FLANNEL-DP-POSTRTG": "~ ip",
        "-t nat -I FLANNEL-DP-POSTRTG -j RETURN": "- ip",
        "-t nat -D FLANNEL-DP-POSTRTG 3": "+ ip",
        "-t filter -I FORWARD -j DROP": "~ ip",
        "-t filter -A FLANNEL-DP-FWD -j DROP": "- ip",
    },
}


@pytest.mark.parametrize("engine", ENGINES)
def test_drift_is_seen_and_repaired(lab: Any, family: int, engine: str) -> None:
    world = World(family, lab.host(), None, None, "", "")
    world.sync(engine)
    good = world.rules()
    word = "ip" if family == 4 else "ip6"

    for command, expected in DRIFT["nft" if engine == "nft" else "iptables"].items():
        if engine == "nft":
            world.node.exec("nft", command.format(ip=word))
        else:
            world.iptables(engine.removeprefix("iptables-"), command)
        changes = world.sync(engine)

        assert any(expected.format(ip=word) in line for line in changes), (command, changes)
        if "-I POSTROUTING" in command or "-I FORWARD" in command:
            # A foreign rule, before which our jump was put back, is still there.
            world.iptables(engine.removeprefix("iptables-"), command.replace("-I", "-D"))
        assert world.rules() == good, command


@pytest.mark.parametrize("engine", ENGINES)
def test_order_of_our_rules_is_drift(lab: Any, family: int, engine: str) -> None:
    world = World(family, lab.host(), None, None, "", "")
    world.sync(engine)
    good = world.rules()
    if engine == "nft":
        word = "ip" if family == 4 else "ip6"
        chain = ("chain", word, "flannel-dp", "forward")
        lines = world.node.exec("nft", "-a", "list", *chain).splitlines()
        rule, handle = next(line for line in lines if "from pods" in line).strip().split(" # ")
        world.node.exec("nft", f"add rule {word} flannel-dp forward {rule}")
        world.node.exec("nft", f"delete rule {word} flannel-dp forward {handle}")
    else:
        kind = engine.removeprefix("iptables-")
        world.iptables(kind, "-F FLANNEL-DP-FWD")
        for side, why in (("-d", "to pods"), ("-s", "from pods")):
            program = f"{'iptables' if family == 4 else 'ip6tables'}-{kind}"
            comment = ("-m", "comment", "--comment", why, "-j", "ACCEPT")
            world.node.exec(program, "-A", "FLANNEL-DP-FWD", side, NETWORK[family], *comment)
    assert world.rules() != good

    changes = world.sync(engine)

    assert [line for line in changes if line.endswith("order of the rules")] == list(changes)
    assert world.rules() == good


def test_one_family_more_leaves_the_other_alone(lab: Any) -> None:
    host = lab.host()
    v4 = FamilyRules(NETWORK[4], SUBNET[4].format(1))
    v6 = FamilyRules(NETWORK[6], SUBNET[6].format(1))
    apply_rules(plan_rules(RulesWanted(families={4: v4}), "nft", host.ns), host.ns)

    plan = plan_rules(RulesWanted(families={4: v4, 6: v6}), "nft", host.ns)

    assert {step.family for step in plan.steps} == {6}


def test_nothing_wanted_leaves_nothing(lab: Any) -> None:
    host = lab.host()
    for engine in ENGINES:
        wanted = RulesWanted(families={4: FamilyRules(NETWORK[4], SUBNET[4].format(1))})
        apply_rules(plan_rules(wanted, engine, host.ns), host.ns)
        apply_rules(plan_rules(RulesWanted(), engine, host.ns), host.ns)
        assert plan_rules(RulesWanted(), engine, host.ns).is_empty
    assert "flannel-dp" not in host.exec("nft", "list", "ruleset").lower()


def test_planning_makes_no_legacy_table(lab: Any) -> None:
    host = lab.host()
    wanted = RulesWanted(families={4: FamilyRules(NETWORK[4], SUBNET[4].format(1))})

    for engine in ENGINES:
        plan_rules(wanted, engine, host.ns)
    clean_rules(host.ns)

    assert host.exec("cat", "/proc/net/ip_tables_names") == ""
    assert host.exec("nft", "list", "ruleset") == ""


@contextlib.contextmanager
def only(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> Iterator[Path]:
    """Let these programs be all that is installed."""
    for program in names:
        found = programs.find(program)
        assert found is not None
        (folder / program).symlink_to(found)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(folder))
        patch.setattr(programs, "_SYSTEM_PATH", str(folder))
        yield folder


def test_missing_programs_are_named_with_their_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with only(monkeypatch, tmp_path):
        for engine, package in (
            ("nft", "nftables"),
            ("iptables", "iptables"),
            ("iptables-legacy", "iptables"),
            ("auto", "nftables"),
        ):
            with pytest.raises(ConfigError, match=r"not installed|is installed") as caught:
                choose_engine(engine)
            assert f"install the package {package}" in caught.value.hint
    with pytest.raises(ConfigError, match="'ufw' does not exist"):
        choose_engine("ufw")


IPTABLES = ("iptables", "iptables-save", "iptables-restore")
IP6TABLES = ("ip6tables", "ip6tables-save", "ip6tables-restore")


def test_auto_is_iptables_where_nft_is_absent(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = lab.host()
    wanted = RulesWanted(families={4: FamilyRules(NETWORK[4], SUBNET[4].format(1))})
    assert choose_engine("auto") == "nft"

    with only(monkeypatch, tmp_path, *IPTABLES):
        plan = plan_rules(wanted, "auto", host.ns)
        apply_rules(plan, host.ns)
        again = plan_rules(wanted, "auto", host.ns)

        assert plan.engine == "iptables"
        assert again.is_empty
        six = RulesWanted(families={6: FamilyRules(NETWORK[6], SUBNET[6].format(1))})
        with pytest.raises(ConfigError, match="ip6tables-save is not installed"):
            plan_rules(six, "auto", host.ns)
        assert clean_rules(host.ns)
    assert "FLANNEL-DP" not in host.exec("nft", "list", "ruleset")


def fail(folder: Path, program: str, words: str) -> None:
    """Replace a program by one that only complains."""
    (folder / program).unlink()
    (folder / program).write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 4\n")
    (folder / program).chmod(0o755)


def test_failing_restore_is_quoted_and_leaves_the_other_family(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = lab.host()
    both = {n: FamilyRules(NETWORK[n], SUBNET[n].format(1)) for n in (4, 6)}
    with only(monkeypatch, tmp_path, *IPTABLES, *IP6TABLES):
        plan = plan_rules(RulesWanted(families=both), "iptables", host.ns)
        fail(tmp_path, "ip6tables-restore", "ip6tables-restore: line 2 failed: no module.")
        with pytest.raises(FlannelDPError, match=r"exit 4: .*line 2 failed: no module\.") as caught:
            apply_rules(plan, host.ns)
    assert ":FLANNEL-DP-POSTRTG" in caught.value.hint
    rules = host.exec("nft", "list", "ruleset")
    assert "table ip nat" in rules
    assert "table ip6" not in rules


def test_failing_nft_changes_nothing(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = lab.host()
    wanted = RulesWanted(families={4: FamilyRules(NETWORK[4], SUBNET[4].format(1))})
    with only(monkeypatch, tmp_path, "nft"):
        plan = plan_rules(wanted, "nft", host.ns)
        fail(tmp_path, "nft", "Error: Could not process rule: No such file or directory")
        with pytest.raises(FlannelDPError, match="Could not process rule: No such file"):
            apply_rules(plan, host.ns)
        fail(tmp_path, "nft", "Operation not permitted (you must be root)")
        with pytest.raises(NotPermitted) as caught:
            plan_rules(wanted, "nft", host.ns)
    assert "CAP_NET_ADMIN" in caught.value.hint
    assert host.exec("nft", "list", "ruleset") == ""


def test_nft_without_json_is_an_error(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = lab.host()
    wanted = RulesWanted(families={4: FamilyRules(NETWORK[4], SUBNET[4].format(1))})
    host.exec("nft", "add table ip flannel-dp")
    with only(monkeypatch, tmp_path, "nft", *IPTABLES):
        fail(tmp_path, "nft", "Error: JSON support not compiled-in")
        with pytest.raises(FlannelDPError, match="JSON support not compiled-in") as caught:
            plan_rules(wanted, "nft", host.ns)
    assert "libnftables" in caught.value.hint


def test_a_program_that_hangs_is_given_up(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = lab.host()
    wanted = RulesWanted(families={4: FamilyRules(NETWORK[4], SUBNET[4].format(1))})
    with only(monkeypatch, tmp_path, "nft", "cat"):
        (tmp_path / "nft").unlink()
        (tmp_path / "nft").write_text("#!/bin/sh\nread forever </dev/zero\n")
        (tmp_path / "nft").chmod(0o755)
        monkeypatch.setattr(programs, "TIMEOUT", 0.1)
        with pytest.raises(FlannelDPError, match=r"no end after 0\.1 s"):
            plan_rules(wanted, "nft", host.ns)
