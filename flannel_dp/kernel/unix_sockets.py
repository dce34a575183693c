"""Sockets in the file system (unix(7)), by paths of any length: sun_path has 108 bytes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: The suffix of an agent's socket, beside the lock of its device.
SOCKET = ".sock"

#: How often a socket is made again that another process removed before it listened.
_ATTEMPTS = 10


def make_socket() -> socket.socket:
    """Return a stream socket that is closed on exec."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)


@contextmanager
def short_path(path: str) -> Iterator[str]:
    """Give another path of the same file, for bind(2) and connect(2). Raises OSError."""
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def listening_socket(path: str, backlog: int) -> socket.socket:
    """Return a socket of mode 0600 that listens at the path, where nothing may be yet.

    Until it listens it has another name, since whoever removes what processes left behind takes it
    for such: where that happened another one is made. Raises OSError.
    """
    unfinished = f"{path}.{os.getpid()}"
    for attempt in range(_ATTEMPTS):
        made = make_socket()
        try:
            # The mode of the inode is that of the descriptor, less the umask, which is everyone's.
            os.fchmod(made.fileno(), 0o600)
            with short_path(unfinished) as short:
                made.bind(short)
            made.listen(backlog)
            os.rename(unfinished, path)
        except BaseException as error:
            made.close()
            if not isinstance(error, FileNotFoundError) or attempt == _ATTEMPTS - 1:
                with suppress(OSError):
                    os.unlink(unfinished)
                raise
        else:
            return made
    raise AssertionError("the last attempt returns or raises")


def remove_unheld_socket(path: str | os.PathLike[str]) -> bool:
    """Remove a socket at which no process listens; return whether that was so. Raises OSError."""
    name = os.fspath(path)
    if _is_held(name):
        return False
    aside = f"{name}.{os.urandom(6).hex()}"
    os.rename(name, aside)
    if _is_held(aside):  # a process that listens has taken the name meanwhile
        with suppress(FileExistsError):
            os.link(aside, name)
        os.unlink(aside)
        return False
    os.unlink(aside)
    return True


def _is_held(name: str) -> bool:
    with make_socket() as connection, short_path(name) as short:
        connection.setblocking(False)
        try:
            connection.connect(short)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its queue is full
            pass
    return True
