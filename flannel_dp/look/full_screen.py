"""A terminal as one screen that is redrawn, with keys: for ``show --watch`` and ``stats --watch``.

Not curses: it ends the process where the terminal's description is missing, which is so in small
images, and cannot be told where to draw. Not rich: an import of 100 ms and a dependency for a table
in place, and it reads no keys. What is used here (ECMA-48, and xterm's alternate screen) every
terminal of the last twenty years has.

The terminal is given back as it was whatever ends the screen: a return, an exception, SIGINT,
SIGTERM, SIGHUP, SIGQUIT, and while the process is stopped (SIGTSTP).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Self

from flannel_dp.look.fitting import cut, speaks_unicode
from flannel_dp.look.terminal import coloured, plain, wants_colour

#: A line of a screen: its text, and its colour ("": none).
Row = tuple[str, str]

_ENTER = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # alternate screen, no cursor, lines do not wrap
_LEAVE = b"\x1b[?7h\x1b[?25h\x1b[?1049l"

#: Signals that end the process, once the terminal is given back.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_KEYS = {
    "A": "up", "B": "down", "H": "home", "F": "end", "1~": "home", "4~": "end", "7~": "home",
    "8~": "end", "5~": "page up", "6~": "page down",
}  # fmt: skip
_CONTROL = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace"}

#: Seconds in which the rest of a key comes whose first byte is that of Escape.
_REST_OF_KEY = 0.05


class FullScreen:
    """The terminal of descriptor ``out``, whose keys come from ``keys``. A context manager."""

    def __init__(self, out: int = 1, keys: int = 0) -> None:
        self._out, self._keys = out, keys
        self._own = -1
        self._saved: list[Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._woken = self._waker = self._former = -1
        self._shown: list[str] = []
        self._taken, self._fresh, self._size = False, True, (0, 0)
        self._paint = coloured if wants_colour() else plain

    def __enter__(self) -> Self:
        if not os.isatty(self._keys):  # leases may come from standard input
            with suppress(OSError):
                self._keys = self._own = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
        with suppress(termios.error):
            self._saved = termios.tcgetattr(self._keys)
        self._woken, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        handlers: dict[int, Any] = dict.fromkeys(_ENDING, self._end)
        handlers |= {signal.SIGTSTP: self._pause, signal.SIGCONT: self._go_on}
        handlers[signal.SIGWINCH] = _nothing  # its number in the pipe is enough
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._handlers[number] = signal.signal(number, handler)
        # Written by the C handler: a signal that comes just before poll(2) ends it as well.
        self._former = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        try:
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._give_back()
        signal.set_wakeup_fd(self._former)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for fd in (self._woken, self._waker, self._own):
            if fd >= 0:
                os.close(fd)

    # ---- the terminal, taken and given back

    def _take(self) -> None:
        if self._saved is not None:
            quiet = [*self._saved[:6], [*self._saved[6]]]
            quiet[3] &= ~(termios.ICANON | termios.ECHO)  # Ctrl-C and Ctrl-Z stay signals
            quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._keys, termios.TCSADRAIN, quiet)
        taken, self._taken = self._taken, True
        if not taken:
            self._write(_ENTER)
        self._fresh = True

    def _give_back(self) -> None:
        if self._taken:
            self._taken = False
            with suppress(BrokenPipeError):
                self._write(_LEAVE)
        if self._saved is not None:
            with suppress(termios.error):  # keys that were not read are no command for a shell
                termios.tcsetattr(self._keys, termios.TCSAFLUSH, self._saved)

    def _end(self, number: int, _: FrameType | None) -> None:
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _pause(self, number: int, _: FrameType | None) -> None:
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops here until SIGCONT
        signal.signal(number, self._pause)
        self._go_on(number, None)

    def _go_on(self, *_: object) -> None:
        self._take()

    # ---- keys

    def wait(self, seconds: float, also: int = -1) -> list[str]:
        """Wait for keys, a new size or the descriptor ``also``, and return the keys: characters,
        or names as "up", "page down", "escape"; "redraw" where all has to be drawn again."""
        poller = select.poll()
        watched = [self._woken, *([self._keys] if self._saved is not None else [])]
        for fd in (*watched, *([also] if also >= 0 else [])):
            poller.register(fd, select.POLLIN)
        ready = dict(poller.poll(max(0.0, seconds) * 1000))
        found = []
        if self._woken in ready:
            with suppress(BlockingIOError):
                os.read(self._woken, 4096)
            found.append("redraw")
        if self._keys in ready and self._keys in watched:
            found += self._read_keys()
        return found

    def _read_keys(self) -> list[str]:
        try:
            typed = os.read(self._keys, 4096)
            while typed.endswith((b"\x1b", b"\x1b[", b"\x1bO")) and self._more():
                typed += os.read(self._keys, 4096)
        except OSError:
            typed = b""
        if not typed:  # the terminal has hung up
            return ["escape"]
        return split_keys(typed.decode("utf-8", "ignore"))

    def _more(self) -> bool:
        return bool(select.select([self._keys], [], [], _REST_OF_KEY)[0])

    # ---- drawing

    def size(self) -> tuple[int, int]:
        """Return its columns and lines."""
        try:
            found = os.get_terminal_size(self._out)
        except OSError:
            return 80, 24
        return found.columns or 80, found.lines or 24

    def draw(self, rows: Sequence[Row]) -> None:
        """Show these lines, at least the first ones and the last; those that are there already are
        not written again. Raises BrokenPipeError where the terminal is gone."""
        width, height = size = self.size()
        if len(rows) > height:
            rows = [*rows[: height - 1], rows[-1]]
        lines = [self._paint(cut(text, width), colour) for text, colour in rows]
        fresh = self._fresh or size != self._size
        self._fresh, self._size = False, size  # a signal may make it fresh while this is drawn
        before = [] if fresh else self._shown
        written = ["\x1b[2J"] if fresh else []
        for number in range(max(len(lines), len(before))):
            line = lines[number] if number < len(lines) else ""
            if number >= len(before) or before[number] != line:
                written.append(f"\x1b[{number + 1};1H\x1b[2K{line}")
        self._shown = lines
        if written:
            encoding = "utf-8" if speaks_unicode() else "ascii"
            self._write("".join(written).encode(encoding, "replace"))

    def _write(self, text: bytes) -> None:
        """Write past Python's buffers: signals may come in between."""
        left = memoryview(text)
        try:
            while left:
                left = left[os.write(self._out, left) :]
        except OSError as error:
            raise BrokenPipeError(error.errno, "the terminal is gone") from None


def _nothing(*_: object) -> None:
    """A handler: a signal that is ignored would write nothing."""


def split_keys(typed: str) -> list[str]:
    """Return the keys that were typed; what is none that is known is left out."""
    found: list[str] = []
    place = 0
    while place < len(typed):
        char = typed[place]
        place += 1
        if char != "\x1b":
            found.append(_CONTROL.get(char, char if char.isprintable() else ""))
            continue
        if typed[place : place + 1] not in ("[", "O"):
            found.append("escape")
            continue
        start = place = place + 1
        while place < len(typed) and not "@" <= typed[place] <= "~":
            place += 1
        place += 1
        found.append(_KEYS.get(typed[start:place], ""))
    return [key for key in found if key]


def full_screen() -> FullScreen | None:
    """Return standard output as a screen; None where it is no terminal, or one that cannot move its
    cursor."""
    if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        return FullScreen(sys.stdout.fileno())
    except OSError:  # an object of a caller's own
        return None
