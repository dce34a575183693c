"""An agent in whose threads every kind of exception is raised: it goes on, the kernel stays in
sync, and a thread that ended is named."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp.agent import supervise
from flannel_dp.agent.agent import Agent
from flannel_dp.errors import FlannelDPError
from flannel_dp.sources import Inbox
from tests.lib.agents import NUMBERS, AgentNode, Script, Watched, rest
from tests.lib.failures import FAILURES, OUTRIGHT_ENDS, fresh
from tests.lib.kernel import expected, observed
from tests.lib.leases import lease_of, peers, plane, subnet
from tests.lib.waiting import LIMIT, wait_until


class Failing(Script):
    """Raises, in the middle of following, what it is given, one after the other."""

    def __init__(self, leases: Any, *errors: BaseException) -> None:
        super().__init__(leases)
        self.errors = list(errors)

    def follow(self, inbox: Inbox) -> None:
        if self.errors:
            inbox.put(self.snapshot())
            raise self.errors.pop(0)
        super().follow(inbox)


def in_sync(host: Any, numbers: Any) -> bool:
    return all(observed(host, f) == expected(peers(numbers), f) for f in (4, 6))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses after a failure."""
    monkeypatch.setattr(supervise, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(supervise, "LONGEST_PAUSE", 0.01)


@pytest.mark.usefixtures("quick")
def test_a_source_that_fails_is_followed_anew(host: Any, caplog: Any) -> None:
    """By each kind of failure, twice in a row."""
    errors = [fresh(error) for error in FAILURES for _ in range(2)]
    script = Failing([lease_of(host), *peers(NUMBERS)], *errors)
    with Watched(plane(host), script) as watched:
        wait_until(lambda: not script.errors and not watched.status.problems)
        script.change(added=peers([40]))
        wait_until(lambda: in_sync(host, [*NUMBERS, 40]))
        assert watched.status.ended == {}

    said = [r for r in caplog.records if "Thread source failed" in r.getMessage()]
    assert [bool(record.exc_info) for record in said] == [True, False] * len(FAILURES)


@pytest.mark.parametrize("error", OUTRIGHT_ENDS, ids=lambda error: type(error).__name__)
def test_a_source_that_ended_is_named(host: Any, error: BaseException) -> None:
    script = Failing([lease_of(host), *peers(NUMBERS)], fresh(error))
    with Watched(plane(host), script) as watched:
        wait_until(lambda: watched.status.ended)

        assert [*watched.status.ended] == ["source"]
        assert "source-thread" in watched.status.problems
        for family in (4, 6):
            host.ip(f"-{family} route del {subnet(family, 3)}")
        wait_until(lambda: in_sync(host, NUMBERS))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["sync", "update", "resync"])
def test_a_turn_that_fails_is_made_again(
    host: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an answer led to on the agent's own thread, and by each kind of failure."""
    with AgentNode(host) as node:
        rest(node)
        method = getattr(node.plane, where)
        left: list[Exception] = []

        def failing(*args: Any, **options: Any) -> Any:
            if left:
                raise left.pop()
            return method(*args, **options)

        monkeypatch.setattr(node.plane, where, failing)
        numbers = [*NUMBERS]
        for new, error in enumerate(FAILURES, 40):
            gone = numbers.pop(0)
            numbers.append(new)
            if where == "update":  # after one failure of it all leases are asked for
                left.append(fresh(error))
                node.script.change(added=peers([new]), removed=[peers([gone])[0].label])
            else:
                left.extend([fresh(error), fresh(error)])
                node.script.leases |= {lease.label: lease for lease in peers([new])}
                node.script.leases.pop(peers([gone])[0].label)
                node.agent.refresh()
            wait_until(lambda: not left and in_sync(host, numbers))
        for family in (4, 6):
            host.ip(f"-{family} route del {subnet(family, numbers[0])}")
        wait_until(lambda: in_sync(host, numbers) and node.settled())

        assert node.status.ended == {}


def test_it_says_what_went_wrong_as_long_as_it_does(
    host: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AgentNode(host) as node:
        rest(node)
        broken, turn = [True], node.agent._work.repair_drift

        def failing() -> None:
            if broken:
                raise OverflowError("int too big to convert")
            turn()

        monkeypatch.setattr(node.agent._work, "repair_drift", failing)
        node.agent.refresh()
        wait_until(lambda: node.status.failures >= 3)
        said = node.status.problems["agent"]
        assert said == "unexpected OverflowError: int too big to convert"
        beat = node.status.heartbeat
        wait_until(lambda: node.status.heartbeat > beat)
        for family in (4, 6):
            host.ip(f"-{family} route del {subnet(family, 5)}")

        broken.clear()
        wait_until(node.settled)
    assert caplog.text.count("Traceback") == 1


def test_it_stops_in_the_middle_of_a_pause(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with AgentNode(host) as node:
        rest(node)

        def failing() -> None:
            raise ValueError("a mistake")

        monkeypatch.setattr(node.agent._work, "repair_drift", failing)
        node.agent.refresh()
        wait_until(lambda: node.status.failures >= 4)
        node.agent.stop()
        node.agent.join(LIMIT)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["source", "sync"])
def test_without_memory_it_ends_and_the_kernel_forwards(
    host: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few attempts, with an error that says so."""
    made, script = plane(host), Failing([lease_of(host), *peers(NUMBERS)])
    with Watched(made, script) as watched:
        wait_until(lambda: in_sync(host, NUMBERS))
        watched.agent.stop()
        watched.agent.join(LIMIT)

    made = plane(host)
    if where == "source":
        script = Failing([lease_of(host), *peers(NUMBERS)], *[MemoryError() for _ in range(50)])
    else:

        def no_memory(*args: Any, **options: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(made, "sync", no_memory)
    agent = Agent(made, script)
    with made, pytest.raises(FlannelDPError, match="out of memory") as caught:
        agent.run()

    assert "more memory" in caught.value.hint
    assert in_sync(host, NUMBERS)
