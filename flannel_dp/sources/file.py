"""Leases from a file or from standard input, in any form ``decode_leases`` reads."""

from __future__ import annotations

import os
import stat
import sys
import time
from typing import TextIO

from flannel_dp.cluster.documents import decode_leases
from flannel_dp.cluster.lease import ANNOTATION_PREFIX, annotation_keys_prefix
from flannel_dp.errors import Unavailable, require
from flannel_dp.sources.base import Call, Inbox, Snapshot

_ATTEMPTS = 5


class FileSource:
    """A file that holds the whole cluster; ``-`` is standard input.

    The file is read to its end before any of it is used, and read again
    (five times at most) when it was changed meanwhile. Writers should write a
    temporary file beside it and rename it, so that no reader ever sees half.

    Raises ConfigError for an ``annotation_prefix`` that cannot be one.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, annotation_prefix: str = ANNOTATION_PREFIX
    ) -> None:
        require(isinstance(path, (str, os.PathLike)), "path", path, 'a file\'s path, or "-"')
        annotation_keys_prefix(annotation_prefix)
        self._path = os.fspath(path)
        self._prefix = annotation_prefix
        self._stdin_read = False

    @property
    def origin(self) -> str:
        """The name of this source in messages."""
        return "standard input" if self._path == "-" else self._path

    @property
    def path(self) -> str:
        """The file's path as given, "-" for standard input."""
        return self._path

    def snapshot(self) -> Snapshot:
        """Read and decode the file as it is now.

        Standard input can be read once. Raises Unavailable, with the file's
        name and a hint, when the file is missing, unreadable, no file, empty,
        cut short or not a list of leases, or does not stop changing.
        """
        started = time.perf_counter()
        return self.decode(self._read_stdin() if self._path == "-" else self.read_file(), started)

    def follow(self, inbox: Inbox) -> None:
        """Deliver the file as it is, and again whenever it has become another; see
        FollowedSource.

        Writing in place, replacing by rename, removing, recreating, swapping a
        symbolic link on the way (a Kubernetes ConfigMap) and moving a directory are
        all noticed by events; where events are unavailable, the file is read every
        5 s instead, and a warning says so. Contents that were delivered already are
        delivered again after ``Call.REFRESH`` only. Standard input and pipes are
        delivered once.

        A version that is missing, broken or unreadable is an error in the inbox, nothing
        is delivered, and what was delivered stays. It is read again at the next
        event; without one, where it could not be read at all, after 1 s, 2 s and so
        on up to 30 s.
        """
        if self._path == "-" or _is_stream(self._path):
            self._follow_stream(inbox)
        else:
            from flannel_dp.sources.file_follow import FileFollower

            FileFollower(self, inbox).run()

    def _follow_stream(self, inbox: Inbox) -> None:
        """Deliver what can be read once; then there is nothing more to come."""
        try:
            self._deliver_stream(inbox)
        except Unavailable as error:
            from flannel_dp.sources.file_follow import bare

            inbox.trouble(bare(error))
        while inbox.wait() is not Call.STOP:
            inbox.trouble(
                Unavailable(
                    f"{self.origin}: it cannot be read twice",
                    hint="use a file for leases that are to be read again",
                )
            )

    def _deliver_stream(self, inbox: Inbox) -> None:
        started = time.perf_counter()
        fd = -1
        try:
            fd = self._open_stream()
            data = _read_stream(fd, inbox)
        except (OSError, ValueError) as error:  # ValueError: closed
            raise Unavailable(
                f"{self.origin}: cannot be read: {_reason(error)}",
                hint="pipe the leases in, or name a file",
            ) from error
        finally:
            if fd >= 0:
                os.close(fd)
        if data is not None:
            inbox.put(self.decode(data, started))

    def _open_stream(self) -> int:
        if self._path == "-":
            return os.dup(self._take_stdin().fileno())
        return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def decode(self, data: bytes, started: float) -> Snapshot:
        """Return the leases that were read; ``started`` is when reading began (perf_counter)."""
        if not data.strip():
            raise Unavailable(
                f"{self.origin}: it is empty",
                hint='write the leases into it; {"leases": []} stands for a cluster without nodes',
            )
        claims = decode_leases(data, origin=self.origin, annotation_prefix=self._prefix)
        return Snapshot(claims, self.origin, time.perf_counter() - started)

    def _take_stdin(self) -> TextIO:
        if self._stdin_read:
            raise Unavailable(
                f"{self.origin}: it was read to its end already",
                hint="use a file for leases that are read more than once",
            )
        if sys.stdin is None:
            raise Unavailable(
                f"{self.origin}: it is closed", hint="pipe the leases in, or name a file"
            )
        self._stdin_read = True
        return sys.stdin

    def _read_stdin(self) -> bytes:
        stdin = self._take_stdin()
        try:
            return stdin.buffer.read()
        except (OSError, ValueError) as error:  # ValueError: closed
            raise Unavailable(
                f"{self.origin}: cannot be read: {error}", hint="pipe the leases in, or name a file"
            ) from error

    def read_file(self, *, regular: bool = False) -> bytes:
        """Return the file's bytes as no write changed them; with ``regular`` a pipe is an error.

        Raises Unavailable as ``snapshot`` does.
        """
        try:
            for _ in range(_ATTEMPTS):
                data = _read_unchanged(self._path, regular)
                if data is not None:
                    return data
        except FileNotFoundError as error:
            raise Unavailable(
                f"{self.origin}: there is no such file", hint="check the path given as --leases"
            ) from error
        except IsADirectoryError as error:
            raise Unavailable(
                f"{self.origin}: it is a directory", hint="name the file in it that has the leases"
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise Unavailable(
                f"{self.origin!r}: cannot be read: {_reason(error)}",
                hint="make it a file that this user may read",
            ) from error
        raise Unavailable(
            f"{self.origin}: it was changed during each of {_ATTEMPTS} reads",
            hint="write a new file beside it and rename that into place",
        )


def _read_unchanged(path: str, regular: bool) -> bytes | None:
    """Return the file's bytes, None if it was written to between the first and the last of them."""
    with open(path, "rb", opener=_open_at_once if regular else None) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            if regular:
                raise Unavailable(
                    f"{path}: it is no regular file any more",
                    hint="remove it and write the leases into a new file of its name",
                )
            return file.read()  # a pipe has no size and no history
        data = file.read()
        after = os.fstat(file.fileno())
    if _identity(before) == _identity(after) and len(data) == after.st_size:
        return data
    return None


def _open_at_once(path: str, flags: int) -> int:
    """Open, and do not wait for a writer where it is a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_stream(path: str) -> bool:
    """Return whether there is something that can be read only once."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # it may yet come
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _read_stream(fd: int, inbox: Inbox) -> bytes | None:
    """Read to the end. Return None when stopped before that."""
    data = bytearray()
    while (call := inbox.wait(fds=[fd])) is not Call.STOP:
        if call is Call.REFRESH:
            continue  # all of it is delivered anyway
        try:
            chunk = os.read(fd, 1 << 20)
        except BlockingIOError:
            continue
        if not chunk:
            return bytes(data)
        data += chunk
    return None


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)
