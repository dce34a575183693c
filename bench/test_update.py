"""One peer joins, moves or leaves: the cost must not know how many others there are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import cluster, planes
from bench.cluster import Case
from bench.figures import Figures, times
from bench.lab import Quiet
from flannel_dp import DataPlane
from flannel_dp.cluster.lease import Lease
from flannel_dp.reconcile.report import Report

_TARGET_US = 200.0
#: "No more among 50,000" as medians of some hundred rounds can tell it.
_GROWTH_TARGET = 1.1
_SIZES = (100, 1_000, 10_000, 50_000)
_ROUNDS = 200

Change = tuple[list[Lease], list[Lease]]

_CASES = [
    pytest.param(
        Case(family, nodes),
        id=f"ipv{family}-{nodes}",
        marks=[pytest.mark.smoke] if nodes == 1_000 else [],
    )
    for nodes in _SIZES
    for family in (4, 6)
]


def _join_and_leave(case: Case, *, named: bool) -> Iterator[Change]:
    while True:
        for number in range(1, case.nodes):
            one = cluster.lease(case.family, number, named=named)
            yield [], [one]
            yield [one], []


def _move(case: Case, *, named: bool) -> Iterator[Change]:
    for generation in range(1, 15):
        for number in range(1, case.nodes):
            yield [cluster.lease(case.family, number, generation, named=named)], []


@pytest.mark.benchmark(group="update of one peer")
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("what", ["join and leave", "move"])
@pytest.mark.parametrize("case", _CASES)
def test_update_one(
    benchmark: Any,
    case: Case,
    what: str,
    named: bool,
    node: str,
    quiet: Quiet,
    figure: Callable[..., None],
    figures: Figures,
) -> None:
    """``update`` with one lease: a peer is removed and put back, or has moved; nodes go by
    their subnets (etcd) or by names (Kubernetes)."""
    changes = {"join and leave": _join_and_leave, "move": _move}[what](case, named=named)
    kind = f"{what}, named" if named else what
    with planes.plane(case, node) as dp:
        dp.sync(cluster.leases(case.family, case.nodes, named=named))
        quiet()

        def setup() -> tuple[tuple[DataPlane, Change], dict[str, Any]]:
            return (dp, next(changes)), {}

        report = benchmark.pedantic(_update, setup=setup, rounds=_ROUNDS, warmup_rounds=10)

        assert report.ok
        assert report.writes > 0
    median = statistics.median(times(benchmark))
    figures.remember(f"update, {kind}", case.family, case.nodes, median)
    target = _TARGET_US if case.nodes == 10_000 else None
    figure(f"update ({kind}), {case}", median * 1e6, "us", target, _spread(times(benchmark)))
    if case.nodes == 50_000:
        growth = figures.compare(f"update, {kind}", case.family, 10_000, 50_000, per_node=False)
        if growth is not None:
            name = f"update ({kind}), IPv{case.family}, 50,000 nodes"
            figure(name, growth, "x 10,000's", _GROWTH_TARGET)


def _update(dp: DataPlane, change: Change) -> Report:
    added, removed = change
    return dp.update(added=added, removed=removed)


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"best {ordered[0] * 1e6:.0f}, 99th {ordered[len(ordered) * 99 // 100] * 1e6:.0f} us"
