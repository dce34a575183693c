"""Packets that a program forwards: to nodes of every kind, and what is not theirs is dropped."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import pytest

from flannel_dp.kernel.netns import call_in_netns
from tests.lib.forwarding import Nodes, held, reaches, send_ping, wanted_in_map
from tests.lib.hosts import Lab
from tests.lib.leases import mac, peer
from tests.lib.traffic import pod_address
from tests.lib.waiting import LIMIT, wait_until


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=["ipv4", "ipv6", "dual"])
def test_pods_of_all_kinds_of_nodes_reach_each_other(
    nodes: Nodes, families: tuple[int, ...]
) -> None:
    """Two nodes by a program, one by the kernel's own tables."""
    cluster = nodes(3)
    leases = [node.lease for node in cluster]
    for node, forwarding in zip(cluster, ("ebpf", "ebpf", "kernel"), strict=True):
        with node.plane(*families, forwarding=forwarding) as dp:
            report = dp.sync(leases)
            assert report.ok, report.to_json()
            again = dp.sync(leases)
            assert again.writes == 0
            assert not any(device.changes for device in again.devices)

    for family in families:
        for one in cluster:
            for other in cluster:
                if one is not other:
                    target = pod_address(family, other.number)
                    assert reaches(one.pod, target), (one.number, target)


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["byte", "megabyte"])
def test_tcp_passes_at_full_size_in_both_directions(nodes: Nodes, family: int, size: int) -> None:
    near, far = cluster = nodes(2)
    for node, forwarding in zip(cluster, ("ebpf", "kernel"), strict=True):
        with node.plane(family, forwarding=forwarding) as dp:
            assert dp.sync([node.lease for node in cluster]).ok
    sent = struct.pack(">I", 0x0BADCAFE) * (size // 4) or b"x"

    for here, there in ((near, far), (far, near)):
        assert _echo(here.pod, there.pod, pod_address(family, there.number), sent) == sent


def _echo(here: str, there: str, target: str, data: bytes) -> bytes:
    """What comes back of ``data`` from a TCP server in another namespace that sends it back."""
    kind = socket.AF_INET6 if ":" in target else socket.AF_INET
    server = call_in_netns(there, lambda: socket.create_server((target, 0), family=kind))
    port = server.getsockname()[1]

    def serve() -> None:
        server.settimeout(LIMIT)
        with server, server.accept()[0] as peer_end:
            peer_end.settimeout(LIMIT)
            got = _read(peer_end, len(data))
            peer_end.sendall(got)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    client = call_in_netns(here, lambda: socket.create_connection((target, port), timeout=LIMIT))
    with client:
        client.sendall(data)
        back = _read(client, len(data))
    thread.join(LIMIT)
    return back


def _read(end: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (part := end.recv(1 << 16)):
        found += part
    return found


def test_direct_routing_goes_beside_it(nodes: Nodes, family: int) -> None:
    """Peers on the own network are reached without the tunnel, the map has them all the same:
    they may reach us through it."""
    near, far = cluster = nodes(2)
    leases = [node.lease for node in cluster]
    with near.plane(family, backend={"DirectRouting": True}) as dp:
        report = dp.sync([*leases, peer(9)])
        assert report.ok, report.to_json()
        assert report.tables["route"]["added"] == 2  # the network's, and the direct one
        assert held(dp, family) == wanted_in_map([far.lease, peer(9)], family)
        assert dp.sync([*leases, peer(9)]).writes == 0
    with far.plane(family, forwarding="kernel") as dp:
        assert dp.sync(leases).ok

    shown = near.host.ip(f"-{family} route get {pod_address(family, 2)}")
    assert "dev eth0" in shown
    assert reaches(near.pod, pod_address(family, 2))


def _spoof(host: Any, vni: int, source: str, target: str, inner_mac: str) -> None:
    """Send one tunnel packet by hand: an inner ICMP echo request from ``source``."""
    from ipaddress import ip_address

    src, dst = ip_address(source), ip_address(target)
    lladdr = bytes.fromhex(inner_mac.replace(":", ""))
    if src.version == 4:
        icmp = bytes([8, 0, 0xF7, 0xFF, 0, 0, 0, 0])
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 1, 0, src.packed, dst.packed)
        total = sum(struct.unpack(">10H", head))
        total = (total & 0xFFFF) + (total >> 16)
        head = head[:10] + struct.pack(">H", ~total & 0xFFFF) + head[12:]
        frame = lladdr + b"\x02\0\0\0\0\x63" + b"\x08\x00" + head + icmp
    else:
        head = struct.pack(">IHBB16s16s", 6 << 28, 8, 59, 64, src.packed, dst.packed)
        frame = lladdr + b"\x02\0\0\0\0\x63" + b"\x86\xdd" + head + bytes(8)
    packet = struct.pack(">II", 0x08 << 24, vni << 8) + frame
    kind = socket.AF_INET if host.target.version == 4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_DGRAM) as tunnel:
        tunnel.sendto(packet, (str(host.target), 8472))


