"""Numbers and times as people read them."""

from __future__ import annotations

import pytest

from flannel_dp.look.terminal import human, human_time


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 "),
        (999, "999 "),
        (1000, "1 k"),
        (1234, "1.2 k"),
        (99_400, "99.4 k"),
        (99_900, "100 k"),
        (340_000_000, "340 M"),
        (999_600, "1.0 M"),
        (1.5e12, "1.5 T"),
        (2e15, "2000 T"),
        (0.25, "0.2 "),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert human(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3599, "60 min"),
        (7200, "2 h"),
        (86400 * 3, "3 d"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert human_time(seconds) == text
