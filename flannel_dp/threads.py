"""Threads that begin, or say that they could not.

``threading.Thread.start`` waits until its thread has begun. One for which there is no memory ends
before that (``thread_run`` in CPython's Modules/_threadmodule.c reports it and returns), and the
caller waits for ever.
"""

from __future__ import annotations

import threading

#: More than a thread takes to begin on the busiest machine.
_SECONDS = 5.0


class _Beginning(threading.Event):
    """What ``Thread.start`` waits for."""

    def wait(self, timeout: float | None = None) -> bool:
        if super().wait(_SECONDS if timeout is None else timeout) or timeout is not None:
            return self.is_set()
        raise MemoryError("a thread could not begin")


class Thread(threading.Thread):
    """A ``threading.Thread`` whose ``start`` raises MemoryError where it does not begin, and
    RuntimeError, as any, where the system has no room for one more."""

    _started: threading.Event

    def start(self) -> None:
        """Start it, and return when it has begun."""
        if not self._started.is_set():
            self._started = _Beginning()
        super().start()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end; there is nothing to wait for where it did not begin."""
        if self._started.is_set():
            super().join(timeout)
