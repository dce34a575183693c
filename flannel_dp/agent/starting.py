"""Wait for what a start needs: the network's configuration, the interface, its address, the source.

At boot they come in any order, minutes apart, and none of that is worth a person's time. So a
start is one function that is tried until it works: at once when the kernel announces a link, an
address or a route, else after a pause of a few seconds. Meanwhile the reason is in the
status (/healthz), in the service manager's status, and in the log.
"""

from __future__ import annotations

import logging
import os
import random
import select
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from flannel_dp.agent.notify import Notifier
from flannel_dp.agent.status import StatusBoard
from flannel_dp.backoff import Backoff
from flannel_dp.errors import (
    DeviceGone,
    DumpInterrupted,
    FlannelDPError,
    NotYet,
    Overrun,
    SourceError,
    kernel_error,
    shortage,
)
from flannel_dp.kernel.arrivals import Arrivals

log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Waiting can resolve these. Everything else is wrong until a person corrects it.
MENDED = (NotYet, SourceError, DeviceGone, DumpInterrupted, Overrun)

#: The longest pause between two attempts, in seconds; a server may ask for more, up to the second.
MOST_SECONDS = 5.0
_MOST_ASKED = 60.0
#: Between an attempt and the next one that an event of the kernel causes; and after the event,
#: as the next one follows it closely. A host whose routes change all the time gives no rest.
_EVENT_SECONDS, _SETTLE_SECONDS = 0.5, 0.02
#: The same reason is logged again after so long.
_LOG_SECONDS = 60.0
_REASONS = 16

#: What the status calls it.
PROBLEM = "start"


class Ended(BaseException):
    """The end was requested before the start had succeeded."""


class Starting:
    """Tries to start until it works. ``until`` is for the main thread, ``retry`` and ``end``
    for any thread, and ``interrupt`` for handlers of signals."""

    def __init__(
        self,
        board: StatusBoard,
        notifier: Notifier,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: random.Random = random.Random(),  # noqa: B008 (shared on purpose)
    ) -> None:
        self._board, self._notifier, self._clock = board, notifier, clock
        self._pause = Backoff(0.25, MOST_SECONDS, random)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._wake_fd)  # a handler may come late
        #: Can be read when a signal has come, -1 where none do (``process.signals``).
        self.signal_fd = -1
        self._ended = self._trying = False
        self._logged: dict[str, float] = {}
        self._said = ""

    def until(self, attempt: Callable[[], _T]) -> _T:
        """Return what ``attempt()`` returns, as soon as it does.

        Raises Ended after ``end``, and whatever ``attempt`` raises that is not of MENDED and no
        shortage of descriptors or memory.
        """
        began = self._clock()
        try:
            self._trying = True
            while not self._ended:
                self._board.set(heartbeat=self._clock())
                with Arrivals() as arrivals:  # before the attempt, so that none is missed
                    try:
                        made = attempt()
                    except Exception as error:
                        mended = _mended(error)
                        if mended is None:
                            raise
                        self._report(mended)
                        self._wait(arrivals, mended)
                        continue
                self._trying = False
                if self._board.problem(PROBLEM, None):
                    log.info(
                        "Everything that the start needs is available after %(seconds).1f s",
                        {"seconds": self._clock() - began},
                    )
                return made
            raise Ended
        finally:
            self._trying = False

    def pause(self, error: Exception) -> None:
        """Report what a later attempt may repair, and wait for that; raises it if it is nothing of
        that kind. For attempts that a signal must not break off."""
        mended = _mended(error)
        if mended is None:
            raise error
        self._report(mended)
        with Arrivals() as arrivals:
            self._wait(arrivals, mended)

    def retry(self) -> None:
        """Try again at once."""
        os.eventfd_write(self._wake_fd, 1)

    def end(self) -> None:
        """Give up before the next attempt."""
        self._ended = True
        self.retry()

    def interrupt(self) -> None:
        """Give up at once, in the middle of an attempt, too: called by a signal's handler, on
        the main thread, it raises Ended there. Does nothing once the start has succeeded."""
        self.end()
        if self._trying:
            raise Ended

    def _wait(self, arrivals: Arrivals, error: FlannelDPError) -> None:
        failed = self._clock()
        asked = min(_MOST_ASKED, float(getattr(error, "retry_after", 0.0)))
        due = failed + max(asked, self._pause.next())
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        if self.signal_fd >= 0:
            poller.register(self.signal_fd, select.POLLIN)
        if arrivals.fileno() >= 0 and not asked:
            poller.register(arrivals.fileno(), select.POLLIN)
        while (left := due - self._clock()) > 0:
            for fd, _ in poller.poll(left * 1000):
                if fd == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                    return
                if fd == self.signal_fd:
                    os.read(fd, 4096)  # its handler is called by now, or next
                    continue
                poller.unregister(fd)  # POLLERR, where too much has happened, is an event, too
                due = min(due, max(self._clock() + _SETTLE_SECONDS, failed + _EVENT_SECONDS))

    def _report(self, error: FlannelDPError) -> None:
        text = str(error)
        self._board.problem(PROBLEM, text)
        words = f"starting: {error.message}"
        beat = self._notifier.watchdog_seconds is not None and not self._board.status.ended
        if beat or words != self._said:
            self._notifier.send(watchdog=beat, status=words if words != self._said else None)
            self._said = words
        now = self._clock()
        # A new reason is logged at once; a few that alternate are not logged each time.
        last = self._logged.get(text)
        if last is None and len(self._logged) >= _REASONS:
            last = max(self._logged.values())
        if last is None or now - last >= _LOG_SECONDS:
            if len(self._logged) >= _REASONS:
                self._logged.clear()
            self._logged[text] = now
            log.warning("Waiting before the start: %(error)s", {"error": text})


def _mended(error: Exception) -> FlannelDPError | None:
    """Return the error to report where waiting can repair it, None where it cannot."""
    if isinstance(error, MENDED):
        return error
    number = shortage(error)
    return kernel_error(number, "use another descriptor or more memory") if number else None
