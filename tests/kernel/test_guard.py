"""Rules of others that reject pods or the tunnel, and the guard that lets in peers only.

Two nodes with a vxlan device each, made by iproute2, and the overlay devices' own addresses
(or addresses behind one of the nodes) as what has to be reached.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import ConfigError, FlannelDPError
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.firewall import programs
from flannel_dp.resources.firewall.choice import needs_raw_socket
from flannel_dp.resources.firewall.engine import apply_rules, clean_rules, plan_rules, update_guard
from flannel_dp.resources.firewall.probe import Blocker, blocking_rules
from flannel_dp.resources.firewall.rules import FamilyRules, RulesWanted, Underlay
from tests.lib.waiting import LIMIT

PORT = 8472
BRIEFLY = 0.3  # seconds that a packet is waited for which is not expected
NETWORK = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
SUBNET = {4: "10.244.{}.0/24", 6: "fd00:10:244:{}::/64"}
DEVICES = {4: ("flannel.1",), 6: ("flannel-v6.1",)}
WORD = {4: "ip", 6: "ip6"}
REJECT = {4: "icmp-host-prohibited", 6: "icmp6-adm-prohibited"}


@dataclass(frozen=True)
class Pair:
    """A node, its peer, and a pod's namespace behind the node."""

    family: int
    node: Any
    peer: Any
    pod: str

    def address(self, number: int, host: int) -> str:
        if self.family == 4:
            return f"10.244.{number}.{host}"
        return f"fd00:10:244:{number}::{host or ''}"

    def program(self, kind: str) -> str:
        return f"{'iptables' if self.family == 4 else 'ip6tables'}-{kind}"

    def iptables(self, kind: str, rule: str) -> None:
        self.node.exec(self.program(kind), *rule.format(reject=REJECT[self.family]).split())

    def wanted(self, *, guard: Any = None, **changes: Any) -> RulesWanted:
        families = {self.family: FamilyRules(NETWORK[self.family], SUBNET[self.family].format(1))}
        values: dict[str, Any] = {
            "families": families,
            "underlay": {self.family: Underlay(PORT, guard)},
        }
        return RulesWanted(**values | changes)

    def sync(self, engine: str, **changes: Any) -> tuple[str, ...]:
        wanted = self.wanted(**changes)
        plan = plan_rules(wanted, engine, self.node.ns)
        apply_rules(plan, self.node.ns)
        assert plan_rules(wanted, engine, self.node.ns).changes == ()
        return plan.changes

    def blockers(self, engine: str) -> list[Blocker]:
        return blocking_rules(
            self.wanted(), engine, self.node.ns, devices=DEVICES, iface=self.node.iface
        )

    def reaches_node(self, timeout: float = LIMIT) -> bool:
        """Whether a tunnel packet of the peer gets in: UDP from it to the node's overlay."""
        return self._arrives(self.node.ns, self.address(1, 0), timeout)

    def reaches_pod(self, timeout: float = LIMIT) -> bool:
        return self._arrives(self.pod, self.address(1, 2), timeout)

    def _arrives(self, ns: str, target: str, timeout: float) -> bool:
        af = socket.AF_INET if self.family == 4 else socket.AF_INET6
        listener = call_in_netns(ns, socket.socket, af, socket.SOCK_DGRAM)
        caller = call_in_netns(self.peer.ns, socket.socket, af, socket.SOCK_DGRAM)
        with listener, caller:
            listener.bind((target, 0))
            listener.settimeout(timeout)
            caller.sendto(b"hello", listener.getsockname()[:2])
            try:
                return listener.recv(16) == b"hello"
            except TimeoutError:
                return False


def _tunnel(one: Any, other: Any, number: int, family: int) -> None:
    peer = 3 - number
    name, mac = DEVICES[family][0], f"02:00:00:00:00:0{peer}"
    own, gateway = (
        f"10.244.{n}.0" if family == 4 else f"fd00:10:244:{n}::" for n in (number, peer)
    )
    bits = "32" if family == 4 else "128 nodad"
    address, _, flag = bits.partition(" ")
    one.ip_batch(
        "",
        f"link add {name} address 02:00:00:00:00:0{number} type vxlan id 1 "
        f"local {one.underlay(family)} dev eth0 dstport {PORT} nolearning",
        f"addr add {own}/{address} dev {name} {flag}",
        f"link set {name} up",
        f"neigh add {gateway} lladdr {mac} dev {name} nud permanent",
        f"route add {SUBNET[family].format(peer)} via {gateway} dev {name} onlink",
    )
    one.bridge(f"fdb add {mac} dev {name} dst {other.underlay(family)} self permanent")


