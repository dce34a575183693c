"""Probes whose checksum, or cutting into segments, is left to the devices on their way.

Pods' packets are like that: the kernel leaves their inner checksums, and the cutting of what is
longer than a packet, to the vxlan device, and that leaves them to the network card where it claims
to know tunnels. Some cards or drivers spoil what they do there. Pings pass, as all their checksums
come from software. Who forwards a packet does not look at the checksum inside, so the spoiled ones
come back, and are recognised here.

Frames go into the vxlan device with a virtio header (packet(7), PACKET_VNET_HDR;
include/uapi/linux/virtio_net.h), which says what is left to it.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

from msgspec import Struct

from flannel_dp.probe.packets import checksum
from flannel_dp.probe.target import Place, Target, raw
from flannel_dp.probe.volleys import raw_mac

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_ETHERTYPE = {4: 0x0800, 6: 0x86DD}
_ETHERNET, _IP = 14, {4: 20, 6: 40}
_ETH_P_ALL, _SOL_PACKET, _PACKET_VNET_HDR = 3, 263, 15

#: Where the source address is in a frame, and after it the destination.
_ADDRESSES = {4: 26, 6: 22}
_SO_ATTACH_FILTER = 26
# BPF_LD|W|ABS, BPF_LD|B|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_LOAD, _LOAD_BYTE, _JUMP, _RETURN = 0x20, 0x30, 0x15, 0x06
_PACKET_TYPE, _OUTGOING = 0xFFFFF004, 4  # SKF_AD_OFF + SKF_AD_PKTTYPE, PACKET_OUTGOING

#: Bytes of answers that may wait. A node that cannot have them reads after each peer.
_SO_RCVBUFFORCE, _BUFFER = 33, 4 << 20

#: struct virtio_net_hdr: flags, gso_type, and lengths in the host's order.
_VIRTIO = struct.Struct("=BBHHHH")
_NEEDS_CSUM = 1
_GSO_TCP = {4: 1, 6: 4}

#: Kinds of packets: a datagram whose checksum is left to the device, one of TCP that is left to it
#: to be cut into segments, and one of TCP with nothing left to it, to compare with.
_LEFT, _CUT, _PLAIN = 0, 1, 2

#: The segments of each kind, and the bytes of data of one: small enough for any path.
_PARTS, _SEGMENT = (1, 4, 1), 500

#: So often what has not come back whole is sent: a packet may be lost by itself.
_TRIES = 3


class Offloaded(Struct, frozen=True):
    """Whether what was left to the device came back whole: a ``checksum``, and ``segments``. None
    where that could not be tried."""

    checksum: bool | None = None
    segments: bool | None = None


def offloaded(place: Place, targets: Sequence[Target], timeout: float) -> list[Offloaded]:
    """Send ``targets``, peers that answer other probes, such packets, in the caller's network
    namespace. Raises OSError where no socket can be opened."""
    asked = _Asked(place, len(targets))
    with ExitStack() as stack:
        packets = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        packets.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        _take_only(packets, place.family, raw(place.source))
        with suppress(OSError):
            packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        packets.bind((place.device, _ETH_P_ALL))
        # A port that no other program gets: its owner would answer, or this node's stack would.
        guard = stack.enter_context(socket.socket(_FAMILY[place.family], socket.SOCK_DGRAM))
        guard.bind((place.source, 0))
        port = guard.getsockname()[1]
        for _ in range(_TRIES):
            for number, target in enumerate(targets):
                for kind, frame in enumerate(asked.frames(number, target, port)):
                    if asked.is_whole(kind, number):
                        continue
                    with suppress(OSError):
                        packets.send(frame)
                        asked.sent[kind][number] = True
                _read(packets, asked, 0.0)
            _read(packets, asked, timeout / _TRIES)
    return [asked.result(number) for number in range(len(targets))]


def _take_only(packets: socket.socket, family: int, address: bytes) -> None:
    """Have a socket receive only what comes in from this address to itself, and not pods' packets:
    a filter of classic BPF (linux/filter.h)."""
    import ctypes

    words = struct.unpack(f"!{len(address) // 4}I", address) * 2
    code = struct.pack("=HBBI", _LOAD_BYTE, 0, 0, _PACKET_TYPE)
    code += struct.pack("=HBBI", _JUMP, 2 * len(words) + 1, 0, _OUTGOING)
    for number, word in enumerate(words):
        code += struct.pack("=HBBI", _LOAD, 0, 0, _ADDRESSES[family] + 4 * number)
        code += struct.pack("=HBBI", _JUMP, 0, 2 * (len(words) - number) - 1, word)
    code += struct.pack("=HBBI", _RETURN, 0, 0, 0xFFFFFFFF) + struct.pack("=HBBI", _RETURN, 0, 0, 0)
    cells = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(cells))
    packets.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _read(packets: socket.socket, asked: _Asked, timeout: float) -> None:
    """Read what has come; then go on until all is back whole, or for ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while True:
        packets.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                asked.take(packets.recv(1 << 16))
        left = end - time.monotonic()
        if left <= 0 or asked.is_done:
            return
        packets.settimeout(left)
        with suppress(TimeoutError):
            asked.take(packets.recv(1 << 16))


