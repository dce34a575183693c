"""What to do when a request to etcd failed: report it once, and wait longer each time.

Who follows the source is told by the inbox, and logs it; here each failure is a line for debugging.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from flannel_dp.backoff import Backoff
from flannel_dp.errors import SourceError
from flannel_dp.sources.base import Call, Inbox

log = logging.getLogger(__name__)

#: A watch that stood for so many seconds was a good one, also where nothing happened in it.
_FORGIVEN = 30.0


class Trouble:
    """The state of one follower of etcd, for its inbox.

    Pauses double from 0.1 s to 4 s, a quarter more or less, so that the nodes of a
    cluster do not come back to it at the same moment. They grow until something useful was
    read: a connection and an accepted watch prove nothing, as those may break again at once.
    """

    def __init__(self, inbox: Inbox, clock: Callable[[], float] = time.monotonic) -> None:
        self._inbox = inbox
        self._clock = clock
        self._backoff = Backoff(first=0.1, most=4.0)
        self._pause = 0.0  # the last one
        self._told = ""
        #: When the watch of now began, and when it counts as healthy; None without one.
        self._began: float | None = None
        self._proved_at: float | None = None

    def report(self, error: SourceError) -> None:
        """Note a failure; the same error is not reported again."""
        self._proved_at = None
        if str(error) != self._told:
            self._told = str(error)
            log.debug("etcd: %(error)s", {"error": error})
            self._inbox.trouble(error)

    def delivered(self) -> None:
        """Note that a snapshot was put into the inbox, which took the error out of it."""
        self._told = ""

    def began(self) -> None:
        """Note that a watch stands. After a failure it counts once it has stood for as long as
        the pause before it; see ``seconds_left``."""
        self._began = self._clock()
        self._proved_at = self._began + self._pause
        self.check()

    @property
    def seconds_left(self) -> float:
        """Seconds until ``check`` has to be called; infinite where it need not be."""
        return math.inf if self._proved_at is None else max(0.0, self._proved_at - self._clock())

    def check(self) -> None:
        """Note that requests succeed if the watch has stood for long enough."""
        if self._proved_at is not None and self._clock() >= self._proved_at:
            self._recovered()

    def useful(self) -> None:
        """Note that something was read that is of use: the next failure is a first one again."""
        self._backoff.reset()
        self._pause = 0.0
        self._recovered()

    def _recovered(self) -> None:
        self._proved_at = None
        if self._told:
            self._told = ""
            log.debug("etcd answers again")
        self._inbox.healthy()

    def pause(self) -> Call:
        """Wait until the next attempt; return why waiting ended."""
        if self._began is not None and self._clock() - self._began > _FORGIVEN:
            self._backoff.reset()
        self._began = self._proved_at = None
        self._pause = self._backoff.next()
        return self._inbox.wait(self._pause)
