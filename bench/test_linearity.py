"""How the cost of a sync grows with the cluster, and which of its stages it grows in.

The exponent is fitted to every round at every size (bench/linear.py). One kernel
behaves so that a plain reading would not do: the dump of a vxlan FDB is quadratic, which
shows above 50,000 entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from bench import linear, planes
from bench.cluster import Case
from bench.figures import times
from bench.lab import Quiet
from flannel_dp import DataPlane
from flannel_dp.reconcile.report import Report

_SIZES = (1_000, 3_000, 10_000, 30_000)
_FULL = (50_000, 100_000)
_ROUNDS = {1_000: 9, 3_000: 7, 10_000: 5}
_ROUNDS_ABOVE = 3

#: The exponent that a cost should have: of installing, and at most of finding all right.
_INSTALLING = (0.95, 1.1)
_RESYNC = (None, 1.15)

_STAGES = ("source", "desired", "snapshot", "diff", "apply", "total")

Points = defaultdict[tuple[str, int], list[linear.Point]]

_CASES = [
    pytest.param(
        Case(family, nodes),
        id=f"ipv{family}-{nodes}",
        marks=[pytest.mark.full] if nodes in _FULL else [],
    )
    for family in (4, 6)
    for nodes in (*_SIZES, *_FULL)
]


@pytest.fixture(scope="module")
def points() -> Points:
    """Nodes and seconds of every round, by work and family."""
    return defaultdict(list)


@pytest.mark.benchmark(group="growth: installing")
@pytest.mark.parametrize("case", _CASES)
def test_installing(
    benchmark: Any,
    case: Case,
    node: str,
    quiet: Quiet,
    points: Points,
    figure: Callable[..., None],
) -> None:
    """From the empty device to all peers."""
    leases = case.leases
    reports: list[Report] = []
    open_planes: list[DataPlane] = []

    def setup() -> None:
        while open_planes:
            open_planes.pop().close()
        planes.empty(case, node)
        open_planes.append(planes.plane(case, node))
        quiet()

    benchmark.pedantic(
        lambda: reports.append(open_planes[-1].sync(leases)),
        setup=setup,
        rounds=_ROUNDS.get(case.nodes, _ROUNDS_ABOVE),
        warmup_rounds=1,
    )
    open_planes.pop().close()

    assert all(report.ok for report in reports)
    assert {report.tables["route"]["added"] for report in reports} == {case.nodes}
    _note(benchmark, figure, "installing", case, reports, points, _INSTALLING)


@pytest.mark.benchmark(group="growth: unchanged")
@pytest.mark.parametrize("case", _CASES)
def test_unchanged(
    benchmark: Any,
    case: Case,
    node: str,
    quiet: Quiet,
    points: Points,
    figure: Callable[..., None],
) -> None:
    """Everything is right already."""
    leases = case.leases
    reports: list[Report] = []
    with planes.plane(case, node) as dp:
        assert dp.sync(leases).ok
        quiet()
        benchmark.pedantic(
            lambda: reports.append(dp.sync(leases)),
            rounds=2 * _ROUNDS.get(case.nodes, _ROUNDS_ABOVE) + 1,
            warmup_rounds=2,
        )

    assert all(report.ok for report in reports)
    assert sum(report.writes for report in reports) == 0
    _note(benchmark, figure, "unchanged", case, reports, points, _RESYNC)


def _note(
    benchmark: Any,
    figure: Callable[..., None],
    work: str,
    case: Case,
    reports: list[Report],
    points: Points,
    aim: tuple[float | None, float],
) -> None:
    """Keep the times and where they went; print the exponent up to this size."""
    seconds = times(benchmark)
    timed = reports[-len(seconds) :]  # those before it warmed up
    benchmark.extra_info.update(
        work=work,
        family=case.family,
        nodes=case.nodes,
        stages={stage: [report.seconds[stage] for report in timed] for stage in _STAGES},
    )
    found = points[work, case.family]
    found += [(case.nodes, one) for one in seconds]
    largest = case.nodes in (_SIZES[-1], _FULL[-1])
    if largest and len({nodes for nodes, _ in found}) >= linear.LEAST_SIZES:
        fit = linear.power(found)
        least, most = aim
        title = f"exponent of cost, {work}, IPv{case.family}, to {case.nodes:,} nodes"
        figure(title, fit.exponent, "of nodes", most, str(fit), least)
