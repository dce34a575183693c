"""Ownership by a table of keys: a difference that touches these, what is new, and nothing else."""

from __future__ import annotations

from flannel_dp._core import Diff, Table, diff_tables
from flannel_dp.errors import require
from flannel_dp.kernel.fdb import as_any, settle
from flannel_dp.kernel.netns import NetNS
from flannel_dp.tables.entries import Entry


def diff_owned(
    table: Table, held: Table, owned: Table, netns: NetNS
) -> tuple[Diff, tuple[tuple[Entry, Entry], ...]]:
    """Return the difference between ``table`` and those of the ``held`` entries that are ``owned``
    or wanted, and the conflicts: wanted entries that are not owned, and others in their place.

    All three are of one kind. Set operations on packed tables; only what is new costs an object.
    """
    if "fdb_any" in (table.kind, held.kind, owned.kind):
        table, held, owned = settle(as_any(table), netns), as_any(held), as_any(owned)
    wanted, conflicts = _copy(table), list[tuple[Entry, Entry]]()
    news = _copy(table)
    news.subtract(owned)
    for entry in news:
        at = held.find(entry)
        if at >= 0 and held[at] != entry:
            conflicts.append((entry, held[at]))
            wanted.discard(entry)
    others = _copy(held)
    others.subtract(wanted)
    others.subtract(owned)
    mine = _copy(held)
    mine.subtract(others)
    for entry, _ in conflicts:
        mine.discard(entry)
    return diff_tables(wanted, mine), tuple(conflicts)


def check_owned(owned: object, kind: str) -> None:
    """Raise ConfigError for what is no table of this kind."""
    fits = isinstance(owned, Table) and owned.kind.partition("_")[0] == kind.partition("_")[0]
    require(fits, "owned", owned, f"a {kind} table: what was written last")


def _copy(table: Table) -> Table:
    made = Table(table.kind)
    made.merge(table)
    return made
