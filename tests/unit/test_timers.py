"""When an agent tries again what failed."""

from __future__ import annotations

from random import Random

from flannel_dp.agent.timers import Timers


def test_a_failure_elsewhere_does_not_put_off_a_retry_that_is_due_soon() -> None:
    now = [100.0]
    timers = Timers(60.0, lambda: now[0], Random(1))
    for _ in range(10):  # as long as pauses get
        timers.retry_later()
        assert timers.retry_at is not None
        now[0] = timers.retry_at
    timers.retry_later()
    assert timers.retry_at is not None
    assert timers.retry_at - now[0] > 20

    timers.retry_soon()
    soon = timers.retry_at
    timers.retry_later()

    assert timers.retry_at == soon
    assert soon - now[0] < 1


def test_a_retry_that_was_due_and_failed_has_a_longer_pause() -> None:
    now = [100.0]
    timers = Timers(60.0, lambda: now[0], Random(1))
    timers.retry_now()
    timers.retry_later()
    first = timers.retry_at
    assert first is not None
    assert first > now[0]

    now[0] = first
    timers.retry_later()

    assert timers.retry_at is not None
    assert timers.retry_at - now[0] > first - 100.0
