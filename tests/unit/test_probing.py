"""What an agent says of its probes, and what becomes of it when a part of them fails."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from flannel_dp import Prober
from flannel_dp.agent.bursts import Bursts
from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.agent.probing import ProbeOptions, Probing
from flannel_dp.agent.status import StatusBoard
from flannel_dp.errors import kernel_error
from tests.lib.waiting import LIMIT


def test_peers_that_could_not_be_read_are_a_problem_until_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board, taken = StatusBoard(), list[Any]()
    probing: Any = Probing(board, ProbeOptions(), Chronicle())
    probing._followed = SimpleNamespace(
        known={},
        host=SimpleNamespace(netns=None),
        config=SimpleNamespace(backend=SimpleNamespace(vni=1)),
    )
    probing.prober = SimpleNamespace(set=taken.append)
    with monkeypatch.context() as patch:

        def gone(*args: Any) -> None:
            raise kernel_error(errno.ENODEV, "read addresses of flannel.1")

        patch.setattr("flannel_dp.probe.wanted.wanted_of", gone)
        probing.follow(None)
    probing._note("")  # the prober finds nothing wrong with this node
    assert "flannel.1" in board.status.problems["probe"]

    probing.follow(None)

    assert board.status.problems == {}
    assert taken == [[]]


def test_a_thread_that_failed_is_a_problem_until_it_works_again() -> None:
    board = StatusBoard()
    probing: Any = Probing(board, ProbeOptions(), Chronicle())

    probing._failed("unexpected ValueError: a value")
    assert board.status.problems == {"probe": "unexpected ValueError: a value"}
    probing._turned()

    assert board.status.problems == {}


@pytest.mark.parametrize("wait", [lambda one: [*one.changes()], lambda one: one.wait_known(LIMIT)])
def test_what_ends_a_prober_reaches_those_who_wait(wait: Callable[[Prober], Any]) -> None:
    ended = threading.Event()

    def fail() -> None:
        ended.set()
        raise ValueError("a value")

    with Prober(on_turn=fail) as prober:
        assert ended.wait(LIMIT)
        prober._thread.join(LIMIT) if prober._thread else None
        assert "a value" in prober.problem
        with pytest.raises(ValueError, match="a value"):
            wait(prober)


def test_bursts_are_counted_by_two_threads() -> None:
    bursts, errors = Bursts(lambda: 0.0), list[Exception]()

    def repeat(work: Callable[[int], object]) -> None:
        try:
            for number in range(20_000):
                work(number)
        except Exception as error:
            errors.append(error)

    def count(number: int) -> None:
        bursts.more((("dead", "back", "lossy", "steady", "first")[number % 5], number % 7), 1)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        works = (count, lambda number: bursts.due, lambda number: bursts.flush(all=True))
        bursts._ends.update(
            {
                (kind, n): 0.0
                for kind in ("dead", "back", "lossy", "steady", "first")
                for n in range(7)
            }
        )
        threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    finally:
        sys.setswitchinterval(before)
    assert errors == []
