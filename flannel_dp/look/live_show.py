"""``flannel-dp show --watch``: the overlay as it is, and what happens to it, until Ctrl-C.

It looks and never writes, so it can run beside an agent. On a terminal it is a
view that is drawn anew; into a pipe go plain lines, or one JSON object a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from msgspec import Struct, to_builtins

from flannel_dp.errors import FlannelDPError
from flannel_dp.look.terminal import human

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from flannel_dp.look.show import FamilyView, Overview, PeerView

#: Seconds between two looks at everything, at most and, however much happens, at least.
LOOK_SECONDS, LEAST_SECONDS = 10.0, 1.0

#: What a terminal is told where rich is missing.
NO_RICH = (
    "flannel-dp: plain lines, because the Python module rich is not installed\n"
    "hint: pip install 'flannel-dp[live]' for a view that is redrawn in place"
)

#: So many events stay on the screen.
SHOWN_EVENTS = 10

_LEAST_ROWS = 5  # of the table, before events get their lines
_TICK = 0.5  # seconds within which ``stop`` is asked again
_DRAW = 0.1  # seconds between two drawings, however much happens
_RATE_SECONDS = 10.0  # rates are means over so long
_REPAIR_SECONDS = 60.0  # what is not repaired after so long was removed on purpose

_IN_ORDER = ("ok", "foreign")
_STATE_COLOURS = {"ok": "green", "foreign": "yellow", "missing": "yellow"}
_CHANGE_COLOURS = {"deleted": "red", "changed": "yellow", "foreign": "yellow", "overrun": "red"}


class DriftLine(Struct, frozen=True):
    """One thing that happened in the kernel, as a line to read.

    ``time`` is in seconds since the epoch, ``family`` 4 or 6 (0: neither, or both),
    ``table`` "route", "neighbour", .. (empty where it is none of them), ``change``
    one of "deleted", "changed", "foreign", "link" and "overrun". ``what`` says what it
    happened to, its key first: ``10.244.7.0/24 via 10.244.7.0 dev flannel.1``.
    """

    time: float
    family: int
    table: str
    change: str
    what: str

    def __str__(self) -> str:
        family = f"ipv{self.family}" if self.family else ""
        return " ".join(filter(None, (family, self.table, self.change, _clean(self.what))))

    def to_json(self) -> dict[str, Any]:
        """Plain values; the time is where the event is put."""
        return {name: value for name, value in to_builtins(self).items() if name != "time"}


Look = Callable[[], "Overview"]
#: Bits a second that a peer (MAC, family) was sent, and that came from it.
Rates = Mapping[tuple[str, int], tuple[float, float]]
Events = Callable[[float | None], "list[DriftLine]"]


def watch_view(
    look: Look,
    events: Events,
    *,
    console: Console | None = None,
    stop: Callable[[], bool],
    source: str = "",
    rates: Callable[[], Rates | None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Show what ``look`` finds, and ``events`` as they come, until ``stop`` says so.

    ``events(timeout)`` waits up to ``timeout`` seconds for something to happen and
    returns it. ``look`` is called at first, after events (once a second at most) and
    every 10 s. On a terminal the view is drawn in place, without the alternate
    screen, so that its last state stays to be read; ``source`` is a word on where the
    leases come from, and ``rates`` gives what each peer's traffic is, or None where nothing
    is counted. Anywhere else the overview's lines are printed once, and then a
    line for each event. Ctrl-C ends it, and so does a reader that goes away.

    Raises what ``events`` and the first ``look`` raise; later errors of ``look`` are
    shown.
    """
    if console is None:
        console = terminal()
    try:
        if console is None or not console.is_terminal or console.is_dumb_terminal:
            _plain(look, events, sys.stdout if console is None else console.file, stop)
        else:
            _draw(look, events, console, stop, _Screen(source, clock, rates), clock)
    except (KeyboardInterrupt, BrokenPipeError):
        return


