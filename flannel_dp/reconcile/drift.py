"""Drift: what another program changed of ours, and what was done about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from msgspec import Struct, field

from flannel_dp._core import Diff
from flannel_dp.reconcile.report import Report
from flannel_dp.tables.describe import describe
from flannel_dp.tables.entries import Entry
from flannel_dp.tables.results import TableResult

#: For each thing that a resync does, the drift that it undoes.
UNDONE = (("added", "deleted"), ("replaced", "changed"), ("removed", "added"))

#: So many entries of one repair are named; the rest is counted.
_NAMED = 64


class Drift(NamedTuple):
    """One entry that another program had changed, and that was repaired.

    ``change`` is "deleted", "changed" or "added" (one of ours that is not desired);
    ``entry`` is the desired one, for "added" the removed one. Of drift that was found by
    reading a table again only the number is known: there ``entry`` is None and
    ``family`` 0.
    """

    family: int
    table: str
    change: str
    entry: Entry | None


class Repair(Struct):
    """What was done about drift: ``counts`` by (table, change), some of it by name.

    ``results`` are the operations on single entries, by family; ``report`` is that of a resync,
    where one was needed.
    """

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    named: list[Drift] = field(default_factory=list)
    results: list[tuple[int, TableResult]] = field(default_factory=list)
    report: Report | None = None
    seconds: float = 0.0

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


def count_result(repair: Repair, family: int, result: TableResult) -> None:
    """What one application of spot repairs did; only what took effect counts."""
    failed = result.counts()["failed"]
    repair.results.append((family, result))
    for outcome in islice(result, _NAMED):
        if outcome.ok:
            change = {"add": "deleted", "remove": "added"}.get(outcome.op, "changed")
            repair.named.append(Drift(family, outcome.table, change, outcome.entry))
    diff: Diff = result.diff
    rest = -failed
    for change, count in (
        ("deleted", diff.added),
        ("changed", diff.replaced),
        ("added", diff.removed),
    ):
        taken = min(count, -rest) if rest < 0 else 0
        rest += taken
        repair.add(result.kind, change, count - taken)
