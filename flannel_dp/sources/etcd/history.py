"""The latest moment of a cluster that this node has seen, for as long as the node runs.

A store that came back empty, or at an earlier state, is recognised by it: by a process that was
started since, too, as after a power failure both often are.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import Struct

from flannel_dp.sources.base import GRACE_SECONDS
from flannel_dp.sources.etcd.notes import read_note, write_note


class Position(Struct, frozen=True):
    """A moment in a cluster's history: all changes up to ``revision`` are known."""

    revision: int
    cluster: int


class History:
    """What was seen of one cluster's history. ``path`` is the file that keeps it for the next
    process of this node; "" keeps nothing.

    As long as peers are kept because the store started afresh, the file has the moment before
    that: a process that is started meanwhile keeps them, too. For one thread at a time.
    """

    def __init__(self, path: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._seen: Position | None = None
        self._until = clock()

    def listed(self, origin: str, now: Position) -> str:
        """Note a listing as of ``now``. Return why the cluster is not the one that was seen
        before, or not as it was then; "" if it is.

        A new data directory of the same members has the same cluster ID; its revisions begin
        at 1.
        """
        before = self._seen or read_note(self._path, Position)
        reason = "" if before is None else _difference(origin, before, now)
        if reason:
            self._until = self._clock() + GRACE_SECONDS
        self._seen = now
        self.write()
        return reason

    def advanced(self, now: Position) -> None:
        """Note that all changes up to ``now`` are known."""
        self._seen = now

    def write(self) -> None:
        """Keep what was seen for the next process."""
        if self._seen is not None and self._clock() >= self._until:
            write_note(self._path, self._seen)


def _difference(origin: str, before: Position, now: Position) -> str:
    if now.cluster != before.cluster:
        return (
            f"{origin}: its cluster ID is {now.cluster:x} and was {before.cluster:x}: another "
            "cluster answers, or it was restored"
        )
    if now.revision < before.revision:
        return (
            f"{origin}: its revision is {now.revision} and was {before.revision}: it started "
            "empty, or an earlier state was restored"
        )
    return ""
