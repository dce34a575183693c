"""A program on a terminal: a pseudo terminal, and what an emulator (pyte) shows of it."""

from __future__ import annotations

import contextlib
import os
import select
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pyte

from tests.lib.waiting import LIMIT

#: What a terminal's program finds in its environment, whatever the tests were started with.
ENVIRONMENT = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "TZ": "UTC"}

#: What xterm is told to take the alternate screen, and to show the former one again.
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


class Session:
    """``start(command, stdin=, stdout=, stderr=, env=, **how)`` on a terminal of this size."""

    def __init__(
        self,
        start: Callable[..., Any],
        command: Sequence[str],
        *,
        columns: int = 80,
        lines: int = 24,
        env: Mapping[str, str] | None = None,
        **how: Any,
    ) -> None:
        self._master, self.slave = os.openpty()
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = bytearray()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.slave)
        inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self.process = start(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**inherited, **ENVIRONMENT, **(env or {})},
            **how,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT)
        os.close(self.slave)
        os.close(self._master)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        self.screen.resize(lines, columns)
        termios.tcsetwinsize(self._master, (lines, columns))

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def shown(self) -> list[str]:
        """The lines of the terminal, without what is empty below them."""
        lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def until(self, there: Callable[[], object]) -> None:
        """Read until ``there()``. Raises AssertionError where that takes too long."""
        end = time.monotonic() + LIMIT
        while not there():
            assert self._read(max(0.0, min(0.05, end - time.monotonic()))) or (
                time.monotonic() < end
            ), "\n".join(["the terminal shows:", *self.shown()])

    def wait(self) -> int:
        """Wait for the end of the program, and return its exit code."""
        self.until(lambda: self.process.poll() is not None)
        while self._read(0.0):
            pass
        return int(self.process.poll())

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):
            came = os.read(self._master, 1 << 16)
            self.raw += came
            self._stream.feed(came)
            return bool(came)
        return False