@pytest.fixture
def pair(lab: Any, family: int, wait_until: Callable[..., None]) -> Pair:
    node, peer, pod = lab.host(), lab.host(), lab.namespace()
    node.sysctl("ipv4/ip_forward", 1)
    node.sysctl("ipv6/conf/all/forwarding", 1)
    _tunnel(node, peer, 1, family)
    _tunnel(peer, node, 2, family)
    made = Pair(family, node, peer, pod)
    bits, nodad = ("24", "") if family == 4 else ("64", "nodad")
    node.ip_batch(
        "",
        f"link add cni0 type veth peer name eth0 netns {pod}",
        f"addr add {made.address(1, 1)}/{bits} dev cni0 {nodad}",
    )
    inside = type(node)(pod, "eth0", "", "", 0)
    for host, device in ((node, "cni0"), (inside, "eth0")):
        # Link-local addresses need not be found unique first, which takes seconds.
        host.sysctl(f"ipv6/conf/{device}/accept_dad", 0)
        host.ip(f"link set {device} up")
    inside.ip_batch(
        "",
        f"addr add {made.address(1, 2)}/{bits} dev eth0 {nodad}",
        f"route add default via {made.address(1, 1)}",
    )
    wait_until(lambda: made.reaches_pod(BRIEFLY) and made.reaches_node(BRIEFLY))
    return made


IPTABLES_SERVICES = (
    "-A {chain} -m state --state RELATED,ESTABLISHED -j ACCEPT",
    "-A {chain} -p {icmp} -j ACCEPT",
    "-A {chain} -i lo -j ACCEPT",
    "-A {chain} -p tcp -m state --state NEW -m tcp --dport 22 -j ACCEPT",
    "-A {chain} -j REJECT --reject-with {{reject}}",
)


def install_services(pair: Pair, kind: str, chain: str) -> None:
    icmp = "icmp" if pair.family == 4 else "ipv6-icmp"
    for rule in IPTABLES_SERVICES:
        if chain == "INPUT" or "-i lo" not in rule:
            pair.iptables(kind, rule.format(chain=chain, icmp=icmp))


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_reject_in_forward_does_not_stop_pods_with_iptables(pair: Pair, kind: str) -> None:
    install_services(pair, kind, "FORWARD")
    assert not pair.reaches_pod(BRIEFLY)

    pair.sync(f"iptables-{kind}")

    assert pair.reaches_pod()
    assert pair.blockers(f"iptables-{kind}") == []


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_reject_in_input_does_not_stop_the_tunnel_with_iptables(pair: Pair, kind: str) -> None:
    install_services(pair, kind, "INPUT")
    pair.iptables(kind, f"-I INPUT -i {DEVICES[pair.family][0]} -j ACCEPT")
    assert not pair.reaches_node(BRIEFLY)

    pair.sync(f"iptables-{kind}")

    assert pair.reaches_node()
    assert pair.blockers(f"iptables-{kind}") == []


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_nft_names_the_rule_that_blocks_and_the_engine_that_would_not_be(
    pair: Pair, kind: str
) -> None:
    install_services(pair, kind, "FORWARD")
    install_services(pair, kind, "INPUT")
    pair.sync("nft")
    assert not pair.reaches_pod(BRIEFLY)

    found = pair.blockers("nft")

    program = pair.program(kind).removesuffix("-nft")
    rule = f"-j REJECT --reject-with {REJECT[pair.family]}"
    assert [(b.family, b.stops, b.where, b.rule) for b in found] == [
        (
            pair.family,
            "pods to the overlay, the overlay to pods",
            f"{program} -t filter FORWARD",
            f"-A FORWARD {rule}",
        ),
        (pair.family, "the tunnel", f"{program} -t filter INPUT", f"-A INPUT {rule}"),
    ]
    assert all(f'engine "iptables-{kind}"' in blocker.fix for blocker in found)
    assert f"IPv{pair.family}" in str(found[0])

    pair.sync(f"iptables-{kind}")
    assert pair.reaches_pod()


def test_other_kind_of_iptables_still_blocks(pair: Pair) -> None:
    install_services(pair, "legacy", "FORWARD")

    pair.sync("iptables-nft")

    assert not pair.reaches_pod(BRIEFLY)
    assert [blocker.where.split()[0] for blocker in pair.blockers("iptables-nft")] == [
        pair.program("legacy")
    ]


def test_policy_is_named(pair: Pair) -> None:
    pair.iptables("nft", "-P FORWARD DROP")
    pair.sync("nft")
    assert not pair.reaches_pod(BRIEFLY)

    (found,) = pair.blockers("nft")

    assert found.rule == "policy DROP of FORWARD"
    pair.sync("iptables-nft")
    assert pair.reaches_pod()


