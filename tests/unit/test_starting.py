"""The wait for what a start needs: what ends it, what is told meanwhile, and how often."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from flannel_dp.agent import starting
from flannel_dp.agent.notify import Notifier
from flannel_dp.agent.starting import Ended, Starting
from flannel_dp.agent.status import StatusBoard
from flannel_dp.backoff import Backoff
from flannel_dp.errors import (
    SHORTAGES,
    AuthFailed,
    Busy,
    ConfigError,
    FlannelDPError,
    NotYet,
    Unavailable,
    Unsupported,
    kernel_error,
)
from tests.lib.waiting import LIMIT


class Recorded(Notifier):
    """A notifier that remembers what it was told."""

    def __init__(self, watchdog: float | None = None) -> None:
        super().__init__(None, watchdog)
        self.said: list[dict[str, Any]] = []

    def send(self, **what: Any) -> bool:
        self.said.append(what)
        return True


class Attempt:
    """Fails with these errors, one after the other, then returns "made"."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.count = [*errors], 0

    def __call__(self) -> str:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return "made"


@pytest.fixture
def board() -> StatusBoard:
    return StatusBoard()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a thousandth of a second."""
    monkeypatch.setattr(starting, "Backoff", lambda first, most, random: Backoff(0.001, 0.001))


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that no test would live to see the end of."""
    monkeypatch.setattr(starting, "Backoff", lambda first, most, random: Backoff(1e6, 1e6))


