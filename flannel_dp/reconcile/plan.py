"""A plan: what would be written, in which order, and how that looks to a person.

A plan holds differences (:class:`flannel_dp._core.Diff`), one for each table,
in the order of additions: what others depend on comes first. It decides nothing
any more: applying it sends exactly the operations it prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from flannel_dp._core import ADD, REMOVE, Diff
from flannel_dp.later import Later
from flannel_dp.tables.describe import conflict_json, counts_text, describe, device_of, was
from flannel_dp.tables.entries import Entry, Scope
from flannel_dp.tables.results import Outcome

if TYPE_CHECKING:
    from flannel_dp.cluster import rejections as rejecting
else:
    rejecting = Later("flannel_dp.cluster.rejections")

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
    """Everything one sync would do, and what it would fail at. Making it is cheap; its lines are
    made when it is printed.

    ``str(plan)`` is one line per operation, ``+`` added, ``~`` replaced, ``-``
    removed, ``!`` conflict, then the counts. Iterating it gives the differences, as
    ``Kernel.apply`` writes them.
    """

    tables: tuple[TablePlan, ...]
    devices: tuple[DeviceChange, ...] = ()
    rejected: Sequence[rejecting.Rejection] = ()
    warnings: tuple[str, ...] = ()
    rules: RulesChange | None = None
    forwarding: str = ""
    resources: dict[str, list[str]] = field(default_factory=dict)
    failures: Sequence[Outcome] = ()
    family_errors: Mapping[int, Exception] = field(default_factory=dict)
    problems: Mapping[str, Exception] = field(default_factory=dict)
    held: Mapping[int, Sequence[str]] = field(default_factory=dict)

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
    def ok(self) -> bool:
        """Whether the node would be in sync afterwards: nothing would fail, conflict, or be held
        back."""
        failing = self.failures or self.family_errors or self.problems
        return not (failing or self.held or self.conflicts())

    def failing(self) -> list[str]:
        """Return what a sync would fail at, a line for each entry, family and resource."""
        names = {index: name for table in self.tables for index, name in table.names.items()}
        return [
            *(f"IPv{number}: {error}" for number, error in self.family_errors.items()),
            *(f"{name}: {error}" for name, error in self.problems.items()),
            *(outcome.message(names) for outcome in self.failures),
        ]

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

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values: as ``to_json``."""
        return self.to_json()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values, with ``"schema": 1``; keys are only ever added."""
        return {
            "schema": 1,
            "ok": self.ok,
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
            "failures": failures_json(
                self.failures,
                {index: name for table in self.tables for index, name in table.names.items()},
                self.family_errors,
                self.problems,
            ),
            "held": {f"IPv{family}": [*names] for family, names in self.held.items() if names},
            "rules": self.rules.to_json() if self.rules else None,
            "forwarding": self.forwarding,
            **({"resources": self.resources} if self.resources else {}),
            "warnings": list(self.warnings),
        }


def failures_json(
    failures: Iterable[Outcome],
    names: dict[int, str],
    families: Mapping[int, Exception],
    problems: Mapping[str, Exception],
) -> list[dict[str, Any]]:
    """Return what failed, or would, as plain values: entries, families, and what a sync does
    beside the tables."""
    others = {f"IPv{family}": error for family, error in families.items()} | dict(problems)
    return [outcome.to_json(names) for outcome in failures] + [
        {"op": "sync", "table": what, "errno": "", "detail": str(error)}
        for what, error in others.items()
    ]
