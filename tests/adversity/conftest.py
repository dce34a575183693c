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

WORKER = Path(__file__).with_name("worker.py")


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
        command = [*prefix, sys.executable, str(WORKER), task, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=2 * LIMIT, check=False
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return start
