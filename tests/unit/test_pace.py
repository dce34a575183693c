"""How many repairs two quarrelling writers are allowed, by a clock of the test's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.agent.timers import RepairPace
from tests.lib.stand_ins import Clock


def drain(pace: RepairPace) -> int:
    """How many repairs may be made now."""
    count = 0
    while pace.due() is None:
        pace.spend()
        count += 1
    return count


def test_a_hundred_at_once_and_then_ten_a_second() -> None:
    clock = Clock()
    pace = RepairPace(clock)

    assert drain(pace) == 100
    clock.now += 1.0
    assert drain(pace) == 10
    clock.now += 0.05
    assert drain(pace) == 0


def test_the_next_turn_is_known() -> None:
    clock = Clock()
    pace = RepairPace(clock, burst=1, rate=4.0)
    pace.spend()

    assert pace.due() == clock.now + 0.25
    clock.now += 0.125
    assert pace.due() == clock.now + 0.125
    clock.now += 0.125
    assert pace.due() is None


def test_rest_restores_the_burst_and_no_more() -> None:
    clock = Clock()
    pace = RepairPace(clock)
    drain(pace)
    clock.now += 3600.0

    assert drain(pace) == 100


@given(
    steps=st.lists(st.floats(0.001, 3.0), max_size=30),
    burst=st.integers(1, 20),
    rate=st.floats(0.5, 50),
)
def test_never_more_than_the_burst_and_the_rate(
    steps: list[float], burst: int, rate: float
) -> None:
    clock = Clock()
    pace, started = RepairPace(clock, burst, rate), clock.now
    made = drain(RepairPace(clock, burst, rate))
    assert made == burst
    made = drain(pace)
    for step in steps:
        clock.now += step
        made += drain(pace)
        assert made <= burst + (clock.now - started) * rate + 1e-6
        until = pace.due()
        assert until is not None
        assert clock.now <= until <= clock.now + 1 / rate + 1e-9
