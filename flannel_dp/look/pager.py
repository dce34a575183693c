"""The part of a list that a full screen shows: scrolling, and a filter by text."""

from __future__ import annotations

from collections.abc import Sequence

from flannel_dp.look.full_screen import Row

#: What the last line says, the most important first.
_HELP = ("q quit", "/ filter", "j k PgUp PgDn scroll", "g G first, last")

_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1}
_PAGES = {"page up": -1, "b": -1, "page down": 1, " ": 1}
_ENDS = {"home": 0, "g": 0, "end": 1 << 62, "G": 1 << 62}


class Pager:
    """Knows which rows of a list are shown, and what the last line says."""

    def __init__(self) -> None:
        self.done = False
        self._first, self._room, self._count, self._total = 0, 1, 0, 0
        self._filter, self._typing = "", False

    def press(self, key: str) -> None:
        """Take a key into account; ``done`` is set by the one that ends it."""
        if self._typing:
            self._edit(key)
        elif key in _STEPS:
            self._first += _STEPS[key]
        elif key in _PAGES:
            self._first += _PAGES[key] * max(1, self._room - 1)
        elif key in _ENDS:
            self._first = _ENDS[key]
        elif key == "/":
            self._typing, self._filter = True, ""
        elif key in ("q", "Q", "escape"):
            self.done = True
        self._first = max(0, self._first)

    def _edit(self, key: str) -> None:
        if key == "enter":
            self._typing = False
        elif key == "escape":
            self._typing, self._filter = False, ""
        elif key == "backspace":
            self._typing, self._filter = bool(self._filter), self._filter[:-1]
        elif len(key) == 1:
            self._filter += key
        self._first = 0

    def shown(self, rows: Sequence[Sequence[str]], room: int) -> list[int]:
        """Return the numbers of the rows to show on ``room`` lines."""
        wanted = self._filter.casefold()
        found = [
            number
            for number, row in enumerate(rows)
            if not wanted or wanted in " ".join(row).casefold()
        ]
        self._room, self._count, self._total = max(1, room), len(found), len(rows)
        self._first = max(0, min(self._first, len(found) - self._room))
        return found[self._first : self._first + self._room]

    def foot(self, width: int) -> Row:
        """Return the last line: the keys, and which rows are shown."""
        last = min(self._first + self._room, self._count)
        of = f"{self._first + 1}-{last} of {self._count:,}" if self._count else "none"
        if self._filter and self._count != self._total:
            of += f" ({self._total:,} in all)"
        if self._typing:
            keys = [f"/{self._filter}_", "Enter keeps it", "Esc clears it"]
        else:
            keys = [*([f"filter: {self._filter}"] if self._filter else []), *_HELP]
        left = keys[0]
        for key in keys[1:]:
            if len(left) + len(key) + len(of) + 4 <= width:
                left += f"  {key}"
        return f"{left}{of:>{max(len(of) + 2, width - len(left))}}", "dim"
