"""A chunked body (RFC 9112, section 7.1), taken apart with no work for each byte or line of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import httpcore2

#: Of a chunk's size with its extensions, and of all trailers: nothing of either is used.
_LINE_MOST, _TRAILERS_MOST = 4096, 65_536

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?")


def unchunked(read: Callable[[], bytes], data: bytes) -> Iterator[bytes]:
    """Yield the bytes of a body as they arrive; ``data`` has come already, ``read`` returns what
    comes next, b"" at the end of the connection.

    Raises httpcore2.RemoteProtocolError for what is not chunked and where the connection ends
    before the body does.
    """
    at = 0
    while True:
        end = data.find(b"\r\n", at)
        while end < 0:
            if len(data) - at > _LINE_MOST:
                raise _broken("the size of a chunk is too long")
            data, at = data[at:] + _more(read), 0
            end = data.find(b"\r\n")
        size = _SIZE.fullmatch(data, at, end)
        if size is None or end - at > _LINE_MOST:
            raise _broken("a chunk without its size")
        left, at = int(size[1], 16), end + 2
        if not left:
            _skip_trailers(read, data[at:])
            return
        while left:
            if at == len(data):
                data, at = _more(read), 0
            piece = data[at : at + left]
            left, at = left - len(piece), at + len(piece)
            yield piece
        while len(data) - at < 2:
            data, at = data[at:] + _more(read), 0
        if data[at : at + 2] != b"\r\n":
            raise _broken("a chunk that is longer than its size")
        at += 2


def _skip_trailers(read: Callable[[], bytes], data: bytes) -> None:
    while not data.startswith(b"\r\n") and b"\r\n\r\n" not in data:
        if len(data) > _TRAILERS_MOST:
            raise _broken("its trailers are too long")
        data += _more(read)


def _more(read: Callable[[], bytes]) -> bytes:
    data = read()
    if not data:
        raise _broken("the connection ended before the answer did")
    return data


def _broken(reason: str) -> httpcore2.RemoteProtocolError:
    return httpcore2.RemoteProtocolError(reason)
