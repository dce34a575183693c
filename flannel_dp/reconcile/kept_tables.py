"""Tables of a program's own, in the place of a data plane where kernel events are followed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msgspec import Struct

from flannel_dp._core import Table
from flannel_dp.errors import ConfigError, Unsupported, require
from flannel_dp.kernel import fdb
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.tables import Kernel, Progress, is_unfinished
from flannel_dp.reconcile.plan import ORDER
from flannel_dp.reconcile.report import Report
from flannel_dp.tables.describe import describe
from flannel_dp.tables.entries import PROTOCOL, TABLE_MAIN, Entry, EventFilter, Fdb, Scope
from flannel_dp.tables.results import TableResult, add_counts

#: Passes over the tables: each finds what the one before made room for.
_PASSES = 3

#: Devices that the filter of the event socket has room for (csrc/events.h).
_DEVICES = 8


class Kept(Struct, frozen=True):
    """A table and the part of the kernel's that it is the whole of."""

    table: Table
    scopes: tuple[Scope, ...]

    @property
    def told(self) -> tuple[Scope, ...]:
        """The scopes that events are compared in."""
        return self.scopes


class _Whole(Struct, frozen=True):
    """All tables, in the place of one family of a data plane."""

    devices: frozenset[int]
    peers: range
    index: int = 0
    uplink: int = 0
    network: str = ""
    subnet: str = ""


class _Part:
    """In the place of the reconciler of a data plane, with one resource."""

    families = (0,)

    def __init__(self, host: Host, tables: list[Kept]) -> None:
        self.host, self.resources, self._tables = host, [self], tables

    def watched(self) -> list[Kept]:
        return self._tables

    def concerned(self, event: object) -> bool:
        return False


class KeptTables:
    """Tables, their scopes, and what the watch asks of a data plane (``Watchable``)."""

    families, watches_filters = (0,), False

    def __init__(
        self, kernel: Kernel, wanted: Table | Iterable[Table], scope: Scope | Iterable[Scope]
    ) -> None:
        self._kernel, self._tables = kernel, _together(kernel, wanted, scope)
        self._by_kind = {one.table.kind: one.table for one in self._tables}
        self.exclusive = threading.RLock()
        self.on_written: list[Callable[[], None]] = []
        self.reconciler: Any = _Part(Host.of(kernel), self._tables)
        self._tags = max((len(one.table) for one in self._tables), default=0)
        self._devices = _devices_of_all(self._tables)
        self.event_filter = self._filter()

    @property
    def known(self) -> dict[int, Any]:
        """All tables, as one family of a data plane."""
        return {0: _Whole(self._devices, range(self._tags))}

    @property
    def state(self) -> dict[int, Any]:
        """The same: what could not be written is in the report, and tried by ``resync``."""
        return self.known

    def written(self) -> None:
        """Have the events of what was written compared with what was wanted then."""
        for told in [*self.on_written]:
            told()

    def resync(
        self,
        families: Iterable[int] | None = None,
        *,
        host: bool = False,
        progress: Progress | None = None,
    ) -> Report:
        """Read all tables and write what differs; there is one family, and nothing of a host."""
        report = Report()
        for row in report.tables.values():
            del row["unchanged"]  # is that of the first pass
        for _ in range(_PASSES):
            diffs = [self._kernel.diff(one.table, *one.scopes) for one in self._tables]
            results = self._kernel.apply(diffs, tags=self._tags, progress=progress)
            report = _reported(report, results)
            if not is_unfinished(results):
                break
        for row in report.tables.values():
            row.setdefault("unchanged", 0)
        if report.failures or report.conflicts:
            with self.reconciler.host.links() as links:
                report.names = {link.index: link.name for link in links.links()}
        self.written()
        return report

    def update(self, added: list[Entry], removed: list[Entry]) -> tuple[Report, bool]:
        """Change what is wanted and in the kernel; return the report, and whether other devices
        than before matter. See ``Keeper.update``."""
        before = {one.table.kind: Table(one.table.kind) for one in self._tables}
        after = {kind: Table(kind) for kind in before}
        report, unknown, tag = Report(), [], 0
        for entry in removed:
            table = self._table_of(entry)
            if (at := table.find(entry)) < 0:
                unknown.append(describe(entry, {}))
                continue
            before[table.kind].add(table[at], tag)
            tag += 1
        for entry in added:
            table = self._table_of(entry)
            if (at := table.find(entry)) >= 0:
                before[table.kind].add(table[at], tag)
            after[table.kind].add(entry, tag)
            tag += 1
        if "fdb_any" in after:
            after["fdb_any"] = fdb.settle(after["fdb_any"], self._kernel.netns)
        kinds = sorted(before, key=_place)
        counts, failed = self._kernel.change(
            [before[kind] for kind in kinds], [after[kind] for kind in kinds], tags=tag
        )
        changed = self._make_wanted(before, after)
        self.written()
        report.unknown = tuple(unknown)
        report.tables |= counts
        if failed:  # the kernel is not as remembered
            for kind in counts:
                report.tables[kind]["failed"] = 0
            report.add(self.resync())
        return report, changed

    def _make_wanted(self, before: dict[str, Table], after: dict[str, Table]) -> bool:
        for kind, table in self._by_kind.items():
            table.subtract(before[kind])
            for entry in after[kind]:
                table.add(entry)
            self._tags = max(self._tags, len(table) + len(before[kind]))
        devices = self._devices.union(*map(_devices_of, after.values()))
        if devices == self._devices:
            return False
        self._devices = devices
        self.event_filter = self._filter()
        return True

    def _table_of(self, entry: Entry) -> Table:
        kind = "fdb_any" if isinstance(entry, Fdb) else type(entry).__name__.lower()
        if kind not in self._by_kind:
            kept = ", ".join(one.removesuffix("_any") for one in self._by_kind)
            raise ConfigError(
                f"{entry!r} is not of a kind that is kept",
                hint=f"give entries of these kinds: {kept}",
            )
        return self._by_kind[kind]

    def _filter(self) -> EventFilter:
        """Return what the kernel has to tell. Raises Unsupported where that is too much."""
        scopes = [scope for one in self._tables for scope in one.scopes]
        tunnels = {scope.device for scope in scopes if scope.device}
        others = self._devices - tunnels
        if len(tunnels) > _DEVICES or len(others) > _DEVICES:
            raise Unsupported(
                f"a keeper follows {_DEVICES} devices, not {max(len(tunnels), len(others))}",
                hint="use a keeper for each device",
            )
        marks = {one.protocol for one in scopes if one.kind in ("route", "nexthop")}
        if len(marks) > 1:
            raise Unsupported(
                f"a keeper follows entries of one protocol, not of {sorted(marks)}",
                hint="use a keeper for each",
            )
        return EventFilter(
            tunnels=tuple(sorted(tunnels)),
            uplinks=tuple(sorted(others)),
            ports=(self._kernel.channel.port,),
            networks=tuple(_networks(scopes)),
            protocol=marks.pop() if marks else PROTOCOL,
            id_nibble=next((one.ids[0] >> 28 for one in scopes if one.kind == "nexthop"), 5),
        )


