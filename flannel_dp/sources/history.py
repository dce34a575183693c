"""The latest moment of a store that this node has seen, for as long as the node runs.

A store that came back empty, or at an earlier state, is recognised by it: by a process that was
started since, too, as after a power failure both often are.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from msgspec import Struct

from flannel_dp.sources.base import GRACE_SECONDS
from flannel_dp.sources.notes import read_note, write_note


class Moment(Struct, frozen=True):
    """A moment in a store's history."""

    @abstractmethod
    def breaks_with(self, before: Self) -> str:
        """Return why the store is not the one it was at the moment ``before``, or at an earlier
        state; "" where it may have gone on from there."""


_Seen = TypeVar("_Seen", bound=Moment)


class History(Generic[_Seen]):
    """What was seen of one store's history, in moments of the class ``kind``. ``path`` is the
    file that keeps it for the next process of this node; "" keeps nothing.

    As long as peers are kept because the store started afresh, the file has the moment before
    that: a process that is started meanwhile keeps them, too. For one thread at a time.
    """

    def __init__(
        self, kind: type[_Seen], path: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kind, self._path, self._clock = kind, path, clock
        self._seen: _Seen | None = None
        self._until = clock()

    def listed(self, origin: str, now: _Seen) -> str:
        """Note a listing of ``origin`` as of ``now``. Return why the store is not the one that was
        seen before, or not as it was then; "" if it is."""
        before = self._seen or read_note(self._path, self._kind)
        reason = "" if before is None else now.breaks_with(before)
        if reason:
            self._until = self._clock() + GRACE_SECONDS
        self._seen = now
        self.write()
        return f"{origin}: {reason}" if reason else ""

    def advanced(self, now: _Seen) -> None:
        """Note that all changes up to ``now`` are known."""
        self._seen = now

    def write(self) -> None:
        """Keep what was seen for the next process."""
        if self._seen is not None and self._clock() >= self._until:
            write_note(self._path, self._seen)