class _Sender:
    """A host of the underlay that can send anything."""

    def __init__(self, ns: str, target: str) -> None:
        from ipaddress import ip_address

        self.ns, self.target = ns, ip_address(target)

    def send(self, vni: int, source: str, target: str, inner_mac: str) -> None:
        call_in_netns(self.ns, _spoof, self, vni, source, target, inner_mac)


def test_what_a_peer_does_not_own_is_dropped_and_counted(
    lab: Lab, nodes: Nodes, family: int
) -> None:
    """No overlay spoofing: the inner source has to be the sender's, and the VNI ours."""
    near, far = cluster = nodes(2)
    stranger = lab.host()
    leases = [node.lease for node in cluster]
    with near.plane(family) as dp:
        assert dp.sync([*leases, peer(9)]).ok
        forwarding = dp.forwarder.forwarding
        assert forwarding is not None

        def dropped() -> dict[str, int]:
            return {one.reason: one.packets for one in forwarding.dropped()}

        before = dropped()
        target = pod_address(family, 1)
        lladdr = mac(family, 1)
        outside = _Sender(stranger.ns, near.host.underlay(family))
        inside = _Sender(far.host.ns, near.host.underlay(family))
        outside.send(1, pod_address(family, 2), target, lladdr)  # the other node's pod
        inside.send(1, pod_address(family, 9), target, lladdr)  # another peer's pod
        inside.send(1, pod_address(family, 77), target, lladdr)  # nobody's
        inside.send(7, pod_address(family, 2), target, lladdr)  # another overlay

        def counted() -> bool:
            now = dropped()
            return {key: now[key] - before[key] for key in now if now[key] != before[key]} == {
                "spoofed": 2,
                "unknown_source": 1,
                "foreign_vni": 1,
            }

        wait_until(counted)
    with far.plane(family, forwarding="kernel") as dp:
        assert dp.sync(leases).ok
    assert reaches(far.pod, pod_address(family, 1)), "and its own pods get through"


def test_a_packet_to_nobody_is_dropped_and_counted(nodes: Nodes, family: int) -> None:
    (node,) = nodes(1)
    with node.plane(family) as dp:
        assert dp.sync([node.lease, peer(9)]).ok
        forwarding = dp.forwarder.forwarding
        assert forwarding is not None
        send_ping(node.pod, pod_address(family, 77))

        def no_peer() -> int:
            return {one.reason: one.packets for one in forwarding.dropped()}["no_peer"]

        wait_until(no_peer)
        assert no_peer() == 1


def test_it_goes_on_without_us(nodes: Nodes, family: int) -> None:
    """Nobody holds a descriptor any more, and a new process finds what is there."""
    cluster = nodes(2)
    near = cluster[0]
    leases = [node.lease for node in cluster]
    for node in cluster:
        with node.plane(family) as dp:
            dp.sync(leases)
    assert reaches(near.pod, pod_address(family, 2), 3)

    with near.plane(family) as dp:
        report = dp.sync([*leases, peer(9)])

    assert report.tables["peer"] == {
        "added": 1,
        "replaced": 0,
        "removed": 0,
        "unchanged": 1,
        "failed": 0,
    }
    assert report.writes == 1
    assert reaches(near.pod, pod_address(family, 2))


def test_prefixes_of_several_lengths_are_all_found(nodes: Nodes, family: int) -> None:
    """The longest that holds an address is its peer's, whatever came before."""
    near, far = cluster = nodes(2)
    leases = [node.lease for node in cluster]
    narrow = "10.240.200.64/26" if family == 4 else "fd00:10:c8:0:1::/80"
    wide = "10.241.0.0/20" if family == 4 else "fd00:10:1000::/44"
    field = "subnet" if family == 4 else "ipv6_subnet"
    with near.plane(family) as dp:
        assert dp.sync([*leases, peer(9)]).ok
        dp.update(added=[peer(30, **{field: narrow}), peer(31, **{field: wide})])
        assert {prefix for prefix, _, _ in held(dp, family)} >= {narrow, wide}
        forwarding = dp.forwarder.forwarding
        assert forwarding is not None

        def no_peer() -> int:
            return {one.reason: one.packets for one in forwarding.dropped()}["no_peer"]

        inside = (
            ("10.240.200.65", "10.241.15.1")
            if family == 4
            else ("fd00:10:c8:0:1::1", "fd00:10:100f::1")
        )
        outside = (
            ("10.240.200.1", "10.241.16.1")
            if family == 4
            else ("fd00:10:c8:0:2::1", "fd00:10:1010::1")
        )
        for target in (*inside, *outside):
            send_ping(near.pod, target)
        wait_until(lambda: no_peer() >= 2)
        assert no_peer() == 2
        assert dp.sync([*leases, peer(9)]).tables["peer"]["removed"] == 2
    with far.plane(family, forwarding="kernel") as dp:
        assert dp.sync(leases).ok
    assert reaches(near.pod, pod_address(family, 2))
