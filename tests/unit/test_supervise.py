"""Workers: whatever their work raises, it is taken up again, or it is told that it is not."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from flannel_dp.agent import supervise
from flannel_dp.agent.health import HealthServer
from flannel_dp.agent.status import StatusBoard
from flannel_dp.agent.supervise import FORGIVEN, LONGEST_PAUSE, Failures, Worker, described
from flannel_dp.backoff import Backoff
from flannel_dp.errors import ConfigError, Unavailable
from flannel_dp.sources.etcd.messages import DecodeError
from tests.lib.failures import FAILURES, OUTRIGHT_ENDS, fresh
from tests.lib.waiting import LIMIT, wait_until


class Work:
    """Raises what it is given, one after the other, then waits until it is released."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.begun = 0
        self.told: list[str] = []
        self.release = threading.Event()

    def __call__(self) -> None:
        self.begun += 1
        if self.errors:
            raise self.errors.pop(0)
        self.release.wait()


Run = Callable[..., tuple[Worker, Work, StatusBoard]]


@pytest.fixture(name="run")
def run_fixture() -> Iterator[Run]:
    made: list[tuple[Worker, Work]] = []

    def run(*errors: BaseException, **how: Any) -> tuple[Worker, Work, StatusBoard]:
        work, board = Work(*errors), StatusBoard()
        board = how.pop("board", board)
        options: dict[str, Any] = {"on_failure": work.told.append, "backoff": Backoff(0.001, 0.002)}
        worker = Worker("test", work, board=board, **(options | how))
        made.append((worker, work))
        worker.start()
        return worker, work, board

    yield run
    for worker, work in made:
        worker.stop()
        work.release.set()
        worker.join(LIMIT)
        assert not worker.alive


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_failed_work_is_taken_up_again(run: Run, error: Exception, caplog: Any) -> None:
    worker, work, board = run(fresh(error), fresh(error), fresh(error))
    wait_until(lambda: work.begun == 4)

    assert worker.alive
    assert board.status.ended == {}
    assert work.told == [described(error)] * 3
    assert type(error).__name__ in work.told[0]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "WARNING"]
    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False]


def test_each_kind_of_failure_has_its_traceback(run: Run, caplog: Any) -> None:
    _, work, _ = run(ValueError("a"), KeyError("b"), ValueError("a"), ValueError("c"))
    wait_until(lambda: work.begun == 5)

    assert [bool(record.exc_info) for record in caplog.records] == [True, True, False, True]


@pytest.mark.parametrize("error", OUTRIGHT_ENDS, ids=lambda error: type(error).__name__)
def test_a_thread_that_ends_is_named_and_healthz_fails(
    run: Run, error: BaseException, caplog: Any
) -> None:
    worker, work, board = run(ValueError("first"), fresh(error))
    wait_until(lambda: board.status.ended)
    worker.join(LIMIT)

    assert not worker.alive
    assert work.begun == 2
    assert board.status.ended == {"test": described(error)}
    assert caplog.records[-1].levelname == "CRITICAL"
    assert caplog.records[-1].exc_info
    health = HealthServer(board, "127.0.0.1", 0)
    try:
        answer, document = health.answer("/healthz", "", False), health.answer("/healthz", "", True)
    finally:
        health.close()
    assert answer is not None
    assert document is not None
    assert (answer.code, document.code) == (503, 503)
    assert answer.body.decode().startswith("ended\ntest-thread: it ended: unexpected ")
    found = json.loads(document.body)
    assert found["status"] == "ended"
    assert [*found["ended"]] == ["test"]


