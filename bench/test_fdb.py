"""An FDB in all forms that the kernel has: up to 100,000 entries, which are 10,000 MACs of groups
with 10 destinations each in 1,000 VNIs, against a C program that sends and receives the same
messages, `bridge` and pyroute2.

The kernel walks the FDB from its start for every page of a dump, so that a dump costs the square
of its size, whoever asks for it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench import cluster, floors, lab
from bench.figures import median_ratio
from bench.floors import Taken
from bench.lab import Quiet
from flannel_dp import Fdb, Kernel, Table, fdb_columns, fdb_scope
from flannel_dp.tables.entries import Scope

VNIS, EACH = 1_000, 10
_ROUNDS, _CHANGES = 3, 200
_INSTALL, _UNCHANGED, _ONE_US, _BYTES = 1.2, 1.3, 60.0, 300.0
#: Of so many entries the slow ones are timed, as the whole would take minutes.
_SAMPLE = 10_000
_DEVICE = "many0"


class Many:
    """A device of 1,000 VNIs, and what is wanted on it."""

    def __init__(self, name: str, family: int) -> None:
        self.name, self.family = name, family
        local = cluster.public_address(family).partition("/")[0]
        lab.ip("-n", name, "link", "add", _DEVICE, "type", "vxlan", "external", "vnifilter",
               "local", local, "dstport", "9999", "nolearning")  # fmt: skip
        lab.ip("-n", name, "link", "set", _DEVICE, "up")
        self.kernel = Kernel(name)
        self.index = self.kernel.ifindex(_DEVICE)
        self.scope: Scope = fdb_scope(self.index, owner="all")
        self.read = self.scope._replace(kind="fdb_any")

    def wanted(self, entries: int) -> Table:
        macs, there, vnis = bytearray(), bytearray(), array("I")
        for number in range(entries):
            group, one = divmod(number, EACH)
            macs += b"\x03\0" + group.to_bytes(4, "big")
            there += self._destination(one)
            vnis.append(1 + group % VNIS)
        return fdb_columns(
            self.index, self.family, bytes(macs), bytes(there), vnis=vnis, src_vnis=vnis
        )

    def _destination(self, number: int) -> bytes:
        start = b"\xc6\x12\0" if self.family == 4 else b"\x20\x01\x0d\xb8" + bytes(11)
        return start + bytes([number + 1])

    def empty(self) -> None:
        """Remove all entries."""
        self.kernel.apply(self.kernel.diff(Table("fdb_any"), self.scope))


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def many(request: pytest.FixtureRequest) -> Iterator[Many]:
    family = int(request.param)
    with lab.namespace(family) as name, lab.inside(name):
        made = Many(name, family)
        yield made
        made.kernel.close()


def _ratio(ours: list[Taken], floor: list[Taken]) -> float:
    return median_ratio(*([one.wall for one in taken[-_ROUNDS:]] for taken in (ours, floor)))


_SIZES = pytest.mark.parametrize(
    "entries", [pytest.param(10_000, marks=pytest.mark.smoke), 100_000]
)


@pytest.mark.benchmark(group="fdb of all forms")
@_SIZES
def test_install(
    benchmark: Any,
    many: Many,
    entries: int,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """From empty, beside the same messages sent by C; bytes in memory for an entry."""
    table = many.wanted(entries)
    messages = floors.write(tmp_path / "messages", floors.batches([table]))
    floor: list[Taken] = []
    ours: list[Taken] = []

    def setup() -> None:
        many.empty()
        quiet()
        floor.append(floors.run("send", messages, many.name))
        assert many.kernel.diff(table, many.scope).unchanged == entries
        many.empty()
        quiet()

    def install() -> Any:
        return floors.timed(ours, lambda: many.kernel.sync(table, many.scope))

    result = benchmark.pedantic(install, setup=setup, rounds=_ROUNDS, warmup_rounds=1)

    assert result.counts()["added"] == entries
    what = f"fdb of all forms, IPv{many.family}, {entries:,}"
    figure(f"install {what}", _ratio(ours, floor), "x floor", _INSTALL)
    figure(f"memory of {what}", table.nbytes / entries, "bytes an entry", _BYTES)


@pytest.mark.benchmark(group="fdb of all forms")
@_SIZES
def test_unchanged(
    benchmark: Any,
    many: Many,
    entries: int,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """With nothing to change, beside the same dump received by C; then one entry at a time."""
    table = many.wanted(entries)
    many.kernel.sync(table, many.scope)
    request = floors.write(tmp_path / "dump", floors.dumps([many.read]))
    floor: list[Taken] = []
    ours: list[Taken] = []

    def setup() -> None:
        quiet()
        floor.append(floors.run("dump", request, many.name))

    def compare() -> Any:
        return floors.timed(ours, lambda: many.kernel.diff(table, many.scope))

    diff = benchmark.pedantic(compare, setup=setup, rounds=_ROUNDS, warmup_rounds=1)

    assert (len(diff), diff.unchanged) == (0, entries)
    what = f"fdb of all forms, IPv{many.family}, {entries:,}"
    figure(f"unchanged {what}", _ratio(ours, floor), "x dump floor", _UNCHANGED)
    figure(f"one entry changed, {what}", _one_entry(many, table), "us", _ONE_US)


def _one_entry(many: Many, table: Table) -> float:
    """Microseconds to remove one destination of a list and to add it again, each."""
    alone, nothing = Table("fdb_any"), Table("fdb_any")
    alone.add(table[len(table) // 2])
    taken = []
    for before, after in [(alone, nothing), (nothing, alone)] * _CHANGES:
        started = time.perf_counter()
        counts, failed = many.kernel.change([before], [after], tags=1)
        taken.append(time.perf_counter() - started)
        assert not failed
        assert sum(counts["fdb"][one] for one in ("added", "removed")) == 1
    return median(taken) * 1e6


@pytest.mark.benchmark(group="fdb of all forms")
def test_beside_others(
    benchmark: Any, many: Many, tmp_path: Path, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """`bridge -batch` and pyroute2 append the same entries, fewer of them."""
    table = many.wanted(_SAMPLE)
    entries: list[Fdb] = [*table]
    lines = tmp_path / "lines"
    lines.write_text("".join(
        f"fdb append {e.mac} dev {_DEVICE} self permanent dst {e.endpoint} vni {e.vni} "
        f"src_vni {e.src_vni}\n" for e in entries
    ))  # fmt: skip
    others = {
        "bridge -batch": ["bridge", "-batch", str(lines)],
        "pyroute2": [sys.executable, "-m", "bench.pyroute2_fdb", str(many.index), str(lines)],
    }
    seconds: dict[str, float] = {}
    for name, command in others.items():
        many.empty()
        quiet()
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds[name] = float(done.stdout or time.perf_counter() - started)
        assert many.kernel.diff(table, many.scope).unchanged == _SAMPLE, name
    ours: list[Taken] = []

    def setup() -> None:
        many.empty()
        quiet()

    benchmark.pedantic(
        lambda: floors.timed(ours, lambda: many.kernel.sync(table, many.scope)),
        setup=setup,
        rounds=_ROUNDS,
        warmup_rounds=1,
    )
    mine = median(taken.wall for taken in ours[-_ROUNDS:])
    for name, taken in seconds.items():
        figure(f"{name} append {_SAMPLE:,} fdb entries, IPv{many.family}", taken / mine, "x ours")
