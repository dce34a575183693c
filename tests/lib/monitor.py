"""Everything that the kernel announces in a namespace."""

from __future__ import annotations

import socket
import struct
from typing import Any, NamedTuple

from flannel_dp.kernel.netns import call_in_netns


class Event(NamedTuple):
    """One notification. ``key`` is a prefix, an address, a MAC, an id or a device's name."""

    table: str
    deleted: bool
    device: int
    key: str


_TABLES = {16: "link", 20: "address", 24: "route", 28: "neighbour", 104: "nexthop"}
_AF_BRIDGE = 7
_GROUPS = (1, 3, 5, 7, 9, 11, 32)  # link, neighbour, addresses, routes, nexthops
_HEADS = {"link": 16, "address": 8, "route": 12, "neighbour": 12, "nexthop": 8}


class Monitor:
    """Everything that changes in a namespace while this is open, in order, like
    ``ip monitor`` and ``bridge monitor fdb``.

    The kernel queues a notification before the change returns to its author, so reading
    after the fact misses nothing; losing one (ENOBUFS) fails the test.

    One thing is left out. The kernel announces an IPv6 address, and the local route to it, from
    a work queue when duplicate address detection ends, which it also does where detection is off
    (``addrconf_dad_completed``): for an address that was there when this was opened, and was not
    written since, that is no change.
    """

    def __init__(self, host: Any) -> None:
        self._socket: socket.socket = call_in_netns(host.ns, self._listen)
        self._settled = call_in_netns(host.ns, _ipv6_addresses)

    @staticmethod
    def _listen() -> socket.socket:
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        so_rcvbufforce = 33
        listener.setsockopt(socket.SOL_SOCKET, so_rcvbufforce, 64 << 20)
        listener.bind((0, sum(1 << (group - 1) for group in _GROUPS)))
        listener.setblocking(False)
        return listener

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def events(self) -> list[Event]:
        """What happened since the last call."""
        found: list[Event] = []
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            while data:
                size, kind = struct.unpack_from("=IH", data)
                if not self._is_late(kind, data[16:size]):
                    found.append(_event(kind, data[16:size]))
                data = data[(size + 3) & ~3 :]

    def _is_late(self, kind: int, body: bytes) -> bool:
        """Tell whether this is the late word on an address that was there before."""
        if body[0] != socket.AF_INET6:
            return False
        if kind == _NEWADDR:
            address, written = _ipv6_address(body)
            return self._settled.get(address) == written
        if kind == _NEWROUTE and body[7] == _RTN_LOCAL:
            attrs = _attributes(body[_HEADS["route"] :])
            (oif,) = struct.unpack("=I", attrs[4])
            return (oif, attrs[1]) in self._settled
        return False

    def deleted(self, *tables: str) -> set[str]:
        """The keys of all deletions in ``tables`` since the last call."""
        return {e.key for e in self.events() if e.deleted and e.table in tables}


_NEWADDR, _GETADDR, _NEWROUTE, _RTN_LOCAL, _DUMP = 20, 22, 24, 2, 0x301


def _ipv6_address(body: bytes) -> tuple[tuple[int, bytes], int]:
    """Device and address of a message, and when it was last written, in 1/100 s since boot."""
    attrs = _attributes(body[_HEADS["address"] :])
    (index,) = struct.unpack_from("=I", body, 4)
    _, _, _, written = struct.unpack("=IIII", attrs[6])
    return (index, attrs[1]), written


def _ipv6_addresses() -> dict[tuple[int, bytes], int]:
    """All of this namespace, each with the time at which it was written."""
    found: dict[tuple[int, bytes], int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asking:
        asking.sendall(struct.pack("=IHHIIBxxxI", 24, _GETADDR, _DUMP, 1, 0, socket.AF_INET6, 0))
        while True:
            data = asking.recv(1 << 16)
            while data:
                size, kind = struct.unpack_from("=IH", data)
                if kind != _NEWADDR:  # NLMSG_DONE
                    return found
                address, written = _ipv6_address(data[16:size])
                found[address] = written
                data = data[(size + 3) & ~3 :]


def _event(kind: int, body: bytes) -> Event:
    table = _TABLES.get(kind & ~1 if kind < 100 else 104, str(kind))
    deleted = bool(kind & 1)
    attrs = _attributes(body[_HEADS.get(table, len(body)) :])
    if table == "route":
        family, length = body[0], body[1]
        dst = attrs.get(1, bytes(4 if family == socket.AF_INET else 16))
        (oif,) = struct.unpack("=I", attrs.get(4, bytes(4)))
        return Event(table, deleted, oif, f"{socket.inet_ntop(family, dst)}/{length}")
    if table == "neighbour":
        family, device = struct.unpack_from("=BxxxI", body)
        if family == _AF_BRIDGE:
            return Event("fdb", deleted, device, attrs[2].hex(":"))
        return Event(table, deleted, device, socket.inet_ntop(family, attrs[1]))
    if table == "nexthop":
        (number,) = struct.unpack("=I", attrs[1])
        (oif,) = struct.unpack("=I", attrs.get(5, bytes(4)))
        return Event(table, deleted, oif, str(number))
    if table == "link":
        (device,) = struct.unpack_from("=i", body, 4)
        return Event(table, deleted, device, attrs.get(3, b"").rstrip(b"\0").decode())
    if table == "address":
        (device,) = struct.unpack_from("=I", body, 4)
        raw = attrs.get(1, b"")
        family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
        return Event(table, deleted, device, socket.inet_ntop(family, raw))
    return Event(table, deleted, 0, "")


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        found[kind & 0x3FFF] = data[4:size]
        data = data[(size + 3) & ~3 :]
    return found
