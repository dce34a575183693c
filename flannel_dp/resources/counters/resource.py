"""How counters hang on a data plane: kept up by every sync, removed, or only read.

Importing this loads nothing of eBPF: a sync that has nothing to do with counters does not
pay for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from flannel_dp._core import parse_mac
from flannel_dp.cluster.lease import printable
from flannel_dp.errors import FlannelDPError, Unsupported

if TYPE_CHECKING:
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.reconcile.report import Report
    from flannel_dp.resources.counters.reading import Direction, Reading, Traffic
    from flannel_dp.resources.counters.store import Counters
    from flannel_dp.resources.forwarding.program import Dropped

log = logging.getLogger(__name__)

_MAC_BYTES = 6

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


class Counting:
    """The counters of a data plane: kept up with every sync if ``wanted``, removed if not
    (False), and left alone without a word (None); read in any case."""

    def __init__(self, plane: DataPlane, wanted: bool | None) -> None:
        self._plane, self.wanted = plane, wanted
        self._counters: Counters | None = None

    @property
    def counters(self) -> Counters:
        """Those of the plane's devices. Host-gw has none."""
        if self._counters is None:
            from flannel_dp.resources.counters.store import Counters

            plane = self._plane
            tunnel = plane.config.backend.type == "vxlan"
            names = [plane.resolver.device_name(n) for n in plane.families] if tunnel else []
            self._counters = Counters(names, plane.netns)
        return self._counters

    def prepare(self) -> None:
        """Do what takes more rights than a sync does. Raises as ``Counters.prepare``."""
        if self.wanted:
            self.counters.prepare()

    def follow(self, report: Report) -> None:
        """After a sync: what was done and what went wrong go into ``report``."""
        if self.wanted is None:
            return
        try:
            if self.wanted:
                if not self.counters.devices:
                    raise Unsupported(
                        "host-gw has no vxlan device, so nothing can be counted",
                        hint="leave --counters out",
                    )
                done = self.counters.ensure()
                report.counters = {name: what for name, what in done.items() if what}
                self._make_room()
            else:
                report.counters = dict.fromkeys(self.counters.remove(), "removed")
        except FlannelDPError as error:
            report.problems["counters"] = error
            log.debug("counters: %s", error)

    def lacks(self, index: int) -> bool:
        """Whether what counts should be on one of the plane's devices and is not."""
        names = (
            self._plane.resolver.device_name(number)
            for number, family in self._plane.known.items()
            if family.index == index
        )
        return bool(self.wanted) and any(self.counters.lacks(name, index) for name in names)

    def _make_room(self) -> None:
        families = self._plane.known.values()
        forgotten = self.counters.make_room(
            mac for family in families for mac in _macs(memoryview(family.peers.macs).tobytes())
        )
        if forgotten:
            log.info("counters of former peers forgotten entries=%d", forgotten)

    def remove(self, report: Report) -> None:
        """For ``clean``: whatever is there goes, whether it was wanted or not."""
        try:
            report.counters = dict.fromkeys(self.counters.remove(), "removed")
        except FlannelDPError as error:
            report.problems["counters"] = error

    def read(self) -> dict[str, Reading]:
        """What was counted, by device; empty where nothing is, or where it cannot be read."""
        try:
            return self.counters.read()
        except FlannelDPError as error:
            log.debug("counters cannot be read: %s", error)
            return {}

    def refused(self) -> list[Dropped]:
        """What a program that forwards has dropped, by reason (forwarding.REASONS)."""
        with self._plane.exclusive:
            return self._plane.forwarder.dropped()

    def of_family(self, number: int) -> Reading | None:
        """What the device of family 4 or 6 has counted; None where nothing is."""
        return self.read().get(self._plane.resolver.device_name(number))

    def by_peer(self, readings: Mapping[str, Reading]) -> Iterator[PeerTraffic]:
        """The traffic of every peer of the last sync, as ``read`` has found it.

        Names are fetched a few hundred at a time, so that neither the work on the tables
        waits for all of them nor memory has to hold them.
        """
        for number in [*self._plane.known] if readings else ():
            reading = readings.get(self._plane.resolver.device_name(number))
            start, named = 0, self._named(number, 0)
            while reading is not None and named:
                for peer, subnet, mac in named:
                    for direction in DIRECTIONS:
                        traffic = reading.traffic(mac, number, direction)
                        yield PeerTraffic(peer, subnet, number, direction, traffic)
                start += len(named)
                named = self._named(number, start)

    def _named(self, number: int, start: int) -> list[tuple[str, str, bytes]]:
        """Names, subnets and MACs of a few peers from the one numbered ``start`` on."""
        with self._plane.exclusive:
            family = self._plane.known.get(number)
            if family is None:
                return []
            claims = family.peers
            return [
                (printable(claims.name(n)), claims.subnet(n), parse_mac(claims.mac(n)))
                for n in range(start, min(start + _NAMED, len(claims)))
            ]


def _macs(column: bytes) -> Iterator[bytes]:
    """The six bytes of each MAC of a column of claims."""
    return (column[at : at + 6] for at in range(0, len(column), _MAC_BYTES))


class Meter:
    """How much traffic each peer has, between two calls of ``rates``."""

    def __init__(self, counting: Counting) -> None:
        self._counting = counting
        self._before: dict[str, Reading] = {}

    def rates(self) -> dict[tuple[str, int], tuple[float, float]] | None:
        """Bits a second sent and received since the last call, by MAC and family; None where
        nothing is counted."""
        now = self._counting.read()
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
