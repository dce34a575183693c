"""How long peers stay whose leases cannot be used: since when, until when, and in words."""

from __future__ import annotations

import re

import pytest

from flannel_dp.agent.grace import Grace
from tests.lib.stand_ins import Clock


@pytest.fixture(name="clock")
def clock_fixture() -> Clock:
    return Clock()


@pytest.fixture(name="grace")
def grace_fixture(clock: Clock) -> Grace:
    return Grace(clock, seconds=600.0)


def test_ten_minutes_without_anything_said(clock: Clock) -> None:
    grace = Grace(clock)
    grace.listed({"a": "x"})
    assert grace.due == clock.now + 600.0


def test_a_period_ends_once_and_is_not_begun_again(grace: Grace, clock: Clock) -> None:
    start = clock.now
    grace.listed({"a": "its VtepMAC is missing"})
    assert (grace.due, grace.over, grace.kept) == (start + 600.0, set(), 1)
    clock.now = start + 599.0
    grace.listed({"a": "its public address is 'x'"})
    assert grace.due == start + 600.0, "a lease that is broken otherwise is broken all the same"

    clock.now = start + 600.0
    assert (grace.over, grace.kept, grace.explain()) == ({"a"}, 0, None)
    assert grace.due == start + 600.0
    grace.mark_asked()
    assert grace.due is None
    grace.listed({"a": "its public address is 'x'"})
    assert (grace.due, grace.over) == (None, {"a"})


def test_a_lease_that_is_good_again_or_gone_has_a_new_period_later(
    grace: Grace, clock: Clock
) -> None:
    start = clock.now
    grace.listed({"a": "x", "b": "y", "c": "z"})
    grace.changed({"a", "b", "d"}, {"d": "w"})
    assert grace.kept == 2
    clock.now = start + 100.0
    grace.changed({"a"}, {"a": "x"})
    assert grace.due == start + 600.0
    grace.changed({"c", "d"}, {})
    assert grace.due == start + 700.0
    grace.listed({})
    assert (grace.due, grace.kept, grace.explain()) == (None, 0, None)


def test_one_that_ends_later_is_asked_after_later(grace: Grace, clock: Clock) -> None:
    start = clock.now
    grace.listed({"a": "x"})
    clock.now = start + 10.0
    grace.changed({"b"}, {"b": "y"})
    clock.now = start + 600.0
    grace.mark_asked()
    assert grace.due == start + 610.0


def test_health_names_the_lease_what_it_lacks_and_until_when(grace: Grace) -> None:
    grace.listed({"node-3": "its IPv4 VtepMAC is missing"})
    error = grace.explain()
    assert error is not None
    assert re.fullmatch(
        r"1 lease of a known peer cannot be used: node-3: its IPv4 VtepMAC is missing; "
        r"its entries are kept until \d\d:\d\d:\d\d",
        error.message,
    )
    grace.changed({"node-1"}, {"node-1": "its backend type is missing"})
    assert "2 leases of known peers cannot be used, the first: node-" in str(grace.explain())
