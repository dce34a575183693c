"""Pauses between attempts grow, are bounded, and vary."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.backoff import Backoff, jittered


class Middle(random.Random):
    """Always the middle of what could be: no jitter."""

    def random(self) -> float:
        return 0.5


def test_each_pause_is_twice_the_one_before_up_to_a_bound() -> None:
    backoff = Backoff(0.1, 1.0, Middle())

    assert [backoff.next() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert backoff.attempts == 6


def test_after_a_success_it_begins_again() -> None:
    backoff = Backoff(0.1, 30.0, Middle())
    for _ in range(5):
        backoff.next()
    backoff.reset()

    assert backoff.attempts == 0
    assert backoff.next() == pytest.approx(0.1)


def test_a_million_failures_overflow_nothing() -> None:
    backoff = Backoff(0.1, 30.0, Middle(), attempts=10**6)

    assert backoff.next() == 30.0


@given(seed=st.integers(), attempts=st.integers(0, 40))
def test_a_pause_varies_by_a_quarter(seed: int, attempts: int) -> None:
    pause = min(30.0, 0.1 * 2**attempts)
    found = Backoff(0.1, 30.0, random.Random(seed), attempts).next()

    assert 0.75 * pause <= found <= 1.25 * pause


def test_two_processes_do_not_keep_step() -> None:
    one, other = (Backoff(0.1, 30.0, random.Random(seed)) for seed in (1, 2))

    assert [one.next() for _ in range(5)] != [other.next() for _ in range(5)]


@given(seconds=st.floats(0, 1e6), share=st.floats(0, 1), seed=st.integers())
def test_jitter_stays_within_its_share(seconds: float, share: float, seed: int) -> None:
    found = jittered(seconds, share, random.Random(seed))

    assert seconds * (1 - share) <= found * (1 + 1e-9)
    assert found <= seconds * (1 + share) * (1 + 1e-9)


def test_jitter_uses_all_of_its_share() -> None:
    source = random.Random(1)
    found = [jittered(60.0, 0.1, source) for _ in range(1000)]

    assert min(found) < 54.5
    assert max(found) > 65.5
