"""Sockets in the file system (unix(7)), by paths of any length: sun_path has 108 bytes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

#: The suffix of an agent's socket, beside the lock of its device.
SOCKET = ".sock"


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


def remove_unheld_socket(path: str | os.PathLike[str]) -> bool:
    """Remove a socket at which no process listens; return whether that was so. Raises OSError."""
    name = os.fspath(path)
    with make_socket() as connection, short_path(name) as short:
        connection.setblocking(False)
        try:
            connection.connect(short)
        except ConnectionRefusedError:
            os.unlink(name)
            return True
        except BlockingIOError:  # its queue is full
            pass
    return False