def watch_json(
    look: Look,
    events: Events,
    *,
    file: IO[str] | None = None,
    stop: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """The same for programs: one JSON object a line, each with "schema" and "time".

    ``{"overview": ..}`` comes first and whenever it has changed, ``{"event": ..}``
    for each event, ``{"error": ..}`` when it could not be read again.
    """
    out = sys.stdout if file is None else file
    if out is None:  # closed by whoever started us
        return
    last = b""
    try:
        for turn in _turns(look, events, stop, clock):
            for event in turn.events:
                _write(out, [_json(timestamp(event.time, "milliseconds"), event=event.to_json())])
            now = timestamp(time.time(), "milliseconds")
            if turn.overview is not None:
                overview = turn.overview.to_json()
                if (digest := _digest(overview)) != last:
                    _write(out, [_json(now, overview=overview)])
                last = digest
            if turn.error is not None:
                error = {"message": turn.error.message, "hint": turn.error.hint}
                _write(out, [_json(now, error=error)])
    except (KeyboardInterrupt, BrokenPipeError):
        return


# ---- when to look ------------------------------------------------------------------


class _Turn(Struct):
    """What came within one wait: events, and a new overview or why there is none."""

    events: Sequence[DriftLine] = ()
    overview: Overview | None = None
    error: FlannelDPError | None = None


def _turns(
    look: Look, events: Events, stop: Callable[[], bool], clock: Callable[[], float]
) -> Iterator[_Turn]:
    """Wait and look, for ever. Looking takes a fifth of the time at most."""
    started = clock()
    yield _Turn(overview=look())
    took = clock() - started
    looked = clock()
    due = looked + LOOK_SECONDS
    while not stop():
        came = events(max(0.0, min(_TICK, due - clock())))
        if came:
            due = min(due, looked + max(LEAST_SECONDS, 4 * took))
        turn = _Turn(came)
        started = clock()
        if started >= due:
            try:
                turn.overview = look()
            except FlannelDPError as error:
                turn.error = error
            looked = clock()
            took = looked - started
            due = looked + LOOK_SECONDS
        yield turn


# ---- lines ---------------------------------------------------------------------------


def _plain(look: Look, events: Events, out: IO[str] | None, stop: Callable[[], bool]) -> None:
    if out is None:
        return
    _write(out, look().lines())
    while not stop():
        if came := events(_TICK):
            _write(out, [f"{timestamp(event.time)} drift {event}" for event in came])


def _write(out: IO[str], lines: Iterable[str]) -> None:
    """Write lines, at once: whoever reads them may be waiting."""
    out.writelines(f"{line}\n" for line in lines)
    out.flush()


def timestamp(seconds: float, precision: str = "seconds") -> str:
    """RFC 3339, in UTC."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=precision)[:-6] + "Z"


def _json(stamp: str, **content: object) -> str:
    return json.dumps({"schema": 1, "time": stamp, **content}, separators=(",", ":"))


def _digest(value: object) -> bytes:
    """Tells one overview from another, without keeping either."""
    from hashlib import blake2b

    return blake2b(json.dumps(value).encode(), digest_size=16).digest()


# ---- the view ------------------------------------------------------------------------


def terminal() -> Console | None:
    """Return a console for standard output; None where it is no terminal to draw on, or where
    rich, which draws, is not installed: a line on standard error says so then."""
    if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(NO_RICH, file=sys.stderr)
        return None
    return Console()


def _draw(
    look: Look,
    events: Events,
    console: Console,
    stop: Callable[[], bool],
    view: _Screen,
    clock: Callable[[], float],
) -> None:
    from rich.live import Live

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        drawn = float("-inf")
        for turn in _turns(look, events, stop, clock):
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


class _Screen:
    """What is on the screen."""

    def __init__(
        self,
        source: str,
        clock: Callable[[], float],
        rates: Callable[[], Rates | None] = lambda: None,
    ) -> None:
        self._source, self._clock = _clean(source), clock
        self._rates_of, self._traffic, self._metered = rates, rates(), clock()
        self._families: tuple[FamilyView, ...] = ()
        self._peers: list[PeerView] = []
        self._ways: list[str] = []
        self._error = ""
        self._last: deque[DriftLine] = deque(maxlen=SHOWN_EVENTS)
        self._touched: dict[str, float] = {}  # keys that something happened to, since when
        self._events, self._repaired = _Rate(clock), _Rate(clock)

    def take(self, turn: _Turn) -> None:
        if self._clock() - self._metered >= LEAST_SECONDS:
            self._traffic, self._metered = self._rates_of(), self._clock()
        self._events.add(len(turn.events))
        self._last.extend(turn.events)
        for event in turn.events:
            if event.change in ("deleted", "changed"):
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
        self._judge(bad, good)

    def _judge(self, bad: Iterable[PeerView], good: Iterable[PeerView]) -> None:
        """A peer in order to which something had happened was repaired."""
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
        """All of it, in no more than ``height`` lines."""
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
            device = view.device
            text, style = str(device or "host-gw: direct routes, no device"), "bold"
            if device and device.problem:  # the rest would push it off the line
                text, style = f"{device.name}: {device.problem}", "bold red"
            found.append(_line(f"IPv{view.family} {view.network}  {_clean(text)}", style))
            if view.error:
                found.append(_line(_clean(view.error), "red"))
        words = [*self._ways, f"source {self._source}"] if self._source else self._ways
        found.append(_line(", ".join(words)))
        if self._error:
            found.append(_line(_clean(self._error), "red"))
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
        """The peer's traffic in bits a second, if anything is counted."""
        if self._traffic is None:
            return ()
        found = self._traffic.get((peer.mac, 6 if ":" in peer.subnet else 4))
        return tuple(f"{human(bits)}bit" for bits in found) if found else ("-", "-")

    def _below(self, most: int) -> list[Text]:
        return [
            _line(f"{timestamp(event.time)} {event}", _CHANGE_COLOURS.get(event.change, ""))
            for event in [*self._last][-most:]
        ]

    def _rates(self) -> Text:
        return _line(
            f"{self._events.per_second:.1f} events/s, {self._repaired.per_second:.1f} repaired/s;"
            f" {_count(self._events.total, 'event')}, {self._repaired.total:,} repaired in all",
            "bold",
        )


def _clean(text: str) -> str:
    """Text that cannot steer a terminal: the kernel takes any byte in a device's name."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _line(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
