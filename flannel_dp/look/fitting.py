"""What fits a terminal: columns left out by importance, long lines folded or cut, bars."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

_EIGHTHS = (
    "\u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"  # one eighth of a block to a whole one
)


def speaks_unicode() -> bool:
    """Return whether the locale's encoding is UTF-8, so that a terminal has more than ASCII."""
    # In the locale "C" Python sets LC_CTYPE to C.UTF-8 by itself (PEP 538).
    coerced = sys.flags.utf8_mode and os.environ.get("LANG", "C") in ("", "C", "POSIX")
    names = ("LC_ALL", *("LC_CTYPE",) * (not coerced), "LANG")
    name = next((os.environ[one] for one in names if os.environ.get(one)), "C")
    return name.lower().replace("-", "").endswith("utf8")


class Grid:
    """Rows as aligned lines, the first of them titles; columns numbered in ``right`` are aligned
    to the right. Rows have one length each. Columns are at least as wide as the texts of ``least``,
    for rows that come later. Of the last column ``last`` characters have to have room, where that
    is given: the rest goes on below (``folded``)."""

    def __init__(
        self,
        rows: Iterable[Sequence[str]],
        *,
        right: Sequence[int] = (),
        drop: Sequence[int | tuple[int, ...]] = (),
        indent: str = "",
        least: Sequence[str] = (),
        last: int = 0,
    ) -> None:
        self.rows = [*rows]
        self._right, self._drop, self._indent = frozenset(right), drop, indent
        widest = [*self.rows, least] if least else self.rows
        self._widths = [max(map(len, column)) for column in zip(*widest, strict=True)]
        self._spare = max(0, self._widths[-1] - last) if last and self._widths else 0

    def lines(self, width: int = 0, rows: Iterable[Sequence[str]] | None = None) -> Iterator[str]:
        """Yield lines, of ``rows`` where these are given. Where they would have more than ``width``
        characters (0: no limit), the columns numbered in ``drop`` are left out, in their order
        (those of a tuple together), until they have not."""
        widths, most = self._widths, width + self._spare
        kept = [*range(len(widths))]
        for numbers in self._drop:
            if width and len(self._indent) + sum(widths[n] + 2 for n in kept) - 2 > most:
                gone = numbers if isinstance(numbers, tuple) else (numbers,)
                kept = [number for number in kept if number not in gone]
        form = "  ".join(f"{{:{'>' if n in self._right else '<'}{widths[n]}}}" for n in kept)
        for row in self.rows if rows is None else rows:
            yield f"{self._indent}{form.format(*(row[number] for number in kept))}".rstrip()


def bar(part: float, width: int) -> str:
    """Return a bar of ``part`` (0 to 1) of ``width`` characters; of ASCII where the locale's
    encoding is not UTF-8. Anything above 0 can be seen."""
    if part <= 0:
        return ""
    if not speaks_unicode():
        return "#" * max(1, round(part * width))
    eighths = max(1, round(min(1.0, part) * width * 8))
    return _EIGHTHS[-1] * (eighths // 8) + (_EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def whole_words(words: Sequence[str], width: int) -> str:
    """Return as many of the words, from the first on, as have room, with commas between them."""
    text = words[0] if words else ""
    for word in words[1:]:
        if len(text) + len(word) + 2 > width:
            break
        text += f", {word}"
    return text


def cut(text: str, width: int) -> str:
    """Return text that takes no more than ``width`` columns of a terminal; what is cut off is
    marked."""
    if len(text) <= width and text.isascii():
        return text
    taken = [*accumulate(map(_columns_of, text))]
    if not taken or taken[-1] <= width:
        return text
    shown = sum(columns < width for columns in taken)
    return text[:shown] + ("\u2026" if speaks_unicode() else ">")


def _columns_of(char: str) -> int:
    if char.isascii():
        return 1
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def folded(lines: Iterable[str], width: int) -> Iterator[str]:
    """Yield lines of at most ``width`` characters (0: no limit): longer ones go on in a line below,
    under the last column that begins in the first two thirds of it. What is quoted, a command to
    copy, stays in one line."""
    if not width:
        yield from lines
        return
    for line in (one for text in lines for one in text.split("\n")):
        if len(_visible(line)) <= width:
            yield line
            continue
        margin = " " * _margin(_visible(line), width)
        now: list[str] = []
        for space, word in re.findall(r"(\s*)((?<!\S)\(?'[^']*'\S*|\S+)", line):
            if len(_visible("".join(now) + space + word)) > width and now:
                place = _break(now, width)
                yield "".join(now[:place])
                now = [margin, *now[place:]] if place < len(now) else [margin, ""]
                now[1] = now[1].lstrip()
                space = space if now[1] else ""
            now += [space + word]
        yield "".join(now)


def _break(words: list[str], width: int) -> int:
    """Return how many of the words stay: up to the last comma in the right half of the line."""
    taken = [*accumulate(len(_visible(word)) for word in words)]
    places = [n + 1 for n, word in enumerate(words) if word[-1:] in (",", ";", ":")]
    return max((n for n in places if taken[n - 1] > width // 2), default=len(words))


def _margin(line: str, width: int) -> int:
    """Return where a line goes on below."""
    columns = [gap.end() for gap in re.finditer(r"(?<=\S)\s{2,}", line)]
    first = len(line) - len(line.lstrip()) + 4
    return max((column for column in columns if column <= width * 2 // 3), default=first)


def _visible(line: str) -> str:
    """Return a line without its colours."""
    return re.sub(r"\x1b\[\d*m", "", line) if "\x1b" in line else line
