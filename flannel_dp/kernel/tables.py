"""Read and write the kernel's tables: one netlink socket, differences in, results out."""

from __future__ import annotations

import errno
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from flannel_dp._core import (
    SKIPPED,
    UNSENT,
    Channel,
    Diff,
    Pages,
    Table,
    table_has_lists,
    widen,
    write_change,
)
from flannel_dp.errors import ConfigError, KernelError, Unsupported, require
from flannel_dp.kernel.ahead import ReadAhead, open_channel
from flannel_dp.kernel.netns import NetNS, open_netns
from flannel_dp.tables.describe import describe
from flannel_dp.tables.entries import Entry, Fdb, Neighbour, Nexthop, Scope
from flannel_dp.tables.results import TableResult

Progress = Callable[[int, int], None]
Fetched = Callable[[Scope], Pages | None]

#: Operations between two calls of a progress function.
_SLICE = 4096

#: A dump of a table that is being changed may show an entry as it was and as it is: two
#: values under one key are reported only when this many dumps in a row showed some.
_LOOKS = 3

#: Passes of one ``sync``: each finds what the one before made room for.
_PASSES = 3


class Kernel:
    """The tables of one network namespace. A context manager, for one thread at a time.

    This is the layer below :class:`flannel_dp.DataPlane`, for agents that have
    peers and no flannel leases: build a table (:mod:`flannel_dp.tables.columns`), compare
    it with the kernel (``diff``), print it (``Plan``), ``apply`` it.

    A table holds one value for a key, and of an entry no more than
    :mod:`flannel_dp.tables.entries` has fields for. The kernel may hold more: routes with
    several paths, nexthop groups. ``read`` and ``diff`` raise
    Unsupported rather than leave such an entry out, overwrite or remove it. With
    ``strict=False`` they count as entries that lead elsewhere: for a caller that owns
    the whole scope and wants it as its tables say.

    The FDB is read as the kernel has it: flood lists, ``src_vni``, flags and entries of
    bridges. What of it is ours ``fdb_scope`` says: if ``strict``, lists of destinations and
    entries that another program marked ``extern_learn`` stay, unless the scope claims them;
    with ``strict=False`` all is ours.

    Raises ConfigError for a namespace that does not exist, KernelError when the
    socket cannot be opened.
    """

    def __init__(self, netns: NetNS = None, *, rcvbuf: int = 0, strict: bool = True) -> None:
        fits = isinstance(rcvbuf, int) and 0 <= rcvbuf <= 0x7FFFFFFF
        require(fits, "rcvbuf", rcvbuf, "bytes, 0 for the kernel's default")
        #: The namespace, as it was given, and whether what a table cannot hold is an error.
        self.netns, self.strict = netns, strict
        with open_netns(netns) as fd:
            try:
                self.channel = Channel(fd, rcvbuf)
            except KernelError as error:
                if netns is not None and error.errno == errno.EINVAL:  # setns(2)
                    raise ConfigError(
                        f"{netns} is not a network namespace",
                        hint="'ip netns list' shows those that exist",
                    ) from error
                raise
        self._second: Channel | None = None

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets; a second call does nothing."""
        self.channel.close()
        if self._second is not None:
            self._second.close()

    def read_ahead(self) -> ReadAhead:
        """Read tables on another thread: see ReadAhead."""

        def channel() -> Channel:
            if self._second is None:
                self._second = open_channel(self.netns)
            return self._second

        return ReadAhead(channel)

    def ifindex(self, device: str) -> int:
        """Return the ifindex of a device. ConfigError when there is none of that name."""
        from flannel_dp.kernel.links import LinkReader

        with LinkReader(self.netns) as reader:
            link = reader.link(device)
        if link is None:
            raise ConfigError(
                f"there is no device {device!r}", hint="'ip link show' lists those that are"
            )
        return link.index

    def diff(
        self,
        table: Table,
        *scopes: Scope,
        fetched: Fetched | None = None,
        whole: Pages | None = None,
    ) -> Diff:
        """Compare ``table`` with what the kernel holds in ``scopes``.

        Reads, never writes: ``ip route show``, ``ip neigh show``, ``bridge fdb
        show``, ``ip nexthop show``, filtered by the kernel. Raises
        DumpInterrupted when the table kept changing under ten dumps, and
        KernelError; nothing is decided from a partial dump. Raises Unsupported, if
        ``strict``, when it would change an entry that no table can hold; those of
        others, which it would not touch, are no obstacle. ``fetched`` has dumps that
        are read ahead, ``whole`` is one of the routing table that all ``scopes`` are in.
        """
        asked: Sequence[Scope] = scopes
        if self._is_of_any_fdb(table.kind, scopes):
            from flannel_dp.kernel import fdb

            table, asked = fdb.prepared(table, scopes, self.netns, strict=self.strict)
        diff = self.channel.diff(table, asked, fetched=fetched, whole=whole)
        misfit = diff.misfit() if self.strict else None
        narrow = self.strict and table.kind == "fdb"
        if narrow and (misfit is not None or diff.frees_places or diff.conflicting):
            return self.diff(widen(table), *scopes)
        for _ in range(_LOOKS - 1):
            if misfit is None:
                return diff
            diff = self.channel.diff(table, asked)
            misfit = diff.misfit()
        if misfit is not None:
            raise self._unsupported(*misfit)
        return diff

    def _is_of_any_fdb(self, kind: str, scopes: tuple[Scope, ...]) -> bool:
        """Return whether a table is of the FDB, and more than all of one device's that is ours."""
        if kind != "fdb":
            return kind == "fdb_any"
        return self.strict or any(getattr(one, "side", "self") != "self" for one in scopes)

    def read(self, kind: str, *scopes: Scope, whole: Pages | None = None) -> Table:
        """Return what the kernel holds in ``scopes`` as a table, one tag per owner.

        Raises Unsupported, if ``strict``, when ``scopes`` contain what a table cannot
        hold, of any owner; else the table has the last of several values under one
        key, and ``other`` of an entry names what else there is to it. Of routes that the
        kernel makes itself (fe80::/64 on every device) it has the last in any case. ``whole`` as
        for ``diff``. For "fdb" the table is of kind "fdb_any" where one of kind "fdb" could not
        hold what there is, unless ``strict`` is false.
        """
        asked: Sequence[Scope] = scopes
        if self._is_of_any_fdb(kind, scopes):
            from flannel_dp.kernel import fdb

            kind, asked = fdb.to_read(kind, scopes, strict=self.strict)
        table = self.channel.read(kind, asked, whole=whole)
        misfit = table.misfit() if self.strict else None
        if self.strict and kind == "fdb" and (misfit is not None or table_has_lists(table)):
            return self.read("fdb_any", *scopes)
        for _ in range(_LOOKS - 1):
            if misfit is None:
                return table
            table = self.channel.read(kind, asked)
            misfit = table.misfit()
        if misfit is not None:
            raise self._unsupported(*misfit)
        return table

    def _names(self) -> dict[int, str]:
        """Return the names of all devices by ifindex."""
        from flannel_dp.kernel.links import LinkReader

        with LinkReader(self.netns) as reader:
            return {link.index: link.name for link in reader.links()}

    def _unsupported(self, entry: Entry, second: Entry | None) -> Unsupported:
        """Return the error that names an entry, and the other one under its key if there is one."""
        names = self._names()
        what = describe(entry, names)
        if second is None:
            text = f"the kernel holds {what}, of which a table can hold only a part"
        else:
            text = (
                f"the kernel holds {what} and also {describe(second, names)}, and a table can "
                "hold one of them"
            )
        return Unsupported(
            text,
            hint="nothing was changed; remove the entry, choose a scope without it, or, if "
            "all of the scope is yours to overwrite, use Kernel(strict=False)",
        )

    def snapshot(self, kind: str, *scopes: Scope) -> list[dict[str, Any]]:
        """Return what the kernel holds in ``scopes`` as plain dicts, with names of devices.

        In the shape of ``ip -j neigh``, ``bridge -j fdb``, ``ip -j nexthop`` and ``ip -j route``
        (:mod:`flannel_dp.tables.shape` says what is left out). Raises as ``read``.
        """
        from flannel_dp.tables.shape import entry_dict

        names = self._names()
        return [entry_dict(entry, names) for entry in self.read(kind, *scopes)]

    def sync(self, table: Table, *scopes: Scope, owned: Table | None = None) -> TableResult:
        """Make what the kernel holds in ``scopes`` equal to ``table``: ``diff`` and ``apply``, and
        once more where that made room for something. Raises as both.

        ``result.ok``, ``result.counts()`` and ``result.failures()`` say what became of it. Several
        tables that depend on each other are given to ``apply`` together, or to
        :func:`flannel_dp.keep`.

        With ``owned``, a table of the same kind, only its keys are ours within the scopes: they are
        changed and removed, what is new is added, and the rest is never touched, whoever made it.
        Give the table that was written last. A wanted entry that is not owned, and in whose place
        there is another, is left out, and in ``result.conflicts``.
        """
        if owned is not None:
            return self._sync_owned(table, scopes, owned)
        (result,) = self.apply(self.diff(table, *scopes))
        for _ in range(_PASSES - 1):
            if not is_unfinished((result,)):
                break
            (again,) = self.apply(self.diff(table, *scopes))
            result = replace(again, earlier=(*result.earlier, result))
        return result

    def _sync_owned(self, table: Table, scopes: tuple[Scope, ...], owned: Table) -> TableResult:
        from flannel_dp.kernel.owned import check_owned, diff_owned

        check_owned(owned, table.kind)
        held = self.read(table.kind, *scopes)
        diff, conflicts = diff_owned(table, held, owned, self.netns)
        (result,) = self.apply(diff)
        return replace(result, foreign=conflicts)

    def get(self, scope: Scope, entry: Entry) -> Entry | None:
        """Return the kernel's neighbour, FDB entry or nexthop with ``entry``'s key, or None.

        Raises Unsupported, if ``strict``, as ``read``. The kernel answers for a MAC alone, so
        for FDB entries of any other form the FDB is read: those in a list of destinations,
        of which one that leads where ``entry`` does is found, those with a ``src_vni``, and
        those of bridges.
        """
        if not self.strict or not isinstance(entry, Fdb):
            found: Entry | None = self.channel.get(scope, entry)
            if self.strict and isinstance(found, (Neighbour, Nexthop)) and found.other:
                raise self._unsupported(found, None)
            return found
        from flannel_dp.tables.forms import is_of_any_form

        if not is_of_any_form(entry) and scope.side == "self":
            alone = self.channel.get(scope._replace(kind="fdb"), entry)
            if not isinstance(alone, Fdb) or not (alone.other or alone.src_vni):
                return alone
        table = self.read("fdb_any", scope)
        at = table.find(entry)
        held: Entry | None = table[at] if at >= 0 else None
        return held

    def apply(
        self,
        plan: Diff | Iterable[Diff],
        *,
        tags: int | None = None,
        progress: Progress | None = None,
    ) -> list[TableResult]:
        """Write the differences (a ``Plan`` is some) in their order; removals in the reverse.

        Every batch is acknowledged before the next is sent, so all entries of a
        table are in the kernel before the first of the next table is. Entries of
        one tag belong together: where one failed, or conflicts with a foreign entry,
        those of later tables are left out. One failing entry stops no other tag.
        ``tags`` is the number of different tags (default: counted).
        ``progress(done, total)`` is called now and then.

        Returns one result per difference. Raises NotPermitted, with nothing
        written, when the process may not write; KernelError when the socket fails.
        """
        diffs = [plan] if isinstance(plan, Diff) else list(plan)
        if tags is None:
            tags = max((len(diff.table) for diff in diffs), default=0)
        broken = array("B", bytes(tags))
        results = [array("i", [UNSENT]) * len(diff) for diff in diffs]
        complaints: list[list[tuple[int, int, str]]] = [[] for _ in diffs]
        total, done = sum(len(diff) for diff in diffs), 0
        for number, start, stop in _phases(diffs):
            diff = diffs[number]
            if diff.conflicting:
                _break_conflicts(diff, broken)
            for at in range(start, stop, _SLICE):
                end = min(at + _SLICE, stop)
                complaints[number] += self.channel.apply(diff, at, end, results[number], broken)
                done += end - at
                if progress:
                    progress(done, total)
        return [
            TableResult(diff, result, tuple(said))
            for diff, result, said in zip(diffs, results, complaints, strict=True)
        ]

    def change(
        self, before: list[Table], after: list[Table], *, tags: int
    ) -> tuple[dict[str, dict[str, int]], list[TableResult] | None]:
        """Make tables that are as ``before`` in the kernel as ``after``; both are of the same
        kinds. Nothing is read, and the order is that of ``apply``.

        For a change of a few entries, in one call. Returns the counts of each table by its kind,
        and the results where an operation failed. Raises as ``apply``.
        """
        counts, failed = write_change(self.channel, before, after, tags)
        return counts, [TableResult(*one) for one in failed] if failed else None


