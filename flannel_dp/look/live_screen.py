"""``show --watch`` on a terminal: what is on the screen, and its keys."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from flannel_dp.look.fitting import Grid, bar, whole_words
from flannel_dp.look.live_turns import (
    LEAST_SECONDS,
    DriftLine,
    Events,
    Look,
    Rates,
    Turn,
    clean,
    turns,
)
from flannel_dp.look.pager import Pager
from flannel_dp.look.terminal import human

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from flannel_dp.cluster.rejections import Rejection
    from flannel_dp.look.full_screen import Row
    from flannel_dp.look.held import PeerView
    from flannel_dp.look.lives import Lives
    from flannel_dp.look.show import FamilyView, Overview

#: So many events stay on the screen.
SHOWN_EVENTS = 10

_DRAW = 0.1  # seconds between two drawings, however much happens
_BAR = 8  # characters
_RATE_SECONDS = 10.0  # rates are means over so long
_REPAIR_SECONDS = 60.0  # what is not repaired after so long was removed on purpose

_IN_ORDER = ("ok", "foreign")
_STATE_COLOURS = {"ok": "", "foreign": "yellow", "missing": "yellow"}
_LIFE_COLOURS = {"dead": "red", "lossy": "yellow"}
#: By the word that says what kind of line it is.
_EVENT_COLOURS = {
    "change": "", "drift": "magenta", "rejection": "yellow", "problem": "red", "peer": "green",
    "agent": "cyan",
}  # fmt: skip


class Terminal(Protocol):
    """What a view draws on, and has its keys from: :class:`full_screen.FullScreen`."""

    def wait(self, seconds: float, also: int = -1) -> list[str]: ...
    def size(self) -> tuple[int, int]: ...
    def draw(self, rows: Sequence[Row]) -> None: ...


def draw(
    look: Look,
    events: Events,
    opened: AbstractContextManager[Terminal],
    stop: Callable[[], bool],
    view: Screen,
    clock: Callable[[], float],
    *,
    fileno: int = -1,
) -> None:
    """Redraw the view for what ``look``, ``events`` and keys bring, until ``stop`` says so or a key
    ends it. ``fileno`` can be read when there are events."""
    pressed: list[str] = []

    def waiting(timeout: float | None) -> list[DriftLine]:
        seconds = 0.0 if fileno < 0 or timeout is None else timeout
        pressed.extend(terminal.wait(seconds, fileno))
        return events(timeout if fileno < 0 else 0.0)

    looks = turns(look, waiting, lambda: stop() or view.pager.done, clock)
    view.take(next(looks))  # where that fails the terminal is as it was
    with opened as terminal:
        terminal.draw(view.render(*terminal.size()))
        drawn = clock()
        for turn in looks:
            view.take(turn)
            for key in pressed:
                view.pager.press(key)
            if pressed or clock() - drawn >= _DRAW:
                terminal.draw(view.render(*terminal.size()))
                drawn = clock()
            pressed.clear()
        terminal.draw(view.render(*terminal.size()))


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
        self.pager = Pager()
        self._source, self._clock = clean(source), clock
        self._rates_of = rates
        self._measure()
        self._families: tuple[FamilyView, ...] = ()
        self._peers: list[PeerView] = []
        self._rejected: Sequence[Rejection] = ()
        self._lives: Lives | None = None
        self._ways: list[str] = []
        self._error = ""
        self._last: deque[DriftLine] = deque(maxlen=SHOWN_EVENTS)
        self._touched: dict[str, float] = {}  # keys that something happened to, since when
        self._events, self._repaired = _Rate(clock), _Rate(clock)
        self._tabulate()

    def _measure(self) -> None:
        self._traffic, self._metered = self._rates_of(), self._clock()
        self._busiest = max((sum(both) for both in (self._traffic or {}).values()), default=0.0)

    def take(self, turn: Turn) -> None:
        if self._clock() - self._metered >= LEAST_SECONDS:
            self._measure()
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
        # What is wrong is what a person looks for.
        self._lives = overview.lives
        self._peers = bad + sorted(good, key=self._order)
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
        dead = sum(self._life_of(peer) == "dead" for peer in peers)
        self._ways[4:4] = [f"{dead:,} dead"] * bool(dead)
        self._rejected = overview.rejected
        self._count_repaired(bad, good)
        self._tabulate()

    def _life_of(self, peer: PeerView) -> str:
        """Return what an agent's probes say of a peer, "" for nothing."""
        life = self._lives.of(peer.subnet) if self._lives else None
        return life.life if life else ""

    def _order(self, peer: PeerView) -> tuple[bool, bool]:
        """Sort peers whose entries are in sync: dead ones, those with a fault, all others."""
        life = self._life_of(peer)
        return life != "dead", not peer.difference and life not in _LIFE_COLOURS

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

    # ---- the table

    def _tabulate(self) -> None:
        """Make the rows of the table: rejected leases, peers that are out of sync, all others."""
        lives, probed = self._lives, self._lives is not None
        titles = ["SUBNET", "PUBLIC IP", "MAC", "PATH", "STATE"] + ["LIFE"] * probed
        rows, colours = [], []
        for one in self._rejected:
            row = [clean(one.lease), "-", "-", "-", f"rejected ({one.reason})"]
            rows.append(row + ["-"] * probed)
            colours.append("yellow")
        for peer in self._peers:
            detail = peer.detail or (peer.difference if peer.state in _IN_ORDER else "")
            state = f"{peer.state} ({detail})" if detail else peer.state
            life = lives.of(peer.subnet) if lives else None
            row = [peer.subnet, peer.endpoint or "-", peer.mac or "-", peer.way, clean(state)]
            rows.append(row + [str(life or "-")] * probed)
            colour = _STATE_COLOURS.get(peer.state, "red")
            if life and colour != "red":
                colour = _LIFE_COLOURS.get(life.life, colour)
            colours.append(colour or ("yellow" if peer.difference else ""))
        self._rows, self._colours = rows, colours
        own = len(titles)
        self._grid = Grid([titles, *rows], drop=(2, 3, 1))
        # What is measured is filled in for the rows that are shown.
        wide = [[*row, "", "", ""] for row in rows]
        self._metered_grid = Grid(
            [[*titles, "SENT/S", "RECEIVED/S", ""], *wide],
            right=(own, own + 1),
            drop=(2, 3, own + 2, 1),
            least=[*[""] * own, "99.9 kbit", "99.9 kbit", " " * _BAR],
        )

    def _metered_row(self, row: list[str]) -> list[str]:
        """Return a row with the peer's traffic in bits a second, and a bar beside the busiest
        peer's."""
        family = 6 if ":" in row[0] else 4
        found = (self._traffic or {}).get((row[2], family))
        if found is None:
            return [*row, "-", "-", ""]
        bits = [f"{human(one)}bit" for one in found]
        return [*row, *bits, bar(sum(found) / (self._busiest or 1.0), _BAR)]

    # ---- drawing

    def render(self, width: int, height: int) -> list[Row]:
        """Return all of it, in no more than ``height`` lines."""
        head = self._head(width)
        room = height - len(head) - 4  # titles, an empty line, the rates, the keys
        below = self._below(min(SHOWN_EVENTS, max(1, room // 3)))
        space = max(1, room - len(below))
        numbers = self.pager.shown(self._rows, space)
        grid, rows = self._grid, [self._rows[number] for number in numbers]
        if self._traffic is not None:
            grid, rows = self._metered_grid, [*map(self._metered_row, rows)]
        titles, *lines = grid.lines(width, [grid.rows[0], *rows])
        table = [(line, self._colours[n]) for line, n in zip(lines, numbers, strict=True)]
        table += [("", "")] * (space - len(table))
        return [
            *head,
            (titles, "dim"),
            *table,
            ("", ""),
            *below,
            self._sum(),
            self.pager.foot(width),
        ]

    def _head(self, width: int) -> list[Row]:
        found: list[Row] = []
        for view in self._families:
            start = f"IPv{view.family} {view.network}  "
            if view.problem:  # the rest would push it off the line
                found.append((f"{start}{clean(f'{view.device_name}: {view.problem}')}", "red"))
            else:
                words = clean(view.title).split(", ")
                found.append((start + whole_words(words, width - len(start)), "bold"))
            if view.error:
                found.append((clean(view.error), "red"))
        words = [*self._ways, f"source {self._source}"] if self._source else self._ways
        found.append((", ".join(words), ""))
        if self._error:
            found.append((clean(self._error), "red"))
        return found

    def _below(self, lines: int) -> list[Row]:
        """Return the latest events, on so many lines."""
        found: list[Row] = [
            (
                f"{datetime.fromtimestamp(event.time):%H:%M:%S} {event.word:<9} {event}",
                _EVENT_COLOURS[event.word],
            )
            for event in [*self._last][-lines:]
        ] or [("no changes yet", "dim")]
        return found + [("", "")] * (lines - len(found))

    def _sum(self) -> Row:
        return (
            f"{self._events.per_second:.1f} events/s, {self._repaired.per_second:.1f} repaired/s;"
            f" {_count(self._events.total, 'event')}, {self._repaired.total:,} repaired in all",
            "bold",
        )


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
