"""HealthServer: what it answers, whom it keeps out, and that it costs nothing while nobody asks."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from flannel_dp.agent.health import HealthServer, status_document
from flannel_dp.agent.status import BUCKETS, Durations, Status, StatusBoard
from flannel_dp.errors import ConfigError, NotYet
from tests.lib.waiting import LIMIT, NEVER

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


@pytest.fixture
def board_and_client() -> Iterator[tuple[StatusBoard, Client]]:
    with serving() as made:
        yield made


@pytest.fixture
def board(board_and_client: tuple[StatusBoard, Client]) -> StatusBoard:
    return board_and_client[0]


@pytest.fixture
def client(board_and_client: tuple[StatusBoard, Client]) -> Client:
    return board_and_client[1]


# ---- what is answered -------------------------------------------------------------


def test_ok(client: Client) -> None:
    reply = client.ask("/healthz")

    assert (reply.code, reply.text) == (200, "ok\n")
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert reply.headers["cache-control"] == "no-store"


def test_degraded_is_alive_and_says_why(board: StatusBoard, client: Client) -> None:
    board.set(problems={"source": "etcd: no answer\nfrom 192.0.2.1", "firewall": "nft is gone"})

    reply = client.ask("/healthz")

    assert reply.code == 200
    assert reply.text == (
        "degraded\nfirewall: nft is gone\nsource: etcd: no answer\\nfrom 192.0.2.1\n"
    )


def test_ready_once_the_peers_are_programmed(board: StatusBoard, client: Client) -> None:
    before = client.ask("/readyz")
    board.set(ready=True, problems={"source": "gone"})
    after = client.ask("/readyz")

    assert (before.code, before.text) == (503, "not ready: peers are not programmed yet\n")
    assert (after.code, after.text) == (200, "ready\n")


def test_unready_says_what_is_missing(board: StatusBoard, client: Client) -> None:
    board.set(peers={4: 3}, problems={"firewall": "nft is gone"})

    reply = client.ask("/readyz")

    assert (reply.code, reply.text) == (
        503,
        "not ready: peers, firewall rules or subnet.env are not programmed yet\n"
        "firewall: nft is gone\n",
    )


def test_stuck_when_the_heartbeat_is_too_old() -> None:
    clock = [1000.0]
    with serving(Status(), stuck_after=30, now=lambda: clock[0]) as (board, client):
        clock[0] = 1030.0  # no heartbeat yet: counts from the start
        assert client.ask("/healthz").code == 200
        clock[0] = 1031.0
        assert client.ask("/healthz").code == 503

        board.set(heartbeat=1031.0, problems={"source": "gone"})
        assert client.ask("/healthz").text == "degraded\nsource: gone\n"
        clock[0] = 1061.5
        reply = client.ask("/healthz")

        assert (reply.code, reply.text) == (503, "stuck\n")
        assert client.ask("/readyz").code == 503
        board.set(ready=True)
        assert client.ask("/readyz").code == 200


def test_never_stuck_without_a_limit() -> None:
    clock = [0.0]
    with serving(Status(heartbeat=1.0), now=lambda: clock[0]) as (_, client):
        clock[0] = 1e9

        assert client.ask("/healthz").text == "ok\n"


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        ("/healthz", "application/json"),
        ("/healthz", "text/html, Application/JSON;q=0.9, */*"),
        ("/healthz?format=json", "text/plain"),
        ("/healthz?a=b&format=json", ""),
        ("/readyz?format=json", ""),
    ],
)
def test_json_for_those_who_ask(path: str, accept: str) -> None:
    status = Status(
        ready=True,
        heartbeat=90.0,
        peers={4: 3, 6: 2},
        problems={"source": "gone"},
        last_audit=1_700_000_000.5,
        apply=Durations().with_one(0.7),
    )
    with serving(status, now=lambda: 100.0) as (_, client):
        reply = client.ask(path, Accept=accept)

    assert reply.code == 200
    assert reply.headers["content-type"] == "application/json"
    document = json.loads(reply.body)
    assert (
        document.items()
        >= {
            "schema": 1,
            "status": "degraded",
            "ready": True,
            "problems": {"source": "gone"},
            "peers": {"4": 3, "6": 2},
            "last_audit": 1_700_000_000.5,
            "source_changed": None,
        }.items()
    )
    assert document["apply"]["total"] == 0.7
    assert document["apply"]["buckets"] == list(BUCKETS)
    assert document["heartbeat_age"] == 0.0  # the server is younger than the heartbeat


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        ("/healthz", "*/*"),
        ("/healthz", "text/html"),
        ("/healthz?format=text", ""),
        ("/healthz", ""),
    ],
)
def test_text_for_everybody_else(client: Client, path: str, accept: str) -> None:
    assert client.ask(path, Accept=accept).text == "ok\n"


def test_json_has_the_codes_of_the_text() -> None:
    clock = [0.0]
    with serving(stuck_after=1, now=lambda: clock[0]) as (_, client):
        clock[0] = 2.0
        stuck = client.ask("/healthz?format=json")
        unready = client.ask("/readyz?format=json")

    assert (stuck.code, unready.code) == (503, 503)
    assert json.loads(stuck.body)["status"] == "stuck"
    assert json.loads(unready.body)["ready"] is False
    assert json.loads(stuck.body)["heartbeat_age"] == 2.0


def test_document_has_every_field_in_plain_form() -> None:
    status = Status(problems={"b": "x", "a": "y"}, drift={"route": 1})

    document = status_document(status, "degraded")

    assert set(Status.__slots__) | {"schema", "status"} == set(document)
    assert json.loads(json.dumps(document))["drift"] == {"route": 1}
    assert list(document["problems"]) == ["a", "b"]


def test_metrics_are_served_in_the_form_asked_for(board: StatusBoard, client: Client) -> None:
    board.set(accepted=42)

    text = client.ask("/metrics")
    open_metrics = client.ask("/metrics", Accept="application/openmetrics-text; version=1.0.0")

    assert text.code == 200
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "flannel_dp_leases_accepted 42.0\n" in text.text
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")


def test_without_prometheus_client_it_says_what_to_install(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "prometheus_client"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    reply = client.ask("/metrics")

    assert reply.code == 501
    assert "pip install flannel-dp[metrics]" in reply.text


# ---- HTTP -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/nothing"])
def test_head_is_get_without_its_body(client: Client, path: str) -> None:
    get, head = client.ask(path), client.ask(path, "HEAD")

    assert head.body == b""
    assert head.code == get.code
    # The numbers of a later scrape may have more digits.
    if path != "/metrics":
        assert head.headers["content-length"] == str(len(get.body))


@pytest.mark.parametrize("path", ["/", "/healthz/", "/healthz/x", "/HEALTHZ", "/favicon.ico"])
def test_unknown_path_is_404(client: Client, path: str) -> None:
    reply = client.ask(path)

    assert reply.code == 404
    assert "/healthz" in reply.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_other_methods_are_405_with_what_is_allowed(client: Client, method: str) -> None:
    reply = client.ask("/healthz", method, body=b"x" * 1000)

    assert reply.code == 405
    assert reply.headers["allow"] == "GET, HEAD"
    assert client.ask("/nothing", method).code == 404


def test_headers_tell_no_versions(client: Client) -> None:
    assert client.ask("/healthz").headers["server"] == "flannel-dp"


def test_absolute_target_is_understood(client: Client) -> None:
    assert client.ask("http://192.0.2.1/healthz").text == "ok\n"


def test_bad_requests_are_answered_in_text(client: Client) -> None:
    for request in (b"GARBAGE\r\n\r\n", b"GET http://[/ HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        with closing(client.raw()) as raw:
            raw.sendall(request)
            answer = raw.makefile("rb").read().decode()
        assert "<html" not in answer.lower()
        assert answer.startswith(("HTTP/1.1 4", "HTTP/1.1 505", "400", "505")), answer


def test_one_connection_serves_many_requests(client: Client) -> None:
    with closing(client.connection()) as connection:
        for path in ("/healthz", "/nothing", "/readyz", "/healthz"):
            connection.request("GET", path, body=b"a body that nobody wants")
            reply = Reply(connection.getresponse())
            used = connection.sock
            assert used is not None
            port = used.getsockname()[1]
            assert reply.body

        connection.request("GET", "/healthz")
        connection.getresponse().read()
        assert connection.sock is not None
        assert connection.sock.getsockname()[1] == port


@pytest.mark.parametrize(
    "header", ["Transfer-Encoding: chunked", "Content-Length: 99999999999", "Content-Length: -5"]
)
def test_body_of_unknown_or_great_length_is_not_taken_for_a_request(
    client: Client, header: str
) -> None:
    with closing(client.raw()) as raw:
        raw.sendall(f"GET /healthz HTTP/1.1\r\n{header}\r\n\r\n".encode())
        answer = raw.makefile("rb").read()  # to the end: the connection is closed

    assert answer.startswith(b"HTTP/1.1 200")
    assert b"Connection: close" in answer


def test_many_at_once(client: Client) -> None:
    codes: list[int] = []

    def ask() -> None:
        for _ in range(10):
            codes.append(client.ask("/healthz").code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert codes == [200] * 80


def test_silent_clients_do_not_keep_a_probe_out() -> None:
    with serving(connections=2) as (_, client):
        silent = [client.raw() for _ in range(5)]

        assert client.ask("/healthz").text == "ok\n"

        for raw in silent[:3]:  # the oldest had to go
            assert raw.recv(1) == b""
        probes = [t for t in threading.enumerate() if t.name == "flannel-dp-probe"]
        assert len(probes) <= 3
        for raw in silent:
            raw.close()


def test_silent_client_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flannel_dp.agent.http_server._ProbeHandler.timeout", 0.05)
    with serving() as (_, client), closing(client.raw()) as raw:
        raw.sendall(GET_HEALTH[:10])

        assert raw.recv(1) == b""


def test_client_that_goes_away_leaves_nothing(
    client: Client, wait_until: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        raw = client.raw()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
        raw.sendall(GET_HEALTH * 50)
        raw.close()

    assert client.ask("/healthz").code == 200
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert capfd.readouterr().err == ""


def test_failing_accept_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (_, client):
        real, failures = socket.socket.accept, [errno.EMFILE, errno.ECONNABORTED]

        def accept(self: socket.socket) -> tuple[socket.socket, object]:
            if failures:
                code = failures.pop()
                real(self)[0].close()
                raise OSError(code, "no")
            return real(self)

        client.ask("/healthz")
        monkeypatch.setattr(socket.socket, "accept", accept)
        for _ in range(3):  # the first is accepted by the call that is waiting already
            with closing(client.raw()) as raw, suppress(ConnectionResetError):
                raw.sendall(GET_HEALTH)
                raw.recv(100)

        assert failures == []
        assert client.ask("/healthz").code == 200


def test_no_room_for_a_thread_costs_that_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(connections=1) as (_, client):
        real, failures = threading.Thread.start, [RuntimeError("can't start new thread")] * 3

        def start(self: threading.Thread) -> None:
            if failures:
                raise failures.pop()
            real(self)

        monkeypatch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            with closing(client.raw()) as raw:
                assert raw.recv(1) == b""

        assert client.ask("/healthz").code == 200


def test_defect_of_ours_is_logged_and_costs_that_connection_only(
    board: StatusBoard, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    board.set(apply=None)
    with closing(client.raw()) as raw:
        raw.sendall(GET_HEALTH.replace(b"healthz", b"healthz?format=json"))
        assert raw.recv(1) == b""
    board.set(apply=Durations())

    assert client.ask("/healthz").code == 200
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info


def test_requests_are_logged_for_debugging_only(
    client: Client, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG", "flannel_dp.agent.http_server")

    client.ask("/healthz")

    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    assert "GET /healthz" in caplog.text
    assert capfd.readouterr().err == ""


# ---- binding and ending -----------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::", "[::1]", ""])
def test_addresses_of_both_families(address: str) -> None:
    with HealthServer(StatusBoard(), address, 0) as server:
        for host in {"": ["127.0.0.1"], "[::1]": ["::1"], "::": ["::1", "127.0.0.1"]}.get(
            address, [address]
        ):
            assert Client(server, host).ask("/healthz").code == 200


def test_connections_wait_until_the_start() -> None:
    server = HealthServer(StatusBoard(), "127.0.0.1", 0)
    before = threading.active_count()
    with closing(Client(server).raw()) as raw:
        raw.sendall(GET_HEALTH)
        assert threading.active_count() == before

        server.start()
        server.start()

        assert raw.recv(100).startswith(b"HTTP/1.1 200")
    server.close()


def test_what_is_to_be_done_before_it_serves_is_done_on_its_thread() -> None:
    done: list[str] = []
    with closing_server() as server:
        server.start(lambda: done.append(threading.current_thread().name))
        assert Client(server).ask("/healthz").code == 200
    assert done == ["flannel-dp-health"]


def test_where_that_fails_nothing_is_served() -> None:
    def fail() -> None:
        raise OSError("no")

    with closing_server() as server, pytest.raises(OSError, match="no"):
        server.start(fail)


def test_address_that_is_not_there_yet_may_come() -> None:
    with pytest.raises(NotYet, match=r"203\.0\.113\.9"):
        HealthServer(StatusBoard(), "203.0.113.9", 0)


def closing_server() -> closing[HealthServer]:
    return closing(HealthServer(StatusBoard(), "127.0.0.1", 0))


def test_port_in_use_is_a_config_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            HealthServer(StatusBoard(), "127.0.0.1", port)

    assert f"'127.0.0.1' port {port}: Address already in use" in caught.value.message
    assert "--healthz-port" in caught.value.hint
    assert f":{port}" in caught.value.hint


@pytest.mark.parametrize(
    ("address", "port", "hint"),
    [
        ("192.0.2.77", 2401, "ip address"),
        ("300.1.2.3", 2401, "--healthz-ip"),
        ("a\0b", 2401, "--healthz-ip"),
        ("x" * 70, 2401, "--healthz-ip"),
        ("127.0.0.1", 65536, "--healthz-port"),
        ("127.0.0.1", -1, "--healthz-port"),
    ],
)
def test_bad_address_or_port_is_a_config_error(address: str, port: int, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HealthServer(StatusBoard(), address, port)

    assert f"{address!r} port {port}" in caught.value.message
    assert hint in caught.value.hint


def test_port_can_be_had_again_at_once() -> None:
    with HealthServer(StatusBoard(), "127.0.0.1", 0) as server:
        Client(server).ask("/healthz")
        port = server.port
    with HealthServer(StatusBoard(), "127.0.0.1", port) as server:
        assert Client(server).ask("/healthz").code == 200


def test_close_ends_threads_and_connections_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flannel_dp.agent.http_server._ProbeHandler.timeout", NEVER)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    server = HealthServer(StatusBoard(), "127.0.0.1", 0, connections=2).start()
    client = Client(server)
    open_ones = [client.raw() for _ in range(2)]
    for raw in open_ones:
        raw.sendall(GET_HEALTH)
        assert raw.recv(100)

    server.close()

    assert threading.active_count() == threads
    for raw in open_ones:
        while raw.recv(1000):
            pass
        raw.close()
    with pytest.raises(ConnectionRefusedError):
        client.raw()
    server.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_close_without_a_start() -> None:
    server = HealthServer(StatusBoard(), "127.0.0.1", 0)
    client = Client(server)

    server.close()

    with pytest.raises(ConnectionRefusedError):
        client.raw()


def test_nothing_wakes_up_while_nobody_asks(
    client: Client, wait_until: Callable[..., None]
) -> None:
    assert client.ask("/healthz").code == 200
    (waiting,) = [t for t in threading.enumerate() if t.name == "flannel-dp-health"]
    task = Path(f"/proc/self/task/{waiting.native_id}")

    def switches() -> list[str]:
        return [line for line in (task / "status").read_text().splitlines() if "ctxt" in line]

    seen = [switches()]

    def at_rest() -> bool:
        seen.append(switches())
        probes = [t for t in threading.enumerate() if t.name == "flannel-dp-probe"]
        return not probes and seen[-1] == seen[-2]

    wait_until(at_rest)
    time.sleep(1.0)  # it is the passing of time that must not wake it

    assert len(seen[-1]) == 2
    assert switches() == seen[-1]
