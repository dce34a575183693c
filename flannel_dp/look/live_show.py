"""``flannel-dp show --watch``: the overlay as it is, and what happens to it, until Ctrl-C.

It reads and never writes, so it can run beside an agent. On a terminal it is a view that is redrawn
(:mod:`flannel_dp.look.live_screen`); into a pipe go plain lines, or one JSON object a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from flannel_dp.look.live_turns import (
    TICK,
    DriftLine,
    Events,
    InOrder,
    Look,
    Rates,
    timestamp,
    turns,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DriftLine", "terminal", "watch_json", "watch_view"]

#: What a terminal is told where rich is missing.
NO_RICH = (
    "flannel-dp: plain lines, because the Python module rich is not installed\n"
    "hint: pip install 'flannel-dp[live]' for a view that is redrawn in place"
)


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
            from flannel_dp.look.live_screen import Screen, draw

            draw(look, events, console, stop, Screen(source, clock, rates), clock)
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
    if out is None:  # closed by the program that started us
        return
    ordered = InOrder(events)
    last = b""
    try:
        for turn in turns(look, ordered, stop, clock):
            again = turn.overview or turn.error
            _write(out, map(_event_json, [*turn.events, *(ordered.rest() if again else ())]))
            now = timestamp(time.time(), "milliseconds")
            if turn.overview is not None:
                overview = turn.overview.to_json()
                if (digest := _digest(overview)) != last:
                    _write(out, [_json(now, overview=overview)])
                last = digest
            if turn.error is not None:
                error = {"message": turn.error.message, "hint": turn.error.hint}
                _write(out, [_json(now, error=error)])
        _write(out, map(_event_json, ordered.rest()))
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            _write(out, map(_event_json, ordered.rest()))
    except BrokenPipeError:
        return


def _plain(look: Look, events: Events, out: IO[str] | None, stop: Callable[[], bool]) -> None:
    if out is None:
        return
    _write(out, look().lines())
    ordered = InOrder(events)
    try:
        while not stop():
            _write(out, map(_event_line, ordered(TICK)))
    finally:
        with suppress(BrokenPipeError):
            _write(out, map(_event_line, ordered.rest()))


def _event_line(event: DriftLine) -> str:
    return f"{timestamp(event.time, 'milliseconds')} {event.word} {event}"


def _event_json(event: DriftLine) -> str:
    return _json(timestamp(event.time, "milliseconds"), event=event.to_json())


def _write(out: IO[str], lines: Iterable[str]) -> None:
    """Write lines, at once: the program that reads them may be waiting."""
    out.writelines(f"{line}\n" for line in lines)
    out.flush()


def _json(stamp: str, **content: object) -> str:
    return json.dumps({"schema": 1, "time": stamp, **content}, separators=(",", ":"))


def _digest(value: object) -> bytes:
    """Tells one overview from another, without keeping either."""
    from hashlib import blake2b

    return blake2b(json.dumps(value).encode(), digest_size=16).digest()


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
