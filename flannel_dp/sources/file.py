"""Leases from a file or from standard input, in any form ``decode_leases`` reads."""

from __future__ import annotations

import os
import stat
import sys
import time

from flannel_dp.errors import Unavailable
from flannel_dp.lease import ANNOTATION_PREFIX, annotation_keys_prefix, decode_leases
from flannel_dp.sources import Snapshot

_ATTEMPTS = 5


class FileSource:
    """A file that holds the whole cluster; ``-`` is standard input.

    The file is read to its end before any of it is believed, and read again
    (five times at most) when it was changed meanwhile. Writers should write a
    temporary file beside it and rename it, so that no reader ever sees half.

    Raises ConfigError for an ``annotation_prefix`` that cannot be one.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, annotation_prefix: str = ANNOTATION_PREFIX
    ) -> None:
        annotation_keys_prefix(annotation_prefix)
        self._path = os.fspath(path)
        self._prefix = annotation_prefix
        self._stdin_read = False

    @property
    def origin(self) -> str:
        """The name of this source in messages."""
        return "standard input" if self._path == "-" else self._path

    def snapshot(self) -> Snapshot:
        """Read and decode the file as it is now.

        Standard input can be read once. Raises Unavailable, with the file's
        name and a hint, when the file is missing, unreadable, no file, empty,
        cut short or not a list of leases, or does not stop changing.
        """
        started = time.perf_counter()
        data = self._read_stdin() if self._path == "-" else self._read_file()
        if not data.strip():
            raise Unavailable(
                f"{self.origin}: it is empty",
                hint='write the leases into it; {"leases": []} stands for a cluster without nodes',
            )
        claims = decode_leases(data, origin=self.origin, annotation_prefix=self._prefix)
        return Snapshot(claims, self.origin, time.perf_counter() - started)

    def _read_stdin(self) -> bytes:
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
        try:
            return sys.stdin.buffer.read()
        except (OSError, ValueError) as error:  # ValueError: closed
            raise Unavailable(
                f"{self.origin}: cannot be read: {error}", hint="pipe the leases in, or name a file"
            ) from error

    def _read_file(self) -> bytes:
        try:
            for _ in range(_ATTEMPTS):
                data = _read_unchanged(self._path)
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
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise Unavailable(
                f"{self.origin!r}: cannot be read: {reason}",
                hint="make it a file that this user may read",
            ) from error
        raise Unavailable(
            f"{self.origin}: it was changed during each of {_ATTEMPTS} reads",
            hint="write a new file beside it and rename that into place",
        )


def _read_unchanged(path: str) -> bytes | None:
    """The file's bytes, None if it was written to between the first and the last of them."""
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        data = file.read()
        if not stat.S_ISREG(before.st_mode):  # a pipe has no size and no history
            return data
        after = os.fstat(file.fileno())
    if _identity(before) == _identity(after) and len(data) == after.st_size:
        return data
    return None


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
