"""``flannel-dp stats``: packets and bytes per peer, drops and their reasons, last seen.

The counts are the kernel's (counters.py). Whose they are comes from the kernel's own tables,
as ``show`` reads them, and from the leases where those are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, to_builtins

from flannel_dp.bpf import filters
from flannel_dp.look.fitting import Grid, bar
from flannel_dp.look.held import PeerView
from flannel_dp.look.show import FamilyView, show
from flannel_dp.look.terminal import Paint, count, human, human_time, plain
from flannel_dp.resources.counters.device import FILTER
from flannel_dp.resources.counters.reading import Direction, Reading, Traffic

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Leases
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.resources.forwarding.program import Dropped as Refused

#: Seconds between two looks at the tables that say whose a MAC is.
NAMES_SECONDS = 10.0

_ENABLE = "'flannel-dp sync --counters' starts counting"


class Flow(Struct, frozen=True):
    """One direction of a peer's traffic: ``packets`` and ``bytes`` (of inner Ethernet frames)
    in all, ``last`` in seconds since the epoch (None: never), and, between two looks, packets
    and bytes in a second (None: only one look)."""

    packets: int = 0
    bytes: int = 0
    last: float | None = None
    packet_rate: float | None = None
    byte_rate: float | None = None


class DroppedView(Struct, frozen=True):
    """So many ``packets`` that the kernel dropped on the device, by its own ``reason``
    (``NETFILTER_DROP``); ``direction`` is "sent", "received" or "" where it is unknown."""

    reason: str
    direction: Direction
    packets: int


class PeerStats(Struct, frozen=True):
    """One peer; ``subnet`` is empty for a tunnel end that no route leads to (any more), and
    ``lease`` where no leases were given."""

    subnet: str
    mac: str
    endpoint: str
    lease: str
    sent: Flow
    received: Flow
    drops: tuple[DroppedView, ...] = ()


class FamilyStats(Struct, frozen=True):
    """One family. ``problem`` says why its device is not counted, or only in part.

    ``groups`` are frames to and from group addresses, ``overflow`` is what had no room in the
    map, both by direction; ``drops`` are those that name no peer. ``direct`` peers are not
    reached through the device and so are not counted.
    """

    family: int
    device: str
    problem: str
    peers: tuple[PeerStats, ...] = ()
    groups: Mapping[str, int] | None = None
    overflow: Mapping[str, int] | None = None
    drops: tuple[DroppedView, ...] = ()
    direct: int = 0
    more: int = 0  # always 0 now


class Stats(Struct, frozen=True):
    """What :func:`stats` found. ``seconds`` is the time that rates are means of, None without
    rates. ``refused`` is what a program that forwards has dropped, by its own reasons. ``str()``
    of it is what the command prints."""

    families: tuple[FamilyStats, ...]
    seconds: float | None = None
    with_leases: bool = False
    refused: tuple[Refused, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``"schema": 1``; keys are only ever added."""
        return {
            "schema": 1,
            "seconds": self.seconds,
            "families": [to_builtins(family) for family in self.families],
            "forwarding_drops": [to_builtins(one) for one in self.refused],
        }

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield the statistics line by line, for a terminal of so many columns (0: any)."""
        for number, family in enumerate(self.families):
            if number:
                yield ""
            yield from _family_lines(family, self, paint, width)
        yield from (paint(line, "yellow") for line in self._refused())

    def drop_lines(self) -> Iterator[str]:
        """Yield what was dropped, and why."""
        for family in self.families:
            yield from _drops_of(family)
        yield from self._refused()

    def _refused(self) -> list[str]:
        told = [f"{one.packets} {one.reason}" for one in self.refused if one.packets]
        return [f"dropped by the forwarding program: {', '.join(told)}"] if told else []

    def __str__(self) -> str:
        return "\n".join(self.lines())


def stats(overlay: Overlay, leases: Leases | None = None) -> Stats:
    """Read the traffic counters of ``overlay``'s devices; write nothing.

    With ``leases`` peers have the names of theirs. Equivalent: ``bpftool map dump pinned
    PATH`` joined with ``bridge fdb show`` and ``ip route show`` by hand. Raises KernelError
    when they cannot be read, and as :meth:`DataPlane.plan` for leases.
    """
    return StatsReader(overlay, leases).read()


class StatsReader:
    """Looks again and again: from the second look on there are rates."""

    def __init__(
        self,
        overlay: Overlay,
        leases: Leases | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._overlay, self._leases, self._clock = overlay, leases, clock
        self._views: tuple[FamilyView, ...] = ()
        self._named = float("-inf")
        self._before: dict[str, Reading] = {}

    def read(self) -> Stats:
        """Return the counters now. Raises as ``stats``."""
        if self._clock() - self._named >= NAMES_SECONDS:
            self._views = show(self._overlay, self._leases).families
            self._named = self._clock()
        readings = self._overlay.counting.counters.read()
        families = tuple(self._family(view, readings) for view in self._views)
        spans = [
            (reading.at - self._before[name].at) / 1e9
            for name, reading in readings.items()
            if name in self._before
        ]
        self._before = readings
        refused = tuple(self._overlay.counting.refused())
        return Stats(families, max(spans, default=None), self._leases is not None, refused)

    def _family(self, view: FamilyView, readings: Mapping[str, Reading]) -> FamilyStats:
        direct = sum(peer.way == "direct" for peer in view.peers)
        name = view.device_name
        reading = readings.get(name)
        if reading is None:
            without = "host-gw has no vxlan device: nothing is counted"
            text = f"not counted: {_ENABLE}" if name else without
            return FamilyStats(view.family, name, text, direct=direct)
        peers = _Peers(view, reading, self._before.get(name))
        return FamilyStats(
            view.family,
            name,
            self._problem(view.index, reading),
            tuple(peers),
            _sums(reading.groups, view.family),
            _sums(reading.overflow, view.family),
            peers.nameless(),
            direct,
        )

    def _problem(self, index: int, reading: Reading) -> str:
        if not index:
            return "there is no such device; what was counted before is still there"
        attached = {
            one.parent
            for one in filters.read_filters(index, self._overlay.host.netns)
            if one.name == FILTER
        }
        missing = [parent for parent in ("ingress", "egress") if parent not in attached]
        if missing:
            return f"the filter is detached from {' and '.join(missing)}: {_ENABLE} again"
        return "" if reading.reasons else "this kernel gives no reasons for drops (Linux 5.17)"


class _Peers:
    """The peers of one family in a reading, and what goes with them."""

    def __init__(self, view: FamilyView, reading: Reading, before: Reading | None) -> None:
        self._view, self._reading, self._before = view, reading, before
        self._wall = time.time()
        self._drops: dict[str, list[DroppedView]] = {}
        for one in reading.drops:
            if one.family == view.family:
                said = DroppedView(one.reason, one.direction, one.packets)
                self._drops.setdefault(one.mac, []).append(said)

    def __iter__(self) -> Iterator[PeerStats]:
        """Yield those that routes lead to, then those that only the counters know of."""
        seen = set()
        for peer in self._view.peers:
            if peer.way == "tunnel" and peer.mac:
                seen.add(peer.mac)
                yield self._peer(peer)
        number = self._view.family
        others = {mac for mac, family, _, _ in self._reading if family == number}
        for mac in sorted((others | self._drops.keys()) - seen - {""}):
            yield self._peer(PeerView("", mac=mac))

    def nameless(self) -> tuple[DroppedView, ...]:
        """Drops of packets that name no peer."""
        return tuple(self._drops.get("", ()))

    def _peer(self, peer: PeerView) -> PeerStats:
        mac = bytes.fromhex(peer.mac.replace(":", ""))
        drops = tuple(self._drops.get(peer.mac, ()))
        flows = (self._flow(mac, "sent"), self._flow(mac, "received"))
        return PeerStats(peer.subnet, peer.mac, peer.endpoint, peer.lease, *flows, drops)

    def _flow(self, mac: bytes, direction: Direction) -> Flow:
        now = self._reading.traffic(mac, self._view.family, direction)
        ago = self._reading.seconds_since(now.last)
        last = None if ago is None else round(self._wall - ago, 3)
        if self._before is None:
            return Flow(now.packets, now.bytes, last)
        was = self._before.traffic(mac, self._view.family, direction)
        span = max(self._reading.at - self._before.at, 1) / 1e9
        # Counters that were removed and set up anew begin again.
        packets = max(0, now.packets - was.packets)
        size = max(0, now.bytes - was.bytes)
        return Flow(now.packets, now.bytes, last, round(packets / span, 3), round(size / span, 3))


def _sums(found: Mapping[tuple[int, Direction], Traffic], number: int) -> dict[str, int]:
    """Packets by direction: the family's, and those that are no IP."""
    return {
        direction: sum(
            traffic.packets
            for (family, way), traffic in found.items()
            if way == direction and family in (0, number)
        )
        for direction in ("sent", "received")
    }


