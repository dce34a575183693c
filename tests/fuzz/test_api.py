"""The Python API of the compiled unit: no call of any of it makes the process crash.

``make fuzz`` runs it longer, on a build with AddressSanitizer and UBSan. To repeat a failure:
``unshare -n python tests/fuzz/api.py SEED RUNS [THREADS]``; then add the seed to corpus/api.txt.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flannel_dp import _core
from tests.fuzz import api

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNS, FUZZ_RUNS = 4000, int(os.environ.get("FLANNEL_DP_FUZZ_RUNS", "0"))


def seeds() -> list[tuple[str, ...]]:
    """Seed, runs and threads of runs that failed once, and of some that did not."""
    lines = (HERE / "corpus/api.txt").read_text().splitlines()
    return [tuple(line.split()) for line in lines if line and not line.startswith("#")]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a network namespace of its own."""
    return subprocess.run(
        ["unshare", "-n", sys.executable, str(HERE / "api.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize("arguments", seeds(), ids="-".join)
def test_a_seed_of_the_corpus(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{arguments[1]} runs")


def test_a_crash_is_one(tmp_path: Path) -> None:
    """The check can fail: a process that a signal ended is no success."""
    script = tmp_path / "crash.py"
    script.write_text("import os; os.abort()\n")
    assert subprocess.run([sys.executable, script], check=False).returncode < 0


def test_every_name_of_the_unit_is_called_or_spared() -> None:
    fuzz = api.Fuzz(1, [])
    called = {function.__name__ for function in fuzz._functions}
    assert {"Table", "Diff", "Claims", "Channel", "Events", "Watched", "diff_tables"} <= called
    assert "ProbeSocket" in called


def test_events_are_compared_with_watched_tables_only() -> None:
    """Any other object was taken for one, and read beyond its end (seed 1, 20000 runs)."""
    with contextlib.closing(_core.Events()) as events, pytest.raises(TypeError):
        events.read([object(), "text"])


def test_objects_that_were_not_filled_are_errors() -> None:
    """Their fields are None, and C would follow it."""
    claims, roster = _core.Claims(4), _core.Roster.__new__(_core.Roster)
    change = _core.PeerChange()
    with _core.Channel() as channel, pytest.raises(TypeError, match="table 0 is None"):
        _core.write_change(channel, [None], [None], 1)
    for call in (
        lambda: change.renews,
        lambda: roster.follow(claims, [], []),
        lambda: roster.concerns_own(claims, []),
        lambda: roster.store(change, None, None),
    ):
        with pytest.raises(AttributeError):
            call()


@pytest.mark.timeout(0)
def test_under_sanitizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With a budget only: the build takes minutes."""
    if not FUZZ_RUNS:
        assert run("1", str(RUNS)).returncode == 0
        return
    place = tmp_path_factory.mktemp("sanitized")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
    build = [sys.executable, "setup.py", "-q", "build_ext"]
    build += ["--build-lib", str(place), "--build-temp", str(place / "objects")]
    subprocess.run(
        build,
        check=True,
        cwd=ROOT,
        env={**os.environ, "CFLAGS": flags, "LDFLAGS": "-fsanitize=address,undefined"},
    )
    (made,) = (place / "flannel_dp").glob("_core*.so")
    for path in (ROOT / "flannel_dp").iterdir():
        if not path.name.startswith("_core."):
            (place / "flannel_dp" / path.name).symlink_to(path)
    libraries = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(place),
    }
    assert made.exists()
    for seed, threads in ((1, 1), (2, 3)):
        done = run(str(seed), str(FUZZ_RUNS // 100), str(threads), **environment)
        assert done.returncode == 0, done.stderr[-8000:]
