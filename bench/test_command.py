"""Whole processes of ``flannel-dp``, from start to end."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cluster, planes
from bench.cluster import Case
from bench.figures import times
from bench.lab import Quiet

_HELP_TARGET = 0.1
_SYNC_TARGET = 0.25
#: A process takes as long as two syncs in memory, and this many seconds.
_BESIDE_SYNC = 0.15
_ROUNDS = 9
_PAIRS = 7
_ROOT = Path(__file__).parent.parent

# What the installed script does.
_COMMAND = [sys.executable, "-c", "from flannel_dp.__main__ import run; run()"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Compiled modules are kept, as they are after an installation, but not in the tree."""
    wanted = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**wanted, "PYTHONPYCACHEPREFIX": str(tmp_path / "pycache")}


def _run(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [*_COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=_ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.benchmark(group="command")
@pytest.mark.smoke
def test_help(benchmark: Any, environment: dict[str, str], figure: Callable[..., None]) -> None:
    """``flannel-dp --help``."""
    text = benchmark.pedantic(_run, args=(["--help"], environment), rounds=_ROUNDS, warmup_rounds=2)

    assert "sync" in text
    figure("flannel-dp --help", statistics.median(times(benchmark)), "s", _HELP_TARGET)


@pytest.mark.benchmark(group="command")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(4, 1_000), id="ipv4-1000", marks=pytest.mark.smoke),
        pytest.param(Case(6, 1_000), id="ipv6-1000", marks=pytest.mark.smoke),
        pytest.param(Case(4, 10_000), id="ipv4-10000"),
    ],
)
def test_sync_unchanged(
    benchmark: Any,
    case: Case,
    node: str,
    tmp_path: Path,
    environment: dict[str, str],
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """``flannel-dp sync`` of leases that the kernel has already."""
    with planes.plane(case, node) as dp:
        assert dp.sync(case.leases).ok
    quiet()
    arguments = _sync_arguments(case, node, tmp_path)

    text = benchmark.pedantic(_run, args=(arguments, environment), rounds=_ROUNDS, warmup_rounds=2)

    report = json.loads(text)
    assert report["ok"]
    assert report["tables"]["route"]["unchanged"] == case.nodes
    assert not any(
        row[word] for row in report["tables"].values() for word in ("added", "replaced", "removed")
    )
    target = _SYNC_TARGET if case.nodes == 1_000 else None
    median = statistics.median(times(benchmark))
    figure(f"flannel-dp sync, unchanged, {case}", median, "s", target)


@pytest.mark.benchmark(group="command")
@pytest.mark.parametrize("start", ["empty", "unchanged"])
@pytest.mark.parametrize(
    "case", [pytest.param(Case(family, 10_000), id=f"ipv{family}-10000") for family in (4, 6)]
)
def test_sync_beside_memory(
    benchmark: Any,
    case: Case,
    start: str,
    node: str,
    tmp_path: Path,
    environment: dict[str, str],
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """``flannel-dp sync`` of a file, start to exit, and ``DataPlane.sync`` of the same leases
    in memory, in turns."""
    leases = case.leases
    arguments = _sync_arguments(case, node, tmp_path)
    in_memory: list[float] = []
    with planes.plane(case, node) as dp:
        assert dp.sync(leases).ok

    def begin() -> None:
        if start == "empty":
            planes.empty(case, node)
        quiet()

    def setup() -> None:
        begin()
        with planes.plane(case, node) as fresh:
            started = time.perf_counter()
            assert fresh.sync(leases).ok
            in_memory.append(time.perf_counter() - started)
        begin()

    text = benchmark.pedantic(
        _run, args=(arguments, environment), setup=setup, rounds=_PAIRS, warmup_rounds=1
    )

    counts = json.loads(text)["tables"]["route"]
    assert counts["added" if start == "empty" else "unchanged"] == case.nodes
    whole, memory = times(benchmark), in_memory[1:]
    beside = statistics.median(one - 2 * two for one, two in zip(whole, memory, strict=True))
    figure(
        f"flannel-dp sync, {start}, less two syncs in memory, {case}",
        beside,
        "s",
        _BESIDE_SYNC,
        f"medians {statistics.median(whole) * 1e3:.0f} ms, in memory "
        f"{statistics.median(memory) * 1e3:.0f} ms",
    )


def _sync_arguments(case: Case, node: str, tmp_path: Path) -> list[str]:
    leases = cluster.write_file(tmp_path / "leases.json", case.leases)
    network = tmp_path / "net-conf.json"
    network.write_text(cluster.config(case.family).to_json(), encoding="utf-8")
    arguments = ["sync", "--leases", str(leases), "--net-conf", str(network)]
    return [*arguments, "--iface", "eth0", "--netns", node, "--output", "json"]
