"""What became of each operation of a difference, and of each table in counts."""

from __future__ import annotations

import errno as _errno
import os
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from flannel_dp._core import ADD, REMOVE, SKIPPED, UNKNOWN, UNSENT, Diff, is_benign, summarise
from flannel_dp.tables.describe import conflict_json, counts_text, describe, device_of
from flannel_dp.tables.entries import Entry

if TYPE_CHECKING:
    Numbers = array[int]
else:
    Numbers = array  # not to be subscripted before Python 3.12

_VERBS = {ADD: "add", REMOVE: "remove"}
_STATES = {
    UNKNOWN: "the kernel's answer was lost",
    SKIPPED: "left out: an entry it depends on failed",
    UNSENT: "not tried",
}


class Outcome(Struct, frozen=True):
    """One entry's fate: ``error`` is 0 or an errno, negative when nothing is known."""

    op: str
    table: str
    entry: Entry
    error: int
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.error == 0

    def message(self, names: dict[int, str] | None = None) -> str:
        """Return ``add route 10.244.7.0/24 nhid 7: Invalid argument (EINVAL): ...``."""
        what = f"{self.op} {describe(self.entry, names or {})}"
        if self.error < 0:
            return f"{what}: {_STATES[self.error]}"
        code = _errno.errorcode.get(self.error, str(self.error))
        detail = f": {self.detail}" if self.detail else ""
        return f"{what}: {os.strerror(self.error)} ({code}){detail}"

    def to_dict(self, names: dict[int, str] | None = None) -> dict[str, Any]:
        """Return the outcome as plain values: as ``to_json``."""
        return self.to_json(names)

    def to_json(self, names: dict[int, str] | None = None) -> dict[str, Any]:
        """Return the outcome as plain values; ``names`` are devices by ifindex."""
        return {
            "op": self.op,
            "table": self.table,
            "entry": self.entry._asdict(),
            "dev": device_of(self.entry, names or {}),
            "errno": _errno.errorcode.get(self.error, "") if self.error > 0 else "",
            "detail": self.message(names),
        }


class TableResult(Struct, frozen=True):
    """A diff after it was applied. ``results`` has one number per operation: 0 done,
    a positive errno, or UNKNOWN, SKIPPED, UNSENT. ``earlier`` are the passes before this one,
    which ``counts`` adds up, ``foreign`` are conflicts that were left out beforehand."""

    diff: Diff
    results: Numbers
    complaints: tuple[tuple[int, int, str], ...] = ()
    earlier: tuple[TableResult, ...] = ()
    foreign: tuple[tuple[Entry, Entry], ...] = ()

    @property
    def kind(self) -> str:
        return str(self.diff.kind)

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Outcome]:
        """Yield every operation with its outcome."""
        words = {number: text for number, _, text in self.complaints}
        for number in range(len(self.results)):
            yield self._outcome(number, words)

    def _outcome(self, number: int, words: dict[int, str]) -> Outcome:
        op, new, old = self.diff.operation(number)
        error = self.results[number]
        if error > 0 and is_benign(op, error):
            error = 0
        verb = _VERBS.get(op, "replace")
        entry = old if op == REMOVE else new
        return Outcome(verb, self.kind, entry, error, words.get(number, ""))

    def failures(self) -> Iterator[Outcome]:
        """Yield the operations that did not take effect."""
        if not any(summarise(self.diff, self.results)[3:]):
            return  # the usual case, known without reading each
        words = {number: text for number, _, text in self.complaints}
        for number, error in enumerate(self.results):
            if error:
                outcome = self._outcome(number, words)
                if not outcome.ok:
                    yield outcome

    def errors(self) -> set[int]:
        """Return the distinct error numbers among the results, benign ones left out."""
        return {outcome.error for outcome in self.failures()}

    def counts(self) -> dict[str, int]:
        """Return added, replaced, removed, unchanged, failed, as the JSON report has them."""
        added, replaced, removed, failed, unknown, skipped = summarise(self.diff, self.results)
        found = {
            "added": added,
            "replaced": replaced,
            "removed": removed,
            "unchanged": self.diff.unchanged,
            "failed": failed + unknown + skipped,
        }
        if not self.earlier:
            return found
        total: dict[str, int] = {}
        for one in self.earlier:
            add_counts(total, one.counts())
        add_counts(total, found)
        return total

    @property
    def conflicts(self) -> list[tuple[Entry, Entry]]:
        """``(wanted, foreign)`` pairs: the foreign entry stays, the wanted one is left out."""
        return [*self.foreign, *self.diff.conflicts()]

    @property
    def ok(self) -> bool:
        """Whether the kernel now holds the table: nothing failed, and nothing conflicted."""
        return not self.conflicts and next(self.failures(), None) is None

    def __str__(self) -> str:
        lines = [counts_text({self.kind: self.counts()})]
        lines += [f"failed: {outcome.message()}" for outcome in self.failures()]
        lines += [
            f"conflict: {describe(wanted, {})} conflicts with an existing entry (not ours): "
            f"{describe(foreign, {})}"
            for wanted, foreign in self.conflicts
        ]
        return "\n".join(lines)

    def to_dict(self, names: dict[int, str] | None = None) -> dict[str, Any]:
        """Return the result as plain values; ``names`` are devices by ifindex."""
        return {
            "table": self.kind,
            "ok": self.ok,
            **self.counts(),
            "failures": [outcome.to_json(names) for outcome in self.failures()],
            "conflicts": [conflict_json(*pair, names or {}) for pair in self.conflicts],
        }


def add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    """Sum what was written over passes. What is unchanged is the first's, as later passes
    find the entries of the first unchanged, too; what failed is the last pass's."""
    for word, count in counts.items():
        if word == "failed":
            total[word] = count
        elif word == "unchanged":
            total.setdefault(word, count)
        else:
            total[word] = total.get(word, 0) + count
