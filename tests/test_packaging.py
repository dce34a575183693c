"""What is shipped: a source archive that is complete, and one wheel for 3.11 and later."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Built:
    """The two files of a release."""

    sdist: Path
    wheel: Path

    def source_files(self) -> set[str]:
        """What is in the source archive, less the directory that all of it is in."""
        with tarfile.open(self.sdist) as archive:
            names = archive.getnames()
        return {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in names}

    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@pytest.fixture(scope="module")
def built(run_folder: Path) -> Built:
    """Made as ``make dist`` makes them: the wheel from the archive, not from the checkout."""
    directory = run_folder / "dist"
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(directory)


def _build(directory: Path) -> Built:
    if made := [*directory.glob("*.whl")]:
        return Built(*directory.glob("*.tar.gz"), made[0])
    done = subprocess.run(
        [sys.executable, "scripts/dist.py", str(directory)],
        cwd=ROOT,
        env=os.environ | {"FLANNEL_DP_DEBUG": "1"},  # compiles in a quarter of the time
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sdist, wheel = done.stdout.split()
    return Built(Path(sdist), Path(wheel))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a fresh environment that has the wheel.

    Dependencies are lent from this environment, because a test has no network; the package
    is not, because the new environment's own directory comes first.
    """
    directory = tmp_path_factory.mktemp("elsewhere")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index",
        "--no-deps", "--disable-pip-version-check", str(built.wheel))  # fmt: skip
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(*command: str, cwd: Path | None = None) -> str:
    """Standard output of a command that knows nothing of this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_is_for_the_stable_abi(built: Built) -> None:
    """One wheel for CPython 3.11 and later, tied to the platform only."""
    _, _, python, abi, platform = built.wheel.stem.split("-")

    assert (python, abi) == ("cp311", "abi3")
    assert platform.startswith("linux_")
    assert "flannel_dp/_core.abi3.so" in built.wheel_files()


def test_wheel_has_what_users_need_and_no_sources(built: Built) -> None:
    files = built.wheel_files()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "flannel_dp").rglob("*.py")}

    assert {"flannel_dp/py.typed", "flannel_dp/_core.pyi"} <= files
    assert modules <= files
    # bcc compiles these where they are used.
    programs = {f"flannel_dp/bpf/programs/{p.name}" for p in (ROOT / "csrc/bpf").glob("*.c")}
    assert programs <= files
    assert {PurePosixPath(name).suffix for name in files - programs} & {
        ".pyx",
        ".pxd",
        ".pxi",
        ".c",
        ".h",
    } == set()
    assert {name.split("/")[0].partition("-")[0] for name in files} == {"flannel_dp"}


def test_wheel_has_manual_pages_and_completion(built: Built) -> None:
    shared = {name.partition(".data/data/share/")[2] for name in built.wheel_files()}
    pages = {f"man/man1/{path.name}" for path in (ROOT / "packaging/man").glob("*.1")}
    shells = {"bash-completion/completions/flannel-dp", "zsh/site-functions/_flannel-dp"}
    shells.add("fish/vendor_completions.d/flannel-dp.fish")

    assert len(pages) > 9
    assert shared - {""} == pages | shells


def test_wheel_carries_the_licence(built: Built) -> None:
    assert [name for name in built.wheel_files() if name.endswith("licenses/LICENSE")]


def test_source_archive_is_complete(built: Built) -> None:
    """Everything that a build or a test run reads; nothing that a build makes."""
    files = built.source_files()
    wanted = {
        str(path.relative_to(ROOT))
        for pattern in (
            *("csrc/*.[ch]", "csrc/cython/*.pxi", "flannel_dp/**/*.py", "flannel_dp/*.p[xy][dxi]"),
            *("tests/**/*.py", "tests/**/*.txt", "tests/**/*.json"),
            *(
                "examples/*",
                "docs/*.md",
                "docs/screens/*",
                "scripts/*",
                "*.md",
                "LICENSE",
                "Makefile",
                ".ci/run",
            ),
        )
        for path in ROOT.glob(pattern)
        if path.is_file()
    }

    assert wanted - files == set()
    assert "csrc/rtnl.h" in files
    assert {name for name in files if name.endswith((".so", ".o", ".pyc"))} == set()
    assert "flannel_dp/_core.c" not in files


def test_command_of_the_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    version = run(str(installed / "flannel-dp"), "--version", cwd=tmp_path)

    assert "0.1.0" in version


def test_package_of_the_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    """The compiled unit loads and answers, from the wheel and not from this checkout."""
    script = (
        "import flannel_dp; from flannel_dp import Fdb, Kernel, fdb_table;"
        "print(flannel_dp.__file__);"
        "print(fdb_table(1, {'02:00:00:00:00:07': '192.0.2.7'})[0] =="
        " Fdb(1, '02:00:00:00:00:07', '192.0.2.7'))"
    )

    origin, same = run(str(installed / "python"), "-c", script, cwd=tmp_path).split()

    assert Path(origin).is_relative_to(installed.parent)
    assert same == "True"
