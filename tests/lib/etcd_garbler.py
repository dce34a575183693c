"""Between a client and an etcd: passes everything on, and changes some of the answers."""

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

_DATA, _HEADERS = 0, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

Change = Callable[[bytes], bytes]


class Garbler:
    """A proxy in front of ``etcd`` on a port of its own, in the same namespace.

    ``fail(method, *changes)`` has the next messages that answer ``method`` (such as
    "LeaseKeepAlive") changed, one change each; ``left(method)`` are those still to come.
    """

    def __init__(self, etcd: EtcdServer) -> None:
        self._target = (etcd.address, etcd.client_port)
        self._netns = etcd.netns or None
        self._listener = call_in_netns(self._netns, socket.create_server, ("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._changes: dict[str, deque[Change]] = defaultdict(deque)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def fail(self, method: str, *changes: Change) -> None:
        self._changes[method].extend(changes)

    def left(self, method: str) -> int:
        return len(self._changes[method])

    def close(self) -> None:
        for made in (self._listener, *self._sockets):
            with suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
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
                changes = self._changes[methods.get(number, "")]
                if kind == _DATA and changes and len(payload) > 5:
                    message = changes.popleft()(payload[5:])
                    payload = b"\0" + len(message).to_bytes(4, "big") + message
                    head = len(payload).to_bytes(3, "big") + head[3:]
                client.sendall(head + payload)
        self._hang_up(client)

    @staticmethod
    def _hang_up(other: socket.socket) -> None:
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


def _frames(stream: Any) -> Iterator[tuple[bytes, int, int, int, bytes]]:
    while len(head := stream.read(9)) == 9:
        length, number = int.from_bytes(head[:3], "big"), int.from_bytes(head[5:], "big")
        yield head, head[3], head[4], number, stream.read(length)


def noise(message: bytes) -> bytes:
    """Three bytes that are no protobuf message."""
    return b"\xff\xff\xff"


def empty(message: bytes) -> bytes:
    return b""


def cut(message: bytes) -> bytes:
    return message[:-1]


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
