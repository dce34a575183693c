"""Fixtures of the adversity tests: processes beside the one that tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import Lease
from tests.lib.waiting import LIMIT

#: The command that runs worker.py, in the folder ROOT.
WORKER = (sys.executable, "-m", "tests.adversity.worker")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def lease_file(tmp_path: Path) -> Callable[[Iterable[Lease]], str]:
    """``lease_file(leases)`` writes them into a new file and returns its path."""
    made = 0

    def write(leases: Iterable[Lease]) -> str:
        nonlocal made
        made += 1
        path = tmp_path / f"leases{made}.json"
        body = ", ".join(lease.to_json() for lease in leases)
        path.write_text(f'{{"leases": [{body}]}}')
        return str(path)

    return write


@pytest.fixture
def worker() -> Callable[..., list[Any]]:
    """``worker(task, *arguments, prefix=())`` runs worker.py; the values it printed."""

    def start(task: str, *arguments: object, prefix: tuple[str, ...] = ()) -> list[Any]:
        command = [*prefix, *WORKER, task, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT, check=False
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return start
