"""SIGINT at any moment of a command: exit code 130, one line, and the next sync is clean."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.lib.command import Cluster
from tests.lib.waiting import LIMIT

SCRIPT = Path(__file__).with_name("interrupted.py")
#: Moments of each run, spread evenly over it; those of IPv6 are between those of IPv4.
MOMENTS = 8


def interrupted(at: int, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(at), *arguments],
        cwd=SCRIPT.parents[2],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def is_as_it_should_be(done: subprocess.CompletedProcess[str]) -> bool:
    return (done.returncode, done.stderr) == (130, "flannel-dp: interrupted\n")


def has_ended_before(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether the moment never came: what other tests leave on the host makes some runs longer."""
    return done.returncode == 0 and done.stderr.endswith("ended before\n")


def calls_of(arguments: Sequence[str]) -> int:
    done = interrupted(0, arguments)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])


def moments(count: int, family: int = 4) -> list[int]:
    """Evenly spread, and the first ones. The first call is that of ``run``; one run has a few more
    or less than another."""
    step = max(2, count // MOMENTS)
    return [
        2 if family == 4 else 3,
        *range(step if family == 4 else step // 2, count * 9 // 10, step),
    ]


@pytest.mark.parametrize("changes", [False, True], ids=["in sync", "first sync"])
def test_an_interrupted_sync_ends_with_130_and_one_line(
    host: Any, family: int, tmp_path: Path, changes: bool
) -> None:
    cluster = Cluster(host, family, tmp_path)
    arguments = cluster.arguments("sync", "--subnet-file", str(tmp_path / "subnet.env"))
    calls = calls_of(arguments)
    if not changes:
        calls = calls_of(arguments)
    met, wrong = 0, []
    for at in moments(calls, family):
        if changes:
            assert cluster.run("clean") == 0
        done = interrupted(at, arguments)
        met += is_as_it_should_be(done)
        if not is_as_it_should_be(done) and not has_ended_before(done):
            wrong.append((at, done.returncode, done.stdout, done.stderr))

    assert wrong == []
    assert met >= MOMENTS // 2
    assert cluster.run("sync") == 0
    assert len(cluster.subnets()) == 3


def test_other_commands_are_interrupted_in_the_same_manner(host: Any, tmp_path: Path) -> None:
    cluster = Cluster(host, 4, tmp_path)
    assert cluster.run("sync") == 0

    def wrong_of(command: str) -> list[Any]:
        arguments = cluster.arguments(command)
        calls = calls_of(arguments)
        found = [(at, interrupted(at, arguments)) for at in moments(calls)[::2]]
        met = sum(is_as_it_should_be(done) for _, done in found)
        return [
            (command, at, done.returncode, done.stderr)
            for at, done in found
            if not is_as_it_should_be(done) and not has_ended_before(done)
        ] + [(command, met)] * (met < MOMENTS // 4)

    with ThreadPoolExecutor(2) as pool:
        assert [wrong for found in pool.map(wrong_of, ("plan", "show")) for wrong in found] == []
