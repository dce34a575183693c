"""What to do when a request to etcd failed: report it once, and wait longer each time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flannel_dp.backoff import Backoff
from flannel_dp.errors import SourceError
from flannel_dp.sources.base import Call, Inbox

log = logging.getLogger(__name__)

#: A failure so many seconds after the one before it is a first one again.
_FORGIVEN = 30.0


class Trouble:
    """The state of one follower of etcd, for its inbox.

    Pauses double from 0.1 s to 4 s, a quarter more or less, so that the nodes of a
    cluster do not come back to it at the same moment.
    """

    def __init__(self, inbox: Inbox, clock: Callable[[], float] = time.monotonic) -> None:
        self._inbox = inbox
        self._clock = clock
        self._backoff = Backoff(first=0.1, most=4.0)
        self._last = clock()
        self._told = ""

    def report(self, error: SourceError) -> None:
        """Note a failure; the same error is not logged again."""
        if str(error) != self._told:
            self._told = str(error)
            log.warning("etcd=trouble error=%s", error)
            self._inbox.trouble(error)

    def recovered(self) -> None:
        """Note that requests succeed."""
        if self._told:
            self._told = ""
            log.info("etcd=healthy")
        self._inbox.healthy()

    def pause(self) -> Call:
        """Wait until the next attempt; return why waiting ended."""
        if self._clock() - self._last > _FORGIVEN:
            self._backoff.reset()
        call = self._inbox.wait(self._backoff.next())
        self._last = self._clock()
        return call
