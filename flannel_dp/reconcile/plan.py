"""A plan: what would be written, in which order, and how that looks to a person.

A plan holds differences (:class:`flannel_dp._core.Diff`), one for each table,
in the order of additions: what others depend on comes first. It decides nothing
any more: applying it sends exactly the operations it prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from msgspec import Struct, field

from flannel_dp._core import ADD, REMOVE, Diff
from flannel_dp.tables.describe import conflict_json, counts_text, describe, device_of, was
from flannel_dp.tables.entries import Entry, Scope

#: Tables in the order in which they are written; removals go the other way.
ORDER = ("peer", "fdb", "neighbour", "nexthop", "route")

_SIGNS = {ADD: "+", REMOVE: "-"}


class DeviceChange(Struct, frozen=True):
    """What happens to a device: ``action`` is none, create, adopt or replace."""

    name: str
    action: str
    changes: tuple[str, ...] = ()


class RulesChange(Struct, frozen=True):
    """What happens to the firewall: which engine, and a line per change (+ ~ -)."""

    engine: str
    changes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"engine": self.engine, "changes": list(self.changes)}


class TablePlan(Struct, frozen=True):
    """The difference of one table, the part of the kernel it was read from, and the
    names of devices for printing."""

    diff: Diff
    scopes: tuple[Scope, ...]
    names: dict[int, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.diff.kind)

    def operations(self) -> Iterator[tuple[str, Entry, Entry | None]]:
        """Yield ``(sign, entry, old entry)`` with sign ``+`` (add), ``~`` (replace), ``-``."""
        for number in range(len(self.diff)):
            op, new, old = self.diff.operation(number)
            sign = _SIGNS.get(op, "~")
            yield sign, (old if op == REMOVE else new), (old if sign == "~" else None)


class Plan(Struct, frozen=True):
    """Everything one sync would write. Making it is cheap; its lines are made when it is printed.

    ``str(plan)`` is one line per operation, ``+`` added, ``~`` replaced, ``-``
    removed, ``!`` conflict, then the counts. Iterating it gives the differences, as
    ``Kernel.apply`` writes them.
    """

    tables: tuple[TablePlan, ...]
    devices: tuple[DeviceChange, ...] = ()
    rejected: Sequence[Any] = ()
    warnings: tuple[str, ...] = ()
    rules: RulesChange | None = None
    forwarding: str = ""
    resources: dict[str, list[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Diff]:
        return (table.diff for table in self.tables)

    def counts(self) -> dict[str, dict[str, int]]:
        """Per table: how many entries are added, replaced, removed, unchanged."""
        total = {
            kind: dict.fromkeys(("added", "replaced", "removed", "unchanged"), 0) for kind in ORDER
        }
        for table in self.tables:
            for what, counted in total[table.kind].items():
                total[table.kind][what] = counted + getattr(table.diff, what)
        return total

    @property
    def is_empty(self) -> bool:
        """Nothing would be written."""
        return (
            not any(len(table.diff) for table in self.tables)
            and not any(device.action != "none" for device in self.devices)
            and not (self.rules and self.rules.changes)
            and not any(self.resources.values())
        )

    def conflicts(self) -> list[tuple[Entry, Entry]]:
        """Return ``(wanted, foreign)`` pairs: the foreign entry stays, the wanted one is left
        out."""
        return [pair for table in self.tables for pair in table.diff.conflicts()]

    def lines(self) -> Iterator[str]:
        """Yield the plan line by line, in the order in which it would be written."""
        for device in self.devices:
            sign = {"create": "+", "replace": "~", "adopt": "~"}.get(device.action)
            if sign:
                yield f"{sign} device {device.name}: {', '.join(device.changes) or device.action}"
        for table in self.tables:
            for sign, entry, old in islice(table.operations(), table.diff.writes):
                yield f"{sign} {describe(entry, table.names)}{was(old, entry, table.names)}"
        for table in reversed(self.tables):
            for sign, entry, _ in islice(table.operations(), table.diff.writes, None):
                yield f"{sign} {describe(entry, table.names)}"
        if self.rules:
            yield from self.rules.changes  # each names its program
        for lines in self.resources.values():
            yield from lines
        for table in self.tables:
            for wanted, foreign in table.diff.conflicts():
                yield (
                    f"! {describe(wanted, table.names)}: "
                    f"conflicts with an entry that is not ours: {describe(foreign, table.names)}"
                )

    def summary(self) -> str:
        """Return the counts as aligned lines of text."""
        return counts_text(self.counts())

    def __str__(self) -> str:
        first = [self.forwarding] if self.forwarding else []
        return "\n".join([*first, *self.lines(), self.summary()])

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values, with ``"schema": 1``; keys are only ever added."""
        return {
            "schema": 1,
            "empty": self.is_empty,
            "tables": self.counts(),
            "devices": [
                {"name": d.name, "action": d.action, "changes": list(d.changes)}
                for d in self.devices
            ],
            "operations": [
                {
                    "op": {"+": "add", "~": "replace", "-": "remove"}[sign],
                    "table": table.kind,
                    "entry": entry._asdict(),
                    "dev": device_of(entry, table.names),
                    **({"old": old._asdict()} if old else {}),
                }
                for table in self.tables
                for sign, entry, old in table.operations()
            ],
            "rejected": [rejection.to_json() for rejection in self.rejected],
            "conflicts": [
                conflict_json(*pair, table.names)
                for table in self.tables
                for pair in table.diff.conflicts()
            ],
            "rules": self.rules.to_json() if self.rules else None,
            "forwarding": self.forwarding,
            **({"resources": self.resources} if self.resources else {}),
            "warnings": list(self.warnings),
        }
