"""How many instructions the core's hot loops take for an entry, counted by callgrind.

A count does not depend on how busy the machine is, so that two commits can be
compared by it. It does depend on the compiler; baselines are kept for each.

    python -m bench.instructions            # count, and compare with the baseline
    python -m bench.instructions --write    # make these counts the baseline
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BINARY = HERE.parent / "build" / "kernels"
BASELINE = HERE / "baseline.json"

#: The sources that are counted, and how they are compiled.
KINDS = ("neighbour", "fdb", "nexthop", "route", "peers")
SOURCES = (
    "table",
    "kinds",
    *KINDS,
    "fdb_any",
    "job",
    "bpfmap",
    "claim",
    "admit",
    "events",
    "socket",
    "heap",
)
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror")

PEERS = 10_000

#: More than this above the baseline is a regression.
TOLERANCE = 0.10


@dataclass(frozen=True, order=True)
class Kernel:
    """One loop over one table: ``count`` is in instructions per entry."""

    loop: str
    table: str
    family: int

    @property
    def name(self) -> str:
        return f"{self.loop} {self.table} ipv{self.family}"


def kernels() -> Iterator[Kernel]:
    """What is counted."""
    tables = {4: ("neighbour", "fdb", "nexthop", "route"), 6: ("neighbour", "fdb", "route")}
    for loop in ("diff", "shuffled", "encode", "decode", "events"):
        for family, names in tables.items():
            yield from (Kernel(loop, name, family) for name in names)
    yield Kernel("admit", "route", 4)


def compiler() -> str:
    """The major version of the compiler: what a baseline is for."""
    text = subprocess.run(
        ["gcc", "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=True
    ).stdout
    machine = subprocess.run(
        ["gcc", "-dumpmachine"], capture_output=True, text=True, check=True
    ).stdout
    return f"gcc-{text.partition('.')[0].strip()}-{machine.strip()}"


def build() -> Path:
    """Compile the loops. Raises CalledProcessError."""
    BINARY.parent.mkdir(exist_ok=True)
    sources = [str(ROOT / "csrc" / f"{name}.c") for name in SOURCES]
    command = ["gcc", *FLAGS, "-I", str(ROOT / "csrc"), "-o", str(BINARY)]
    subprocess.run([*command, str(HERE / "kernels.c"), *sources, "-lpthread"], check=True)
    return BINARY


def count(kernel: Kernel) -> float:
    """Instructions per entry. Raises RuntimeError with what callgrind said."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        inside = ["--collect-atstart=no", "--toggle-collect=measured"]
        done = subprocess.run(
            [*tool, *inside, str(BINARY), kernel.loop, kernel.table, str(kernel.family)],
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.search(r"^(?:totals|summary): (\d+)", _read(out), re.MULTILINE)
        if done.returncode != 0 or found is None:
            raise RuntimeError(f"{kernel.name}: {done.stderr}")
    return round(int(found[1]) / PEERS, 1)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def counts() -> dict[str, float]:
    """Every count, by name."""
    build()
    return {kernel.name: count(kernel) for kernel in kernels()}


def baseline() -> dict[str, float] | None:
    """The counts to compare with, None when there are none for this compiler."""
    known: dict[str, dict[str, float]] = json.loads(BASELINE.read_text())
    return known.get(compiler())


def write(found: dict[str, float]) -> None:
    """Make these the baseline of this compiler."""
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    known[compiler()] = found
    BASELINE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def grown(found: dict[str, float], before: dict[str, float]) -> list[str]:
    """What takes over a tenth more than before, or was never counted before."""
    return [
        f"{name}: {now:.1f} instructions an entry, {before.get(name, 0.0):.1f} before"
        for name, now in found.items()
        if now > before.get(name, 0.0) * (1 + TOLERANCE)
    ]
