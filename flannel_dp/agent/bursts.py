"""How much of what happens to many at once the log tells one by one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

#: So many of one kind are told one by one within so many seconds.
MOST, WINDOW = 5, 10.0

#: What of each kind there were more of.
_MORE = {
    "added": "peers were added",
    "changed": "peers have changed",
    "removed": "peers were removed",
    "rejected": "leases are rejected",
    "drift": "entries were repaired",
    "dead": "peers are unreachable",
    "back": "peers are reachable again",
    "lossy": "peers are not well reachable",
    "steady": "peers are well reachable again",
    "first": "peers are reachable",
    "narrow": "paths to peers take less than the device's MTU",
    "wide": "paths to peers take the device's MTU again",
}

#: What is counted together: a kind, and the family or 0.
_Kind = tuple[str, int]


class Bursts:
    """How many of each kind may be told now; the rest is counted, and told when a window ends.

    ``clock`` is in seconds and monotonic. From any thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._ends: dict[_Kind, float] = {}
        self._left: dict[_Kind, int] = {}
        self._more: dict[_Kind, int] = {}
        self._opened: set[_Kind] = set()  # windows that the pass being told has opened

    @property
    def due(self) -> float | None:
        """When a count has to be told, by the clock; None where there is none."""
        with self._lock:
            return min((self._ends[kind] for kind in self._more), default=None)

    def room(self, kind: _Kind, count: int) -> int:
        """Return how many of ``count`` may be told now."""
        now = self._clock()
        with self._lock:
            self._opened.discard(kind)
            if now >= self._ends.get(kind, now):
                self._tell(kind)
                self._ends[kind], self._left[kind] = now + WINDOW, MOST
                self._opened.add(kind)
            told = min(count, self._left[kind])
            self._left[kind] -= told
        return told

    def more(self, kind: _Kind, count: int) -> None:
        """Count what was not told; tell it where all came at once."""
        with self._lock:
            if count:
                self._more[kind] = self._more.get(kind, 0) + count
            if kind in self._opened:
                self._opened.discard(kind)
                self._tell(kind)

    def flush(self, *, all: bool = False) -> None:
        """Tell the counts whose windows have ended, or ``all``."""
        now = self._clock()
        with self._lock:
            for kind in [*self._more]:
                if all or now >= self._ends[kind]:
                    self._tell(kind)

    def _tell(self, kind: _Kind) -> None:
        if count := self._more.pop(kind, 0):
            what, family = _MORE[kind[0]], kind[1]
            log.info(
                "... and %(count)d more %(what)s",
                {
                    "count": count,
                    "what": f"IPv{family} {what}" if family else what,
                    "family": family,
                },
            )
