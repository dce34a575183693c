"""Tests that are shared between processes: each runs once, also when one of them ends a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TESTS = """
import os, signal
import pytest

def note(text):
    with open("notes", "a") as notes:
        notes.write(f"{text}\\n")

@pytest.fixture(scope="module", params=[1, 2])
def shared(request):
    note("made")
    yield request.param
    note("given back")

@pytest.mark.alone
def test_alone():
    note("alone")

@pytest.mark.parametrize("n", range(40))
def test_one(n, shared):
    note(f"one {shared} {n}")

def test_it_fails():
    print("said by it")
    raise ValueError("told by it")

def test_it_is_killed():
    os.kill(os.getpid(), signal.SIGKILL)
"""


ENDING = """
import os

def pytest_runtest_logfinish():
    os._exit(7)
"""


def test_a_worker_that_ends_outside_of_a_test_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(ENDING)

    done = run_of(tmp_path, "def test_it(): pass")

    assert done.returncode != 0
    assert "a worker ended with 7 outside of a test" in done.stdout + done.stderr


def run_of(tmp_path: Path, tests: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_some.py").write_text(tests)
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "--workers=3"),
            *("-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path),
            "test_some.py",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_is_run_once_and_its_end_is_told(tmp_path: Path) -> None:
    done = run_of(tmp_path, TESTS)

    assert done.returncode == 1
    assert "2 failed, 81 passed" in done.stdout
    for text in ("told by it", "said by it", "the worker that ran it ended with -9"):
        assert text in done.stdout
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes[-1] == "alone"
    assert sorted(line for line in notes if line.startswith("one")) == sorted(
        f"one {shared} {n}" for shared in (1, 2) for n in range(40)
    )
    killed_with_one = notes.count("made") - notes.count("given back")
    assert killed_with_one in (0, 1)
