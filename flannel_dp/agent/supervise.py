"""Restart the work of a service's threads after an unexpected error.

Expected errors are the work's own. An unexpected exception is logged with its traceback and
noted as a problem, and the work starts again after a pause. A thread that cannot go on (after
SystemExit and its like, or because none can be started) is noted in ``Status.ended``: /healthz
fails from then on and the watchdog is not fed, because a restart helps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from flannel_dp.agent.status import StatusBoard
from flannel_dp.backoff import Backoff

log = logging.getLogger(__name__)

#: Pauses between attempts, in seconds: the first, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
#: A failure so many seconds after the one before it is a first one again.
FORGIVEN = 120.0
#: So many different failures in a row are logged with their tracebacks.
_TRACEBACKS = 20


class Failures:
    """The unforeseen failures of one piece of work, ``name`` in the log.

    ``failed`` logs one, the same one only once with its traceback, and returns the seconds
    to wait; they double up to ``LONGEST_PAUSE``.
    """

    def __init__(
        self,
        name: str,
        *,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._clock = clock
        self._backoff = backoff or Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._last = clock()
        self._seen: set[str] = set()

    def failed(self, error: Exception) -> float:
        """Log it; return the pause in seconds before the work starts again."""
        now = self._clock()
        if now - self._last > FORGIVEN:
            self._backoff.reset()
        self._last = now
        pause = self._backoff.next()
        text = described(error)
        fresh = text not in self._seen and len(self._seen) < _TRACEBACKS
        if fresh:
            self._seen.add(text)
        log.log(
            logging.ERROR if fresh else logging.WARNING,
            "thread=%s failed and starts again in %.1f s: %s",
            self._name,
            pause,
            text,
            exc_info=error if fresh else None,
        )
        return pause


class Worker:
    """A thread that does ``work()`` until it is stopped, whatever goes wrong in it.

    ``work`` returns when it was stopped by means of its own; ``stop`` here only ends
    the pauses. After an Exception, or when it returns too early, ``on_failure(text)`` is called
    on the thread, and ``work`` once more after a pause. What is not an Exception ends the
    thread, and is noted on ``board``.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], object],
        *,
        board: StatusBoard,
        on_failure: Callable[[str], object],
        backoff: Backoff | None = None,
    ) -> None:
        self.name = name
        self._work, self._board, self._on_failure = work, board, on_failure
        self._failures = Failures(name, backoff=backoff)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"flannel-dp-{name}", daemon=True)

    def start(self) -> None:
        """Start. A thread that cannot be started is noted on ``board``; nothing is raised."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._end(error)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Start the work no more. From any thread."""
        self._stopped.set()

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, for ``timeout`` seconds at most."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._stopped.wait(self._once())
        except BaseException as error:
            self._end(error)

    def _once(self) -> float:
        """Work to the end; return the pause before the next start."""
        try:
            self._work()
            if self._stopped.is_set():
                return 0.0
            raise _TooEarly("it returned without having been stopped")
        except Exception as error:
            if self._stopped.is_set():
                log.debug("thread=%s failed at its end", self.name, exc_info=error)
                return 0.0
            pause = self._failures.failed(error)
            try:
                self._on_failure(described(error))
            except Exception:
                log.exception("thread=%s cannot report its failure", self.name)
            return pause

    def _end(self, error: BaseException) -> None:
        if self._stopped.is_set():
            return
        log.critical("thread=%s ended; restart the service", self.name, exc_info=error)
        self._board.end(self.name, described(error))


class _TooEarly(Exception):
    """The work came to its end by itself."""


def described(error: BaseException) -> str:
    """Return an error in one line: its kind, and its text if it has any."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:  # a text that cannot be made ends no thread
        text = ""
    kind = type(error).__name__.lstrip("_")
    return f"unexpected {kind}: {text}" if text else f"unexpected {kind}"
