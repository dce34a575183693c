"""``flannel-dp stats --watch``: rates per peer, until Ctrl-C.

On a terminal a full screen, the busiest peers first; into a pipe the lines of each reading, or one
JSON object a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from flannel_dp.look.live_turns import clean, timestamp

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from flannel_dp.look.full_screen import Row
    from flannel_dp.look.live_screen import Terminal
    from flannel_dp.look.stats import FamilyStats, PeerStats, Stats

#: ``wait(seconds)`` returns True when it is time to end.
Wait = Callable[[float], bool]

#: So many lines say what was dropped, and why.
_SHOWN_DROPS = 5


def watch_stats(
    look: Callable[[], Stats],
    wait: Wait,
    *,
    interval: float = 1.0,
    as_json: bool = False,
    terminal: AbstractContextManager[Terminal] | None = None,
    file: IO[str] | None = None,
) -> None:
    """Show what ``look`` finds every ``interval`` seconds until ``wait`` says so.

    The first reading has no rates, and is not shown. ``terminal`` is the screen to draw on, else
    standard output where that is a terminal. Ctrl-C ends it, and so does a reader that goes away.
    Raises what ``look`` raises.
    """
    if terminal is None and file is None and not as_json:
        from flannel_dp.look.full_screen import full_screen

        terminal = full_screen()
    try:
        look()
        if terminal is not None:
            _draw(look, wait, interval, terminal)
            return
        out = file or sys.stdout
        while out is not None and not wait(interval):
            found, now = look(), timestamp(time.time())
            if as_json:
                lines = [json.dumps({"time": now, **found.to_json()}, separators=(",", ":"))]
            else:
                lines = [now, *found.lines(), ""]
            out.writelines(f"{line}\n" for line in lines)
            out.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        return


def _draw(
    look: Callable[[], Stats],
    wait: Wait,
    interval: float,
    opened: AbstractContextManager[Terminal],
) -> None:
    view = StatsScreen()
    with opened as terminal:
        terminal.draw([("reading the counters ...", "dim")])
        due = time.monotonic() + interval
        while not view.pager.done and not wait(0.0):
            keys = terminal.wait(due - time.monotonic())
            for key in keys:
                view.pager.press(key)
            if time.monotonic() >= due:
                view.take(look())
                due = time.monotonic() + interval
            elif not keys:
                continue
            if view.found is not None:
                terminal.draw(view.render(*terminal.size()))


class StatsScreen:
    """What is on the screen."""

    def __init__(self) -> None:
        from flannel_dp.look.pager import Pager

        self.pager = Pager()
        self.found: Stats | None = None

    def take(self, found: Stats) -> None:
        """Show these from now on."""
        from flannel_dp.look.stats import grid_of

        self.found = found
        peers = [peer for family in found.families for peer in family.peers]
        peers.sort(key=_busiest)
        self._peers, self._grid = peers, grid_of(peers, found)

    def render(self, width: int, height: int) -> list[Row]:
        """Return all of it, in no more than ``height`` lines."""
        assert self.found is not None
        head = [_title(family) for family in self.found.families]
        drops: list[Row] = [(clean(line), "yellow") for line in self.found.drop_lines()]
        free = height - len(head) - 3  # beside the titles, one peer and the foot
        most = max(0, min(_SHOWN_DROPS, free))
        if len(drops) > most:
            more = len(drops) - most + 1
            drops[max(0, most - 1) :] = [(f"... and {more} more lines of drops", "yellow")]
            del drops[most:]
        gap = bool(drops) and len(drops) < free
        space = max(1, free + 1 - len(drops) - gap)
        titles, *rows = self._grid.rows
        numbers = self.pager.shown(rows, space)
        head_line, *lines = self._grid.lines(width, [titles, *(rows[n] for n in numbers)])
        dropped = [bool(self._peers[number].drops) for number in numbers]
        table: list[Row] = [
            (line, "yellow" if one else "") for line, one in zip(lines, dropped, strict=True)
        ]
        table += [("", "")] * (space - len(table) + gap)
        return [*head, (head_line, "dim"), *table, *drops, self.pager.foot(width)]


def _title(family: FamilyStats) -> Row:
    from flannel_dp.look.stats import summary

    title = f"IPv{family.family} {family.device}".rstrip()
    if family.problem:
        return clean(f"{title}: {family.problem}"), "yellow"
    return f"{clean(title)}: {summary(family)}", "bold"


def _busiest(peer: PeerStats) -> tuple[float, str]:
    return -((peer.sent.byte_rate or 0.0) + (peer.received.byte_rate or 0.0)), peer.subnet
