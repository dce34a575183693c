"""The counters of one device (bpf.counters): what they count, and what becomes of them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest

from flannel_dp import Conflict
from flannel_dp._core import BpfMap
from flannel_dp.bpf import filters, pins
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.counters.device import FILTER, DeviceCounters
from flannel_dp.resources.counters.reading import Traffic
from tests.lib.bpf import HASH, End, counted, datagrams, tc, tunnel
from tests.lib.hosts import Host
from tests.lib.waiting import wait_until

ETHERNET, UDP = 14, 8
IP = {4: 20, 6: 40}


@pytest.fixture
def ends(make_host: Callable[..., Host], family: int) -> tuple[End, End]:
    return tunnel(make_host(), make_host(), family)


def set_up(end: End) -> DeviceCounters:
    counters = DeviceCounters("flannel.1", end.host.ns)
    counters.ensure(end.index)
    return counters


def test_every_datagram_is_counted_on_both_sides(ends: tuple[End, End], family: int) -> None:
    left, right = ends
    here, there = set_up(left), set_up(right)

    datagrams(left, right, 25)
    datagrams(right, left, 7, size=1000)

    frame = ETHERNET + IP[family] + UDP
    sent, received = counted(here.read(), right, family)
    assert sent[:2] == (25, 25 * (frame + 100))
    assert received[:2] == (7, 7 * (frame + 1000))
    assert [one[:2] for one in counted(there.read(), left, family)] == [received[:2], sent[:2]]


def test_last_seen_is_when_the_last_packet_came(ends: tuple[End, End], family: int) -> None:
    left, right = ends
    here = set_up(left)

    datagrams(left, right, 1)
    reading = here.read()

    sent, received = counted(reading, right, family)
    assert reading is not None
    assert 0 < sent.last <= reading.at
    assert received == Traffic()
    assert reading.seconds_since(received.last) is None

    def later() -> bool:  # right to a tick of the kernel's
        datagrams(left, right, 1)
        return counted(here.read(), right, family)[0].last > sent.last

    wait_until(later)


def test_segments_of_large_packets_are_counted_one_by_one(
    ends: tuple[End, End], family: int
) -> None:
    """TCP hands the device packets of up to 64 KiB, and gets as large ones from it; it knows
    itself how many segments they were (TCP_INFO)."""
    left, right = ends
    here, there = set_up(left), set_up(right)

    with right.socket(socket.SOCK_STREAM) as listener, left.socket(socket.SOCK_STREAM) as client:
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            for _ in range(64):
                client.sendall(bytes(65536))
                left_over = 65536
                while left_over:
                    left_over -= len(server.recv(left_over))
            server.sendall(b"done")
            assert client.recv(4) == b"done"
            wait_until(lambda: _as_tcp_counts(client, here, right, family))

    client_side, server_side = here.read(), there.read()
    sent, received = counted(client_side, right, family)
    assert sent.packets > 64 * 65536 // 1400
    mirrored = counted(server_side, left, family)
    assert (sent[:2], received[:2]) == (mirrored[1][:2], mirrored[0][:2])


def _as_tcp_counts(tcp: socket.socket, counters: DeviceCounters, peer: End, family: int) -> bool:
    """struct tcp_info of linux/tcp.h: segs_out is at byte 136, segs_in at 140, bytes_sent at
    200."""
    info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    segments_out, segments_in = struct.unpack_from("=II", info, 136)
    (bytes_sent,) = struct.unpack_from("=Q", info, 200)
    sent, received = counted(counters.read(), peer, family)
    # 20 bytes and 12 of timestamps; the first segment has 8 more of options.
    headers = segments_out * (ETHERNET + IP[family] + 32) + 8
    return (sent.packets, received.packets, sent.bytes) == (
        segments_out,
        segments_in,
        bytes_sent + headers,
    )


def test_group_frames_are_kept_apart_from_peers(ends: tuple[End, End], family: int) -> None:
    left, _ = ends
    here = set_up(left)
    before = here.read()
    assert before is not None

    with left.socket(socket.SOCK_DGRAM) as udp:
        if family == 4:
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            udp.sendto(b"x", ("10.9.0.255", 9))
        else:
            udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, left.index)
            udp.sendto(b"x", ("ff02::9", 9))

    after = here.read()
    assert after is not None
    earlier = before.groups.get((family, "sent"), Traffic()).packets
    assert after.groups[family, "sent"].packets >= earlier + 1
    assert len(after) == 0


def test_drops_have_the_kernels_reason_and_the_peers_name(
    ends: tuple[End, End], family: int
) -> None:
    left, right = ends
    here, there = set_up(left), set_up(right)

    # No socket there: the frame arrived, and is dropped behind the device.
    with left.socket(socket.SOCK_DGRAM) as udp:
        for _ in range(3):
            udp.sendto(b"x", (right.address, 4444))
    reading = there.read()
    assert reading is not None
    drops = {(one.mac, one.direction, one.reason): one.packets for one in reading.drops}
    assert drops[left.mac, "received", "NO_SOCKET"] == 3

    # Nothing says where that MAC is: the device drops it.
    left.host.bridge(f"fdb del {right.mac} dev flannel.1")
    with left.socket(socket.SOCK_DGRAM) as udp:
        for _ in range(4):
            udp.sendto(b"x", (right.address, 4444))
    reading = here.read()
    assert reading is not None
    sent = [one for one in reading.drops if (one.mac, one.direction) == (right.mac, "sent")]
    assert [(one.family, one.packets) for one in sent] == [(family, 4)]


def test_drops_elsewhere_are_not_counted(ends: tuple[End, End], family: int) -> None:
    left, right = ends
    there = set_up(right)

    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with call_in_netns(left.host.ns, socket.socket, kind, socket.SOCK_DGRAM) as udp:
        udp.sendto(b"x", (right.host.underlay(family), 4444))
        # Whatever was sent before this has arrived when this has.
    assert left.host.ping(right.host.underlay(family))

    reading = there.read()
    assert reading is not None
    assert [one for one in reading.drops if one.reason == "NO_SOCKET"] == []


def test_programs_are_found_again_and_not_loaded_anew(ends: tuple[End, End], family: int) -> None:
    left, right = ends
    first = DeviceCounters("flannel.1", left.host.ns)
    assert first.ensure(left.index) == "loaded"
    assert first.ensure(left.index) == ""
    datagrams(left, right, 3)

    second = DeviceCounters("flannel.1", left.host.ns)

    assert second.ensure(left.index) == ""
    datagrams(left, right, 2)
    assert counted(second.read(), right, family)[0].packets == 5
    # One that only reads need not know which version of the programs it is.
    assert counted(DeviceCounters("flannel.1", left.host.ns).read(), right, family)[0].packets == 5


@pytest.mark.parametrize("parent", ["ingress", "egress"])
def test_a_filter_that_was_detached_is_attached_again(
    ends: tuple[End, End], family: int, parent: str
) -> None:
    left, right = ends
    here = set_up(left)
    datagrams(left, right, 3)
    datagrams(right, left, 3)
    tc(left.host, f"filter del dev flannel.1 {parent}")

    assert here.ensure(left.index) == "attached"

    datagrams(left, right, 4)
    datagrams(right, left, 4)
    assert [one.packets for one in counted(here.read(), right, family)] == [7, 7]


def test_a_device_made_anew_is_counted_again(make_host: Callable[..., Host], family: int) -> None:
    hosts = make_host(), make_host()
    left, right = tunnel(*hosts, family)
    here = set_up(left)
    datagrams(left, right, 3)
    for host in hosts:
        host.ip("link del flannel.1")
    left, right = tunnel(*hosts, family)

    assert here.ensure(left.index) == "attached"

    datagrams(left, right, 4)
    assert counted(here.read(), right, family)[0].packets == 7
    with right.socket(socket.SOCK_DGRAM) as udp:
        udp.sendto(b"x", (left.address, 4444))
    wait_until(lambda: _has_drop(here, "NO_SOCKET"))


def _has_drop(counters: DeviceCounters, reason: str) -> bool:
    reading = counters.read()
    return reading is not None and any(one.reason == reason for one in reading.drops)


PINS = ["peers", "others", "drops", "device", "reasons", "count-in", "count-out", "count-drop"]


@pytest.mark.parametrize("name", PINS)
def test_a_pin_that_was_deleted_is_made_again(make_host: Callable[..., Host], name: str) -> None:
    left, right = tunnel(make_host(), make_host(), 4)
    here = set_up(left)
    datagrams(left, right, 3)
    (pin,) = pins.pin_directory("flannel.1", left.host.ns).glob(f"{name}*")
    pin.unlink()

    here.ensure(left.index)

    datagrams(left, right, 4)
    # Only what nobody holds any more had to be loaded anew; that of a tracepoint is one.
    assert counted(here.read(), right, 4)[0].packets == 7
    assert DeviceCounters("flannel.1", left.host.ns).ensure(left.index) == ""


def test_all_pins_deleted_and_nobody_left_who_holds_them(
    ends: tuple[End, End], family: int
) -> None:
    left, right = ends
    set_up(left)
    pins.remove(pins.pin_directory("flannel.1", left.host.ns))

    here = DeviceCounters("flannel.1", left.host.ns)
    assert here.read() is None
    assert here.ensure(left.index) == "loaded"

    datagrams(left, right, 4)
    assert counted(here.read(), right, family)[0].packets == 4


def test_a_map_that_is_full_loses_nothing(make_host: Callable[..., Host], family: int) -> None:
    left, right = tunnel(make_host(), make_host(), family)
    here = DeviceCounters("flannel.1", left.host.ns, max_peers=1)
    here.ensure(left.index)

    datagrams(left, right, 3)
    datagrams(right, left, 5)

    reading = here.read()
    assert reading is not None
    assert [one.packets for one in counted(reading, right, family)] == [3, 0]
    assert reading.overflow[family, "received"].packets == here.overflow() == 5
    assert here.forget([]) == 1
    datagrams(right, left, 2)
    assert [one.packets for one in counted(here.read(), right, family)] == [0, 2]


def test_somebody_elses_map_at_our_pin_is_left_alone(ends: tuple[End, End]) -> None:
    left, _ = ends
    directory = pins.pin_directory("flannel.1", left.host.ns, create=True)
    theirs = BpfMap.create(HASH, 4, 4, 8, name="theirs")
    theirs.pin(directory / "peers")
    here = DeviceCounters("flannel.1", left.host.ns)

    for work in (lambda: here.ensure(left.index), here.read):
        with pytest.raises(Conflict, match="the map theirs there"):
            work()

    assert BpfMap.open(directory / "peers").id == theirs.id
    assert filters.read_filters(left.index, left.host.ns) == []


def test_somebody_elses_filter_at_our_priority_is_left_alone(ends: tuple[End, End]) -> None:
    left, _ = ends
    tc(left.host, "qdisc add dev flannel.1 clsact")
    tc(left.host, "filter add dev flannel.1 ingress prio 13801 u32 match u32 0 0 classid 1:1")
    before = tc(left.host, "filter show dev flannel.1 ingress")
    here = DeviceCounters("flannel.1", left.host.ns)

    with pytest.raises(Conflict, match="filter u32 has priority 13801"):
        here.ensure(left.index)

    assert tc(left.host, "filter show dev flannel.1 ingress") == before


def test_removed_without_a_trace(ends: tuple[End, End]) -> None:
    left, _ = ends
    here = set_up(left)
    directory = pins.pin_directory("flannel.1", left.host.ns)
    assert here.is_there()

    assert here.remove(left.index) is True

    assert not here.is_there()
    assert not directory.exists()
    assert "clsact" not in tc(left.host, "qdisc show dev flannel.1")
    assert here.remove(left.index) is False
    assert here.read() is None


def test_removing_leaves_what_others_have(ends: tuple[End, End]) -> None:
    left, _ = ends
    here = set_up(left)
    directory = pins.pin_directory("flannel.1", left.host.ns)
    BpfMap.create(HASH, 4, 4, 8, name="theirs").pin(directory / "other")
    tc(left.host, "filter add dev flannel.1 egress prio 7 u32 match u32 0 0 classid 1:1")

    here.remove(left.index)

    assert [path.name for path in directory.iterdir() if path.name == "other"] == ["other"]
    found = filters.read_filters(left.index, left.host.ns)
    assert {one.priority for one in found} == {7}
    assert FILTER not in {one.name for one in found}
