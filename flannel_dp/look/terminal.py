"""Standard output: lines, one JSON document, colour where it is wanted, aligned columns.

Colour is for terminals only and never with NO_COLOR (no-color.org). Lines are
the same with and without it, so that what is piped can be read as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

#: ``paint(text, colour)`` returns the text, coloured or as it is.
Paint = Callable[[str, str], str]

_CODES = {"red": 31, "green": 32, "yellow": 33, "magenta": 35, "cyan": 36, "bold": 1, "dim": 2}


def plain(text: str, _: str) -> str:
    """Paint nothing."""
    return text


def coloured(text: str, colour: str) -> str:
    """Paint by an ANSI escape sequence (ECMA-48, SGR)."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if colour and text else text


def wants_colour() -> bool:
    """Return whether the environment lets a terminal have colours."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def stdout_paint() -> Paint:
    """Return ``coloured`` where standard output is a terminal that wants it, else ``plain``."""
    wanted = sys.stdout is not None and sys.stdout.isatty() and wants_colour()
    return coloured if wanted else plain


def stdout_width() -> int:
    """Return the columns of the terminal that standard output is; 0 where it is none."""
    if sys.stdout is None or not sys.stdout.isatty():
        return 0
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return 0


def write_lines(lines: Iterable[str]) -> None:
    """Write lines to standard output. A reader that went away ("| head") is no error."""
    if sys.stdout is None:  # closed by the program that started us
        return
    try:
        sys.stdout.writelines(f"{line}\n" for line in lines)
    except BrokenPipeError:
        _drop_stdout()


def write_json(value: object) -> None:
    """Write one JSON document on one line."""
    import json

    write_lines([json.dumps(value, separators=(",", ":"))])


def flush() -> None:
    """Write out what is buffered, while an error can still be handled."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()


def _drop_stdout() -> None:
    """Nobody reads any more: what is still buffered must not fail at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def columns(
    rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), indent: str = ""
) -> Iterator[str]:
    """Yield rows as aligned lines; the columns numbered in ``right`` are aligned to the right.

    Rows have one length each; of no rows there are no lines.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(
        f"{{:{'>' if number in right else '<'}{width}}}" for number, width in enumerate(widths)
    )
    for row in rows:
        yield f"{indent}{form.format(*row)}".rstrip()


def count(number: int, word: str, plural: str = "") -> str:
    """Return ``1 peer``, ``2 peers``; ``plural`` is for words that take no s."""
    return f"{number} {word if number == 1 else plural or word + 's'}"


def human(value: float) -> str:
    """Return two or three digits and a unit: ``999 ``, ``1.2 k``, ``340 M``; powers of 1000."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    digits = 0 if value >= 99.5 or value == int(value) else 1
    return f"{value:.{digits}f} {unit}"


def human_time(seconds: float) -> str:
    """Return ``3 s``, ``5 min``, ``2 h``, ``4 d``."""
    for most, size, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
