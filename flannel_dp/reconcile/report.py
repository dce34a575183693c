"""What became of a plan: per table, per entry, and as the JSON report of ``sync``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from flannel_dp._core import Claims
from flannel_dp.later import Later
from flannel_dp.reconcile.plan import ORDER, DeviceChange, RulesChange, failures_json
from flannel_dp.tables.describe import conflict_json, counts_text, describe
from flannel_dp.tables.entries import Entry
from flannel_dp.tables.results import Outcome

if TYPE_CHECKING:
    from flannel_dp.cluster import rejections as rejecting
else:
    rejecting = Later("flannel_dp.cluster.rejections")

_NOTHING = dict.fromkeys(("added", "replaced", "removed", "unchanged", "failed"), 0)
_KINDS = tuple(reversed(ORDER))


def no_counts() -> dict[str, dict[str, int]]:
    """Return the counts of a sync that did nothing."""
    return {kind: _NOTHING.copy() for kind in _KINDS}


class Report(Struct):
    """What a sync did. ``ok`` is True when the kernel now agrees with the leases and
    nothing failed or conflicted (rejected leases do not count). ``problems`` are
    what went wrong beside the tables ("firewall", "subnet file"), ``rules`` what
    was written to the firewall, ``counters`` what became of the devices' traffic counters
    ("loaded", "attached", "removed"), ``subnet_file`` the file that was brought up to date,
    ``names`` the devices that entries are on, by ifindex, ``held`` the names of peers by
    family that are kept although the leases lack them (ShrinkRefused tells why).
    ``blockers`` are rules of other programs that stop packets although ours are in place; they are
    among the ``warnings``, and so are the errors in ``tolerated``: what failed and leaves the
    report ``ok``, because it was not required. An agent tries it again. ``diversions``, too, are
    among the warnings: by family, what of other programs diverts packets of pods
    (:class:`flannel_dp.node.path.Diversion`); and so are ``moves``, which tell of a tunnel that is
    on another interface or sends from another address now.

    ``unknown`` are names in ``removed`` of an update that no lease had: nothing was removed for
    them. ``changed`` are the accepted leases that an update was about, before and after, by family.
    ``looked`` are the kinds of problems that this pass checked, whether it found any or
    not: "kernel" and "entries" (of all families), "firewall", "subnet file", "forwarding"
    (``blockers``), "path4" and "path6" (``diversions``), "program", "counters". Of other
    kinds the report says nothing.
    """

    tables: dict[str, dict[str, int]] = field(default_factory=no_counts)
    devices: tuple[DeviceChange, ...] = ()
    rejected: Sequence[rejecting.Rejection] = ()
    conflicts: list[tuple[Entry, Entry]] = field(default_factory=list)
    failures: list[Outcome] = field(default_factory=list)
    family_errors: dict[int, Exception] = field(default_factory=dict)
    problems: dict[str, Exception] = field(default_factory=dict)
    tolerated: dict[str, Exception] = field(default_factory=dict)
    rules: RulesChange | None = None
    counters: dict[str, str] = field(default_factory=dict)
    subnet_file: str = ""
    warnings: tuple[str, ...] = ()
    blockers: tuple[str, ...] = ()
    diversions: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    moves: tuple[str, ...] = ()
    looked: set[str] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)
    held: dict[int, list[str]] = field(default_factory=dict)
    changed: dict[int, tuple[Claims, Claims]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("source", "desired", "snapshot", "diff", "apply", "total"), 0.0
        )
    )

    def add_to(self, whole: Report) -> None:
        """Add this part to the report of the whole pass."""
        whole.add(self)

    @property
    def ok(self) -> bool:
        return not (self.conflicts or self.failures or self.family_errors or self.problems)

    @property
    def writes(self) -> int:
        """Entries that were written or removed."""
        return sum(
            row[word] for row in self.tables.values() for word in ("added", "replaced", "removed")
        )

    def add(self, part: Report) -> None:
        """Add what one resource did to the report of the whole pass.

        Most parts have little to them, and an update is short: what is empty is not added.
        """
        for table, row in part.tables.items():
            if row != _NOTHING:
                total = self.tables[table]
                if not any(total.values()):
                    self.tables[table] = row.copy()
                    continue
                for word, count in row.items():
                    total[word] += count
        for stage, taken in part.seconds.items():
            if taken:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + taken
        if part.devices:
            self.devices = merge_devices(self.devices + part.devices)
        if part.conflicts:
            self.conflicts += part.conflicts
        if part.failures:
            self.failures += part.failures
        if part.family_errors:
            self.family_errors |= part.family_errors
        if part.problems:
            self.problems |= part.problems
        if part.tolerated:
            self.tolerated |= part.tolerated
        if part.warnings:
            self.warnings += part.warnings
        if part.blockers:
            self.blockers += part.blockers
        if part.diversions:
            self.diversions |= part.diversions
        if part.moves:
            self.moves += part.moves
        if part.looked:
            self.looked |= part.looked
        if part.names:
            self.names |= part.names
        if part.counters:
            self.counters |= part.counters
        self.rules = part.rules or self.rules
        self.subnet_file = part.subnet_file or self.subnet_file

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yield the verdict and the counts of each table, then a line for each thing that was
        changed beside the tables, that went wrong, or that is to be known."""
        verdict, changed = "in sync" if self.ok else "not in sync", self.writes
        entries = f"{changed} {'entry' if changed == 1 else 'entries'} changed"
        yield f"{verdict}: {entries}, {self.seconds['total']:.3f} s"
        if any(any(row.values()) for row in self.tables.values()):
            yield from counts_text(self.tables).splitlines()
        for device in self.devices:
            if device.action != "none":
                yield f"device {device.name}: {', '.join(device.changes) or device.action}"
        yield from (f"firewall: {line}" for line in (self.rules.changes if self.rules else ()))
        yield from (f"counters {name}: {what}" for name, what in self.counters.items())
        if self.subnet_file:
            yield f"{self.subnet_file}: written"
        yield from (f"rejected {one.lease}: {one.detail}" for one in self.rejected)
        yield from (f"not known, so not removed: {name}" for name in self.unknown)
        for wanted, foreign in self.conflicts:
            yield (
                f"conflict: {describe(wanted, self.names)} conflicts with an existing entry "
                f"(not ours): {describe(foreign, self.names)}"
            )
        yield from (f"failed: IPv{family}: {error}" for family, error in self.family_errors.items())
        yield from (f"failed: {name}: {error}" for name, error in self.problems.items())
        yield from (f"failed: {outcome.message(self.names)}" for outcome in self.failures)
        for family, names in self.held.items():
            if names:
                yield f"kept although the leases lack them, IPv{family}: {', '.join(names)}"
        yield from (f"warning: {text}" for text in self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values: as ``to_json``, and ``unknown``."""
        return {**self.to_json(), "unknown": list(self.unknown)}

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values, with ``"schema": 1``; keys are only ever added."""
        return {
            "schema": 1,
            "ok": self.ok,
            "tables": self.tables,
            "devices": [
                {"name": d.name, "action": d.action, "changes": list(d.changes)}
                for d in self.devices
            ],
            "rejected": [rejection.to_json() for rejection in self.rejected],
            "conflicts": [conflict_json(*pair, self.names) for pair in self.conflicts],
            "failures": failures_json(self.failures, self.names, self.family_errors, self.problems),
            "rules": self.rules.to_json() if self.rules else None,
            "counters": self.counters,
            "subnet_file": self.subnet_file or None,
            "warnings": list(self.warnings),
            "held": {f"IPv{family}": names for family, names in self.held.items() if names},
            "seconds": {stage: round(taken, 6) for stage, taken in self.seconds.items()},
        }


class Written(Struct):
    """The part of the report of a resource that wrote entries, in ``seconds``, and met nothing
    else: ``tables`` are counts as a report has them. An update is short, and a Report large."""

    tables: dict[str, dict[str, int]]
    seconds: float

    def add_to(self, whole: Report) -> None:
        """Add this part to the report of the whole pass."""
        whole.seconds["apply"] += self.seconds
        for table, row in self.tables.items():
            total = whole.tables[table]
            if total == _NOTHING:
                whole.tables[table] = row
                continue
            for word, count in row.items():
                total[word] += count


def merge_devices(changes: Iterable[DeviceChange]) -> tuple[DeviceChange, ...]:
    """Return one change for each device: one that serves both families is named once."""
    found: dict[str, DeviceChange] = {}
    for change in changes:
        before = found.get(change.name, DeviceChange(change.name, "none"))
        lines = (*before.changes, *(line for line in change.changes if line not in before.changes))
        action = change.action if before.action == "none" else before.action
        found[change.name] = DeviceChange(change.name, action, lines)
    return tuple(found.values())
