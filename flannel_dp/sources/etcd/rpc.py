"""Calls of gRPC: the bytes and headers of one HTTP/2 stream, read as messages and a status.

The form is that of gRPC's doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote

from msgspec import Struct, field

from flannel_dp.sources.etcd.socket import Lost
from flannel_dp.sources.limits import MESSAGE_BYTES, MIB

#: No status code has more; gRPC's own go up to 16.
_CODE_DIGITS = 9

# Status codes (gRPC's doc/statuscodes.md).
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, PERMISSION_DENIED = 0, 3, 4, 5, 7
RESOURCE_EXHAUSTED, FAILED_PRECONDITION, OUT_OF_RANGE = 8, 9, 11
UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 12, 13, 14
UNAUTHENTICATED = 16


class RpcStatus(Struct, frozen=True):
    """How a call ended; ``message`` is the server's text."""

    code: int
    message: str


class RpcError(Exception):
    """The server answered with an error status."""

    def __init__(self, status: RpcStatus) -> None:
        super().__init__(status.message)
        self.status = status


class HttpStream(Struct):
    """One call. ``size`` is that of ``messages`` in bytes; ``complete`` counts taken ones, too."""

    data: bytearray = field(default_factory=bytearray)
    messages: list[bytes] = field(default_factory=list)
    size: int = 0
    complete: int = 0
    http: str = "200"
    status: RpcStatus | None = None
    ended: bool = False


def split_messages(stream: HttpStream) -> None:
    """Take complete messages off the front of the stream's bytes."""
    data, start = stream.data, 0
    while len(data) - start >= 5:
        length = int.from_bytes(data[start + 1 : start + 5], "big")
        if data[start]:
            raise Lost("it sent something that is no gRPC message")
        if stream.size + length > MESSAGE_BYTES:
            raise Lost(f"it sent a message of over {MESSAGE_BYTES // MIB} MiB")
        if len(data) - start - 5 < length:
            break
        with memoryview(data) as view:
            stream.messages.append(bytes(view[start + 5 : start + 5 + length]))
        stream.size += length
        stream.complete += 1
        start += 5 + length
    if start:
        del data[:start]


def read_headers(stream: HttpStream, headers: Iterable[tuple[bytes | str, bytes | str]]) -> None:
    """Note what headers or trailers say of the call."""
    found = {_text(name): _text(value) for name, value in headers}
    stream.http = found.get(":status", stream.http)
    if (code := found.get("grpc-status")) is not None:
        if code.isascii() and code.isdigit() and len(code) <= _CODE_DIGITS:
            stream.status = RpcStatus(int(code), unquote(found.get("grpc-message", "")))
        else:
            stream.status = RpcStatus(UNAVAILABLE, f"unreadable grpc-status {code[:40]!r}")


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def status_of(stream: HttpStream) -> RpcStatus:
    """Return how a call ended whose stream has ended."""
    if stream.status is not None:
        return stream.status
    if stream.http != "200":
        return RpcStatus(UNAVAILABLE, f"HTTP status {stream.http}: that is not etcd itself")
    return RpcStatus(UNAVAILABLE, "the answer was cut short")


def answer_of(stream: HttpStream) -> bytes | RpcStatus:
    """Return the message that answers a unary call, or how the call failed."""
    status = status_of(stream)
    if status.code != OK:
        return status
    if len(stream.messages) != 1:
        # As every gRPC client has it; an absent message is no empty one.
        return RpcStatus(INTERNAL, f"unreadable answer: OK with {len(stream.messages)} messages")
    return stream.messages[0]
