"""One stage at a time, over a device that has all peers: encode, decode, snapshot, churn
of 1 %, and remove all.

Each case is installed once and serves all stages. What is read is set against the floor
that makes the same dumps and looks at nothing, what is removed against the floor that
makes the dumps and sends the same messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench import cluster, floors, lab, planes
from bench.cluster import Case
from bench.figures import median_ratio, times
from bench.floors import Taken
from bench.lab import Quiet
from flannel_dp import DataPlane, Lease
from flannel_dp._core import ADD, REMOVE, Diff, Table
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.peers.place import DesiredTable

_SIZES = (100, 1_000, 10_000, 50_000)
_FULL = 100_000

#: Below this a stage is as long as one message more or less, and gets no target.
_TOLD = 10_000

_ENCODE_NS = 60.0
_DECODE_NS = 150.0
_SNAPSHOT = 1.3
_CHURN = 1.5
_REMOVE = 1.15

_ROUNDS = {100: 15, 1_000: 11, 10_000: 7}
_ROUNDS_ABOVE = 3

_CASES = [
    pytest.param(
        Case(family, nodes),
        id=f"ipv{family}-{nodes}",
        marks=[pytest.mark.full] if nodes == _FULL else [pytest.mark.smoke] if nodes == 100 else [],
    )
    for nodes in (*_SIZES, _FULL)
    for family in (4, 6)
]


@dataclass(frozen=True)
class Installed:
    """A node whose kernel has everything."""

    case: Case
    node: str
    dp: DataPlane
    leases: list[Lease]

    @property
    def wanted(self) -> list[DesiredTable]:
        return planes.state(self.dp, self.case).tables

    @property
    def entries(self) -> int:
        return sum(len(one.table) for one in self.wanted)

    @property
    def rounds(self) -> int:
        return _ROUNDS.get(self.case.nodes, _ROUNDS_ABOVE)

    def target(self, most: float) -> float | None:
        return most if self.case.nodes == _TOLD else None


@pytest.fixture(scope="module", params=_CASES)
def installed(request: pytest.FixtureRequest) -> Iterator[Installed]:
    """All peers of a case, in a namespace that this thread is in."""
    case: Case = request.param
    leases = case.leases
    with (
        lab.namespace(case.family) as node,
        lab.inside(node),
        planes.plane(case, node, allow_shrink=True) as dp,
    ):
        assert dp.sync(leases).ok
        yield Installed(case, node, dp, leases)


@pytest.mark.benchmark(group="stage: encode")
def test_encode(benchmark: Any, installed: Installed, figure: Callable[..., None]) -> None:
    """The messages of a sync from empty; the cost of sending them is not in it."""
    tables = [one.table for one in installed.wanted]

    def encode() -> int:
        return sum(table.encoded_size(ADD) for table in tables)

    size = benchmark.pedantic(encode, rounds=installed.rounds, warmup_rounds=1)

    assert size == sum(len(table.encode(0, ADD)) * len(table) for table in tables)
    each = median(times(benchmark)) / installed.entries * 1e9
    figure(f"encode, {installed.case}", each, "ns/message", installed.target(_ENCODE_NS))


@pytest.mark.benchmark(group="stage: decode")
def test_decode(benchmark: Any, installed: Installed, figure: Callable[..., None]) -> None:
    """Dumps that were received before, decoded and compared with what is wanted."""
    channel, wanted = installed.dp.kernel.channel, installed.wanted
    scopes = floors.scopes_of(wanted)
    pages = dict(zip(scopes, channel.fetch(scopes, most=1 << 30), strict=True))

    def decode() -> list[Diff]:
        return [channel.diff(one.table, one.scopes, fetched=pages.get) for one in wanted]

    diffs = benchmark.pedantic(decode, rounds=installed.rounds, warmup_rounds=1)

    assert sum(diff.unchanged for diff in diffs) == installed.entries
    each = median(times(benchmark)) / installed.entries * 1e9
    figure(f"decode and compare, {installed.case}", each, "ns/entry", installed.target(_DECODE_NS))


@pytest.mark.benchmark(group="stage: snapshot")
def test_snapshot(
    benchmark: Any,
    installed: Installed,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """The kernel's tables into packed ones, on one thread."""
    wanted, kernel = installed.wanted, installed.dp.kernel
    requests = floors.write(tmp_path / "requests", floors.dumps(floors.scopes_of(wanted)))
    floor: list[Taken] = []
    ours: list[Taken] = []
    quiet()

    def read() -> list[Table]:
        return floors.timed(
            ours, lambda: [kernel.read(one.table.kind, *one.scopes) for one in wanted]
        )

    found = benchmark.pedantic(
        read,
        setup=lambda: floor.append(floors.run("dump", requests, installed.node)),
        rounds=installed.rounds,
        warmup_rounds=1,
    )

    # The kernel's own entries are in it, too.
    assert all(len(table) >= installed.case.nodes for table in found)
    _against(figure, f"snapshot, {installed.case}", ours, floor, installed.target(_SNAPSHOT))


