"""An overlay whose events are followed."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from flannel_dp._core import Events, Table, Watched
from flannel_dp.kernel.netns import call_in_netns, open_netns
from flannel_dp.tables.entries import Entry, EventFilter, Fdb, Neighbour, Nexthop, Route
from tests.lib.core_overlay import Overlay
from tests.lib.leases import NETWORK, address, mac, subnet

PEERS = range(1, 10)

Operation = tuple[int, Entry | None, Entry | None]


def listen(host: Any, chosen: EventFilter, **options: int) -> Events:
    with open_netns(host.ns) as fd:
        return Events(fd, chosen, **options)


def operations(diff: Any) -> list[Operation]:
    return sorted((diff.operation(number) for number in range(len(diff))), key=repr)


RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
RTM_NEWROUTE, RTM_DELROUTE, RTM_NEWNEIGH, RTM_DELNEIGH = 24, 25, 28, 29
RTM_NEWNEXTHOP, RTM_DELNEXTHOP = 104, 105
RTM_NEWRULE, RTM_DELRULE = 32, 33

#: Events about devices and addresses. The kernel tells of these from its work queue as well, at
#: any time after a device was made.
OF_DEVICES = {RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR}

#: The size of the message after which the attributes of a route or a nexthop start, and their
#: attributes RTA_OIF and NHA_OIF.
_OUTPUT = {
    RTM_NEWROUTE: (12, 4),
    RTM_DELROUTE: (12, 4),
    RTM_NEWNEXTHOP: (8, 5),
    RTM_DELNEXTHOP: (8, 5),
}


class Heard(NamedTuple):
    """An event as the kernel sent it."""

    kind: int
    body: bytes

    @property
    def device(self) -> int:
        """The index of the device that it is about; 0: of none."""
        if self.kind not in _OUTPUT:
            return int(struct.unpack_from("=i", self.body, 4)[0])
        at, wanted = _OUTPUT[self.kind]
        while at < len(self.body):
            size, name = struct.unpack_from("=HH", self.body, at)
            if name == wanted:
                return int(struct.unpack_from("=i", self.body, at + 4)[0])
            at += size + 3 & ~3
        return 0


def hear(events: Events) -> list[Heard]:
    """Read the events that have come, past the library."""
    heard = []
    with socket.socket(fileno=os.dup(events.fileno())) as same:
        while True:
            try:
                data = same.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return heard
            while data:
                size, kind = struct.unpack_from("=IH", data)
                heard.append(Heard(kind, data[16:size]))
                data = data[size + 3 & ~3 :]


class Followed:
    """An overlay in sync, its tables, and a socket that receives their events."""

    def __init__(self, host: Any, family: int, **changes: Any) -> None:
        self.host, self.family = host, family
        self.overlay = Overlay(host, family)
        self.wanted = self.overlay.wanted(PEERS)
        self.overlay.sync(self.wanted)
        self.filter = EventFilter(
            tunnels=(self.overlay.index,),
            uplinks=(host.ifindex,),
            ports=(self.overlay.kernel.channel.port,),
            networks=(NETWORK[family],),
        )._replace(**changes)
        self.events = listen(host, self.filter)
        self.tables = {table.kind: Watched(table, [scope]) for table, scope in self.wanted}

    def close(self) -> None:
        self.events.close()
        self.overlay.kernel.close()

    def read(self) -> tuple[int, list[tuple[int, bytes, int]]]:
        return self.events.read(self.tables.values())

    def hear(self) -> list[Heard]:
        """Read the events without comparing them with the tables."""
        return hear(self.events)

    def touched(self) -> dict[str, int]:
        return {kind: view.touched for kind, view in self.tables.items() if view.touched}

    def take(self, kind: str) -> list[Operation]:
        return operations(self.tables[kind].take())

    def truth(self, kind: str) -> list[Operation]:
        """What a reading of the whole table says."""
        table, scope = next((t, s) for t, s in self.wanted if t.kind == kind)
        return operations(self.overlay.kernel.diff(table, scope))

    def entry(self, kind: str, number: int) -> Any:
        return next(table for table, _ in self.wanted if table.kind == kind)[number - 1]


class Hand:
    """Somebody else who writes: raw messages from a socket of its own, failures ignored."""

    def __init__(self, host: Any) -> None:
        self._socket: socket.socket = call_in_netns(
            host.ns,
            lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE),
        )
        self._socket.bind((0, 0))

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def write(self, entry: Any, op: int) -> None:
        """The kernel has done it, or not, when this returns."""
        kind = {Neighbour: "neighbour", Fdb: "fdb", Nexthop: "nexthop", Route: "route"}
        table = Table(kind[type(entry)])
        table.add(entry)
        self._socket.send(table.encode(0, op))
        while True:
            try:
                self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return

    def send_to(self, port: int, data: bytes) -> None:
        self._socket.sendto(data, (port, 0))


@pytest.fixture(name="followed")
def followed_fixture(host: Any, family: int) -> Iterator[Followed]:
    made = Followed(host, family)
    yield made
    made.close()


def delete(overlay: Overlay, kind: str, number: int) -> None:
    """As somebody at a shell would."""
    family, device = overlay.family, overlay.device
    if kind == "fdb":
        overlay.bridge(f"fdb del {mac(family, number)} dev {device}")
    else:
        overlay.ip(
            {
                "neighbour": f"neigh del {address(family, number)} dev {device}",
                "nexthop": f"nexthop del id {number}",
                "route": f"route del {subnet(family, number)}",
            }[kind]
        )
