"""``show --watch`` on a terminal: what is on the screen, redrawn in place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from flannel_dp.look.live_turns import (
    LEAST_SECONDS,
    DriftLine,
    Events,
    Look,
    Rates,
    Turn,
    clean,
    timestamp,
    turns,
)
from flannel_dp.look.terminal import human

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from flannel_dp.look.held import PeerView
    from flannel_dp.look.show import FamilyView, Overview

#: So many events stay on the screen.
SHOWN_EVENTS = 10

_LEAST_ROWS = 5  # of the table, before events get their lines
_DRAW = 0.1  # seconds between two drawings, however much happens
_RATE_SECONDS = 10.0  # rates are means over so long
_REPAIR_SECONDS = 60.0  # what is not repaired after so long was removed on purpose

_IN_ORDER = ("ok", "foreign")
_STATE_COLOURS = {"ok": "green", "foreign": "yellow", "missing": "yellow"}
_CHANGE_COLOURS = {"deleted": "red", "changed": "yellow", "foreign": "yellow", "overrun": "red"}


def draw(
    look: Look,
    events: Events,
    console: Console,
    stop: Callable[[], bool],
    view: Screen,
    clock: Callable[[], float],
) -> None:
    """Redraw the view for what ``look`` and ``events`` bring, until ``stop`` says so."""
    from rich.live import Live

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        drawn = float("-inf")
        for turn in turns(look, events, stop, clock):
            view.take(turn)
            if clock() - drawn >= _DRAW:
                live.update(view.render(console.width, console.height), refresh=True)
                drawn = clock()
        live.update(view.render(console.width, console.height), refresh=True)


class _Rate:
    """How often something happened: in all, and in a second lately."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()
        self.total = 0

    def add(self, count: int) -> None:
        if count:
            self.total += count
            self._recent.append((self._clock(), count))

    @property
    def per_second(self) -> float:
        while self._recent and self._recent[0][0] <= self._clock() - _RATE_SECONDS:
            self._recent.popleft()
        return sum(count for _, count in self._recent) / _RATE_SECONDS


