"""Connection against a scripted HTTP/2 server: what etcd never says, or only on bad days."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest

from flannel_dp.sources.etcd.grpc import Connection, KeepAlive
from flannel_dp.sources.etcd.options import Endpoint
from flannel_dp.sources.etcd.rpc import RpcStatus
from flannel_dp.sources.etcd.socket import Deadline, Lost, Stopped
from tests.lib.grpc_server import (
    HEADERS,
    OK,
    Server,
    framed,
)
from tests.lib.waiting import LIMIT, NEVER


def deadline(seconds: float = LIMIT, stopped: Callable[[], bool] = lambda: False) -> Deadline:
    return Deadline(time.monotonic() + seconds, stopped)


def ask(server: Server, *messages: bytes, seconds: float = LIMIT) -> list[bytes | RpcStatus]:
    connection = Connection(server.endpoint, None, deadline())
    try:
        return connection.unary("/a/b", messages or [b"x"], (), deadline(seconds))
    finally:
        connection.close()


def test_answers_come_in_the_order_of_the_requests(serve: Callable[..., Server]) -> None:
    waiting: list[tuple[int, bytes]] = []
    held: list[int] = []

    def answer(server: Server, stream: int, message: bytes) -> None:
        held.append(stream)
        waiting.append((stream, message))
        if len(held) in (64, 100):  # as many as are sent at once; the rest
            while waiting:
                number, text = waiting.pop()
                server.reply(number, text.upper())

    server = serve(answer)
    messages = [f"m{number}".encode() for number in range(100)]

    assert ask(server, *messages) == [message.upper() for message in messages]


def test_an_answer_in_small_pieces(serve: Callable[..., Server]) -> None:
    def answer(server: Server, stream: int, message: bytes) -> None:
        server.http.send_headers(stream, HEADERS)
        for byte in framed(b"piecemeal"):
            server.http.send_data(stream, bytes([byte]), pad_length=3)
            server.flush()
        server.http.send_headers(stream, OK, end_stream=True)

    assert ask(serve(answer)) == [b"piecemeal"]


def test_an_answer_larger_than_every_window(serve: Callable[..., Server]) -> None:
    size = 40 << 20
    sent: dict[int, int] = {}

    def answer(server: Server, stream: int, message: bytes) -> None:
        server.http.send_headers(stream, HEADERS)
        server.http.send_data(stream, b"\0" + size.to_bytes(4, "big"))
        sent[stream] = 0
        push(server)

    def push(server: Server) -> None:
        for stream in list(sent):
            while sent[stream] < size:
                room = min(server.http.local_flow_control_window(stream), 16384)
                room = min(room, size - sent[stream])
                if not room:
                    return
                server.http.send_data(stream, bytes(room))
                sent[stream] += room
            server.http.send_headers(stream, OK, end_stream=True)
            del sent[stream]

    server = serve(answer)
    handle = server._handle

    def handling(event: h2.events.Event) -> None:
        handle(event)
        if isinstance(event, h2.events.WindowUpdated):
            push(server)

    server._handle = handling  # type: ignore[method-assign]

    assert ask(server, seconds=20) == [bytes(size)]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("grpc-status", "7"), ("grpc-message", "no %C3%A9ntry")], RpcStatus(7, "no éntry")),
        ([("grpc-status", "5")], RpcStatus(5, "")),
        ([("grpc-status", "nonsense")], RpcStatus(14, "unreadable grpc-status 'nonsense'")),
        ([("grpc-status", "-1")], RpcStatus(14, "unreadable grpc-status '-1'")),
        ([("grpc-status", "")], RpcStatus(14, "unreadable grpc-status ''")),
        ([("grpc-status", "7" * 5000)], RpcStatus(14, f"unreadable grpc-status {'7' * 40!r}")),
        ([("grpc-status", "7"), ("grpc-message", "%ff%fe")], RpcStatus(7, "\ufffd\ufffd")),
        (OK, RpcStatus(13, "unreadable answer: OK with 0 messages")),
    ],
)
def test_a_refusal(
    serve: Callable[..., Server], headers: list[tuple[str, str]], expected: RpcStatus
) -> None:
    """Headers alone, as gRPC answers when there is nothing else to say."""

    def answer(server: Server, stream: int, message: bytes) -> None:
        server.http.send_headers(stream, HEADERS + headers, end_stream=True)

    assert ask(serve(answer)) == [expected]


def test_a_proxy_that_answers_for_etcd(serve: Callable[..., Server]) -> None:
    def answer(server: Server, stream: int, message: bytes) -> None:
        server.http.send_headers(stream, [(":status", "503")], end_stream=True)

    (status,) = ask(serve(answer))

    assert isinstance(status, RpcStatus)
    assert "HTTP status 503" in status.message


def test_half_an_answer(serve: Callable[..., Server]) -> None:
    def answer(server: Server, stream: int, message: bytes) -> None:
        server.http.send_headers(stream, HEADERS)
        server.http.send_data(stream, framed(b"whole")[:-1], end_stream=True)

    (status,) = ask(serve(answer))

    assert isinstance(status, RpcStatus)
    assert "cut short" in status.message


def test_two_messages_where_one_was_asked_for(serve: Callable[..., Server]) -> None:
    def answer(server: Server, stream: int, message: bytes) -> None:
        server.http.send_headers(stream, HEADERS)
        server.http.send_data(stream, framed(b"one") + framed(b"two"))
        server.http.send_headers(stream, OK, end_stream=True)

    assert ask(serve(answer)) == [RpcStatus(13, "unreadable answer: OK with 2 messages")]


def test_an_empty_message_is_a_message(serve: Callable[..., Server]) -> None:
    assert ask(serve(lambda server, stream, message: server.reply(stream, b""))) == [b""]


def test_a_stream_that_is_reset(serve: Callable[..., Server]) -> None:
    def answer(server: Server, stream: int, message: bytes) -> None:
        server.http.reset_stream(stream, 8)

    (status,) = ask(serve(answer))

    assert isinstance(status, RpcStatus)
    assert "broken off" in status.message


def goaway(server: Server, stream: int, message: bytes) -> None:
    server.http.close_connection(11, b"too_many_pings")


def compressed(server: Server, stream: int, message: bytes) -> None:
    server.http.send_headers(stream, HEADERS)
    server.http.send_data(stream, b"\1\0\0\0\1x")


def endless(server: Server, stream: int, message: bytes) -> None:
    server.http.send_headers(stream, HEADERS)
    server.http.send_data(stream, b"\0\xff\xff\xff\xff")


def silent(server: Server, stream: int, message: bytes) -> None:
    pass


def hang_up(server: Server, stream: int, message: bytes) -> None:
    assert server._socket is not None
    server._socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (goaway, "too_many_pings"),
        (compressed, "no gRPC message"),
        (endless, "a message of over 64 MiB"),
        (silent, "does not answer"),
        (hang_up, "closed the connection"),
    ],
)
def test_lost(
    serve: Callable[..., Server], answer: Callable[[Server, int, bytes], None], said: str
) -> None:
    with pytest.raises(Lost, match=said):
        ask(serve(answer), seconds=0.3)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream.to_bytes(4, "big") + payload


@pytest.mark.parametrize(
    "data",
    [
        frame(1, 4, 1, b"\xff" * 40),  # HPACK: an integer without end
        frame(1, 4, 1, b"\x82\xfe\xfe"),  # an index that is in no table
        frame(1, 4, 1, b"\x00\x85\xff\xff\xff\xff\xff\x01a"),  # Huffman padding of a byte
        frame(1, 4, 1, b"\x40\x0econtent-length\x03abc"),
        frame(0, 8, 1, b"\xff"),  # more padding than frame
        frame(4, 0, 0, b"\x00\x04\xff\xff\xff\xff"),  # a window of 2**32 - 1
        frame(8, 0, 0, b"\x7f\xff\xff\xff" * 1),  # past the largest window
        frame(6, 0, 0, b"short"),  # a ping that is none
        frame(0x7, 0, 0, b"\x00"),
        frame(9, 4, 1, b"x"),  # a continuation of nothing
    ],
)
def test_frames_that_cannot_be_read(serve: Callable[..., Server], data: bytes) -> None:
    def answer(server: Server, stream: int, message: bytes) -> None:
        server.flush()
        server.raw(data)

    with pytest.raises(Lost, match="does not speak gRPC"):
        ask(serve(answer), seconds=60)


def test_a_ping_behind_the_end_is_the_end(serve: Callable[..., Server]) -> None:
    """An etcd that stops sends both, and speaks gRPC all the same."""

    def answer(server: Server, stream: int, message: bytes) -> None:
        server.flush()
        server.raw(frame(7, 0, 0, bytes(8)) + frame(6, 0, 0, bytes(8)))

    with pytest.raises(Lost, match="it ended the connection"):
        ask(serve(answer), seconds=60)


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), OverflowError(), IndexError(), KeyError(3), TypeError(), AttributeError()],
)
def test_whatever_a_library_raises_for_bytes_of_a_member(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def receive(self: Any, data: bytes) -> None:
        raise error

    server = serve(lambda server, stream, message: server.reply(stream, b"x"))
    connection = Connection(server.endpoint, None, deadline(60))
    monkeypatch.setattr(connection._http, "receive_data", receive.__get__(connection._http))
    try:
        with pytest.raises(Lost, match=type(error).__name__):
            connection.unary("/a/b", [b"x"], (), deadline(60))
    finally:
        connection.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
def test_no_descriptor_for_a_socket(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("flannel_dp.sources.etcd.socket.socket.socket", full)

    with pytest.raises(Lost, match=os.strerror(code)) as caught:
        Connection(Endpoint("127.0.0.1", 1, False), None, deadline())
    assert "LimitNOFILE" in caught.value.hint


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\1\0\0\0\0\0\0x"])
def test_not_grpc_at_all(serve: Callable[..., Server], greeting: bytes) -> None:
    with pytest.raises(Lost, match="does not speak gRPC") as caught:
        ask(serve(silent, greeting), seconds=1)

    assert "https://" in caught.value.hint


def test_a_sign_of_life_is_asked_for_and_has_to_come(serve: Callable[..., Server]) -> None:
    now = 100.0
    server = serve(silent)
    connection = Connection(
        server.endpoint, None, deadline(), keepalive=KeepAlive(10, 5), clock=lambda: now
    )
    try:
        settle(connection)
        assert connection.due == 110

        now = 109.0
        connection.tick(deadline())
        assert connection.due == 110  # too early

        now = 110.0
        connection.tick(deadline())
        assert connection.due == 115
        settle(connection)
        assert (server.pings, connection.due) == (1, 120)  # the answer counts

        now = 130.0
        connection.tick(deadline())
        now = 134.9
        connection.tick(deadline())
        now = 135.0
        with pytest.raises(Lost, match="no sign of life for 15 s"):
            connection.tick(deadline())
    finally:
        connection.close()


def settle(connection: Connection) -> None:
    """Take in what the server has sent by itself."""
    deadline().wait(connection.fileno(), 1)
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        connection.pump(deadline())


def test_waiting_is_called_off(serve: Callable[..., Server]) -> None:
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    connection = Connection(serve(silent).endpoint, None, deadline())
    with pytest.raises(Stopped):
        connection.unary("/a/b", [b"x"], (), deadline(NEVER, stopped))
    connection.close()


# ---- names


def resolve(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", answer)


def connect(name: str, port: int, seconds: float = LIMIT) -> Connection:
    return Connection(Endpoint(name, port, False), None, deadline(seconds))


def test_a_name_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **how: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    resolve(monkeypatch, unknown)

    with pytest.raises(Lost, match="its name is not known: Name or service not known"):
        connect("etcd.invalid", 1)


def test_the_first_address_that_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Server]
) -> None:
    port = serve(silent).endpoint.port
    kinds = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    dead, alive = ("127.0.0.2", 1), ("127.0.0.1", port)
    resolve(monkeypatch, lambda *args, **how: [(*kinds, dead), (*kinds, alive)])

    connection = connect("etcd.example.org", port)

    assert connection._bytes._socket.getpeername() == alive
    connection.close()


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    resolve(monkeypatch, lambda *args, **how: answered.wait(NEVER) and [])
    try:
        with pytest.raises(Lost, match="does not answer"):
            connect("etcd.example.org", 1, 0.3)
    finally:
        answered.set()
