"""A whole sync against the floor: from empty, and with nothing to change.

Both sides of a pair run right after each other in the same namespace, the floor
first, so that what drifts (clock frequency, other programs, the kernel's
allocators) drifts for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench import floors, planes
from bench.cluster import Case
from bench.figures import Figures, median_ratio
from bench.floors import Taken
from bench.lab import Quiet
from flannel_dp import DataPlane
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.peers.paths import whole_main_table

_FROM_EMPTY_TARGET = {"vxlan": 1.15, "direct": 1.5, "host-gw": 1.5}
_PER_NODE_TARGET = 1.5
_UNCHANGED_TARGET = 1.2
_SMALL, _LARGE = 1_000, 50_000

_ROUNDS = {100: 9, 1_000: 9, 10_000: 7, 50_000: 3}


def _cases(*sizes: int) -> list[Any]:
    return [
        pytest.param(
            Case(family, nodes),
            id=f"ipv{family}-{nodes}",
            marks=[pytest.mark.smoke] if nodes == _SMALL else [],
        )
        for nodes in sizes
        for family in (4, 6)
    ] + [
        pytest.param(Case(family, nodes, layout), id=f"{layout}-ipv{family}-{nodes}")
        for layout in ("direct", "host-gw")
        for nodes in sizes
        for family in (4, 6)
    ]


@pytest.mark.benchmark(group="sync from empty")
@pytest.mark.parametrize("case", _cases(100, 1_000, 10_000, 50_000))
def test_sync_from_empty(
    benchmark: Any,
    case: Case,
    node: str,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
    figures: Figures,
) -> None:
    """Leases in memory, the device there, no peer: until the kernel has them all.

    What decides the way to each peer is read from the kernel besides, the whole main
    table; the floor has no need of it.
    """
    leases = case.leases
    messages = _messages(case, node, leases, tmp_path / "messages")
    floor: list[Taken] = []
    ours: list[Taken] = []
    open_planes: list[DataPlane] = []

    def setup() -> tuple[tuple[DataPlane], dict[str, Any]]:
        while open_planes:
            open_planes.pop().close()
        planes.empty(case, node)
        quiet()
        floor.append(floors.run("send", messages, node))
        planes.empty(case, node)
        open_planes.append(planes.plane(case, node))
        quiet()
        return (open_planes[-1],), {}

    def sync(dp: DataPlane) -> Report:
        return floors.timed(ours, lambda: dp.sync(leases))

    rounds = _ROUNDS[case.nodes]
    report = benchmark.pedantic(sync, setup=setup, rounds=rounds, warmup_rounds=1)

    assert report.ok
    assert report.tables["route"]["added"] == case.nodes
    pairs = list(zip(ours, floor, strict=True))[-rounds:]
    target = _FROM_EMPTY_TARGET[case.layout] if case.nodes >= _SMALL else None
    _note(benchmark, figure, f"sync from empty, {case}", pairs, target)
    seconds = median(taken.wall for taken, _ in pairs)
    figures.remember(f"{case.layout} from empty", case.family, case.nodes, seconds)
    if case.nodes == _LARGE:
        what = f"{case.layout} from empty"
        per_node = figures.compare(what, case.family, _SMALL, _LARGE, per_node=True)
        if per_node is not None:
            figure(f"cost per node, {case}", per_node, f"x {_SMALL:,}'s", _PER_NODE_TARGET)


def _messages(case: Case, node: str, leases: list[Any], path: Path) -> Path:
    """The messages of a sync from empty; checked to leave the kernel as a sync does."""
    with planes.plane(case, node, allow_shrink=True) as dp:
        dp.sync(leases)
        tables = [wanted.table for wanted in planes.state(dp, case).tables]
        floors.write(path, floors.batches(tables))
        planes.empty(case, node)
        floors.run("send", path, node)
        assert dp.sync(leases).writes == 0
    return path


@pytest.mark.benchmark(group="sync unchanged")
@pytest.mark.parametrize("case", _cases(100, 1_000, 10_000, 50_000))
def test_sync_unchanged(
    benchmark: Any,
    case: Case,
    node: str,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """The same leases once more: everything is read, nothing is written."""
    leases = case.leases
    floor: list[Taken] = []
    ours: list[Taken] = []
    with planes.plane(case, node) as dp:
        dp.sync(leases)
        # One dump of the main table says which routes are ours, which are in the way of leases, and
        # how each peer is reached.
        scopes = [
            one for one in floors.scopes_of(planes.state(dp, case).tables) if one.kind != "route"
        ]
        scopes.append(whole_main_table(case.family))
        requests = floors.write(tmp_path / "requests", floors.dumps(scopes))
        quiet()
        written = dp.kernel.channel.messages_sent

        def setup() -> None:
            floor.append(floors.run("dump", requests, node))

        def sync() -> Report:
            return floors.timed(ours, lambda: dp.sync(leases))

        rounds = 2 * _ROUNDS[case.nodes] + 1
        report = benchmark.pedantic(sync, setup=setup, rounds=rounds, warmup_rounds=2)

        assert report.ok
        assert report.writes == 0
        assert dp.kernel.channel.messages_sent == written
        assert report.tables["route"]["unchanged"] == case.nodes
    pairs = list(zip(ours, floor, strict=True))[-rounds:]
    target = _UNCHANGED_TARGET if case.nodes >= _SMALL else None  # a sync has its fixed costs
    _note(benchmark, figure, f"unchanged sync, {case}", pairs, target)


def _note(
    benchmark: Any,
    figure: Callable[..., None],
    name: str,
    pairs: list[tuple[Taken, Taken]],
    target: float | None,
) -> None:
    ours, floor = zip(*pairs, strict=True)
    benchmark.extra_info["floor_seconds"] = [one.wall for one in floor]
    by_cpu = median_ratio([one.cpu for one in ours], [one.cpu for one in floor])
    benchmark.extra_info["ratio_of_processor_time"] = by_cpu
    figure(
        name,
        median_ratio([one.wall for one in ours], [one.wall for one in floor]),
        "x floor",
        target,
        f"by processor time {by_cpu:.2f}; "
        f"medians {_milliseconds(ours)}, floor {_milliseconds(floor)}",
    )


def _milliseconds(taken: Sequence[Taken]) -> str:
    return f"{median(one.wall for one in taken) * 1e3:.1f} ms"
