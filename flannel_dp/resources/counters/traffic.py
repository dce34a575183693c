"""The traffic of each peer, for metrics, ``explain`` and ``show --watch``: counters that are read
and joined with the names of the peers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from flannel_dp._core import Claims, parse_mac
from flannel_dp.cluster.lease import printable
from flannel_dp.errors import FlannelDPError
from flannel_dp.resources.counters.store import Counters

if TYPE_CHECKING:
    from flannel_dp.resources.counters.reading import Direction, Reading, Traffic

log = logging.getLogger(__name__)

#: Peers whose names are fetched at once.
_NAMED = 250

DIRECTIONS: tuple[Direction, ...] = ("sent", "received")


class PeerTraffic(NamedTuple):
    """What went to (sent) or came from (received) one peer; ``peer`` is its lease's name."""

    peer: str
    subnet: str
    family: int
    direction: Direction
    traffic: Traffic


class TrafficReader:
    """Reads the counters of a node. For any thread.

    ``devices`` are the names of the vxlan devices by family (4, 6). ``peers(family)`` are the
    peers as they are now, None for a family that was not synced; it is called, and what it
    returned is read, with ``lock`` held. ``dropped()`` says what a program that forwards has
    dropped, by its reason.
    """

    def __init__(
        self,
        counters: Counters,
        devices: Mapping[int, str],
        peers: Callable[[int], Claims | None],
        lock: AbstractContextManager[object],
        dropped: Callable[[], list[Any]] = list,
    ) -> None:
        self.counters = counters
        self._dropped = dropped
        self._device_names, self._peers, self._lock = devices, peers, lock

    def read(self) -> dict[str, Reading]:
        """Return what was counted, by device; empty where nothing is, or where it cannot be
        read."""
        try:
            return self.counters.read()
        except FlannelDPError as error:
            log.debug("Counters cannot be read: %(error)s", {"error": error})
            return {}

    def refused(self) -> list[Any]:
        """Return what a program that forwards has dropped (``Forwarding.dropped``)."""
        with self._lock:
            return self._dropped()

    def of_family(self, number: int) -> Reading | None:
        """Return what the device of family 4 or 6 has counted; None where nothing is."""
        return self.read().get(self._device_names.get(number, ""))

    def by_peer(self, readings: Mapping[str, Reading]) -> Iterator[PeerTraffic]:
        """Yield the traffic of every peer in ``readings``, which ``read`` returned.

        Names are fetched a few hundred at a time, so that neither the work on the tables
        waits for all of them nor memory has to hold them.
        """
        for number, device in self._device_names.items():
            reading = readings.get(device)
            start, named = 0, self._named(number, 0) if reading is not None else []
            while reading is not None and named:
                for peer, subnet, mac in named:
                    for direction in DIRECTIONS:
                        traffic = reading.traffic(mac, number, direction)
                        yield PeerTraffic(peer, subnet, number, direction, traffic)
                start += len(named)
                named = self._named(number, start)

    def _named(self, number: int, start: int) -> list[tuple[str, str, bytes]]:
        """Names, subnets and MACs of a few peers from the one numbered ``start`` on."""
        with self._lock:
            peers = self._peers(number)
            if peers is None:
                return []
            return [
                (printable(peers.name(n)), peers.subnet(n), parse_mac(peers.mac(n)))
                for n in range(start, min(start + _NAMED, len(peers)))
            ]


class Meter:
    """How much traffic each peer has, between two calls of ``rates``; ``read()`` returns the
    counters, as ``TrafficReader.read``."""

    def __init__(self, read: Callable[[], Mapping[str, Reading]]) -> None:
        self._read = read
        self._before: Mapping[str, Reading] = {}

    def rates(self) -> dict[tuple[str, int], tuple[float, float]] | None:
        """Return bits a second sent and received since the last call, by MAC and family; None
        where nothing is counted."""
        now = self._read()
        before, self._before = self._before, now
        if not now:
            return None
        found: dict[tuple[str, int], list[float]] = {}
        for name, reading in now.items():
            was = before.get(name, reading)
            span = max(reading.at - was.at, 1) / 8e9
            for mac, family, direction, traffic in reading:
                raw = bytes.fromhex(mac.replace(":", ""))
                gone = traffic.bytes - was.traffic(raw, family, direction).bytes
                rates = found.setdefault((mac, family), [0.0, 0.0])
                rates[direction == "received"] += max(0, gone) / span
        return {key: (rates[0], rates[1]) for key, rates in found.items()}