class _Asked:
    """What was sent to each of ``count`` peers, by kind, and which parts of it came back whole."""

    def __init__(self, place: Place, count: int) -> None:
        self._place, self._count, self._mark = place, count, os.urandom(8)
        self.sent = [[False] * count for _ in _PARTS]
        self._whole = [[set[int]() for _ in range(count)] for _ in _PARTS]

    def result(self, number: int) -> Offloaded:
        """Return what came back from a peer. Of a firewall that lets no such packet of TCP pass
        segments say nothing."""
        plain = self.is_whole(_PLAIN, number)
        segments = self.is_whole(_CUT, number) if plain else None
        return Offloaded(self.is_whole(_LEFT, number), segments)

    def is_whole(self, kind: int, number: int) -> bool | None:
        """Whether what a peer was sent is back whole, None where it was sent nothing."""
        if not self.sent[kind][number]:
            return None
        return len(self._whole[kind][number]) == _PARTS[kind]

    @property
    def is_done(self) -> bool:
        """Whether all is back whole."""
        return all(
            self.is_whole(kind, number) is not False
            for kind in range(len(_PARTS))
            for number in range(self._count)
        )

    def frames(self, number: int, target: Target, port: int) -> Iterator[bytes]:
        """Yield a frame of each kind."""
        ports = struct.pack("!HH", (port + 1) & 0xFFFF or 1, port)
        data = self._part(_LEFT, number, 0)
        datagram = ports + struct.pack("!HH", 8 + len(data), 0) + data
        yield self._frame(target, socket.IPPROTO_UDP, datagram, _NEEDS_CSUM, 0)
        # A plain ACK: who follows connections takes it for one that is under way.
        tcp = ports + struct.pack("!IIBBHHH", 1, 1, 5 << 4, 0x10, 512, 0, 0)
        data = b"".join(self._part(_CUT, number, part) for part in range(_PARTS[_CUT]))
        yield self._frame(target, socket.IPPROTO_TCP, tcp + data, _NEEDS_CSUM, _SEGMENT)
        data = self._part(_PLAIN, number, 0)
        yield self._frame(target, socket.IPPROTO_TCP, tcp + data, 0, 0)

    def _part(self, kind: int, number: int, part: int) -> bytes:
        head = self._mark + struct.pack("!BIB", kind, number, part)
        return head.ljust(_SEGMENT, b"\xa5")

    def _frame(self, target: Target, protocol: int, body: bytes, flags: int, segment: int) -> bytes:
        family, source = self._place.family, raw(self._place.source)
        at = 16 if protocol == socket.IPPROTO_TCP else 6
        pseudo = _pseudo(source, protocol, len(body))
        # What is left to the device begins with the sum of the pseudo-header.
        value = ~checksum(pseudo) & 0xFFFF if flags else checksum(pseudo + body)
        body = body[:at] + struct.pack("!H", value) + body[at + 2 :]
        ethernet = raw_mac(target.mac) + raw_mac(self._place.mac)
        ethernet += struct.pack("!H", _ETHERTYPE[family])
        begin = _ETHERNET + _IP[family]
        virtio = _VIRTIO.pack(0, 0, 0, 0, 0, 0)
        if flags:
            kind, header = (_GSO_TCP[family], begin + 20) if segment else (0, begin + 8)
            virtio = _VIRTIO.pack(flags, kind, header, segment, begin, at)
        return virtio + ethernet + _ip(family, source, protocol, len(body)) + body

    def take(self, packet: bytes) -> None:
        """Note what of a packet that was received is ours and whole."""
        family, begin = self._place.family, _VIRTIO.size + _ETHERNET
        found = packet.find(self._mark, begin)
        body = packet[begin + _IP[family] :]
        if found < 0 or packet[begin + (8 if family == 4 else 7)] != 1:
            return  # another's, or on its way out
        protocol = packet[begin + (9 if family == 4 else 6)]
        # The kernel joins segments that are whole, and then says that the checksum is yet to come:
        # as it does of packets that never left this machine.
        is_checked = packet[0] & _NEEDS_CSUM
        if not is_checked and checksum(
            _pseudo(raw(self._place.source), protocol, len(body)) + body
        ):
            return
        while found >= 0:
            kind, number, part = struct.unpack_from("!BIB", packet, found + len(self._mark))
            if kind < len(_PARTS) and number < self._count:
                self._whole[kind][number].add(part)
            found = packet.find(self._mark, found + _SEGMENT)


def _pseudo(source: bytes, protocol: int, length: int) -> bytes:
    """Return the pseudo-header of a checksum of a packet from a node to itself (RFC 9293, 3.1; RFC
    8200, 8.1); the words of both families add up to the same."""
    return source + source + struct.pack("!II", length, protocol)


def _ip(family: int, source: bytes, protocol: int, length: int) -> bytes:
    """Return the IP header of a packet from this node to itself that one node may forward."""
    if family == 6:
        return struct.pack("!IHBB", 6 << 28, length, protocol, 2) + source + source
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 2, protocol, 0)
    head += source + source
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:]
