"""The history of a node: events in a bounded file, which the next process goes on with.

What happens in one turn of the agent's loop is one write(2), and nothing is synced to a disk. Of
many peers that change at once the list of all is written, packed: it says the same, in a tenth of
the time. A last line that was cut off by the end of a process is ended first.

Not SQLite: 10,000 events take it 20 ms in one transaction (lines: 15 ms; the packed list: 3 ms), a
single one four times as long, and its import 7 ms; and a line is what a person can read.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from flannel_dp.cluster.lease import printable
from flannel_dp.look.events import BEFORE, Event, PeerList

if TYPE_CHECKING:
    from flannel_dp._core import Claims

#: A file of so many bytes is full; or of so many times the list of all peers, if that is more.
MOST_BYTES, MOST_LISTS = 4 << 20, 4
#: So many events wait at most, where nothing can be written.
_MOST_WAITING = 10_000


class History:
    """Appends events to the file at ``path``.

    ``lists()`` gives the accepted peers by family, with which a new file begins. What cannot be
    written is dropped; ``report(error)`` is called with why, and with None when it can be again.
    From any thread. The constructor raises nothing.
    """

    def __init__(
        self,
        path: str,
        lists: Callable[[], Mapping[int, Claims]],
        report: Callable[[OSError | None], object],
        *,
        most: int = MOST_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path, self._lists, self._report = path, lists, report
        self._most, self._clock = most, clock
        self._fd, self._size, self._largest = -1, 0, 0
        self._torn = self._failed = False
        self._waiting: list[Event | PeerList] = []
        self._lock = threading.Lock()

    def note(self, event: Event) -> None:
        """Have the next ``flush`` write an event."""
        with self._lock:
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append(event)

    def note_list(self, claims: Claims, cause: str = "") -> None:
        """Have the next ``flush`` write all peers of a family."""
        made = peer_list(claims, self._clock(), cause)
        with self._lock:
            self._waiting.append(made)

    def flush(self) -> None:
        """Write what waits, in one append."""
        if not self._waiting:
            return
        with self._lock:
            waiting, self._waiting = self._waiting, []
            text = b"".join(msgspec.json.encode(one) + b"\n" for one in waiting)
            try:
                self._append(text)
            except OSError as error:
                failure: OSError | None = error
                self._close()
            else:
                failure = None
        if failure is not None or self._failed:
            self._failed = failure is not None
            self._report(failure)

    def close(self) -> None:
        """Write what waits, and close the file."""
        self.flush()
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, text: bytes) -> None:
        if self._fd < 0:
            self._open()
        lacks_lists = not self._size and os.path.exists(self.path + BEFORE)
        self._write(text)  # before the lists, which have it: they are compared with what is known
        self._largest = max(self._largest, len(text))
        if self._size > max(self._most, MOST_LISTS * self._largest):
            os.rename(self.path, self.path + BEFORE)
            self._close()
            self._open()
            lacks_lists = True
        if lacks_lists:
            self._write_lists()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        self._fd = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size
        self._torn = bool(self._size) and os.pread(self._fd, 1, self._size - 1) != b"\n"

    def _write_lists(self) -> None:
        """Have the file know all peers, of which the one before it tells."""
        now = self._clock()
        lists = [peer_list(claims, now) for claims in self._lists().values()]
        self._write(b"".join(msgspec.json.encode(one) + b"\n" for one in lists))

    def _write(self, text: bytes) -> None:
        """Append; a text that was written in part is ended by the next one."""
        if self._torn:
            text = b"\n" + text
        left = memoryview(text)
        while left:
            self._torn = True
            written = os.write(self._fd, left)
            self._size += written
            left = left[written:]
        self._torn = False


def peer_list(claims: Claims, now: float, cause: str = "") -> PeerList:
    """Return the accepted peers of a family, packed."""
    names = [*map(claims.name, range(len(claims)))]
    if not "".join(names).isprintable():
        names = [*map(printable, names)]
    return PeerList(
        now,
        claims.family,
        names,
        bytes(claims.subnets),
        bytes(claims.lengths),
        bytes(claims.endpoints),
        bytes(claims.macs),
        cause,
    )
