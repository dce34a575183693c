"""``probe``: peers that answer are alive, and of those that do not the right side is named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.command.cli import main
from flannel_dp.errors import ConfigError
from flannel_dp.kernel import offload
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.kernel.offload import CHECKSUM
from flannel_dp.look.probing import probe as look_and_probe
from flannel_dp.probe.oneshot import Effort
from flannel_dp.probe.packets import checksum
from flannel_dp.probe.target import raw
from tests.lib.forwarding import Nodes, PodNode
from tests.lib.leases import half
from tests.lib.probed import Probed

FORWARDING = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}


@pytest.fixture
def probed(nodes: Nodes, family: int) -> Iterator[Probed]:
    made = Probed(nodes(3), family, "kernel")
    yield made
    made.close()


@pytest.mark.parametrize("forwarding", ["kernel", "ebpf"])
def test_all_peers_are_alive(nodes: Nodes, family: int, forwarding: str) -> None:
    """Each answers every probe, by every source port, with the largest packet of the device."""
    probed = Probed(nodes(4), family, forwarding)
    try:
        # One of the other mode answers the same, and one that has nothing of ours.
        if forwarding == "kernel":
            probed.forward_by_program(probed.nodes[2], probed.leases)
        probed.lay_out_as_flanneld(probed.nodes[3])
        proof = probed.prove()
    finally:
        probed.close()
    assert proof.ok, str(proof)
    assert [(one.subnet, one.endpoint, one.mac) for one in proof.peers] == [
        half(lease, family) for lease in probed.leases[1:]
    ]
    for one in proof.peers:
        assert (one.code, one.path, one.sent, one.received) == ("alive", "tunnel", 8, 8)
        assert one.path_mtu == one.mtu > 1200
        assert one.rtt
        assert 0 < one.rtt.min <= one.rtt.median <= one.rtt.p99
        assert one.evidence.echo is None  # of those that are silent only
    assert str(proof).endswith("3 of 3 peers alive")


# ---- faults at the peer


def _other_mac(p: Probed, node: PodNode) -> None:
    """Its neighbours go with the old MAC; its agent has written them again."""
    address, mac = p.subnet(p.first).split("/")[0], half(p.first.lease, p.family)[2]
    p.at(
        node,
        f"link set {p.device} address 02:00:00:00:00:77",
        f"neigh replace {address} lladdr {mac} dev {p.device} nud permanent",
    )


def _duplicate(p: Probed, node: PodNode) -> None:
    """It has another node's MAC and endpoint for this node's subnet: that of a second lease."""
    address, other = p.subnet(p.first).split("/")[0], half(p.nodes[-1].lease, p.family)
    p.at(node, f"neigh replace {address} lladdr {other[2]} dev {p.device} nud permanent")


#: What is done at a peer, the verdict, and the side that it names.
FAULTS: dict[str, tuple[Callable[[Probed, PodNode], object], str, str]] = {
    "its route to this node is gone": (
        lambda p, node: p.at(node, f"route del {p.subnet(p.first)}"),
        "no-way-back",
        "peer or underlay",
    ),
    "its neighbour entry for this node is gone": (
        lambda p, node: p.at(node, f"neigh del {p.subnet(p.first).split('/')[0]} dev {p.device}"),
        "no-way-back",
        "peer or underlay",
    ),
    "its FDB entry for this node is gone": (
        lambda p, node: node.host.bridge(
            f"fdb del {half(p.first.lease, p.family)[2]} dev {p.device}"
        ),
        "no-way-back",
        "peer or underlay",
    ),
    "its device is down": (
        lambda p, node: p.at(node, f"link set {p.device} down"),
        "no-vtep",
        "peer",
    ),
    "its device is gone": (
        lambda p, node: p.at(node, f"link del {p.device}"),
        "no-vtep",
        "peer",
    ),
    "another node has the subnet of this node there": (_duplicate, "detour", "peer"),
    "it does not forward": (
        lambda p, node: node.host.sysctl(FORWARDING[p.family], 0),
        "peer-does-not-forward",
        "peer",
    ),
    "its firewall drops what is forwarded": (
        lambda p, node: p.drop(node, "counter", "forward"),
        "peer-does-not-forward",
        "peer",
    ),
    "its device has another MAC": (_other_mac, "wrong-mac", "peer"),
    "UDP from it to this node is dropped": (
        lambda p, node: p.drop(node, "udp dport 8472"),
        "no-way-back",
        "peer or underlay",
    ),
    "UDP from this node to it is dropped": (
        lambda p, node: p.drop(node, "udp dport 8472", "input"),
        "no-way-out",
        "peer or underlay",
    ),
    "UDP is dropped both ways, and nothing else": (
        lambda p, node: (p.drop(node, "udp dport 8472"), p.drop(node, "udp dport 8472", "input")),
        "tunnel-dead",
        "peer or underlay",
    ),
    "its eBPF program has no entry for this node": (
        lambda p, node: p.forward_by_program(node, p.leases[1:]),
        "tunnel-dead",  # it takes nothing from a node that it does not know
        "peer or underlay",
    ),
    "its eBPF program's device is down": (
        lambda p, node: (
            p.forward_by_program(node, p.leases),
            p.at(node, f"link set {p.device} down"),
        ),
        "no-vtep",
        "peer",
    ),
    "it is gone": (
        lambda p, node: p.at(node, f"link set {node.host.iface} down"),
        "unreachable",
        "peer or underlay",
    ),
    "nothing": (lambda p, node: None, "alive", ""),
}


def test_the_side_at_fault_is_named(nodes: Nodes, family: int) -> None:
    """Each peer has a fault of its own, and all are probed at once."""
    probed = Probed(nodes(1 + len(FAULTS)), family, "kernel")
    try:
        faulty = dict(zip(FAULTS, probed.nodes[1:], strict=True))
        for name, (make, _, _) in FAULTS.items():
            make(probed, faulty[name])
        proof = probed.prove()
    finally:
        probed.close()
    by_subnet = {one.subnet: one for one in proof.peers}
    found = {name: by_subnet[probed.subnet(node)] for name, node in faulty.items()}
    assert {name: (one.code, one.side) for name, one in found.items()} == {
        name: (code, side) for name, (_, code, side) in FAULTS.items()
    }
    for name, one in found.items():
        assert one.alive == (name == "nothing")
        assert one.alive or (one.text and one.next)
    assert not proof.ok


# ---- faults at this node


def test_this_node_s_entries_are_at_fault(probed: Probed) -> None:
    subnet, endpoint, mac = half(probed.second.lease, probed.family)
    host = probed.first.host
    host.bridge(f"fdb del {mac} dev {probed.device}")
    found = probed.of(probed.second)
    assert (found.code, found.side, found.next) == (
        "not-programmed",
        "this node",
        "flannel-dp sync",
    )
    probed.sync(0)
    host.ip(f"-{probed.family} route del {subnet}")
    found = probed.of(probed.second)
    assert (found.code, found.side) == ("not-programmed", "this node")
    assert found.text.endswith("missing")
    probed.sync(0)
    host.bridge(
        f"fdb replace {mac} dev {probed.device} dst {probed.nodes[2].host.underlay(probed.family)}"
    )
    found = probed.of(probed.second)
    assert (found.code, found.side) == ("not-programmed", "this node")
    probed.sync(0)
    assert probed.of(probed.second).endpoint == endpoint


def test_an_uplink_that_is_down_is_told_as_that(probed: Probed) -> None:
    """And not as so many dead peers."""
    probed.first.host.ip(f"link set {probed.first.host.iface} down")
    found = probed.prove()
    assert {one.code for one in found.peers} == {"uplink-down"}
    assert {one.text for one in found.peers} == {f"{probed.first.host.iface} is down"}


def test_a_translated_source_is_named(nodes: Nodes, family: int) -> None:
    """A peer of flanneld's kind takes packets from any address; one with an eBPF program takes them
    from the address of the lease only."""
    probed = Probed(nodes(3), family, "kernel")
    plain, strict = probed.nodes[1:]
    try:
        probed.forward_by_program(strict, probed.leases)
        host = probed.first.host
        other = {4: "198.51.100.77", 6: "2001:db8:ff::77"}[family]
        bits = {4: 32, 6: 128}[family]
        host.ip(f"address add {other}/{bits} dev {host.iface} {'nodad' if family == 6 else ''}")
        what = {4: "ip", 6: "ip6"}[family]
        chain = "add chain inet nat post { type nat hook postrouting priority 100; }"
        rule = f"add rule inet nat post udp dport 8472 snat {what} to {other}"
        for command in ("add table inet nat", chain, rule):
            host.exec("nft", command)
        proof = probed.prove()
    finally:
        probed.close()
    codes = {one.subnet: (one.code, one.side) for one in proof.peers}
    assert codes == {
        probed.subnet(plain): ("alive", ""),
        probed.subnet(strict): ("no-way-out", "peer or underlay"),
    }, str(proof)


# ---- the size of packets


def test_the_path_mtu_is_found(probed: Probed) -> None:
    """Switches on the way take less than the device sends, each another size, as some clouds do."""
    takes = dict(zip(probed.nodes[1:], (1400, 1350), strict=True))
    for node, mtu in takes.items():
        node.host.ip(f"link set {node.host.iface} mtu {mtu}")
    proof = probed.prove()
    # The outer headers of IP, UDP, VXLAN and Ethernet take 50 bytes, or 70. A veth lets in four
    # more than its MTU, for a VLAN tag, and in IPv6 the answer is what does not go out.
    less = {4: 46, 6: 70}[probed.family]
    assert [one.path_mtu for one in proof.peers] == [mtu - less for mtu in takes.values()]
    for one in proof.peers:
        assert (one.code, one.side) == ("mtu", "underlay")
        assert str(one.path_mtu) in one.text


# ---- the command


def test_the_command(probed: Probed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf, leases = tmp_path / "net-conf.json", tmp_path / "leases.json"
    conf.write_text(probed.planes[0].config.to_json())
    leases.write_text(f'{{"leases": [{",".join(one.to_json() for one in probed.leases)}]}}')
    flags = ["--netns", probed.first.host.ns, "--net-conf", str(conf), "--iface", "eth0"]
    subnet = probed.subnet(probed.second)

    assert main(["probe", *flags, "--output", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is True
    assert [one["code"] for one in shown["peers"]] == ["alive", "alive"]

    probed.at(probed.second, f"link set {probed.device} down")
    inside = subnet.partition("/")[0]
    assert main(["probe", *flags, "--leases", str(leases), inside]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["SUBNET", subnet]
    assert lines[1].endswith("no-vtep")
    assert "UDP port 8472 is closed there" in lines[2]
    assert lines[-1] == "0 of 1 peer alive"


def test_a_peer_that_there_is_none_of(probed: Probed) -> None:
    with pytest.raises(ConfigError, match=r"no peer is named '192\.0\.2\.99'"):
        probed.prove("192.0.2.99")
    assert len(probed.prove(probed.subnet(probed.second), effort=Effort(count=1)).peers) == 1


def test_progress_is_told_meanwhile(probed: Probed) -> None:
    steps: list[tuple[int, int]] = []
    effort = Effort(count=4, timeout=3.0)
    look_and_probe(probed.planes[0], probed.leases, (), effort, lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {2}
    assert [steps[0][0], 1 in {done for done, _ in steps}, steps[-1][0]] == [0, True, 2]


# ---- a network card that spoils what is left to it


def _spoil(p: Probed, kind: str) -> None:
    """Have the first node's uplink spoil the inner checksums of packets that were left to it.

    No card here does by itself. What a card is to fill in holds the sum of the pseudo-header; a
    rule on the way out changes it, and the uplink leaves the rest to the kernel, which adds what is
    there. Packets with a checksum from software have another value there, and pass."""
    host, address = p.first.host, raw(p.subnet(p.first).partition("/")[0])
    call_in_netns(host.ns, offload.switch_off, host.iface, CHECKSUM)
    protocol, size, at = {"checksum": (17, 508, 6), "segments": (6, 2020, 16)}[kind]
    value = ~checksum(address * 2 + struct.pack("!II", size, protocol)) & 0xFFFF
    field = f"@th,{8 * (8 + 8 + 14 + {4: 20, 6: 40}[p.family] + at)},16"
    for command in (
        "add table netdev card",
        f"add chain netdev card out {{ type filter hook egress device {host.iface} priority 0; }}",
        f"add rule netdev card out udp dport 8472 {field} {value} {field} set 0x1234",
    ):
        host.exec("nft", command)


def test_a_network_card_that_spoils_checksums(
    probed: Probed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, and --fix-offload switches that off on the vxlan device, until clean."""
    conf, ns = tmp_path / "net-conf.json", probed.first.host.ns
    conf.write_text(probed.planes[0].config.to_json())
    flags = ["--netns", ns, "--net-conf", str(conf), "--iface", "eth0"]

    def is_on(feature: str) -> bool:
        return call_in_netns(ns, offload.is_on, probed.device, feature)

    def alias() -> str:
        return probed.first.host.ip_json(f"link show {probed.device}")[0].get("ifalias", "")

    probed.first.host.ip(f"link set {probed.device} alias site-7")
    _spoil(probed, "segments")
    found = probed.prove()
    assert {(one.code, one.side, one.alive) for one in found.peers} == {
        ("segments", "this node", False)
    }
    assert {(one.evidence.checksum, one.evidence.segments) for one in found.peers} == {
        (True, False)
    }
    assert "tx-udp_tnl-segmentation" in found.peers[0].text
    assert main(["probe", *flags]) == 3
    assert is_on(offload.SEGMENTS)
    capsys.readouterr()

    _spoil(probed, "checksum")
    found = probed.prove()
    assert {(one.code, one.side) for one in found.peers} == {("checksum", "this node")}
    assert found.peers[0].next.endswith(f"ethtool -K {probed.device} {CHECKSUM} off")
    assert main(["probe", *flags, "--fix-offload", "--output", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fixed"] == [{"device": probed.device, "feature": CHECKSUM}]
    assert {one["code"] for one in told["peers"]} == {"alive"}
    assert not is_on(CHECKSUM)
    assert CHECKSUM in alias()

    probed.planes[0].clean(keep_device=True)
    assert is_on(CHECKSUM)
    assert is_on(offload.SEGMENTS)
    assert alias() == "site-7"


# ---- without the tunnel


@pytest.mark.parametrize("backend", [{"Type": "host-gw"}, {"DirectRouting": True}], ids=str)
def test_peers_on_the_same_network(nodes: Nodes, family: int, backend: dict[str, Any]) -> None:
    """They forward back over the underlay as it is; of those that do not, the fault is theirs."""
    probed = Probed(nodes(5), family, "kernel", **backend)
    _, _, closed, lost, gone = probed.nodes
    try:
        assert probed.prove().ok
        closed.host.sysctl(FORWARDING[family], 0)
        probed.at(lost, f"route del {probed.subnet(probed.first)}")
        probed.at(gone, f"link set {gone.host.iface} down")
        proof = probed.prove()
    finally:
        probed.close()
    codes = {one.subnet: one.code for one in proof.peers}
    assert [codes[probed.subnet(node)] for node in probed.nodes[1:]] == [
        "alive",
        "peer-does-not-forward",
        "peer-does-not-forward",
        "unreachable",
    ]
    assert {one.path for one in proof.peers} == {"direct"}
    assert proof.peers[0].path_mtu == proof.peers[0].mtu == 1500


def test_one_of_two_equal_paths_is_dead(probed: Probed) -> None:
    """The underlay has two, as its switches choose by the outer source port, and one loses all."""
    probed.drop(probed.second, "udp dport 8472 udp sport and 1 == 1", "input")
    found = probed.of(probed.second, Effort(16, 16, timeout=3.0))
    assert (found.code, found.alive, found.side) == ("path-dead", False, "underlay")
    dead = [number for number, (sent, came) in enumerate(found.evidence.paths) if not came]
    assert all(sent == 4 for sent, _ in found.evidence.paths)
    assert all(came in (0, 4) for _, came in found.evidence.paths)
    assert found.text.startswith(f"{len(dead)} of 16 source ports get no answer")


def test_some_loss_is_no_death(probed: Probed) -> None:
    probed.drop(probed.second, "udp dport 8472 numgen inc mod 3 == 0", "input")
    found = probed.of(probed.second, Effort(16, 4, timeout=3.0))
    assert (found.code, found.alive) == ("loss", True)
    assert 0 < found.received < found.sent
