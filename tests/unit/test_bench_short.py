"""What ``make bench`` leaves out is there, and what it is about is not left out."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from bench import short

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="tests", scope="module")
def tests_fixture() -> list[str]:
    """All benchmarks, as ``file::test[case]``."""
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--collect-only", "-q"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in listed.splitlines() if line.startswith("bench/") and "::" in line]
    return [line.removeprefix("bench/") for line in lines]


def test_every_pattern_leaves_something_out(tests: list[str]) -> None:
    idle = [one for one in short.PATTERNS if not any(fnmatchcase(test, one) for test in tests)]

    assert idle == []


def test_the_main_figures_are_measured(tests: list[str]) -> None:
    for name in (
        *(
            f"test_sync.py::test_sync_{what}[ipv{n}-10000]"
            for what in ("from_empty", "unchanged")
            for n in (4, 6)
        ),
        "test_command.py::test_sync_beside_memory[ipv4-10000-unchanged]",
        "test_peers.py::test_installing[vxlan-ipv4-10000]",
        "test_peers.py::test_reading[vxlan-ipv4-10000]",
        "test_traffic.py::test_pings_during_work[ipv4-10000]",
        "test_linearity.py::test_installing[ipv4-30000]",
    ):
        assert name in tests
        assert not short.is_long(name), name
