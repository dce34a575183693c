"""The simulator's scenarios, at a size that is quick: what a change costs a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench import simulate
from bench.cluster import Case


@pytest.mark.smoke
@pytest.mark.benchmark(group="simulated day")
@pytest.mark.parametrize("scenario", sorted(simulate.SCENARIOS))
@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
def test_a_simulated_day(
    benchmark: Any, family: int, scenario: str, figure: Callable[..., None]
) -> None:
    """1,000 nodes, 24 hours; the kernel ends as a sync with the survivors would leave it."""
    case = Case(family, 1_000)
    found = benchmark.pedantic(simulate.replay, args=(case, scenario, 24.0), rounds=1)

    assert found.changes > 0
    if scenario == "renewals":
        assert found.writes == 0
    else:
        assert found.writes > 0
    benchmark.extra_info["outcome"] = vars(found)
    cost = found.cpu / found.changes
    figure(f"a day of {scenario}, IPv{family}", cost * 1e6, "us a change", None, _detail(found))


def _detail(found: simulate.Outcome) -> str:
    return f"{found.changes} changes, {found.writes} writes, {found.cpu:.2f} s of processor time"
