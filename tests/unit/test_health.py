"""HealthServer: what it answers, where it listens, how it ends, and what it costs unasked."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flannel_dp.agent.health import HealthServer, status_document
from flannel_dp.agent.status import BUCKETS, Durations, Status, StatusBoard
from flannel_dp.errors import ConfigError, NotYet
from tests.lib.health import GET_HEALTH, Client, serving
from tests.lib.waiting import NEVER

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

    assert threading.active_count() <= threads  # those of earlier tests may end
    for raw in open_ones:
        while raw.recv(1000):
            pass
        raw.close()
    with pytest.raises(ConnectionRefusedError):
        client.raw()
    server.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


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
