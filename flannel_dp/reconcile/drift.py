"""Drift: what another program changed of ours, and what was done about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from msgspec import Struct, field

from flannel_dp._core import ADD, REMOVE, Authors, Diff, Watched, is_benign
from flannel_dp.kernel.host import Host
from flannel_dp.reconcile.report import Report
from flannel_dp.tables.describe import describe
from flannel_dp.tables.entries import Entry
from flannel_dp.tables.results import TableResult

#: For each thing that a resync does, the drift that it undoes.
_UNDONE = (("added", "deleted"), ("replaced", "changed"), ("removed", "added"))

#: So many entries of one table are named in one repair; the rest is counted.
_NAMED = 256


class Drift(NamedTuple):
    """One entry that another program had changed, and that was repaired.

    ``change`` is "deleted", "changed" or "added" (one of ours that is not desired);
    ``entry`` is the desired one, for "added" the removed one. Of a device, and where so much has
    changed at once that only the number is known, ``entry`` is None and ``family`` 0.
    """

    family: int
    table: str
    change: str
    entry: Entry | None


class Repaired(NamedTuple):
    """One entry of ``family`` as another program had left it, and as it is now (None: there is
    none). ``peer`` is the number of the peer that it belongs to, -1 where it is no peer's;
    ``port`` the netlink port of the program (:mod:`flannel_dp.kernel.programs`), 0 where the
    kernel named none."""

    family: int
    table: str
    change: str
    before: Entry | None
    after: Entry | None
    peer: int
    port: int


class Repair(Struct):
    """What was done about drift: ``counts`` by (table, change), some of it by name.

    ``entries`` are the first entries of each table, before and after, and ``ports`` the netlink
    ports of the programs that changed a device, by its name. ``results`` are the operations on
    single entries, by family; ``report`` is that of a resync, where one was needed.
    """

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    named: list[Drift] = field(default_factory=list)
    results: list[tuple[int, TableResult]] = field(default_factory=list)
    report: Report | None = None
    seconds: float = 0.0
    entries: list[Repaired] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rest = Counter(self.counts)
        rest.subtract((one.table, one.change) for one in self.named)
        lines = [f"{d.change}, repaired: {describe(d.entry, {})}" for d in self.named if d.entry]
        lines += [
            f"{change}, repaired: {count} of the {table} table"
            for (table, change), count in rest.items()
            if count > 0
        ]
        return "\n".join(lines) or "nothing was to be repaired"

    def drifts(self) -> Iterator[Drift]:
        """Yield all drift: by name as far as it is known, else an entry None for each count."""
        yield from self.named
        named = Counter((one.table, one.change) for one in self.named)
        for (table, change), count in self.counts.items():
            for _ in range(count - named[table, change]):
                yield Drift(0, table, change, None)

    def add(self, table: str, change: str, count: int = 1) -> None:
        if count:
            self.counts[table, change] = self.counts.get((table, change), 0) + count


class Blame:
    """Which programs changed what a repair undoes, as far as the kernel's events named them.

    Made before the tables of ``views`` are taken or read again.
    """

    def __init__(self, views: Iterable[tuple[int, Watched]]) -> None:
        self._authors: list[tuple[int, str, Authors]] = []
        for number, view in views:
            authors = view.authors() if view.touched else None
            if authors is not None:
                self._authors.append((number, view.kind, authors))

    def port(self, family: int, table: str, entry: Entry) -> int:
        for number, kind, authors in self._authors:
            if (number, kind) == (family, table) and (port := authors.port(entry)):
                return port
        return 0


@contextmanager
def naming(repair: Repair, host: Host, views: Iterable[tuple[int, Watched]]) -> Iterator[None]:
    """Name in ``repair`` the entries that a pass on the host writes within the block."""
    blame = Blame(views)
    host.applied = partial(_name_result, repair, blame)
    try:
        yield
    finally:
        host.applied = None


def _name_result(repair: Repair, blame: Blame, family: int, result: TableResult) -> None:
    """Name the first entries of what was applied to one table; only what took effect counts."""
    diff = result.diff
    for number in range(min(len(diff), _NAMED)):
        op, after, before = diff.operation(number)
        error = result.results[number]
        if error and not (error > 0 and is_benign(op, error)):
            continue
        change = {ADD: "deleted", REMOVE: "added"}.get(op, "changed")
        peer = -1 if op == REMOVE else diff.tag(number)
        entry = before if op == REMOVE else after
        port = blame.port(family, result.kind, entry)
        repair.named.append(Drift(family, result.kind, change, entry))
        repair.entries.append(
            Repaired(family, result.kind, change, before, after, peer, port),
        )


def count_result(repair: Repair, blame: Blame, family: int, result: TableResult) -> None:
    """Count and name what one application of spot repairs did; only what took effect counts."""
    _name_result(repair, blame, family, result)
    repair.results.append((family, result))
    rest = -result.counts()["failed"]
    diff: Diff = result.diff
    for change, count in (
        ("deleted", diff.added),
        ("changed", diff.replaced),
        ("added", diff.removed),
    ):
        taken = min(count, -rest) if rest < 0 else 0
        rest += taken
        repair.add(result.kind, change, count - taken)


def count_report(repair: Repair, report: Report) -> None:
    """Count what a pass over whole families did that undoes drift."""
    repair.report = report
    for table, row in report.tables.items():
        for word, change in _UNDONE:
            repair.add(table, change, row[word])
    for device in report.devices:
        if device.action == "adopt":
            repair.add("device", "changed", len(device.changes))
        elif device.action != "none":
            repair.add("device", "deleted")