# ---- text ------------------------------------------------------------------------

_BAR = 8  # characters


def _family_lines(family: FamilyStats, whole: Stats, paint: Paint, width: int) -> Iterator[str]:
    title = f"IPv{family.family} {family.device}".rstrip()
    if family.problem:
        title += f": {family.problem}"
    yield paint(title, "yellow" if family.problem else "bold")
    if family.groups is None:
        return
    if family.peers:
        yield from grid_of(family.peers, whole, indent="  ").lines(width)
    yield from (paint(f"  {line}", "yellow") for line in _drops_of(family))
    yield f"  {summary(family)}"


def summary(family: FamilyStats) -> str:
    """Return how many peers there are, and what was counted of none of them."""
    words = [count(len(family.peers), "peer")]
    words += [f"{family.direct} direct (not counted)"] * bool(family.direct)
    words += _two("to groups", family.groups or {}) + _two("without room", family.overflow or {})
    return ", ".join(words)


def grid_of(peers: Sequence[PeerStats], whole: Stats, *, indent: str = "") -> Grid:
    """Return the table of these peers, which leaves out what is less important on a narrow
    terminal: drops and traffic stay."""
    rates = whole.seconds is not None
    titles = ["SUBNET", "PUBLIC IP", "MAC"] + ["LEASE"] * whole.with_leases
    drop: list[str | tuple[str, ...]] = ["MAC"]
    if rates:
        titles += ["SENT PKT/S", "SENT BIT/S", "RECV PKT/S", "RECV BIT/S", ""]
    titles += ["SENT PKT", "SENT B", "RECV PKT", "RECV B", "LAST SEEN", "DROPS"]
    totals = [("SENT PKT", "RECV PKT"), ("SENT B", "RECV B")]
    drop += [*totals, ("SENT PKT/S", "RECV PKT/S")] if rates else []
    drop += ["PUBLIC IP"] + ["LEASE"] * whole.with_leases
    drop += ["", "LAST SEEN"] if rates else [totals[0], "LAST SEEN"]
    most = max((_rate(peer) for peer in peers), default=0.0)
    now = time.time()
    rows = [titles]
    for peer in peers:
        row = [peer.subnet or "-", peer.endpoint or "-", peer.mac]
        row += [peer.lease or "-"] * whole.with_leases
        if rates:
            for flow in (peer.sent, peer.received):
                row += [human(flow.packet_rate or 0), f"{human(8 * (flow.byte_rate or 0))}bit"]
            row.append(bar(_rate(peer) / (most or 1.0), _BAR))
        for flow in (peer.sent, peer.received):
            row += [f"{flow.packets:,}", f"{human(flow.bytes)}B"]
        row += [_ago(peer.received.last, now), f"{sum(one.packets for one in peer.drops):,}"]
        rows.append(row)
    left = ("SUBNET", "PUBLIC IP", "MAC", "LEASE", "")
    place = titles.index
    return Grid(
        rows,
        right=[number for number, title in enumerate(titles) if title not in left],
        drop=[
            place(one) if isinstance(one, str) else tuple(place(title) for title in one)
            for one in drop
        ],
        indent=indent,
    )


def _rate(peer: PeerStats) -> float:
    return (peer.sent.byte_rate or 0.0) + (peer.received.byte_rate or 0.0)


def _drops_of(family: FamilyStats) -> Iterator[str]:
    for peer in family.peers:
        yield from _drop_lines(peer.drops, peer.subnet or peer.mac)
    yield from _drop_lines(family.drops, "no peer")


def _drop_lines(drops: tuple[DroppedView, ...], whose: str) -> Iterator[str]:
    for one in drops:
        way = f" ({one.direction})" if one.direction else ""
        yield f"dropped: {whose}{way}: {one.packets} {one.reason}"


def _two(what: str, packets: Mapping[str, int]) -> list[str]:
    return [f"{n} {way} {what}" for way, n in packets.items() if n]


def _ago(last: float | None, now: float) -> str:
    return "never" if last is None else f"{human_time(max(0.0, now - last))} ago"
