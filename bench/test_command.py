"""Whole processes of ``flannel-dp``, from start to end."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
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
_ROUNDS = 15
_ROOT = Path(__file__).parent.parent

# What the installed script does.
_COMMAND = [sys.executable, "-c", "import sys; from flannel_dp.cli import main; sys.exit(main())"]


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
    leases = cluster.write_file(tmp_path / "leases.json", case.leases)
    network = tmp_path / "net-conf.json"
    network.write_text(cluster.config(case.family).to_json(), encoding="utf-8")
    arguments = ["sync", "--leases", str(leases), "--net-conf", str(network)]
    arguments += ["--iface", "eth0", "--netns", node, "--output", "json"]

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
