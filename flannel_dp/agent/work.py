"""What an agent's loop does: apply deliveries, undo drift, audit, and plan the next attempts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from msgspec.structs import replace

from flannel_dp._core import Claims, trim_heap
from flannel_dp.agent import totals
from flannel_dp.agent.backlog import Backlog
from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.agent.grace import Grace
from flannel_dp.agent.holding import Holding
from flannel_dp.agent.problems import Problems
from flannel_dp.agent.status import StatusBoard
from flannel_dp.agent.story import Story
from flannel_dp.agent.timers import Timers
from flannel_dp.cluster.lease import LeaseList
from flannel_dp.errors import FlannelDPError, NotPermitted, ShrinkRefused, SourceError
from flannel_dp.look.terminal import count
from flannel_dp.reconcile.drift import Repair, count_report
from flannel_dp.reconcile.watch import Watch
from flannel_dp.sources import Inbox, Snapshot

if TYPE_CHECKING:
    from flannel_dp.agent.kept import Kept
    from flannel_dp.reconcile.report import Report

log = logging.getLogger(__name__)

#: Accepted leases before and after a change, by family.
Changed: TypeAlias = Mapping[int, tuple[Claims, Claims]]

#: Different warnings that are logged, each once.
_WARNINGS = 100

#: Repairs in a row before the source's deliveries are applied again.
_REPAIRS = 16


class Work:
    """The work of one agent on what is ``kept`` in sync, done on the agent's thread.

    What became of it is on ``board``, and when there is more to do in ``timers``.
    ``watch`` is the kernel's events, from the start of the loop on; ``ready`` is set when the node
    was ready once, after which ``on_ready`` is called; ``on_drift`` is, after each repair, and
    ``on_peers`` after each pass, with the leases that an update was about (None: all).
    """

    def __init__(
        self,
        kept: Kept,
        inbox: Inbox,
        *,
        board: StatusBoard,
        timers: Timers,
        holding: Holding,
        grace: Grace,
        on_ready: Callable[[], None],
        on_drift: Callable[[Repair], None],
        on_peers: Callable[[Changed | None], None],
        stopped: Callable[[], bool],
        wake: Callable[[], None],
        chronicle: Chronicle | None = None,
    ) -> None:
        self._kept, self._inbox = kept, inbox
        self._board, self._timers = board, timers
        self.holding, self.grace = holding, grace
        self._on_ready, self._on_drift, self._on_peers = on_ready, on_drift, on_peers
        self._stopped, self._wake = stopped, wake
        self._backlog = Backlog()
        self._warned: set[str] = set()
        self._chronicle = chronicle or Chronicle()
        self._story = Story(kept, chronicle=self._chronicle)
        self.problems = Problems(board)
        self.watch: Watch | None = None
        self.ready = threading.Event()

    @property
    def due(self) -> tuple[float | None, ...]:
        """When the source has to be asked again, and when the log has a count to tell, by the
        clock; None where there is no such time."""
        return self.holding.due, self.grace.due, self._story.due

    def read_again(self) -> None:
        """Have everything read again, from the source and from the kernel."""
        assert self.watch is not None
        self._inbox.refresh()
        self.watch.mark_dirty()
        self._timers.audit_now()

    def deliver(self) -> None:
        """Apply what the source has delivered; ask it again where that is due."""
        for waiting in (self.holding, self.grace):
            if self._timers.due(waiting.due):
                waiting.mark_asked()
                self._inbox.refresh()
        delivery = self._inbox.take()
        self._backlog.add(delivery)
        if delivery.snapshot is not None:
            self.holding.arrived(_confirming(delivery.snapshot))
        self.note("source", delivery.error)
        if self._backlog.snapshot is not None and (delivery.snapshot or self._timers.retry_due):
            self._sync()
        elif self._backlog.changed:
            self._update()

    # ---- the source's deliveries

    def _sync(self) -> None:
        """Sync a new snapshot, or the one that could not be synced before."""
        assert self.watch is not None
        snapshot = self._backlog.snapshot
        assert snapshot is not None
        held: ShrinkRefused | None = None
        before = self._accepted()
        self._story.began()
        try:
            claims, lacking = self._kept.complete(snapshot.claims, self.grace.over)
            self._note_lacking(self.grace.listed, lacking)
            report = self._kept.sync(
                claims,
                progress=self.watch.progress,
                keep=self.holding.keep,
                confirmed=self.holding.confirmed,
                probe=True,
            )
        except ShrinkRefused as error:  # all else is done
            held, report = error, error.report
        except SourceError as error:  # no lease of this node, say: another snapshot may have one
            self.note("leases", error)
            self._timers.retry_later()
            return
        except FlannelDPError as error:
            self._failed(error)
            return
        self.watch.remember()
        self._on_peers(None)
        self._note_held(held)
        self.note("leases", None)
        changes = self._backlog.synced(complete=not report.family_errors)
        del snapshot, claims
        trim_heap()  # the leases are packed now: the larger part of what reading them took is free
        self._count(report, syncs=1)
        self._assess(report)
        self._tell(before, self._accepted())  # after the line of the start
        if self._timers.audit_at is None:
            self._timers.audit_later()
        if changes and self._backlog.snapshot is None:
            self._update()

    def _update(self) -> None:
        """Apply the changes that came together."""
        if self._backlog.snapshot is not None or {*self._kept.state} != {*self._kept.families}:
            self._inbox.refresh()  # a family is out of sync: only a snapshot repairs it
            self._backlog.drop_changes()
            return
        added, removed, bad = self._backlog.changes()
        try:
            names = {*removed, *(lease.label for lease in added)}
            whole = self._kept.complete(LeaseList(added, bad), self.grace.over)
            self._note_lacking(partial(self.grace.changed, names), whole.lacking)
            added = whole.claims.leases
            removed = [name for name in removed if name not in {lease.label for lease in added}]
            report = self._kept.update(added, removed)
        except SourceError as error:  # this node's lease, or more than an update can do
            log.info("Reading all leases again: %(why)s", {"why": error.message})
            self._inbox.refresh()
            return
        except FlannelDPError as error:
            self._inbox.refresh()
            self._failed(error)
            return
        self._tell(
            {family: old for family, (old, _) in report.changed.items()},
            {family: new for family, (_, new) in report.changed.items()},
            again=bool(report.rejected),
        )
        self._on_peers(report.changed)
        self._note_held()
        self._count(report, updates=1)
        self._assess(report)

    def _note_lacking(
        self, note: Callable[[Mapping[str, str]], None], lacking: Mapping[str, str]
    ) -> None:
        """Note leases that cannot be used, whose peers are kept for a while."""
        note(lacking)
        self._board.set(unusable=self.grace.kept)
        self.note("unusable", self.grace.explain())

    def _note_held(self, held: ShrinkRefused | None = None) -> None:
        """Note which peers are kept although the source lacks them, and when to ask again."""
        if not self.holding.update(self._kept.brake.held):
            self.note("shrink", None)
        elif held is not None:
            self.note("shrink", self.holding.explain(held))

    # ---- the kernel's events

    def repair_drift(self) -> None:
        """Undo drift, and try families again that are out of sync."""
        watch = self.watch
        assert watch is not None
        for _ in range(_REPAIRS):
            if self._stopped():
                return
            pending = watch.read()
            if (
                watch.overruns != self._board.status.overruns
            ):  # by this reading, or by that of a pass
                self._board.set(overruns=watch.overruns)
            if watch.device_events_seen and self._timers.retry_at is not None:
                watch.device_events_seen = False  # a device that a family waits for may have come
                self._timers.retry_soon()
            if self._timers.retry_due:
                if self._backlog.snapshot is not None:
                    self._sync()
                    continue
                if self.problems.owed and self._kept.known:  # which a repair does not read
                    self._timers.retry_done()
                    self.audit()
                    continue
                watch.mark_dirty()
                pending = bool(watch.dirty)
                self._timers.retry_done()
            if not pending or self._timers.pace.due():
                return
            self._timers.pace.spend()
            try:
                repair = watch.repair()
            except FlannelDPError as error:
                watch.dirty.clear()
                self._failed(error)
                return
            self._repaired(repair)
        self._wake()  # there is more

    def _repaired(self, repair: Repair) -> None:
        self._board.set(drift=totals.with_repair(self._board.status.drift, repair))
        if repair.counts:
            self._story.repaired(repair)
            self._on_drift(repair)
        if repair.report is not None:
            self._on_peers(None)  # a device may be another one
            self._count(repair.report)
            self._assess(repair.report)
        elif repair.counts:
            status = self._board.status
            written = sum(repair.counts.values())
            self._board.set(
                writes=status.writes + written, apply=status.apply.with_one(repair.seconds)
            )
        # What failed or conflicted may be right now: only a reading of all families tells.
        whole = repair.report is not None and "entries" in repair.report.looked
        open_ = "entries" in self._board.status.problems
        if repair.counts and open_ and not whole and self._timers.retry_at is None:
            self._timers.retry_soon()

    def look_at_path(self) -> None:
        """Read what diverts packets, where the kernel announced that it may have changed."""
        assert self.watch is not None
        if self.watch.path_changed:
            self.watch.path_changed = False
            self._timers.path_soon()
        if not self._timers.path_due:
            return
        self._timers.path_done()
        if not self._kept.known:
            return
        try:
            report = self._kept.diversions()
        except FlannelDPError as error:
            self._failed(error)
            return
        self._count(report)
        self._assess(report)

    def audit(self) -> None:
        """Compare everything with the kernel; write nothing when it is in sync."""
        assert self.watch is not None
        self._timers.audit_later()
        if self._backlog.snapshot is not None or not self._kept.known:
            return
        before = self._accepted()
        self.watch.dirty.clear()  # not afterwards: events may come meanwhile
        repair = Repair()
        try:
            with self.watch.naming(repair):
                report = self._kept.resync(progress=self.watch.progress, probe=True)
        except FlannelDPError as error:
            self._failed(error)
            return
        self.watch.remember()
        if self.watch.pending:  # of a change meanwhile all events may have been read already
            self._wake()
        self._tell(before, self._accepted())
        self._on_peers(None)
        if report.writes:
            log.warning(
                "The audit found and repaired %(entries)s that another program had changed",
                {"entries": count(report.writes, "entry", "entries"), "writes": report.writes},
            )
            self._board.set(drift=totals.with_audit(self._board.status.drift, report))
        count_report(repair, report)
        self._story.repaired(repair)
        self._chronicle.audited = report.writes
        self._board.set(audits=self._board.status.audits + 1, last_audit=time.time())
        self._count(report)
        self._assess(report)

    # ---- reports

    def _assess(self, report: Report) -> None:
        """Decide by a report what is to be tried again, and whether the node is ready."""
        diverted = (str(one) for found in report.diversions.values() for one in found)
        problems = {*report.blockers, *diverted}
        for warning in report.warnings:
            if warning in problems:
                continue  # noted as such, for as long as it lasts
            if warning in report.moves:
                log.warning("%(warning)s", {"warning": warning})  # there and back, each time
            elif warning not in self._warned and len(self._warned) < _WARNINGS:
                self._warned.add(warning)
                log.warning("%(warning)s", {"warning": warning})
        out_of_sync = {*self._kept.families} - {*self._kept.state}
        self.problems.note_report(report)
        failing, conflicts = len(report.failures), len(report.conflicts)
        whole = "entries" in report.looked
        if whole or failing or conflicts:
            self._board.set(failing=failing, conflicts=conflicts)
        if whole:
            self._board.set(warnings=tuple(w for w in report.warnings if w not in problems))
        if out_of_sync or self.problems.cures(report):
            self._timers.retry_later()
        elif self.problems.open:  # an earlier pass found it, and this one did not read it
            if self._timers.retry_at is None:
                self._timers.retry_later()
        elif whole and self._backlog.snapshot is None:
            self._timers.retry_done(recovered=True)
        if not out_of_sync and not self.problems.owed and not self.ready.is_set():
            self.ready.set()
            self._board.set(ready=True)
            status = self._board.status
            self._story.started(status.origin, status.peers)
            self._on_ready()

    def _accepted(self) -> dict[int, Claims]:
        """Return the accepted leases of each family."""
        return {number: state.peers for number, state in self._kept.known.items()}

    def _tell(
        self, before: Mapping[int, Claims], after: Mapping[int, Claims], *, again: bool = True
    ) -> None:
        """Have the log tell which peers changed, and which leases are rejected now."""
        self._story.peers(before, after)
        self._story.rejections(self._backlog.unreadable, again=again)

    def flush(self, *, all: bool = False) -> None:
        """Have the log tell the counts that are due, or ``all``, and the history written."""
        self._story.flush(all=all)
        self._chronicle.flush()

    def _failed(self, error: FlannelDPError) -> None:
        """Note a pass that failed, and try again later."""
        if isinstance(error, NotPermitted) and not self.ready.is_set():
            raise error
        self._board.set(failures=self._board.status.failures + 1)
        self.note("kernel", error)
        self._timers.retry_later()

    def note(self, about: str, error: Exception | None) -> None:
        if about == "source":
            self._board.set(source_ok=error is None and self._backlog.heard)
        self.problems.note(about, error)

    def _count(self, report: Report, *, syncs: int = 0, updates: int = 0) -> None:
        """Update the status."""
        known, status = self._kept.known, self._board.status
        rejected = self._backlog.bad_reasons()
        changes = totals.of_families(known, rejected) | totals.of_report(status, report)
        if syncs or updates:
            now = time.time()
            changes |= {"last_sync": now, "source_changed": now}
        self._board.set(**changes, syncs=status.syncs + syncs, updates=status.updates + updates)


def _confirming(snapshot: Snapshot) -> Snapshot:
    """Return the list, as one that confirms no removal where it is empty, however often it comes:
    not even this node has a lease in it, so that it takes a person (``--allow-shrink``)."""
    return snapshot if snapshot.claims.leases else replace(snapshot, consistent=False)
