"""``flannel-dp stats --watch``: rates per peer, until Ctrl-C.

On a terminal a view that is redrawn, the busiest peers first; into a pipe the lines of
each look, or one JSON object a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp.look.live_show import terminal
from flannel_dp.look.live_turns import timestamp
from flannel_dp.look.terminal import coloured

if TYPE_CHECKING:
    from rich.console import Console

    from flannel_dp.look.stats import FamilyStats, PeerStats, Stats

#: ``wait(seconds)`` returns True when it is time to end.
Wait = Callable[[float], bool]


def watch_stats(
    look: Callable[[], Stats],
    wait: Wait,
    *,
    interval: float = 1.0,
    as_json: bool = False,
    console: Console | None = None,
    file: IO[str] | None = None,
) -> None:
    """Show what ``look`` finds every ``interval`` seconds until ``wait`` says so.

    The first look has no rates, and is not shown. Ctrl-C ends it, and so does a reader that
    goes away. Raises what ``look`` raises.
    """
    console = console or (None if as_json or file else terminal())
    try:
        look()
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            _draw(look, wait, interval, console)
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


def _draw(look: Callable[[], Stats], wait: Wait, interval: float, console: Console) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not wait(interval):
            shown = busiest(look(), console.height)
            text = Text.from_ansi("\n".join(shown.lines(coloured)))
            text.no_wrap, text.overflow = True, "ellipsis"
            live.update(text, refresh=True)


def busiest(found: Stats, height: int) -> Stats:
    """Return the peers with the most bytes a second first, and no more than there are lines for."""
    rows = max(1, height // max(1, len(found.families)) - 4)
    return replace(found, families=tuple(_busiest(family, rows) for family in found.families))


def _busiest(family: FamilyStats, rows: int) -> FamilyStats:
    ordered = sorted(family.peers, key=lambda peer: (-_rate(peer), peer.subnet))
    return replace(family, peers=tuple(ordered[:rows]), more=max(0, len(ordered) - rows))


def _rate(peer: PeerStats) -> float:
    return (peer.sent.byte_rate or 0.0) + (peer.received.byte_rate or 0.0)
