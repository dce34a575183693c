"""A service as a process of its host: signals, the supervisor that started it, and memory."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 128 * 1024


@contextmanager
def signals(end: Callable[[], None], reload: Callable[[], None]) -> Iterator[int]:
    """Have SIGTERM, SIGINT and SIGQUIT call ``end`` and SIGHUP ``reload``, then restore what was
    there. Yields a descriptor that can be read when a signal has come.

    Python calls handlers between two steps of the main thread only. A signal that comes when that
    has just looked for one, and before it waits in the kernel, or that another thread gets, ends no
    wait: who waits has to wait for the descriptor as well.
    """

    def call_end(number: int, frame: object) -> None:
        end()

    def call_reload(number: int, frame: object) -> None:
        reload()

    chosen = {signal.SIGHUP: call_reload} | dict.fromkeys(
        (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT), call_end
    )
    came, comes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    told = signal.set_wakeup_fd(comes, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handler) for number, handler in chosen.items()}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(told)
        os.close(came)
        os.close(comes)


def end_with_supervised(stop: Callable[[], None]) -> None:
    """Watch the parent, and ``stop`` when it ends: supervisord stops the process that it started.

    Where that is a start script, the script dies, hands nothing on, and supervisord starts the
    next one, which would find the device held. The script leads our process group (supervisor's
    ``_spawn_as_child``).
    """
    if "SUPERVISOR_ENABLED" not in os.environ:
        return
    from flannel_dp.kernel.capabilities import end_with_parent

    end_with_parent(signal.SIGQUIT)
    try:
        os.kill(os.getpgrp(), 0)
    except ProcessLookupError:  # it had died before we asked
        stop()
    except PermissionError:
        pass


def return_large_blocks() -> None:
    """Let the system have large blocks back when they are freed (mallopt(3)).

    By itself glibc keeps ever larger ones once it has seen one, and those of a thread for good:
    malloc_trim(3) leaves the top of its arena alone. The answers of /metrics are such blocks.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
