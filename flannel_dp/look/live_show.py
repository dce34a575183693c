"""``flannel-dp show --watch``: the overlay as it is, and what happens to it, until Ctrl-C.

It reads and never writes, so it can run beside an agent. On a terminal it is a full screen
(:mod:`flannel_dp.look.live_screen`); into a pipe go plain lines, or one JSON object a line.
"""

from __future__ import annotations

import json
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
    from contextlib import AbstractContextManager

    from flannel_dp.look.live_screen import Terminal

__all__ = ["DriftLine", "watch_json", "watch_view"]


def watch_view(
    look: Look,
    events: Events,
    *,
    terminal: AbstractContextManager[Terminal] | None = None,
    file: IO[str] | None = None,
    stop: Callable[[], bool],
    source: str = "",
    rates: Callable[[], Rates | None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    fileno: int = -1,
) -> None:
    """Show what ``look`` finds, and ``events`` as they come, until ``stop`` says so.

    ``events(timeout)`` waits up to ``timeout`` seconds for something to happen and
    returns it; ``fileno`` is a descriptor that can be read when there is something. ``look`` is
    called at first, after events (once a second at most) and every 10 s. ``terminal`` is the screen
    to draw on, else standard output where that is a terminal; ``source`` is a word on where the
    leases come from, and ``rates`` gives what each peer's traffic is, or None where nothing
    is counted. Anywhere else, and in a ``file``, the overview's lines are printed once, and then a
    line for each event. Ctrl-C ends it, and so does a reader that goes away.

    Raises what ``events`` and the first ``look`` raise; later errors of ``look`` are
    shown.
    """
    if terminal is None and file is None:
        from flannel_dp.look.full_screen import full_screen

        terminal = full_screen()
    try:
        if terminal is None:
            _plain(look, events, file or sys.stdout, stop)
        else:
            from flannel_dp.look.live_screen import Screen, draw

            view = Screen(source, clock, rates)
            draw(look, events, terminal, stop, view, clock, fileno=fileno)
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
