"""What agents add to their history while it is looked at: for ``show --watch``."""

from __future__ import annotations

import os
from contextlib import suppress

import msgspec

from flannel_dp.kernel.netns import NetNS, netns_identity
from flannel_dp.look.events import HISTORY, Event
from flannel_dp.look.history import words_of
from flannel_dp.look.live_turns import DriftLine


class HistoryTail:
    """The events that the agents of one network namespace keep from now on."""

    def __init__(self, directory: str, netns: NetNS = None) -> None:
        self._directory, self._prefix = directory, f"{netns_identity(netns)[1]}-"
        self._decoder = msgspec.json.Decoder(Event)
        #: How far each file was read, by its path: its inode and the place.
        self._read: dict[str, tuple[int, int]] = {}
        self.lines(skip=True)

    def lines(self, *, skip: bool = False) -> list[DriftLine]:
        """Return what was added since; nothing where there is no history, or none to be read."""
        found: list[DriftLine] = []
        with suppress(OSError):
            for name in sorted(os.listdir(self._directory)):
                if name.startswith(self._prefix) and name.endswith(HISTORY):
                    with suppress(OSError):
                        found += self._added(f"{self._directory}/{name}", skip=skip)
        return found

    def _added(self, path: str, *, skip: bool) -> list[DriftLine]:
        known = os.stat(path)
        inode, place = self._read.get(path, (known.st_ino, 0))
        if inode != known.st_ino or known.st_size < place:  # a new one has begun
            place = 0
        if skip or known.st_size == place:
            self._read[path] = known.st_ino, known.st_size
            return []
        with open(path, "rb") as file:
            file.seek(place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read[path] = known.st_ino, place + len(whole)
        return [line for row in whole.splitlines() for line in self._line(row)]

    def _line(self, row: bytes) -> list[DriftLine]:
        try:
            event = self._decoder.decode(row)
        except (msgspec.DecodeError, ValueError):
            return []
        if event.kind == "peers":
            return []
        what = words_of(event)
        return [DriftLine(event.time, event.family, event.table, event.kind, what, "agent")]
