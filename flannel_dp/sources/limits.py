"""How much a server may send: bytes, frames, pages and seconds.

A million leases pass all of these; docs/operations.md has the table. What exceeds a limit is an
error of that server, like an answer that cannot be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MIB = 1 << 20

#: etcd: one message, and all messages of one listing (a lease is some 300 bytes).
MESSAGE_BYTES, LISTING_BYTES = 64 * MIB, 2048 * MIB
#: etcd: answers that one listing is made of, of 20,000 keys each, and seconds from first to last.
LISTING_PAGES, LISTING_SECONDS = 2_000, 600.0
#: etcd: messages that answer one request which has one answer.
UNARY_MESSAGES = 10
#: etcd: HTTP/2 frames that carry no message: at once, and for each second.
IDLE_FRAMES, IDLE_FRAMES_A_SECOND = 10_000, 100
#: etcd: answers on a watch that carry no event: at once, and for each second. etcd sends one
#: every ten minutes.
IDLE_ANSWERS, IDLE_ANSWERS_A_SECOND = 1_000, 10

#: Kubernetes: one object, one page of nodes, and a list of nodes in one piece, all of them
#: uncompressed (a node is 10 to 30 KiB).
OBJECT_BYTES, PAGE_BYTES, LIST_BYTES = 16 * MIB, 256 * MIB, 2048 * MIB
#: Kubernetes: seconds until one answer has to be complete, and until a listing has to be.
ANSWER_SECONDS, LIST_SECONDS = 60.0, 3600.0
#: Kubernetes: seconds in which a kubeconfig's exec command has to end.
EXEC_SECONDS = 30.0
#: Kubernetes: pages of one listing, and the bytes of all of them.
LIST_PAGES, ALL_PAGES_BYTES = 10_000, 65_536 * MIB
#: Kubernetes: events of a watch that say nothing about a node: at once, and for each second. The
#: API server sends a bookmark each minute.
IDLE_EVENTS, IDLE_EVENTS_A_SECOND = 1_000, 10


class Allowance:
    """``burst`` at once, and ``rate`` a second from then on."""

    def __init__(
        self, burst: float, rate: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._rate, self._clock = float(burst), rate, clock
        self._left, self._since = self._burst, clock()

    def spend(self, count: float = 1.0) -> bool:
        """Take ``count``. Return False when there are not so many left."""
        self._left -= count
        if self._left >= 0:
            return True
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._since) * self._rate)
        self._since = now
        return self._left >= 0

    def earn(self, count: float) -> None:
        """Give ``count`` back, up to ``burst``."""
        self._left = min(self._burst, self._left + count)


class Excess(Exception):
    """An answer is longer than it may be, in bytes or in time, or compressed in another manner
    than was asked for."""


class Pace:
    """What the answer under way may take: ``until`` is the time (monotonic) by which it has to be
    complete, ``most`` its bytes. None is no limit. For one thread at a time."""

    def __init__(self) -> None:
        self.until: float | None = None
        self.most: int | None = None

    def allow(self, seconds: float | None, most: int | None) -> None:
        """Set both for the next request."""
        self.until = None if seconds is None else time.monotonic() + seconds
        self.most = most

    def shortened(self, timeout: float | None) -> float | None:
        """Return a timeout that ends by ``until``. Raises Excess when that has passed."""
        if self.until is None:
            return timeout
        left = self.until - time.monotonic()
        if left <= 0:
            raise Excess("its answer was not complete in time")
        return left if timeout is None else min(timeout, left)
