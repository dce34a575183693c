"""A gRPC server whose answers are scripted, and may be none of gRPC's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest

from flannel_dp.sources.etcd.options import Endpoint
from tests.lib.waiting import LIMIT

HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


class Server:
    """Connections, one after the other; ``answer(server, stream, message)`` is called for each
    request."""

    def __init__(self, answer: Callable[[Server, int, bytes], None], greeting: bytes = b"") -> None:
        self._answer = answer
        self._greeting = greeting
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("127.0.0.1", self._listener.getsockname()[1], False)
        self.http = self._fresh()
        self.pings = 0
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT)
        self._listener.close()

    def flush(self) -> None:
        assert self._socket is not None
        self._socket.sendall(self.http.data_to_send())

    def raw(self, data: bytes) -> None:
        assert self._socket is not None
        self._socket.sendall(data)

    def reply(self, stream: int, message: bytes, trailers: list[tuple[str, str]] = OK) -> None:
        self.http.send_headers(stream, HEADERS)
        self.http.send_data(stream, framed(message))
        self.http.send_headers(stream, trailers, end_stream=True)

    @staticmethod
    def _fresh() -> h2.connection.H2Connection:
        return h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))

    def _run(self) -> None:
        while True:
            try:
                self._socket = self._listener.accept()[0]
            except OSError:
                return
            self._serve(self._socket)
            self.http = self._fresh()

    def _serve(self, connected: socket.socket) -> None:
        with connected:
            self.http.initiate_connection()
            if self._greeting:
                self.http.clear_outbound_data_buffer()
            self.raw(self._greeting or self.http.data_to_send())
            try:
                while data := connected.recv(65536):
                    for event in self.http.receive_data(data):
                        self._handle(event)
                    self.flush()
            except (OSError, h2.exceptions.ProtocolError):  # it has ended the connection
                return

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.DataReceived):
            assert event.data is not None
            self._answer(self, event.stream_id or 0, event.data[5:])
        elif isinstance(event, h2.events.PingReceived):
            self.pings += 1


@pytest.fixture(name="serve")
def serve_fixture() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def serve(answer: Callable[[Server, int, bytes], None], greeting: bytes = b"") -> Server:
        made.append(Server(answer, greeting))
        return made[-1]

    yield serve
    for server in made:
        server.close()