def _place(kind: str) -> int:
    return ORDER.index(kind.removesuffix("_any"))


def _together(
    kernel: Kernel, wanted: Table | Iterable[Table], scope: Scope | Iterable[Scope]
) -> list[Kept]:
    """Return copies of the tables with their scopes, in the order in which they are written."""
    require(isinstance(wanted, (Table, Iterable)), "wanted", wanted, "a Table, or one of each kind")
    require(isinstance(scope, Iterable), "scope", scope, "a Scope, or several")  # a Scope is one
    tables = [wanted] if isinstance(wanted, Table) else [*wanted]
    scopes = [scope] if isinstance(scope, Scope) else [*scope]
    for table in tables:
        require(isinstance(table, Table), "wanted", table, "a Table, or one of each kind")
    for one in scopes:
        require(isinstance(one, Scope), "scope", one, "a Scope, or several")
        _check_events(one)
    kinds = [table.kind.removesuffix("_any") for table in tables]
    if len({*kinds}) < len(kinds):
        raise ConfigError(
            f"wanted has several tables of one kind: {', '.join(sorted(kinds))}",
            hint="put all entries of one kind into one table; the scopes may be several",
        )
    if {*kinds} != {one.kind for one in scopes}:
        raise ConfigError(
            f"wanted has tables of {', '.join(sorted(kinds))}, and scope is of "
            f"{', '.join(sorted({one.kind for one in scopes}))}",
            hint="give at least one scope for each table, and none of another kind",
        )
    found = []
    for kind, table in sorted(zip(kinds, tables, strict=True), key=lambda one: _place(one[0])):
        copy = Table(table.kind)
        copy.merge(table)
        if kind == "fdb":  # whatever its entries are, events are about those of all forms
            copy = fdb.settle(fdb.as_any(copy), kernel.netns)
        of_kind = [one for one in scopes if one.kind == kind]
        found.append(Kept(copy, tuple(fdb.scopes_of(copy.kind, of_kind, strict=kernel.strict))))
    return found


def _check_events(scope: Scope) -> None:
    """Raise Unsupported for a scope of which the kernel tells nothing."""
    if scope.kind == "peer":
        why = "of the maps of programs the kernel sends no events"
    elif scope.kind == "route" and scope.table != TABLE_MAIN:
        why = f"events are followed of the main routing table, and not of {scope.table}"
    elif scope.kind in ("fdb", "neighbour") and not scope.device:
        why = f"{scope.kind} entries are followed on one device, and the scope has none"
    else:
        return
    raise Unsupported(why, hint="compare such a table now and then, with Kernel.sync()")


def _devices_of_all(tables: Iterable[Kept]) -> frozenset[int]:
    scopes = {scope.device for one in tables for scope in one.scopes if scope.device}
    return frozenset(scopes.union(*(_devices_of(one.table) for one in tables)))


def _devices_of(table: Table) -> set[int]:
    """Return the devices that routes and nexthops of a table are on: they go with them. Entries of
    neighbour and FDB tables are on the devices of their scopes."""
    if table.kind not in ("route", "nexthop"):
        return set()
    return {entry.device for entry in table if entry.device}


def _networks(scopes: Iterable[Scope]) -> Iterator[str]:
    """Yield a prefix of each family that has all routes of which events matter: another program's
    route may replace one of ours."""
    for family, everything in ((2, "0.0.0.0/0"), (10, "::/0")):
        held = {one.within for one in scopes if one.kind == "route" and one.family in _both(family)}
        if held:
            yield held.pop() if len(held) == 1 and all(held) else everything


def _both(family: int) -> tuple[int, int]:
    return (2, 4) if family == 2 else (10, 6)


def _reported(report: Report, results: list[TableResult]) -> Report:
    """Return the report of passes so far and one more."""
    made = Report(tables=report.tables)
    for result in results:
        add_counts(made.tables[result.kind], result.counts())
        made.failures += result.failures()
        made.conflicts += result.diff.conflicts()
    return made
