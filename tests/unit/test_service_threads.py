"""A service whose threads and configuration fail in every way: it goes on, and it says so."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flannel_dp.agent import supervise
from flannel_dp.agent.notify import Notifier
from flannel_dp.agent.service import Service, ServiceOptions
from flannel_dp.backoff import Backoff
from flannel_dp.errors import Unavailable
from flannel_dp.sources import Call, Inbox
from tests.lib.failures import FAILURES, OUTRIGHT_ENDS, fresh
from tests.lib.waiting import wait_until


class Member:
    """Keeps a lease, but for the errors it is given, one after the other."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.renewals = 0

    def keep(self, inbox: Inbox) -> None:
        if self.errors:
            raise self.errors.pop(0)
        inbox.healthy()
        while inbox.wait() is not Call.STOP:
            self.renewals += 1


def service(build: Any = None, notifier: Notifier | None = None) -> Service:
    return Service(build, ServiceOptions(), notifier or Notifier())


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_the_lease_is_kept_on(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_PAUSE", 0.001)
    made, member, said = service(), Member(fresh(error), fresh(error)), []
    made.board.on_change = lambda status: said.append(status.problems.get("lease", ""))
    with made._keeping(member) as box:
        wait_until(lambda: not member.errors and not made.board.status.problems)
        box.refresh()
        wait_until(lambda: member.renewals == 1)

    assert any(type(error).__name__ in text for text in said)
    assert made.board.status.ended == {}


def test_a_lease_that_cannot_be_refreshed_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever words the error has meanwhile: they are counted until its end."""
    caplog.set_level("INFO", "flannel_dp")
    made = service()
    with made._keeping(Member()) as box:
        for text in ("it closed the connection", "connection refused", "no answer"):
            box.trouble(Unavailable(text, hint="check that etcd runs"))
        box.healthy()

    began, more, ended = (one.getMessage() for one in caplog.records if "lease" in one.getMessage())
    assert began.startswith(
        "Problem (lease): cannot refresh this node's lease: it closed the connection"
    )
    assert more.startswith("... and 2 more of lease, the last: ")
    assert ended.startswith("Problem (lease) ended after")


def test_a_problem_of_the_lease_ends_with_its_keeper() -> None:
    """A node that joins again has another one, which has no failure to end."""
    made, member = service(), Member()
    with made._keeping(member) as box:
        box.refresh()
        wait_until(lambda: member.renewals == 1)
        box.trouble(Unavailable("the node is not found", hint="wait"))
        assert "not found" in made.board.status.problems["lease"]
    assert not made.board.status.problems
    box.trouble(Unavailable("the node is not found", hint="wait"))  # by a thread that ends later
    assert not made.board.status.problems


@pytest.mark.parametrize("error", OUTRIGHT_ENDS, ids=lambda error: type(error).__name__)
def test_a_keeper_that_ended_is_named_and_the_watchdog_bites(
    error: BaseException, tmp_path: Path
) -> None:
    with manager(tmp_path) as (notifier, received):
        made = service(notifier=notifier)
        with made._keeping(Member(fresh(error))):
            wait_until(lambda: made.board.status.ended)
            before = len(received())
            for _ in range(3):
                made._turn()

        assert [*made.board.status.ended] == ["lease"]
        said = received()[before:]
        assert said, "it still says how it is"
        assert not any("WATCHDOG=1" in one for one in said)
        assert any("lease-thread" in one for one in said)


def test_the_watchdog_is_fed_while_all_threads_run(tmp_path: Path) -> None:
    with manager(tmp_path) as (notifier, received):
        made = service(notifier=notifier)
        with made._keeping(Member()):
            made._turn()

        assert any("WATCHDOG=1" in one for one in received())


@contextmanager
def manager(folder: Path) -> Any:
    path = folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(path))
        bound.setblocking(False)
        seen: list[str] = []

        def received() -> list[str]:
            while True:
                try:
                    seen.append(bound.recv(4096).decode())
                except BlockingIOError:
                    return seen

        notifier = Notifier(str(path), watchdog_seconds=0.001)
        yield notifier, received
        notifier.close()


def data_plane(config: object) -> SimpleNamespace:
    """One that was synced for no family yet."""
    return SimpleNamespace(config=config, known={}, resolver=None)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["config", "join"])
def test_a_reload_that_fails_ends_nothing(error: Exception, where: str) -> None:
    """Reading the new configuration, or joining with it."""

    def fail(*args: object) -> Any:
        raise fresh(error)

    good: Callable[..., Any] = lambda *args: SimpleNamespace()  # noqa: E731
    build = SimpleNamespace(**({"config": good, "join": good} | {where: fail}))
    made = service(build)
    stopped = threading.Event()
    made._agent = SimpleNamespace(  # type: ignore[assignment]
        plane=data_plane("before"), stop=stopped.set, refresh=lambda: None
    )
    if where == "join":
        made._join = fail  # type: ignore[method-assign]
    made.reload()
    made._turn()

    assert [*made.board.status.problems] == ["config"]
    assert not stopped.is_set()
    assert made._next is None


def test_a_configuration_that_was_not_to_be_had_is_read_again() -> None:
    same = SimpleNamespace()
    answers: list[Any] = [Unavailable("etcd is away", hint="wait"), same]

    def config() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    made = service(SimpleNamespace(config=config))
    made._rereading = Backoff(0.001, 0.001)
    made._agent = SimpleNamespace(  # type: ignore[assignment]
        plane=data_plane(same), stop=lambda: None, refresh=lambda: None
    )
    made.reload()
    made._turn()
    assert made.board.status.problems == {"config": "etcd is away - wait"}

    def turned() -> bool:
        made._turn()
        return not made.board.status.problems

    wait_until(turned)
    assert answers == []
    made._turn()  # and not once more