@pytest.mark.benchmark(group="stage: 1 % churn")
def test_churn(
    benchmark: Any,
    installed: Installed,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """``DataPlane.sync`` after every hundredth peer has moved, and after it moved back."""
    case, leases = installed.case, installed.leases
    requests = floors.write(tmp_path / "requests", floors.dumps(floors.scopes_of(installed.wanted)))
    moved = cluster.churned(case.family, case.nodes)
    turns = [moved, leases]
    floor: list[Taken] = []
    ours: list[Taken] = []
    quiet()

    def setup() -> tuple[tuple[list[Lease]], dict[str, Any]]:
        floor.append(floors.run("dump", requests, installed.node))
        return (turns[len(ours) % 2],), {}

    def sync(members: list[Lease]) -> Report:
        return floors.timed(ours, lambda: installed.dp.sync(members))

    rounds = installed.rounds + 1
    report = benchmark.pedantic(sync, setup=setup, rounds=rounds, warmup_rounds=1)

    assert report.ok
    changed = sum(one != two for one, two in zip(moved, leases, strict=True))
    assert report.tables["neighbour"]["replaced"] == changed
    assert installed.dp.sync(leases).ok
    name = f"1 % churn, {case}"
    _against(figure, name, ours, floor, installed.target(_CHURN), "x the dump floor")


@pytest.mark.benchmark(group="stage: remove all")
def test_remove_all(
    benchmark: Any,
    installed: Installed,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """``DataPlane.sync`` of a list that only this node is left in."""
    case, dp = installed.case, installed.dp
    requests = floors.write(tmp_path / "requests", floors.dumps(floors.scopes_of(installed.wanted)))
    messages = floors.write(
        tmp_path / "messages",
        floors.batches([one.table for one in reversed(installed.wanted)], REMOVE),
    )
    floor: list[Taken] = []
    ours: list[Taken] = []

    def setup() -> None:
        assert dp.sync(installed.leases).ok
        quiet()
        read = floors.run("dump", requests, installed.node)
        sent = floors.run("send", messages, installed.node)
        floor.append(Taken(read.wall + sent.wall, read.cpu + sent.cpu))
        assert dp.sync(installed.leases).ok
        quiet()

    def sync() -> Report:
        return floors.timed(ours, lambda: dp.sync([case.own]))

    rounds = max(installed.rounds // 2, 2)
    report = benchmark.pedantic(sync, setup=setup, rounds=rounds, warmup_rounds=0)

    assert report.ok
    assert report.tables["route"]["removed"] == case.nodes
    _against(figure, f"remove all, {case}", ours, floor, installed.target(_REMOVE))


def _against(
    figure: Callable[..., None],
    name: str,
    ours: list[Taken],
    floor: list[Taken],
    target: float | None,
    unit: str = "x floor",
) -> None:
    """The median ratio of pairs."""
    mine, theirs = [one.wall for one in ours], [one.wall for one in floor]
    figure(
        name,
        median_ratio(mine, theirs),
        unit,
        target,
        f"medians {median(mine) * 1e3:.2f} ms, floor {median(theirs) * 1e3:.2f} ms",
    )
