"""All peers that one prober probes: the lines that they are on, and what is known of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from flannel_dp._core import TRIP_BOUNDS, PeerProber, Table
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS
from flannel_dp.probe.life import LIVES, LifeChange, MtuChange, PeerLife, Totals
from flannel_dp.probe.line import Line, PacketSockets, PathMtuMode
from flannel_dp.probe.wanted import Wanted

#: Bits a second that all probes together may take, and as many for their answers. Where the
#: interval has to be stretched, small ones take less, so that path MTUs are measured, too.
ALL_BITS, MOST_BITS, STRETCHED_BITS = 1_000_000, 950_000, 850_000


#: The share of a processor that all probes together may take.
MOST_USED = 0.009


class Lines:
    """The lines of one prober, by family, path and device. Peers come and go on the prober's thread
    alone; they are read from any."""

    def __init__(
        self,
        netns: NetNS,
        *,
        interval: float,
        paths: int,
        sockets: PacketSockets | None,
        path_mtu: PathMtuMode = "warn",
    ) -> None:
        self.interval, self.paths, self.netns, self.sockets = interval, paths, netns, sockets
        self._path_mtu = path_mtu
        #: Path MTUs by subnet, for lines that are yet to be opened.
        self._carried: dict[str, int] = {}
        self._lines: dict[tuple[int, str, str], Line] = {}
        self._lock = threading.Lock()  # lines and what they hold, but for the work of the C unit
        #: What lines that are gone have counted.
        self._past = (0, 0, (0,) * (len(TRIP_BOUNDS) + 1), 0.0)

    def __iter__(self) -> Iterator[Line]:
        return iter([*self._lines.values()])

    def __len__(self) -> int:
        with self._lock:
            return sum(len(line.prober) for line in self._lines.values())

    @property
    def probers(self) -> list[PeerProber]:
        """The C unit's object of each line."""
        return [line.prober for line in self._lines.values()]

    # ---- which peers

    def set(self, wanted: list[Wanted]) -> None:
        """Have exactly these peers. Raises KernelError, NotPermitted."""
        with self._lock:
            new = {one.key: one for one in wanted}
            for key, line in [*self._lines.items()]:
                if key not in new or new[key].place != line.place:
                    self._carried |= {one.subnet: one.path_mtu for one in line.narrow()}
                    self._keep_totals(line)
                    line.close()
                    del self._lines[key]
            for key, one in new.items():
                if key not in self._lines:
                    self._lines[key] = Line(
                        one,
                        self.netns,
                        paths=self.paths,
                        interval=self.interval,
                        most_used=MOST_USED,
                        sockets=self.sockets,
                        path_mtu=self._path_mtu,
                    )
                self._lines[key].keep(one)
                self._lines[key].note_mtus(self._carried)
            self._carried = {}
            self._stretch()

    def alter(self, family: int, gone: Table, come: Table) -> None:
        """Add and forget peers of a family all of which are reached the same way."""
        with self._lock:
            for line in self._lines.values():
                if line.place.family == family:
                    line.prober.put(come)
                    line.prober.remove(gone)
            self._stretch()

    def _stretch(self) -> None:
        """Set the interval so that small probes together stay below MOST_BITS, and what large ones
        may take beside them."""
        bits = sum(len(line.prober) * line.bits for line in self._lines.values())
        small = bits / self.interval
        stretched = self.interval
        if small > MOST_BITS:
            stretched, small = min(3600.0, bits / STRETCHED_BITS), STRETCHED_BITS
        peers = sum(len(line.prober) for line in self._lines.values())
        for line in self._lines.values():
            line.prober.set_interval(stretched)
            if peers:
                share = len(line.prober) / peers
                line.prober.set_large_rate(max(0, int((ALL_BITS - small) / 8 * share)))

    def _keep_totals(self, line: Line) -> None:
        sent, came, trips, seconds = line.prober.totals
        before = self._past
        self._past = (
            before[0] + sent,
            before[1] + came,
            tuple(a + b for a, b in zip(before[2], trips, strict=True)),
            before[3] + seconds,
        )

    def close(self) -> None:
        """Close the sockets."""
        with self._lock:
            for line in self._lines.values():
                line.close()

    # ---- what is known

    def peers(self, lives: tuple[str, ...], most: int | None) -> list[PeerLife]:
        """See :meth:`Prober.peers`."""
        found: list[PeerLife] = []
        numbers = [LIVES.index(life) for life in lives] if lives else [-1]
        with self._lock:
            for line in self._lines.values():
                for life in numbers:
                    room = 0xFFFFFFFF if most is None else most - len(found)
                    found += [line.peer(n) for n in line.prober.numbers(life, room)]
        return found

    def peer(self, subnet: str) -> PeerLife | None:
        """See :meth:`Prober.peer`."""
        with self._lock:
            for line in self._lines.values():
                if (number := line.prober.find(subnet)) >= 0:
                    return line.peer(number)
        return None

    @property
    def totals(self) -> Totals:
        """The counts of all peers and probes."""
        with self._lock:
            sent, came, trips, seconds = self._past
            lives: dict[int, dict[str, int]] = {}
            longest = self.interval
            for line in self._lines.values():
                more = line.prober.totals
                sent, came, seconds = sent + more[0], came + more[1], seconds + more[3]
                trips = tuple(a + b for a, b in zip(trips, more[2], strict=True))
                by = lives.setdefault(line.place.family, dict.fromkeys(LIVES, 0))
                for life, count in zip(LIVES, line.prober.lives, strict=True):
                    by[life] += count
                longest = max(longest, line.prober.interval)
        return Totals(lives, sent, came, trips, seconds, longest)

    def changes(self) -> tuple[list[LifeChange], bool]:
        """Return the peers whose life has changed since this was called last, and whether no peer
        of some line answers at all."""
        with self._lock:
            changes = [one for line in self._lines.values() for one in line.changes()]
            return changes, any(line.prober.silent for line in self._lines.values())

    def mtu_changes(self) -> list[MtuChange]:
        """Return the peers whose path MTU has changed since this was called last."""
        with self._lock:
            return [one for line in self._lines.values() for one in line.mtu_changes()]

    def narrow(self, most: int | None) -> list[PeerLife]:
        """Return the peers whose path takes less than the device's MTU, ``most`` at most."""
        found: list[PeerLife] = []
        with self._lock:
            for line in self._lines.values():
                found += line.narrow(None if most is None else most - len(found))
        return found

    @property
    def narrow_count(self) -> int:
        """How many such peers there are."""
        with self._lock:
            return sum(len(line.prober.narrow()) for line in self._lines.values())

    def note_mtus(self, known: Mapping[str, int]) -> None:
        """Take path MTUs as known, by subnet, until they are measured."""
        with self._lock:
            self._carried |= known
            for line in self._lines.values():
                line.note_mtus(known)

    @property
    def lacks_macs(self) -> bool:
        """Whether there are peers on the underlay whose MACs have to be learned."""
        return any(line.lacks_macs for line in self._lines.values())

    def learn(self) -> None:
        """Learn some of these."""
        for line in self:
            if line.lacks_macs:
                try:
                    with self._lock:
                        line.learn()
                except (FlannelDPError, OSError):
                    continue  # the device is gone, say, which its silence tells

    def own_problem(self) -> str:
        """Return why no peer can be proven, in words; "" for nothing."""
        try:
            with LinkReader(self.netns) as reader:
                for line in self:
                    if problem := line.own_problem(reader):
                        return problem
                for line in self:
                    if line.prober.silent:
                        return line.silence(reader)
        except FlannelDPError as error:
            return str(error)
        return ""
