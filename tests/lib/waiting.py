"""Waits, and their one limit, which is so long that it says nothing about the machine.

A test waits for a condition and goes on as soon as it holds. The limit is only met by what will
never come; it must not decide a test on a machine whose processors are busy with other work.
Where a test shows that something does not wait for a timer, the timer is set to NEVER: had it
waited, the test would fail at the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

#: Seconds. Every wait of a test, for a condition, a process, a thread or an answer, ends by it.
LIMIT: Final = 120.0

#: Seconds until a timer that a test must not depend on: longer than any test may run.
NEVER: Final = 3600.0


def wait_until(
    predicate: Callable[[], object],
    timeout: float = LIMIT,
    *,
    describe: Callable[[], str] = lambda: "",
) -> None:
    """Return as soon as ``predicate()`` is true; fail at the limit, with ``describe()``."""
    first = time.monotonic()
    while True:
        began = time.monotonic()
        if predicate():
            return
        now = time.monotonic()
        if now > first + timeout:
            raise AssertionError(f"{predicate} was not true within {timeout} s\n{describe()}")
        # What is waited for needs the processor more than the asking does, and what has taken
        # long is not noticed much later for being asked for less often.
        time.sleep(max(0.005, min(2 * (now - began), 0.25), min((now - first) / 8, 0.05)))
