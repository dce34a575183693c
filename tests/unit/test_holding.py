"""When held-back removals are made: after the pause, after the grace period, or by a person."""

from __future__ import annotations

import pytest

from flannel_dp.agent.holding import Holding
from flannel_dp.cluster.lease import LeaseList
from flannel_dp.errors import ShrinkRefused
from flannel_dp.resources.peers.brake import is_sharp
from flannel_dp.sources import Inbox, Snapshot
from tests.lib.stand_ins import Clock


@pytest.fixture(name="clock")
def clock_fixture() -> Clock:
    return Clock()


@pytest.fixture(name="holding")
def holding_fixture(clock: Clock) -> Holding:
    return Holding(clock, confirm=15.0, grace=600.0)


def snapshot(afresh: str = "", *, consistent: bool = True, seconds: float = 0.0) -> Snapshot:
    return Snapshot(LeaseList([], []), "the test", seconds, consistent=consistent, afresh=afresh)


@pytest.mark.parametrize(
    ("gone", "before", "sharp"),
    [
        (0, 0, False), (1, 1, True), (1, 2, False), (2, 2, True), (2, 3, True), (1, 3, False),
        (2, 4, False), (3, 4, True), (10, 12, False), (10, 11, True), (11, 21, True),
        (11, 22, False), (15, 30, False), (16, 30, True),
    ],
)  # fmt: skip
def test_all_or_nearly_all(gone: int, before: int, sharp: bool) -> None:
    assert is_sharp(gone, before) is sharp


def test_a_second_list_after_the_pause_confirms(holding: Holding, clock: Clock) -> None:
    holding.arrived(snapshot())
    assert holding.update({4: ["a", "b"], 6: ["a"]})
    assert holding.due == 1015.0
    clock.now = 1014.0
    holding.arrived(snapshot())
    assert holding.confirmed == {}
    holding.update({4: ["a", "b"], 6: ["a"]})
    clock.now = 1015.0
    holding.mark_asked()
    assert holding.due is None

    holding.arrived(snapshot())

    assert holding.confirmed == {4: {"a", "b"}, 6: {"a"}}
    assert not holding.update({4: [], 6: []})
    assert holding.due is None


def test_a_list_that_was_begun_before_the_pause_was_over_confirms_nothing(
    holding: Holding, clock: Clock
) -> None:
    holding.arrived(snapshot())
    holding.update({4: ["a"]})
    clock.now = 1020.0
    holding.arrived(snapshot(seconds=6.0))
    assert holding.confirmed == {}


def test_peers_that_vanish_later_wait_for_a_list_of_their_own(
    holding: Holding, clock: Clock
) -> None:
    holding.arrived(snapshot())
    holding.update({4: ["a"]})
    clock.now = 1010.0
    holding.update({4: ["a", "b"]})
    clock.now = 1016.0
    holding.arrived(snapshot())

    assert holding.confirmed == {4: {"a"}}
    holding.update({4: ["b"]})
    assert holding.due == 1025.0


def test_a_file_confirms_nothing(holding: Holding, clock: Clock) -> None:
    error = ShrinkRefused("all are gone", hint="--allow-shrink")
    holding.arrived(snapshot(consistent=False))
    holding.update({4: ["a"]})
    clock.now = 5000.0
    holding.arrived(snapshot(consistent=False))

    assert (holding.due, holding.confirmed) == (None, {})
    assert holding.explain(error) is error


def test_a_store_that_started_afresh_removes_nothing_for_the_grace_period(
    holding: Holding, clock: Clock
) -> None:
    holding.arrived(snapshot("it has another cluster ID"))
    assert holding.keep
    holding.update({4: ["a"]})
    assert holding.due == 1600.0
    assert "another cluster ID" in holding.explain(ShrinkRefused("1 is gone")).message
    clock.now = 1599.0
    holding.arrived(snapshot())
    assert holding.keep
    assert holding.confirmed == {}
    holding.update({4: ["a"]})
    clock.now = 1600.0
    holding.arrived(snapshot())
    assert not holding.keep
    assert holding.confirmed == {4: {"a"}}


def test_the_grace_period_ends_when_all_are_back(holding: Holding) -> None:
    holding.arrived(snapshot("it has another cluster ID"))
    holding.update({4: ["a"]})
    holding.update({4: []})

    assert not holding.keep
    assert holding.due is None


def test_a_fresh_start_is_not_forgotten_when_two_lists_come_together() -> None:
    inbox = Inbox()
    inbox.put(snapshot("it has another cluster ID"))
    inbox.put(snapshot())

    taken = inbox.take().snapshot
    inbox.close()

    assert taken is not None
    assert taken.afresh == "it has another cluster ID"
