"""HealthServer: HTTP, bad requests, and clients that are silent, many or gone."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress

import pytest

from flannel_dp.agent.status import Durations, StatusBoard
from tests.lib.health import GET_HEALTH, Client, Reply, serving

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