def test_a_thread_that_is_killed_from_outside_is_named() -> None:
    release, told = threading.Event(), list[str]()

    def work() -> None:
        while not release.wait(0.01):
            pass

    worker = Worker("killed", work, board=(board := StatusBoard()), on_failure=told.append)
    worker.start()
    thread = next(one for one in threading.enumerate() if one.name == "flannel-dp-killed")
    assert thread.ident is not None
    kill = ctypes.pythonapi.PyThreadState_SetAsyncExc
    assert kill(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1
    wait_until(lambda: board.status.ended)

    assert [*board.status.ended] == ["killed"]
    worker.join(LIMIT)
    assert not worker.alive


def test_work_without_memory_is_given_up(run: Run) -> None:
    """A few times it is taken up again; then a restart is what helps."""
    worker, work, board = run(*[MemoryError() for _ in range(50)])
    wait_until(lambda: board.status.ended)
    worker.join(LIMIT)

    assert not worker.alive
    assert worker.out_of_memory
    assert work.begun == 6
    assert [*board.status.ended] == ["test"]
    assert len(work.told) == 7  # the end, too


def test_memory_that_comes_back_is_used(run: Run) -> None:
    errors = [*[MemoryError()] * 5, ValueError("x"), *[MemoryError()] * 5]
    worker, work, board = run(*[fresh(error) for error in errors])
    wait_until(lambda: work.begun == len(errors) + 1)

    assert worker.alive
    assert not worker.out_of_memory
    assert board.status.ended == {}


def test_no_memory_to_log_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the failure nor, at first, the end of the thread."""
    monkeypatch.setattr("flannel_dp.agent.supervise._SHORTAGE_PAUSE", 0.001)
    left = [3]

    def failed(self: Failures, error: Exception) -> float:
        raise MemoryError

    class Board(StatusBoard):
        def end(self, thread: str, why: str) -> None:
            if left[0]:
                left[0] -= 1
                raise MemoryError
            super().end(thread, why)

    monkeypatch.setattr(Failures, "failed", failed)
    worker, work, board = run(*[MemoryError() for _ in range(50)], board=(board := Board()))
    wait_until(lambda: board.status.ended)
    worker.join(LIMIT)

    assert not worker.alive
    assert work.begun == 6
    assert [*board.status.ended] == ["test"]


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    board = StatusBoard()
    worker = Worker("test", Work(), board=board, on_failure=lambda text: None)
    monkeypatch.setattr(threading.Thread, "start", full)
    worker.start()

    assert board.status.ended == {"test": "unexpected RuntimeError: can't start new thread"}
    worker.join(1.0)


def test_work_that_returns_too_early_is_taken_up_again() -> None:
    begun: list[int] = []
    told: list[str] = []
    board = StatusBoard()
    worker = Worker(
        "test", lambda: begun.append(1), board=board, on_failure=told.append, backoff=Backoff(0.001)
    )
    worker.start()
    wait_until(lambda: len(begun) >= 3)
    worker.stop()
    worker.join(LIMIT)

    assert not worker.alive
    assert told[0] == "unexpected TooEarly: it returned without having been stopped"
    assert board.status.ended == {}


def test_it_goes_on_where_its_failure_cannot_be_told(run: Run, caplog: Any) -> None:
    def tell(text: str) -> None:
        raise OSError(errno.EBADF, "closed")

    worker, work, board = run(ValueError("x"), on_failure=tell)
    wait_until(lambda: work.begun == 2)

    assert worker.alive
    assert board.status.ended == {}
    assert "cannot report its failure" in caplog.text


def test_a_failure_after_the_end_is_no_news(caplog: Any) -> None:
    begun, release = threading.Event(), threading.Event()
    told: list[str] = []

    def work() -> None:
        begun.set()
        release.wait()
        raise ValueError("late")

    worker = Worker("test", work, board=(board := StatusBoard()), on_failure=told.append)
    worker.start()
    assert begun.wait(LIMIT)
    worker.stop()
    release.set()
    worker.join(LIMIT)

    assert not worker.alive
    assert told == []
    assert board.status.ended == {}
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_pause_ends_when_it_is_stopped(run: Run) -> None:
    worker, work, _ = run(ValueError("x"), backoff=Backoff(3600.0, 3600.0))
    wait_until(lambda: work.told)
    worker.stop()
    worker.join(LIMIT)

    assert not worker.alive
    assert work.begun == 1


def test_pauses_grow_and_are_forgiven() -> None:
    now = 0.0
    failures = Failures("test", clock=lambda: now)

    def failed() -> float:
        return failures.failed(ValueError("x"))

    pauses = [failed() for _ in range(12)]

    assert all(after > before for before, after in pairwise(pauses[:7]))
    assert pauses[0] < 1.0
    assert max(pauses) <= LONGEST_PAUSE * 1.25
    assert pauses[-1] >= LONGEST_PAUSE * 0.75
    now += FORGIVEN + 1
    assert failed() < 1.0


def test_an_error_without_a_text_has_its_kind() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert described(Mute()) == "unexpected Mute"
    assert described(StopIteration()) == "unexpected StopIteration"
    assert described(KeyError("a\nb")) == "unexpected KeyError: 'a\\nb'"
    assert described(ValueError("a\nb")) == "unexpected ValueError: a b"


def test_the_table_has_what_answers_make_libraries_raise() -> None:
    kinds = {type(error) for error in FAILURES}

    assert kinds >= {DecodeError, ValueError, OverflowError, UnicodeDecodeError, RecursionError}
    assert kinds >= {MemoryError, OSError, Unavailable, ConfigError}


# ---- the server of /healthz is one -------------------------------------------------


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_the_health_server_serves_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_PAUSE", 0.001)
    board = StatusBoard()
    with HealthServer(board, "127.0.0.1", 0) as server:
        real, left = server._server.get_request, [fresh(error), fresh(error)]

        def get_request() -> Any:
            if left:
                raise left.pop()
            return real()

        monkeypatch.setattr(server._server, "get_request", get_request)
        # Whether the first connection is taken before the change the scheduler decides.
        said = [ask(server), ask(server)]
        assert [code for code, _ in said] == [200, 200]
        if not isinstance(error, OSError):  # those it tries again by itself
            assert any(text.startswith("degraded\nhealth: unexpected ") for _, text in said)
        assert ask(server) == (200, "ok\n")
        assert board.status.problems == {}


def test_the_health_server_that_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    board = StatusBoard()
    server = HealthServer(board, "127.0.0.1", 0)

    def gone() -> Any:
        raise SystemExit(3)

    monkeypatch.setattr(server._server, "get_request", gone)
    with server:
        wait_until(lambda: board.status.ended)

    assert [*board.status.ended] == ["health"]


def ask(server: HealthServer) -> tuple[int, str]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)
    try:
        connection.request("GET", "/healthz", headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