def _break_conflicts(diff: Diff, broken: array[int]) -> None:
    """Mark the tags of conflicts: what depends on such an entry would use the foreign one."""
    for wanted, _ in diff.conflicts():
        tag = diff.table.tag(diff.table.find(wanted))
        if tag < len(broken):
            broken[tag] = 1


def _phases(diffs: Sequence[Diff]) -> list[tuple[int, int, int]]:
    """Return ``(number of the diff, first, last + 1)``: all writes, then all removals backwards;
    before them the removals of diffs that the kernel would not take otherwise.

    Without those that have nothing to do and no conflict that later ones need to know.
    """
    sizes = [(number, diff.writes, len(diff)) for number, diff in enumerate(diffs)]
    first = [(n, mid, end) for n, mid, end in sizes if diffs[n].removes_first]
    writes = [(n, 0, mid) for n, mid, _ in sizes if mid or diffs[n].conflicting]
    rest = [(n, mid, end) for n, mid, end in reversed(sizes) if end > mid]
    return first + writes + [one for one in rest if one not in first]


#: Errors that go away by themselves (a hash table that is growing, memory, a queue).
TRANSIENT = frozenset({errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.ENOBUFS, errno.EINTR})

#: Errors that say the device is not the one we looked up.
GONE = frozenset({errno.ENODEV, errno.ENXIO})


def is_unfinished(results: Iterable[TableResult]) -> bool:
    """Return whether reading again and applying the rest may get further.

    That is so where answers were lost, where an error was transient, where an
    entry was removed that the kernel would not replace, and where something
    failed that may have conflicted with an entry that the same pass removed.
    """
    results = list(results)
    removed = any(len(result.diff) > result.diff.writes for result in results)
    for result in results:
        if result.diff.frees_places:
            return True
        counts = result.counts()
        if not counts["failed"]:
            continue
        errors = result.errors()
        if removed or any(error < 0 and error != SKIPPED for error in errors):
            return True
        if errors & TRANSIENT:
            return True
    return False


class timed:
    """Add the time that the block takes to ``seconds[stage]``. A class, as a generator would
    take a tenth of an update's time."""

    __slots__ = ("_seconds", "_stage", "_started")

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        taken = time.perf_counter() - self._started
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + taken
