"""A health server that is asked."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from flannel_dp.agent.health import HealthServer
from flannel_dp.agent.status import Status, StatusBoard
from tests.lib.waiting import LIMIT

GET_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.code = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def text(self) -> str:
        return self.body.decode()


class Client:
    """Asks a server, each time by a connection of its own."""

    def __init__(self, server: HealthServer, address: str = "127.0.0.1") -> None:
        self._server, self._address = server, address

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address, self._server.port, timeout=LIMIT)

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> Reply:
        with closing(self.connection()) as connection:
            connection.request(method, path, body=body, headers=headers)
            return Reply(connection.getresponse())

    def raw(self) -> socket.socket:
        made = socket.create_connection((self._address, self._server.port), timeout=LIMIT)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made


@contextmanager
def serving(
    status: Status | None = None,
    address: str = "127.0.0.1",
    *,
    stuck_after: float | None = None,
    now: Callable[[], float] = time.monotonic,
    connections: int = 16,
) -> Iterator[tuple[StatusBoard, Client]]:
    board = StatusBoard(status)
    with HealthServer(
        board, address, 0, stuck_after=stuck_after, now=now, connections=connections
    ) as server:
        yield board, Client(server, {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(address, address))


@pytest.fixture(name="board_and_client")
def board_and_client_fixture() -> Iterator[tuple[StatusBoard, Client]]:
    with serving() as made:
        yield made


@pytest.fixture(name="board")
def board_fixture(board_and_client: tuple[StatusBoard, Client]) -> StatusBoard:
    return board_and_client[0]


@pytest.fixture(name="client")
def client_fixture(board_and_client: tuple[StatusBoard, Client]) -> Client:
    return board_and_client[1]