class Screen:
    """What is on the screen."""

    def __init__(
        self,
        source: str,
        clock: Callable[[], float],
        rates: Callable[[], Rates | None] = lambda: None,
    ) -> None:
        self._source, self._clock = clean(source), clock
        self._rates_of, self._traffic, self._metered = rates, rates(), clock()
        self._families: tuple[FamilyView, ...] = ()
        self._peers: list[PeerView] = []
        self._ways: list[str] = []
        self._error = ""
        self._last: deque[DriftLine] = deque(maxlen=SHOWN_EVENTS)
        self._touched: dict[str, float] = {}  # keys that something happened to, since when
        self._events, self._repaired = _Rate(clock), _Rate(clock)

    def take(self, turn: Turn) -> None:
        if self._clock() - self._metered >= LEAST_SECONDS:
            self._traffic, self._metered = self._rates_of(), self._clock()
        self._events.add(len(turn.events))
        self._last.extend(turn.events)
        for event in turn.events:
            if event.told_by == "kernel" and event.change in ("deleted", "changed"):
                self._touched.setdefault(event.what.partition(" ")[0], self._clock())
        if turn.overview is not None:
            self._take(turn.overview)
            self._error = ""
        if turn.error is not None:
            self._error = str(turn.error)

    def _take(self, overview: Overview) -> None:
        self._families = overview.families
        peers = [peer for view in overview.families for peer in view.peers]
        bad = [peer for peer in peers if peer.state not in _IN_ORDER]
        good = [peer for peer in peers if peer.state in _IN_ORDER]
        self._peers = bad + good  # what is wrong is what a person looks for
        self._ways = [
            _count(len(peers), "peer"),
            f"{sum(peer.way == 'tunnel' for peer in peers):,} tunnel",
            f"{sum(peer.way == 'direct' for peer in peers):,} direct",
            f"{len(bad):,} out of sync",
        ]
        strays = sum(len(view.strays) for view in overview.families)
        self._ways += [f"{strays:,} stray"] * bool(strays)
        self._ways += [f"{len(overview.rejected):,} rejected"] * bool(overview.rejected)
        self._ways += ["stopped by a firewall"] * bool(overview.blockers)
        self._ways += [_count(len(overview.warnings), "warning")] * bool(overview.warnings)
        self._count_repaired(bad, good)

    def _count_repaired(self, bad: Iterable[PeerView], good: Iterable[PeerView]) -> None:
        """Count peers as repaired that were changed and are in sync again."""
        now = self._clock()
        if self._touched:
            repaired = 0
            for peer in good:
                found = {peer.subnet, peer.via, peer.mac} & self._touched.keys()
                for key in found:
                    del self._touched[key]
                repaired += bool(found)
            self._repaired.add(repaired)
            old = now - _REPAIR_SECONDS
            self._touched = {key: since for key, since in self._touched.items() if since > old}
        for peer in bad:
            self._touched.setdefault(peer.subnet, now)

    # ---- drawing

    def render(self, width: int, height: int) -> RenderableType:
        """Return all of it, in no more than ``height`` lines."""
        from rich.console import Group

        top = self._head()
        room = height - len(top) - 4  # titles, an empty line, the rates, the cursor's line
        below = self._below(min(SHOWN_EVENTS, max(1, room - _LEAST_ROWS)))
        rows = max(1, room - len(below))
        if len(self._peers) > rows:
            rows = max(1, rows - 1)
        parts: list[RenderableType] = [*top, self._table(self._peers[:rows])]
        if len(self._peers) > rows:
            parts.append(_line(f"... and {len(self._peers) - rows:,} more", "dim"))
        return Group(*parts, _line(""), *below, self._rates())

    def _head(self) -> list[Text]:
        found = []
        for view in self._families:
            text, style = view.title, "bold"
            if view.problem:  # the rest would push it off the line
                text, style = f"{view.device_name}: {view.problem}", "bold red"
            found.append(_line(f"IPv{view.family} {view.network}  {clean(text)}", style))
            if view.error:
                found.append(_line(clean(view.error), "red"))
        words = [*self._ways, f"source {self._source}"] if self._source else self._ways
        found.append(_line(", ".join(words)))
        if self._error:
            found.append(_line(clean(self._error), "red"))
        return found

    def _table(self, peers: Sequence[PeerView]) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("SUBNET", "PUBLIC IP", "MAC", "PATH", "STATE"):
            table.add_column(title, no_wrap=True, overflow="ellipsis")
        for title in ("SENT/S", "RECEIVED/S") if self._traffic is not None else ():
            table.add_column(title, no_wrap=True, justify="right")
        for peer in peers:
            state = f"{peer.state} ({peer.detail})" if peer.detail else peer.state
            style = _STATE_COLOURS.get(peer.state, "red")
            cells = (peer.subnet, peer.endpoint or "-", peer.mac or "-", peer.way)
            table.add_row(*map(Text, cells), Text(state, style), *map(Text, self._meter(peer)))
        return table

    def _meter(self, peer: PeerView) -> tuple[str, ...]:
        """Return the peer's traffic in bits a second, if anything is counted."""
        if self._traffic is None:
            return ()
        found = self._traffic.get((peer.mac, 6 if ":" in peer.subnet else 4))
        return tuple(f"{human(bits)}bit" for bits in found) if found else ("-", "-")

    def _below(self, most: int) -> list[Text]:
        return [
            _line(
                f"{timestamp(event.time)} {event.word} {event}",
                _CHANGE_COLOURS.get(event.change, ""),
            )
            for event in [*self._last][-most:]
        ]

    def _rates(self) -> Text:
        return _line(
            f"{self._events.per_second:.1f} events/s, {self._repaired.per_second:.1f} repaired/s;"
            f" {_count(self._events.total, 'event')}, {self._repaired.total:,} repaired in all",
            "bold",
        )


def _line(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