DOCKER = (
    "-P FORWARD DROP",
    "-N DOCKER-USER",
    "-N DOCKER",
    "-A FORWARD -j DOCKER-USER",
    "-A DOCKER-USER -j RETURN",
    "-A FORWARD -o cni0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A FORWARD -o cni0 -j DOCKER",
    "-A FORWARD -i cni0 ! -o cni0 -j ACCEPT",
)


def test_docker_blocks_one_direction_only(pair: Pair) -> None:
    for rule in DOCKER:
        pair.iptables("nft", rule)
    pair.sync("nft")
    assert not pair.reaches_pod(BRIEFLY)

    (found,) = pair.blockers("nft")

    assert (found.stops, found.rule) == ("the overlay to pods", "policy DROP of FORWARD")


NFT_FORWARD = """
add table inet theirs
add chain inet theirs forward { type filter hook forward priority filter; policy accept; }
add chain inet theirs checked
add rule inet theirs forward ct state established,related accept
add rule inet theirs forward iifname "lo" accept
add rule inet theirs forward meta l4proto { icmp, ipv6-icmp } accept
add rule inet theirs forward tcp dport { 22, 80-90 } accept
add rule inet theirs forward jump checked
add rule inet theirs checked ct state vmap { invalid : drop, new : continue }
add rule inet theirs checked reject with icmpx type admin-prohibited
"""


