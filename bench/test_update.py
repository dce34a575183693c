"""One peer joins, moves, leaves, gets a new MAC or renews its lease, beside a C program that sends
the same messages: the cost must not know how many other peers there are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench import cluster, floors, planes
from bench.cluster import Case
from bench.figures import Figures, times
from bench.lab import Quiet
from flannel_dp import DataPlane
from flannel_dp.cluster.lease import Lease
from flannel_dp.reconcile.report import Report

#: "At most three times what the same messages take, and under 60 us where they take 20."
_RATIO_TARGET = 3.0
_TARGET_US = 60.0
#: "No more among 50,000" as medians of some hundred rounds can tell it.
_GROWTH_TARGET = 1.1
_SIZES = (100, 1_000, 10_000, 50_000)
#: Changes in one direction between two runs of the floor, and how often both are measured.
_BLOCK, _BLOCKS = 25, 5

Change = tuple[list[Lease], list[Lease]]
There = Callable[[Lease, int], tuple[Change, Change]]
"""A change of one peer, and the change back."""

_CASES = [
    pytest.param(
        Case(family, nodes),
        id=f"ipv{family}-{nodes}",
        marks=[pytest.mark.smoke] if nodes == 1_000 else [],
    )
    for nodes in _SIZES
    for family in (4, 6)
]


def _leave(one: Lease, family: int) -> tuple[Change, Change]:
    return ([], [one]), ([one], [])


def _move(one: Lease, family: int) -> tuple[Change, Change]:
    elsewhere = {4: {"public_ip": "172.29.7.7"}, 6: {"public_ipv6": "2001:db8::77:7"}}[family]
    moved = replace(one, **elsewhere, **_data(one, family))
    return ([moved], []), ([one], [])


def _new_mac(one: Lease, family: int) -> tuple[Change, Change]:
    return ([replace(one, **_data(one, family))], []), ([one], [])


def _renewal(one: Lease, family: int) -> tuple[Change, Change]:
    return ([replace(one, expiration="2031-01-01T00:00:00Z")], []), ([one], [])


def _data(one: Lease, family: int) -> dict[str, Any]:
    name = {4: "backend_data", 6: "backend_v6_data"}[family]
    data = getattr(one, name)
    return {name: replace(data, vtep_mac=f"0a:0a:{data.vtep_mac[6:]}")}


_KINDS: dict[str, There] = {
    "join and leave": _leave,
    "move": _move,
    "new MAC": _new_mac,
    "renewal": _renewal,
}


class _Blocks:
    """Blocks of changes that end where they began, and the floor of their messages before each."""

    def __init__(self, dp: DataPlane, changes: list[Change], path: Path, netns: str) -> None:
        self._dp, self._changes, self._path, self._netns = dp, changes, path, netns
        #: Seconds of the floor for a change, a figure for each block.
        self.floor: list[float] = []
        self.messages = floors.write(path, self._record())

    def _record(self) -> Iterator[bytes]:
        kernel = self._dp.kernel
        change = kernel.change
        sent: list[bytes] = []

        def note(before: Any, after: Any, *, tags: int) -> Any:
            sent.extend(floors.change_batches(before, after))
            return change(before, after, tags=tags)

        vars(kernel)["change"] = note
        for one in self._changes:
            _update(self._dp, one)
        del vars(kernel)["change"]
        yield from sent

    def rounds(self) -> Iterator[Change]:
        while True:
            if self._path.stat().st_size:
                taken = floors.run("send", self._path, self._netns)
                self.floor.append(taken.wall / len(self._changes))
            yield from self._changes


@pytest.mark.benchmark(group="update of one peer")
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("what", [*_KINDS])
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
    tmp_path: Path,
) -> None:
    """``update`` with one lease; nodes go by their subnets (etcd) or by names (Kubernetes)."""
    kind = f"{what}, named" if named else what
    peers = [cluster.lease(case.family, n, named=named) for n in range(1, _BLOCK + 1)]
    pairs = [_KINDS[what](one, case.family) for one in peers]
    changes = [there for there, _ in pairs] + [back for _, back in pairs]
    with planes.plane(case, node) as dp:
        dp.sync(cluster.leases(case.family, case.nodes, named=named))
        blocks = _Blocks(dp, changes, tmp_path / "messages", node)
        quiet()
        rounds = blocks.rounds()

        def setup() -> tuple[tuple[DataPlane, Change], dict[str, Any]]:
            return (dp, next(rounds)), {}

        count = _BLOCKS * len(changes)
        report = benchmark.pedantic(_update, setup=setup, rounds=count, warmup_rounds=len(changes))

        assert report.ok
        assert bool(report.writes) == (what != "renewal")
    median = statistics.median(times(benchmark))
    figures.remember(f"update, {kind}", case.family, case.nodes, median)
    figure(f"update ({kind}), {case}", median * 1e6, "us", _TARGET_US, _spread(times(benchmark)))
    if blocks.floor:
        floor = statistics.median(blocks.floor)
        name, detail = f"update ({kind}), {case}, to its messages", f"floor {floor * 1e6:.0f} us"
        figure(name, median / floor, "x floor", _RATIO_TARGET, detail)
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
    return (
        f"best {ordered[0] * 1e6:.0f}, 99th {ordered[len(ordered) * 99 // 100] * 1e6:.0f} us, "
        f"{len(ordered)} rounds"
    )
