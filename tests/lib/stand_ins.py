"""Small stand-ins: a clock that a test sets, and a terminal that keeps what is printed."""

from __future__ import annotations

import io


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
