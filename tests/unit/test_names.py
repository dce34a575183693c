"""Look-ups of names take no longer than they may, whatever the name server does."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.agent import health
from flannel_dp.agent.health import HealthServer
from flannel_dp.agent.status import StatusBoard
from flannel_dp.errors import NotYet, Unavailable
from flannel_dp.sources import names
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.source import KubeSource
from flannel_dp.sources.names import resolve_within
from tests.lib.waiting import LIMIT, wait_until

INFO = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))]


def lookups() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "flannel-dp-lookup"]


@pytest.fixture(name="silent")
def silent_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No name server answers until the event is set."""
    answered = threading.Event()

    def getaddrinfo(*args: Any, **how: Any) -> Any:
        answered.wait()
        return INFO

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield answered
    answered.set()
    wait_until(lambda: not lookups())


def test_a_name_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **how: INFO)

    assert resolve_within("example.org", 80, LIMIT) == [(socket.AF_INET, ("192.0.2.1", 80))]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "fe80::1%lo"])
def test_an_address_is_no_name(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise AssertionError

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    ((_, found),) = resolve_within(address, 80, 0.0)

    assert found[:2] == (address.partition("%")[0], 80)


@pytest.mark.usefixtures("silent")
def test_no_name_server_answers() -> None:
    with pytest.raises(TimeoutError, match=r"no name server answers for example\.org"):
        resolve_within("example.org", 80, 0.05)


@pytest.mark.parametrize(
    "error",
    [socket.gaierror(-2, "unknown"), UnicodeError("label too long"), OSError(errno.EMFILE, "full")],
)
def test_the_error_of_a_look_up_is_the_callers(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(*args: Any, **how: Any) -> Any:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    with pytest.raises(type(error)) as caught:
        resolve_within("example.org", 80, LIMIT)
    assert caught.value is error


def test_look_ups_that_were_left_behind_are_limited(silent: threading.Event) -> None:
    for _ in range(names._MOST):
        with pytest.raises(TimeoutError):
            resolve_within("example.org", 80, 0.0)

    with pytest.raises(RuntimeError, match="earlier look-ups have not ended"):
        resolve_within("example.org", 80, LIMIT)
    assert len(lookups()) == names._MOST
    silent.set()
    wait_until(lambda: not lookups())
    assert resolve_within("example.org", 80, LIMIT)


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    for _ in range(names._MOST + 1):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            resolve_within("example.org", 80, LIMIT)


@pytest.mark.usefixtures("silent")
def test_the_health_server_waits_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an address that the node does not have yet."""
    monkeypatch.setattr(health, "LOOKUP_SECONDS", 0.05)

    with pytest.raises(NotYet, match="no name server answers for node-7") as caught:
        HealthServer(StatusBoard(), "node-7", 0)
    assert "--healthz-ip" in caught.value.hint


@pytest.mark.usefixtures("silent")
def test_an_api_server_by_a_name_that_is_not_answered_for(tmp_path: Path) -> None:
    options = KubeOptions(
        api_url="http://api.example.org:1",
        service_account=str(tmp_path),
        connect_timeout=0.05,
        environ=os.environ,
    )
    source = KubeSource(options)
    try:
        with pytest.raises(Unavailable, match=r"no name server answers for api\.example\.org"):
            source.snapshot()
    finally:
        source.close()
