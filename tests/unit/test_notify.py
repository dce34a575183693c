"""sd_notify(3): what goes to the service manager's socket, and that nothing there stops us."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannel_dp.agent.notify import Notifier
from tests.lib.waiting import LIMIT


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(LIMIT)
        self._socket.bind(address.replace("@", "\0", 1) if address[0] == "@" else address)

    def received(self) -> list[str]:
        """The lines of the next datagram."""
        return self._socket.recv(4096).decode().split("\n")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    where = str(tmp_path / "notify") if request.param == "path" else f"@fdp-test-{os.getpid()}"
    made = Manager(where)
    yield made
    made.close()


@pytest.fixture
def notifier(manager: Manager) -> Iterator[Notifier]:
    made = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})
    yield made
    made.close()


def test_ready_and_status_go_in_one_datagram(manager: Manager, notifier: Notifier) -> None:
    assert notifier.send(ready=True, status="3 IPv4 peers")

    assert manager.received() == ["READY=1", "STATUS=3 IPv4 peers"]


def test_each_word(manager: Manager, notifier: Notifier) -> None:
    notifier.send(watchdog=True)
    notifier.send(stopping=True)
    notifier.send(status="")

    assert manager.received() == ["WATCHDOG=1"]
    assert manager.received() == ["STOPPING=1"]
    assert manager.received() == ["STATUS="]


def test_reloading_carries_the_monotonic_time_in_microseconds(manager: Manager) -> None:
    notifier = Notifier(manager.address, clock_ns=lambda: 12_345_678_999)

    notifier.send(reloading=True)
    notifier.close()

    assert manager.received() == ["RELOADING=1", "MONOTONIC_USEC=12345678"]


def test_status_stays_one_line_of_a_bounded_length(manager: Manager, notifier: Notifier) -> None:
    notifier.send(status="a\nREADY=1")
    notifier.send(status="\N{SNOWMAN}" * 5000)

    assert manager.received() == ["STATUS=a\\nREADY=1"]
    (line,) = manager.received()
    assert line == "STATUS=" + "\N{SNOWMAN}" * 333


def test_nothing_said_is_nothing_sent(manager: Manager, notifier: Notifier) -> None:
    assert not notifier.send()
    notifier.send(watchdog=True)

    assert manager.received() == ["WATCHDOG=1"]


def test_without_a_socket_nothing_happens() -> None:
    notifier = Notifier.from_environment({"WATCHDOG_USEC": "1000000"})

    assert not notifier.send(ready=True)
    assert notifier.watchdog_seconds is None


def test_variables_are_removed_and_others_stay() -> None:
    environ = {
        "NOTIFY_SOCKET": "/run/x",
        "WATCHDOG_USEC": "1",
        "WATCHDOG_PID": "1",
        "HOME": "/root",
    }

    Notifier.from_environment(environ)

    assert environ == {"HOME": "/root"}


def test_own_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")

    assert Notifier.from_environment().address == "/run/x"
    assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [
        ("180000000", "", 180.0),
        ("1500000", "own", 1.5),
        ("180000000", "1", None),
        ("", "", None),
    ],
)
def test_watchdog_interval(usec: str, pid: str, expected: float | None) -> None:
    pid = str(os.getpid()) if pid == "own" else pid  # a worker's name for the test has no number
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}

    assert Notifier.from_environment(environ).watchdog_seconds == expected


@pytest.mark.parametrize("usec", ["0", "-1", "1s", "\N{SUPERSCRIPT TWO}", " "])
def test_bad_watchdog_interval_is_told_and_ignored(
    usec: str, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": usec}

    assert Notifier.from_environment(environ).watchdog_seconds is None
    assert f"WATCHDOG_USEC {usec} is ignored" in caplog.text


@pytest.mark.parametrize("address", ["vsock:2:1234", "relative", "@", "/"])
def test_address_of_another_kind_is_told_and_ignored(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})

    assert not notifier.send(ready=True)
    assert f"NOTIFY_SOCKET {address} is ignored" in caplog.text


def test_vanished_socket_is_told_once_for_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = str(tmp_path / "notify")
    manager = Manager(address)
    notifier = Notifier(address)
    assert notifier.send(ready=True)
    manager.close()
    os.unlink(address)

    assert not any(notifier.send(watchdog=True) for _ in range(5))
    manager = Manager(address)
    assert notifier.send(watchdog=True)
    assert manager.received() == ["WATCHDOG=1"]
    manager.close()
    assert not notifier.send(watchdog=True)
    notifier.close()

    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert caplog.text.count(f"Cannot notify the service manager at {address}") == 2


def test_path_that_is_too_long_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier("/" + "x" * 200)

    assert not notifier.send(ready=True)
    notifier.close()
    assert "Cannot notify the service manager" in caplog.text


def test_closing_twice_and_sending_again(manager: Manager, notifier: Notifier) -> None:
    notifier.send(ready=True)
    notifier.close()
    notifier.close()
    notifier.send(stopping=True)

    assert manager.received() == ["READY=1"]
    assert manager.received() == ["STOPPING=1"]


def test_full_queue_does_not_stop_us_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flannel_dp.agent.notify.TIMEOUT", 0.01)
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(manager.address)
    sent = 0
    while notifier.send(watchdog=True):  # nobody reads
        sent += 1
        assert sent < 100_000

    assert manager.received() == ["WATCHDOG=1"]
    assert notifier.send(ready=True)  # room again
    notifier.close()
    manager.close()
