"""Numbers and times as people read them."""

from __future__ import annotations

import pytest

from flannel_dp.look.terminal import human, human_time
from flannel_dp.look.text import counts_lines
from flannel_dp.reconcile.plan import ORDER


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


@pytest.mark.parametrize("of_map", [0, 3])
def test_the_row_of_the_map_of_peers_is_there_where_it_has_entries(of_map: int) -> None:
    words = ("added", "replaced", "removed", "unchanged", "failed")
    tables = {kind: dict.fromkeys(words, 0) for kind in ORDER}
    tables["peer"]["unchanged"] = of_map

    rows = [line.split()[0] for line in counts_lines(tables)]

    assert rows == ["added", "route", "nexthop", "neighbour", "fdb", *(["peer"] if of_map else [])]
