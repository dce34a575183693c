"""An agent in whose threads every kind of exception is raised: it goes on, the kernel stays in
sync, and a thread that ended is named."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp.agent import supervise
from flannel_dp.agent.agent import Agent
from flannel_dp.errors import FlannelDPError
from flannel_dp.sources import Inbox
from tests.lib.agents import NUMBERS, Node, Script, Watched, rest
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


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_source_that_fails_is_followed_anew(host: Any, error: Exception, caplog: Any) -> None:
    script = Failing([lease_of(host), *peers(NUMBERS)], fresh(error), fresh(error))
    with Watched(plane(host), script) as watched:
        wait_until(lambda: not script.errors and not watched.status.problems)
        script.change(added=peers([40]))
        wait_until(lambda: in_sync(host, [*NUMBERS, 40]))
        assert watched.status.ended == {}

    said = [r for r in caplog.records if "thread=source failed" in r.getMessage()]
    assert len(said) == 2
    assert [bool(record.exc_info) for record in said] == [True, False]


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


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["sync", "update", "resync"])
def test_a_turn_that_fails_is_made_again(host: Any, error: Exception, where: str) -> None:
    """Whatever an answer led to on the agent's own thread."""
    with Node(host) as node:
        rest(node)
        method, left = getattr(node.plane, where), [fresh(error), fresh(error)]

        def failing(*args: Any, **options: Any) -> Any:
            if left:
                raise left.pop()
            return method(*args, **options)

        setattr(node.plane, where, failing)
        if where == "update":
            node.script.change(added=peers([40]), removed=[peers([3])[0].label])
            node.script.change(added=peers([41]))
        else:
            node.script.leases |= {lease.label: lease for lease in peers([40, 41])}
            node.script.leases.pop(peers([3])[0].label)
            node.agent.refresh()
        numbers = [number for number in (*NUMBERS, 40, 41) if number != 3]
        wait_until(lambda: in_sync(host, numbers))
        for family in (4, 6):
            host.ip(f"-{family} route del {subnet(family, 5)}")
        wait_until(lambda: in_sync(host, numbers) and node.settled())

        assert node.status.ended == {}
        if where != "update":  # after one failure of it all leases are asked for
            assert not left


def test_it_says_what_went_wrong_as_long_as_it_does(host: Any, caplog: Any) -> None:
    with Node(host) as node:
        rest(node)
        broken, turn = [True], node.agent._work.repair_drift

        def failing() -> None:
            if broken:
                raise OverflowError("int too big to convert")
            turn()

        node.agent._work.repair_drift = failing  # type: ignore[method-assign]
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


def test_it_stops_in_the_middle_of_a_pause(host: Any) -> None:
    with Node(host) as node:
        rest(node)

        def failing() -> None:
            raise ValueError("a mistake")

        node.agent._work.repair_drift = failing  # type: ignore[method-assign]
        node.agent.refresh()
        wait_until(lambda: node.status.failures >= 4)
        node.agent.stop()
        node.agent.join(LIMIT)


@pytest.mark.parametrize("where", ["source", "sync"])
def test_without_memory_it_ends_and_the_kernel_forwards(
    host: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few attempts, with an error that says so."""
    monkeypatch.setattr(supervise, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(supervise, "LONGEST_PAUSE", 0.01)
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
