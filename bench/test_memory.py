"""Bytes that a peer costs in the process, and whether syncing for ever needs more and more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cluster
from bench.cluster import Case

_TARGET_BYTES = 600.0
#: KiB; an allocator breathes by half of that.
_GROWTH_TARGET = 256.0
_ROOT = Path(__file__).parent.parent


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case(family, nodes),
            id=f"ipv{family}-{nodes}",
            marks=[pytest.mark.smoke] if nodes == 1_000 else [],
        )
        for nodes in (1_000, 10_000, 50_000)
        for family in (4, 6)
    ],
)
def test_bytes_per_peer(
    benchmark: Any, case: Case, node: str, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """A fresh process: after a few leases, and after syncs of a file of all of them."""
    path = cluster.write_file(tmp_path / "leases.json", case.leases)

    found = _probe(benchmark, "peers", case, node, str(path))

    # Below that size it is the allocator's granularity that is measured.
    target = _TARGET_BYTES if case.nodes >= 10_000 else None
    detail = f"after the first sync {found['first']:.0f}, at the peak {found['peak']:.0f}"
    figure(f"memory, {case}", found["retained"], "bytes/peer", target, detail)


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("case", [pytest.param(Case(4, 1_000), id="ipv4-1000")])
def test_growth_over_1000_syncs(
    benchmark: Any, case: Case, node: str, figure: Callable[..., None]
) -> None:
    """1,000 syncs, a hundredth of the nodes moving each time."""
    found = _probe(benchmark, "growth", case, node, "1000")

    detail = f"Python objects {found['objects']:+.0f}"
    figure(f"growth over 1,000 syncs, {case}", found["kib"], "KiB", _GROWTH_TARGET, detail)


def _probe(benchmark: Any, what: str, case: Case, node: str, last: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.memory_probe"]
    command += [what, str(case.family), str(case.nodes), node, last]
    done = benchmark.pedantic(
        subprocess.run,
        args=(command,),
        kwargs={"capture_output": True, "text": True, "check": False, "cwd": _ROOT},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found
