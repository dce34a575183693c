"""Follows a file of leases: events of inotify(7), or reading it now and then."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from flannel_dp.backoff import Backoff
from flannel_dp.errors import Unavailable
from flannel_dp.sources.base import Call, Inbox, Snapshot

if TYPE_CHECKING:
    from flannel_dp.sources.inotify import FileWatch

log = logging.getLogger(__name__)

#: Events that come within so many seconds of the first are one change.
_SETTLE = 0.02
#: Seconds between two readings where events are unavailable.
_POLL = 5.0


class FollowedFile(Protocol):
    """What is followed: ``FileSource``."""

    @property
    def path(self) -> str:
        """The file's path."""
        ...

    def read_file(self, *, regular: bool = False) -> bytes:
        """Return its bytes; with ``regular`` a pipe is an error. Raises Unavailable."""
        ...

    def decode(self, data: bytes, started: float) -> Snapshot:
        """Return the leases in these bytes. Raises Unavailable."""
        ...


class FileFollower:
    """One ``follow`` of one file: watch, read, wait, and so on."""

    def __init__(self, source: FollowedFile, inbox: Inbox) -> None:
        self._source, self._inbox = source, inbox
        self._watch: FileWatch | None = None
        self._polling = False
        self._forced = True  # deliver, whatever is in it
        self._delivered = b""  # digests of contents
        self._broken: tuple[bytes, Unavailable] | None = None
        self._backoff = Backoff(first=1.0, most=24.0)
        self._due: float | None = None  # when to read without an event, monotonic

    def run(self) -> None:
        """Follow the file until the inbox says to stop."""
        try:
            while True:
                self._arm()
                self._read()
                if not self._wait():
                    return
        finally:
            self._disarm()

    # ---- events

    def _arm(self) -> None:
        from flannel_dp.sources.inotify import FileWatch, watch_hint

        try:
            if self._watch is None:
                self._watch = FileWatch(self._source.path)
            self._watch.arm()
        except OSError as error:
            self._disarm()
            if not self._polling:
                hint = f" - {hint}" if (hint := watch_hint(error)) else ""
                log.warning(
                    "%(file)s cannot be watched, it is read every %(seconds)g s instead: "
                    "%(path)s: %(error)s",
                    {
                        "file": self._source.path,
                        "seconds": _POLL,
                        "path": error.filename,
                        "error": f"{error.strerror}{hint}",
                    },
                )
            self._polling = True
        else:
            if self._polling:
                log.info("%(file)s is watched again", {"file": self._source.path})
            self._polling = False

    def _disarm(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _wait(self) -> bool:
        """Wait until the file is to be read again. Return False for the end."""
        watch = self._watch
        fds = [watch.fileno()] if watch else []
        while True:
            timeout = None if self._due is None else self._due - time.monotonic()
            call = self._inbox.wait(timeout, fds)
            if call is Call.READY and not (watch and watch.read()):
                continue
            if call is Call.READY:
                call = self._inbox.wait(_SETTLE)
            self._forced |= call is Call.REFRESH
            return call is not Call.STOP

    # ---- the file

    def _read(self) -> None:
        self._due = time.monotonic() + _POLL if self._polling else None
        started = time.perf_counter()
        try:
            data = self._source.read_file(regular=True)
        except Unavailable as error:
            self._inbox.trouble(bare(error))
            self._retry()
            return
        self._backoff.reset()
        self._take(data, started)

    def _take(self, data: bytes, started: float) -> None:
        from hashlib import blake2b

        digest = blake2b(data, digest_size=16).digest()
        if digest == self._delivered and not self._forced:
            self._inbox.healthy()
            return
        if self._broken is not None and digest == self._broken[0]:
            self._inbox.trouble(self._broken[1])
            return
        try:
            self._inbox.put(self._source.decode(data, started))
        except Unavailable as error:
            self._broken = digest, bare(error)
            self._inbox.trouble(self._broken[1])
        else:
            self._delivered, self._forced, self._broken = digest, False, None

    def _retry(self) -> None:
        """The obstacle may go without an event (a permission, a disk, a mount)."""
        due = time.monotonic() + self._backoff.next()
        self._due = due if self._due is None else min(due, self._due)


def bare(error: Unavailable) -> Unavailable:
    """Return the same error without its traceback, whose frames hold on to what was read."""
    return Unavailable(error.message, hint=error.hint)
