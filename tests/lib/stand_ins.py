"""Small stand-ins: a clock that a test sets, a terminal that keeps what is printed, and a screen
that keeps what is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Self


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Screen:
    """``keys`` are typed one turn after the other."""

    def __init__(self, width: int = 100, height: int = 30, keys: Sequence[list[str]] = ()) -> None:
        self._size, self._keys = (width, height), [*keys]
        self.drawn: list[list[tuple[str, str]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait(self, seconds: float, also: int = -1) -> list[str]:
        return self._keys.pop(0) if self._keys else []

    def size(self) -> tuple[int, int]:
        return self._size

    def draw(self, rows: Sequence[tuple[str, str]]) -> None:
        self.drawn.append([*rows])