def test_reject_of_another_nft_table_is_named_for_every_engine(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "theirs.nft"
    path.write_text(NFT_FORWARD)
    pair.node.exec("nft", "-f", str(path))

    for engine in ("nft", "iptables-nft", "iptables-legacy"):
        pair.sync(engine)
        assert not pair.reaches_pod(BRIEFLY)

        (found,) = pair.blockers(engine)

        assert found.where == "nft inet theirs checked"
        assert found.rule.startswith("reject with icmpx")
        assert "no engine can overrule it" in found.fix


HARMLESS = (
    'add rule inet theirs {hook} iifname "eth7" drop',
    "add rule inet theirs {hook} {ip} saddr {elsewhere} drop",
    "add rule inet theirs {hook} ct state invalid drop",
    "add rule inet theirs {hook} tcp dport 23 drop",
    "add rule inet theirs {hook} meta mark 7 drop",
    "add rule inet theirs {hook} limit rate over 1000000/second drop",
    "add rule inet theirs {hook} {ip} saddr @banned drop",
    "add rule inet theirs {hook} udp dport != 1-65535 drop",
    "add rule inet theirs {hook} meta nfproto {other} drop",
    "add rule inet theirs {hook} accept",
    "add rule inet theirs {hook} drop",
)


def test_rules_that_do_not_block_are_not_reported(pair: Pair, tmp_path: Path) -> None:
    elsewhere = "203.0.113.0/24" if pair.family == 4 else "2001:db8:1::/48"
    address = "ipv4_addr" if pair.family == 4 else "ipv6_addr"
    lines = ["add table inet theirs", f"add set inet theirs banned {{ type {address}; }}"]
    for hook in ("forward", "input"):
        lines.append(
            f"add chain inet theirs {hook} {{ type filter hook {hook} priority 0; policy drop; }}"
        )
        lines += [
            rule.format(
                hook=hook,
                ip=WORD[pair.family],
                elsewhere=elsewhere,
                other="ipv6" if pair.family == 4 else "ipv4",
            )
            for rule in HARMLESS
        ]
    path = tmp_path / "theirs.nft"
    path.write_text("\n".join(lines) + "\n")
    pair.node.exec("nft", "-f", str(path))
    assert pair.reaches_pod()

    assert pair.blockers("nft") == []


def test_dormant_table_blocks_nothing(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "theirs.nft"
    path.write_text(
        "add table ip asleep { flags dormant; }\nadd table ip6 asleep { flags dormant; }\n"
        + "".join(
            f"add chain {word} asleep x {{ type filter hook forward priority 0; policy drop; }}\n"
            for word in ("ip", "ip6")
        )
    )
    pair.node.exec("nft", "-f", str(path))
    assert pair.reaches_pod()

    assert pair.blockers("nft") == []


def test_probing_writes_nothing(pair: Pair) -> None:
    before = pair.node.exec("nft", "list", "ruleset")

    pair.blockers("nft")

    assert pair.node.exec("nft", "list", "ruleset") == before
    assert pair.node.exec("cat", "/proc/net/ip_tables_names") == ""


@pytest.mark.parametrize("engine", ["nft", "iptables-nft", "iptables-legacy"])
def test_guard_lets_in_peers_and_nobody_else(
    pair: Pair, engine: str, wait_until: Callable[..., None]
) -> None:
    peer = pair.peer.underlay(pair.family)
    stranger = "192.0.2.77" if pair.family == 4 else "2001:db8::77"
    word = WORD[pair.family]

    pair.sync(engine, guard=[stranger])
    assert not pair.reaches_node(BRIEFLY)

    assert pair.sync(engine, guard=[peer]) == (
        f"+ nft {word} flannel-dp @peers {peer}",
        f"- nft {word} flannel-dp @peers {stranger}",
    )
    assert pair.reaches_node()

    update_guard(pair.family, removed=[peer], added=[stranger], netns=pair.node.ns)
    assert not pair.reaches_node(BRIEFLY)
    update_guard(pair.family, added=socket.inet_pton(_af(pair), peer), netns=pair.node.ns)
    assert pair.reaches_node()

    pair.sync(engine, guard=())
    assert not pair.reaches_node(BRIEFLY)
    pair.sync(engine)
    assert pair.reaches_node()
    pair.sync(engine, guard=())
    clean_rules(pair.node.ns)
    assert pair.reaches_node()


def _af(pair: Pair) -> int:
    return socket.AF_INET if pair.family == 4 else socket.AF_INET6


def test_guard_holds_although_others_accept(pair: Pair) -> None:
    for kind in ("nft", "legacy"):
        pair.iptables(kind, "-I INPUT -j ACCEPT")

    pair.sync("nft", guard=())

    assert not pair.reaches_node(BRIEFLY)


def test_guard_leaves_other_ports_and_the_pods_alone(pair: Pair) -> None:
    pair.sync("nft", guard=[pair.peer.underlay(pair.family)])

    assert pair.node.ping(pair.peer.underlay(pair.family))
    assert pair.reaches_pod()


def test_removing_a_peer_that_is_not_there_changes_nothing(pair: Pair) -> None:
    peer = pair.peer.underlay(pair.family)
    stranger = "192.0.2.77" if pair.family == 4 else "2001:db8::77"
    pair.sync("nft", guard=[peer])

    with pytest.raises(FlannelDPError, match="No such file"):
        update_guard(pair.family, removed=[stranger, peer], netns=pair.node.ns)
    assert plan_rules(pair.wanted(guard=[peer]), "nft", pair.node.ns).is_empty


def test_ten_thousand_peers(lab: Any, family: int) -> None:
    host = lab.host()
    pair = Pair(family, host, host, "")
    start = int(ipaddress.ip_address("10.0.0.1" if family == 4 else "2001:db8:5::"))
    size = 4 if family == 4 else 16
    many = [(start + number).to_bytes(size, "big") for number in range(10_000)]
    changes = pair.sync("nft", guard=b"".join(many))
    assert changes[-1] == f"+ nft {WORD[family]} flannel-dp @peers: 10000 addresses"

    # What is sent for one peer more and one less is two elements, and little work.
    other = (start + 20_000).to_bytes(size, "big")
    wanted = pair.wanted(guard=b"".join([*many[1:], other]))
    plan = plan_rules(wanted, "nft", host.ns)
    apply_rules(plan, host.ns)

    (step,) = plan.steps
    assert len(plan.changes) == 2
    assert len(step.script) < 500
    assert plan_rules(wanted, "nft", host.ns).is_empty


def test_guard_without_nft_is_refused(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = lab.host()
    for name in ("iptables", "iptables-save", "iptables-restore"):
        found = programs.find(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    pair = Pair(4, host, host, "")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.setattr(programs, "_SYSTEM_PATH", str(tmp_path))
        with pytest.raises(ConfigError, match="--guard-underlay: the program nft") as caught:
            plan_rules(pair.wanted(guard=[]), "iptables", host.ns)
        assert "install the package nftables" in caught.value.hint
        assert not plan_rules(pair.wanted(), "iptables", host.ns).is_empty


def test_raw_sockets_are_for_legacy_iptables_alone(lab: Any) -> None:
    """So CAP_NET_RAW is kept where the kernel has legacy tables, which every engine reads, or
    where legacy iptables was asked for."""
    host = lab.host()
    engines = ("auto", "nft", "iptables-nft", "iptables-legacy")

    def needing() -> list[str]:
        return [name for name in engines if call_in_netns(host.ns, needs_raw_socket, name)]

    assert needing() == ["iptables-legacy"]
    host.exec("ip6tables-legacy", "-P", "FORWARD", "DROP")
    assert needing() == [*engines]
