"""Build a source archive, and from its content, in a place of its own, a wheel.

Usage: ``python scripts/dist.py DIRECTORY``. Uses the build requirements that are installed
(setuptools, Cython) and no network; prints the two files.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]), file=sys.stderr)
"""


def build(hook: str, source: Path, target: Path) -> Path:
    """Call a PEP 517 hook of setuptools in ``source``; return the file it made in ``target``.

    Raises SystemExit with all the build printed when it fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, hook, str(target)],
        cwd=source,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{hook}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return target / done.stderr.strip().splitlines()[-1]


def main(target: Path) -> None:
    """Make both files in ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    sdist = build("build_sdist", Path(__file__).resolve().parents[1], target.resolve())
    print(sdist)
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(sdist) as archive:
            if hasattr(tarfile, "data_filter"):  # not in Python 3.11.2, which is Debian 12's
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(directory)
        (root,) = Path(directory).iterdir()
        print(build("build_wheel", root, target.resolve()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
