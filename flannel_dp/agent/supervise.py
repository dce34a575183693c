"""Restart the work of a service's threads after an unexpected error.

Expected errors are the work's own. An unexpected exception is logged with its traceback and
noted as a problem, and the work starts again after a pause. A thread that cannot go on (after
SystemExit and its like, for lack of memory, or because none can be started) is noted in
``Status.ended``: /healthz fails from then on and the watchdog is not fed, because a restart helps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from flannel_dp.agent.status import StatusBoard
from flannel_dp.backoff import Backoff
from flannel_dp.threads import Thread

log = logging.getLogger(__name__)

#: Pauses between attempts, in seconds: the first, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
#: A failure so many seconds after the one before it is a first one again.
FORGIVEN = 120.0
#: So many times in a row there may be no memory before the work is given up.
_OUT_OF_MEMORY = 6
#: The pause where there was not even memory to log it, and how often the end of a thread is
#: reported again for that reason.
_SHORTAGE_PAUSE, _REPORTS = 1.0, 60
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
        self._shortages = 0

    @property
    def out_of_memory(self) -> bool:
        """Whether there was no memory each of the last times: a restart may get some."""
        return self._shortages >= _OUT_OF_MEMORY

    def without_memory(self) -> float:
        """Count a failure that could not even be logged, which takes no memory; the pause."""
        self._shortages += 1
        return _SHORTAGE_PAUSE

    def failed(self, error: Exception) -> float:
        """Log it; return the pause in seconds before the work starts again."""
        now = self._clock()
        if now - self._last > FORGIVEN:
            self._backoff.reset()
            self._shortages = 0
        self._last = now
        self._shortages = self._shortages + 1 if isinstance(error, MemoryError) else 0
        pause = self._backoff.next()
        text = described(error)
        fresh = text not in self._seen and len(self._seen) < _TRACEBACKS
        if fresh:
            self._seen.add(text)
        log.log(
            logging.ERROR if fresh else logging.WARNING,
            "Thread %(thread)s failed and starts again in %(pause).1f s: %(error)s",
            {"thread": self._name, "pause": pause, "error": text},
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
        self._thread = Thread(target=self._run, name=f"flannel-dp-{name}", daemon=True)

    def start(self) -> None:
        """Start. A thread that cannot be started is noted on ``board``; nothing is raised."""
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:
            self._end(error)

    @property
    def out_of_memory(self) -> bool:
        """Whether the work was given up because there was no memory for it."""
        return self._failures.out_of_memory

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
                try:
                    pause = self._once()
                except MemoryError:  # while it was logged or reported
                    pause = self._failures.without_memory()
                    if self._failures.out_of_memory:
                        raise _OutOfMemory from None
                self._stopped.wait(pause)
        except BaseException as error:
            self._report_end(error)

    def _report_end(self, error: BaseException) -> None:
        """Note the end of the thread, when there is memory for that."""
        for _ in range(_REPORTS):
            try:
                self._end(error)
                if isinstance(error, _OutOfMemory):
                    self._on_failure(described(error))
                return
            except MemoryError:
                self._stopped.wait(_SHORTAGE_PAUSE)
            except Exception:  # it is noted, and cannot be reported
                return

    def _once(self) -> float:
        """Work to the end; return the pause before the next start."""
        try:
            self._work()
            if self._stopped.is_set():
                return 0.0
            raise _TooEarly("it returned without having been stopped")
        except Exception as error:
            if self._stopped.is_set():
                log.debug(
                    "Thread %(thread)s failed at its end", {"thread": self.name}, exc_info=error
                )
                return 0.0
            pause = self._failures.failed(error)
            try:
                self._on_failure(described(error))
            except Exception:
                log.exception("Thread %(thread)s cannot report its failure", {"thread": self.name})
            if self._failures.out_of_memory:
                raise _OutOfMemory from error
            return pause

    def _end(self, error: BaseException) -> None:
        if self._stopped.is_set():
            return
        self._board.end(self.name, described(error))
        log.critical(
            "Thread %(thread)s ended; restart the service", {"thread": self.name}, exc_info=error
        )


class _OutOfMemory(BaseException):
    """There is no memory for the work, again and again."""


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