def waiting(board: StatusBoard) -> bool:
    return starting.PROBLEM in board.status.problems


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "error",
    [
        NotYet("there is no interface 'tun0'", hint="name it"),
        Unavailable("etcd: connection refused"),
        AuthFailed("403"),
        kernel_error(19, "read eth0"),  # ENODEV
        kernel_error(4, "dump links"),  # EINTR
        kernel_error(105, "dump links"),  # ENOBUFS
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_come_is_waited_for_and_told(error: FlannelDPError, board: StatusBoard) -> None:
    attempt, notifier, told = Attempt(error, error, error), Recorded(), []
    board.on_change = lambda status: told.append(status.problems.get("start"))

    assert Starting(board, notifier).until(attempt) == "made"

    assert attempt.count == 4
    assert str(error) in told
    assert told[-1] is None
    assert [one for one in notifier.said if one.get("status")] == [
        {"watchdog": False, "status": f"starting: {error.message}"}
    ]
    assert not any(one.get("ready") for one in notifier.said)


def caused(by: Exception) -> ConfigError:
    """As a file that cannot be opened is an error of the configuration."""
    error = ConfigError("net-conf.json: cannot be read")
    error.__cause__ = by
    return error


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", sorted(SHORTAGES))
def test_what_the_machine_has_no_more_of_is_waited_for(number: int, board: StatusBoard) -> None:
    shortage = OSError(number, os.strerror(number))
    attempt = Attempt(shortage, caused(shortage), kernel_error(number, "open a netlink socket"))
    told = []
    board.on_change = lambda status: told.append(status.problems.get("start"))

    assert Starting(board, Recorded()).until(attempt) == "made"
    assert attempt.count == 4
    assert any(os.strerror(number) in (text or "") for text in told)
    assert told[-1] is None


@pytest.mark.usefixtures("quick")
def test_a_thread_that_ended_gets_the_watchdog_to_bite(board: StatusBoard) -> None:
    board.end("health", "unexpected SystemExit")
    notifier = Recorded(watchdog=10.0)

    assert Starting(board, notifier).until(Attempt(NotYet("no eth0"), NotYet("no eth0"))) == "made"
    assert notifier.said
    assert not any(one["watchdog"] for one in notifier.said)


@pytest.mark.usefixtures("quick")
def test_a_pause_outside_of_a_start_reports_and_raises_what_it_cannot_mend(
    board: StatusBoard,
) -> None:
    waits = Starting(board, Recorded())
    waits.pause(OSError(errno.EMFILE, "full"))
    assert "Too many open files" in board.status.problems["start"]

    with pytest.raises(ConfigError, match="wrong"):
        waits.pause(ConfigError("wrong"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "error",
    [
        ConfigError("--iface-regex: '(': not a regular expression"),
        Busy("flannel.1 is held by process 7"),
        Unsupported("no BTF"),
        kernel_error(1, "add a device"),  # EPERM
        RuntimeError("a defect"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_no_waiting_mends_ends_it(error: Exception, board: StatusBoard) -> None:
    attempt = Attempt(Unavailable("first this"), error)

    with pytest.raises(type(error)) as caught:
        Starting(board, Recorded()).until(attempt)

    assert caught.value is error
    assert attempt.count == 2


@pytest.mark.usefixtures("quick")
def test_the_watchdog_is_fed_meanwhile(board: StatusBoard) -> None:
    notifier = Recorded(watchdog=10.0)

    Starting(board, notifier).until(Attempt(*[Unavailable("etcd")] * 5))

    assert [one["watchdog"] for one in notifier.said] == [True] * 5


@pytest.mark.usefixtures("quick")
def test_each_attempt_is_a_sign_of_life(board: StatusBoard) -> None:
    ticks, seen = itertools.count(100.0, 1.0), []

    def attempt() -> None:
        seen.append(board.status.heartbeat)
        if len(seen) < 3:
            raise Unavailable("etcd")

    Starting(board, Recorded(), clock=lambda: next(ticks)).until(attempt)

    assert seen[0] >= 100.0
    assert seen == sorted(set(seen))


@pytest.mark.usefixtures("quick")
def test_one_line_at_the_first_failure_and_one_a_minute(
    board: StatusBoard, caplog: pytest.LogCaptureFixture
) -> None:
    now = itertools.count(0.0, 2.0)  # seconds, a look at the clock each

    class Timed(Starting):
        def _report(self, error: FlannelDPError) -> None:
            super()._report(error)
            moments.append((next(now), len(lines())))

    def lines() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]

    moments: list[tuple[float, int]] = []
    caplog.set_level(logging.INFO)
    errors = [Unavailable("etcd: connection refused", hint="start it")] * 200

    Timed(board, Recorded(), clock=lambda: next(now)).until(Attempt(*errors))

    assert moments[0][1] == 1
    lasted, said = moments[-1]
    assert lasted > 600
    assert lasted / 75 - 1 <= said <= lasted / 60 + 1
    assert set(lines()) == {"Waiting before the start: etcd: connection refused - start it"}


@pytest.mark.usefixtures("quick")
def test_a_new_reason_is_logged_at_once_and_those_that_alternate_are_not_repeated(
    board: StatusBoard, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [NotYet("no link"), NotYet("no address"), *[NotYet("no link"), NotYet("x")] * 20]
    many = [NotYet(f"reason {number}") for number in range(200)]

    ticks = itertools.count(0.0, 0.01)  # within a minute

    Starting(board, Recorded(), clock=lambda: next(ticks)).until(Attempt(*errors, *many))

    said = [one.getMessage().partition("the start: ")[2] for one in caplog.records]
    said = [text for text in said if text]
    assert said[:3] == ["no link", "no address", "x"]
    assert len(said) == len(set(said)) == 16
    assert next(ticks) < 60


@pytest.mark.usefixtures("endless")
def test_retry_tries_at_once(board: StatusBoard) -> None:
    made = Starting(board, Recorded())
    attempt = Attempt(Unavailable("etcd"))

    on_thread(made, attempt, lambda: made.retry(), board)

    assert attempt.count == 2


@pytest.mark.usefixtures("endless")
def test_the_end_is_not_waited_for(board: StatusBoard) -> None:
    made = Starting(board, Recorded())
    attempt = Attempt(Unavailable("etcd"))

    with pytest.raises(Ended):
        on_thread(made, attempt, made.end, board)

    assert attempt.count == 1


def test_nothing_is_tried_after_the_end(board: StatusBoard) -> None:
    made, attempt = Starting(board, Recorded()), Attempt()
    made.end()

    with pytest.raises(Ended):
        made.until(attempt)

    assert attempt.count == 0


def test_a_signal_ends_an_attempt_that_waits_for_an_answer(board: StatusBoard) -> None:
    """A server that says nothing is waited for by one system call, for as long as it may be."""
    made = Starting(board, Recorded())
    one, other = os.pipe()
    swallowed: list[bytes] = []

    def attempt() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        late.start()  # so that a defect fails, and does not hang
        swallowed.append(os.read(one, 1))

    late = threading.Timer(LIMIT, os.write, (other, b"x"))
    before = signal.signal(signal.SIGUSR1, lambda number, frame: made.interrupt())
    try:
        with pytest.raises(Ended):
            made.until(attempt)
    finally:
        signal.signal(signal.SIGUSR1, before)
        late.cancel()
        os.close(one)
        os.close(other)
    assert swallowed == []


def test_a_signal_after_the_start_raises_nothing(board: StatusBoard) -> None:
    made = Starting(board, Recorded())
    made.until(Attempt())

    made.interrupt()


@pytest.mark.usefixtures("quick")
def test_a_server_that_asks_for_a_longer_pause_gets_it(
    board: StatusBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = Unavailable("429")
    error.retry_after = 1e6  # type: ignore[attr-defined]
    monkeypatch.setattr(starting, "_MOST_ASKED", 3e5)
    made, attempt = Starting(board, Recorded()), Attempt(error)

    # Only what is asked for ends a pause that long.
    on_thread(made, attempt, made.retry, board)

    assert attempt.count == 2


def on_thread(
    made: Starting, attempt: Attempt, then: Callable[[], object], board: StatusBoard
) -> None:
    """``made.until(attempt)``, and ``then()`` once it waits. Raises what that raised."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            made.until(attempt)
        except BaseException as error:
            failures.append(error)

    noted = threading.Event()
    board.on_change = lambda status: noted.set() if waiting(board) else None
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert noted.wait(LIMIT)
    then()
    thread.join(LIMIT)
    assert not thread.is_alive(), "it goes on waiting"
    if failures:
        raise failures[0]
