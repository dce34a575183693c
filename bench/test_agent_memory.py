"""Memory of an agent's process: at rest, and after a million events."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cluster, floors, planes
from bench.agents import Remote, Service, Stranger
from bench.cluster import Case
from flannel_dp import DataPlane
from flannel_dp._core import REMOVE, Table

_RESIDENT_TARGET_MB = 60.0
#: An allocator breathes by that much between two syncs.
_GROWTH_TARGET_MB = 2.0
_EVENTS = {1_000: 20_000, 10_000: 1_000_000}

#: Peers that lose everything at once, and get it back.
_PEERS = 400
#: The share of the events after which memory is compared with memory at the end: by then
#: all that is made at the first need has been made.
_WARM = 0.2


_CASES = [
    pytest.param(
        Case(family, nodes),
        id=f"ipv{family}-{nodes}",
        marks=[pytest.mark.smoke] if (family, nodes) == (4, 1_000) else [],
    )
    for nodes in (1_000, 10_000)
    for family in (4, 6)
]


@pytest.mark.benchmark(group="agent memory")
@pytest.mark.parametrize("case", _CASES)
def test_resident(
    benchmark: Any, case: Case, node: str, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """``flannel-dp sync --watch`` from nothing, with firewall rules, health and metrics: what
    is resident once all peers are programmed."""
    leases = cluster.write_file(tmp_path / "leases.json", case.leases)

    def run() -> dict[str, float]:
        with Service(case, leases, tmp_path) as service:
            return service.memory()

    memory = benchmark.pedantic(run)

    target = _RESIDENT_TARGET_MB if case.nodes == 10_000 else None
    detail = f"private {memory['private']:.1f}, peak {memory['peak']:.1f}"
    figure(f"memory of sync --watch, {case}", memory["resident"], "MB", target, detail)


@pytest.mark.benchmark(group="agent memory")
@pytest.mark.parametrize("case", _CASES)
def test_growth(
    benchmark: Any, case: Case, node: str, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """An agent's memory after hostile events, and how flat it stays: another program deletes
    hundreds of peers' entries and writes them again, as fast as the kernel takes it, with
    the agent repairing in between. Counted are the events that the agent has read; the
    kernel is right in the end."""
    leases = cluster.write_file(tmp_path / "leases.json", case.leases)
    with Remote(case, leases) as remote, planes.plane(case, node) as dp, Stranger() as stranger:
        first = remote.memory()
        assert dp.sync(case.leases).writes == 0
        churn = _churn(dp, case)
        enough = _EVENTS[case.nodes]

        def disturb(events: int) -> dict[str, Any]:
            while (status := remote.ask())["events"] < events:
                for _ in range(4):
                    stranger.send_all(churn)
            return status

        disturb(round(enough * _WARM))
        _calm(remote)
        warm = remote.memory()
        began = time.perf_counter()
        benchmark.pedantic(disturb, args=(enough,))
        seconds = time.perf_counter() - began
        last = _calm(remote)
        memory = remote.memory()
        assert dp.sync(case.leases).writes == 0

    detail = (
        f"{first['resident']:.1f} at first, {warm['resident']:.1f} to {memory['resident']:.1f}, "
        f"peak {memory['peak']:.1f}; {last['drift']:,} repairs, {last['overruns']} overruns, "
        f"{seconds:.0f} s"
    )
    target = _GROWTH_TARGET_MB if case.nodes == 10_000 else None
    growth = memory["resident"] - warm["resident"]
    figure(f"growth over {enough:,} events, {case}", growth, "MB", target, detail)


def _churn(dp: DataPlane, case: Case) -> list[bytes]:
    """Messages that delete all of some peers' entries and write them again."""
    tables = []
    for wanted in planes.state(dp, case).tables:
        part = Table(wanted.table.kind)
        for number in range(min(_PEERS, len(wanted.table))):
            part.add(wanted.table[number])
        tables.append(part)
    return [*floors.batches(reversed(tables), REMOVE), *floors.batches(tables)]


def _calm(remote: Remote) -> dict[str, Any]:
    """Wait until the agent has nothing left to repair."""
    deadline = time.monotonic() + 30
    before = remote.ask()
    while True:
        time.sleep(0.3)  # the pause between two repairs is 0.1
        status = remote.ask()
        if status == before:
            return status
        assert time.monotonic() < deadline, status
        before = status
