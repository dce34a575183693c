"""Hostile etcd members: one passes a real one's answers on and changes some, one floods."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import hpack

from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.sources.etcd import messages as pb
from tests.lib.etcd import EtcdServer
from tests.lib.waiting import LIMIT

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

Change = Callable[[bytes], bytes]


class Garbler:
    """A proxy in front of ``etcd`` on a port of its own, in the same namespace.

    ``fail(method, *changes)`` has the next messages that answer ``method`` (such as
    "LeaseKeepAlive") changed, one change each; ``left(method)`` are those still to come.
    ``flood(method, frame)`` sends ``frame`` without end after the next message that answers it.
    """

    def __init__(self, etcd: EtcdServer) -> None:
        self._target = (etcd.address, etcd.client_port)
        self._netns = etcd.netns or None
        self._listener = call_in_netns(self._netns, socket.create_server, ("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._changes: dict[str, deque[Change]] = defaultdict(deque)
        self.floods: dict[str, bytes] = {}
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def fail(self, method: str, *changes: Change) -> None:
        self._changes[method].extend(changes)

    def flood(self, method: str, frame: bytes) -> None:
        self.floods[method] = frame

    def behave(self) -> None:
        """Change nothing and flood no client from now on."""
        self._changes.clear()
        self.floods.clear()

    def left(self, method: str) -> int:
        return len(self._changes[method])

    def close(self) -> None:
        for made in (self._listener, *self._sockets):
            with suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        for made in (self._listener, *self._sockets):
            made.close()

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, name="garbler"))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            try:
                server = call_in_netns(self._netns, socket.create_connection, self._target)
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            methods: dict[int, str] = {}
            self._run(self._questions, client, server, methods)
            self._run(self._answers, server, client, methods)

    def _questions(self, client: socket.socket, server: socket.socket, methods: Any) -> None:
        decoder = hpack.Decoder()
        with suppress(OSError), client.makefile("rb") as stream:
            server.sendall(stream.read(len(_PREFACE)))
            for head, kind, flags, number, payload in _frames(stream):
                if kind == _HEADERS:
                    block = payload[5:] if flags & 0x20 else payload
                    fields = dict(decoder.decode(block, raw=True))
                    methods[number] = fields[b":path"].decode().rpartition("/")[2]
                server.sendall(head + payload)
        self._hang_up(server)

    def _answers(self, server: socket.socket, client: socket.socket, methods: Any) -> None:
        with suppress(OSError), server.makefile("rb") as stream:
            for head, kind, _flags, number, payload in _frames(stream):
                method = methods.get(number, "")
                changes = self._changes[method]
                if kind == _DATA and changes and len(payload) > 5:
                    message = changes.popleft()(payload[5:])
                    payload = b"\0" + len(message).to_bytes(4, "big") + message
                    if isinstance(message, WithMore):
                        payload += message.more
                    head = len(payload).to_bytes(3, "big") + head[3:]
                client.sendall(head + payload)
                if kind == _DATA and len(payload) > 5 and (frame := self.floods.pop(method, b"")):
                    send_without_end(client, frame)
        self._hang_up(client)

    @staticmethod
    def _hang_up(other: socket.socket) -> None:
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


def send_without_end(client: socket.socket, frame: bytes) -> None:
    """Until the client hangs up, which raises OSError."""
    many = frame * (1 + 65536 // len(frame))
    while True:
        client.sendall(many)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame (RFC 9113 section 4.1)."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream.to_bytes(4, "big") + payload


class Flooder:
    """A member that answers the first request of each connection with ``first``, and then sends
    ``frame`` without end. ``asked`` counts the connections."""

    def __init__(self, frame: bytes, first: bytes = b"") -> None:
        self._first, self._frame = first, frame
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked = 0
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, name="flooder")
        self._thread.start()

    def __enter__(self) -> Flooder:
        return self

    def __exit__(self, *exc: object) -> None:
        for made in (self._listener, *self._clients):
            with suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        for made in (self._listener, *self._clients):
            made.close()

    def _run(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            self._clients.append(client)
            with suppress(OSError), client.makefile("rb") as stream:
                client.sendall(frame(_SETTINGS, 0, 0, b""))
                stream.read(len(_PREFACE))
                for _, kind, _, _, _ in _frames(stream):
                    if kind == _DATA:
                        self.asked += 1
                        client.sendall(self._first)
                        if self._frame:
                            send_without_end(client, self._frame)


def _frames(stream: Any) -> Iterator[tuple[bytes, int, int, int, bytes]]:
    while len(head := stream.read(9)) == 9:
        length, number = int.from_bytes(head[:3], "big"), int.from_bytes(head[5:], "big")
        yield head, head[3], head[4], number, stream.read(length)


class WithMore(bytes):
    """A message, and ``count`` times ``other`` after it in the same frame."""

    more: bytes

    def __new__(cls, message: bytes, other: bytes, count: int) -> WithMore:
        made = super().__new__(cls, message)
        made.more = count * (b"\0" + len(other).to_bytes(4, "big") + other)
        return made


def noise(message: bytes) -> bytes:
    """Three bytes that are no protobuf message."""
    return b"\xff\xff\xff"


def empty(message: bytes) -> bytes:
    return b""


def cut_short(message: bytes) -> bytes:
    return message[:-1]


def after_the_first(change: Change) -> Change:
    """``change`` for what comes after a watch was accepted: that is passed on as it is."""

    def changed(message: bytes) -> bytes:
        return message if pb.WatchResponse.FromString(message).created else change(message)

    return changed


def edited(kind: Any, edit: Callable[[Any], object]) -> Change:
    """The message of class ``kind`` as ``edit`` leaves it."""

    def change(data: bytes) -> bytes:
        message = kind.FromString(data)
        edit(message)
        return bytes(message.SerializeToString())

    return change


def in_range(edit: Callable[[Any], object]) -> Change:
    return edited(pb.RangeResponse, edit)


def in_watch(edit: Callable[[Any], object]) -> Change:
    return edited(pb.WatchResponse, edit)
