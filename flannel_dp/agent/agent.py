"""The agent: keep the kernel in sync with a source for as long as it runs.

One thread waits for the source's deliveries, the kernel's events and the next due time,
and then calls ``sync`` for a snapshot, ``update`` for changes, or repairs the entries,
else the family, that another program changed. The source reads on a thread of its own.
Only audits and retries are due by the clock (``timers``).
"""

from __future__ import annotations

import logging
import os
import random
import select
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp._core import trim_heap
from flannel_dp.agent import totals
from flannel_dp.agent.backlog import Backlog
from flannel_dp.agent.grace import Grace
from flannel_dp.agent.holding import Holding
from flannel_dp.agent.problems import Problems
from flannel_dp.agent.status import Status, StatusBoard, peers_in_words
from flannel_dp.agent.supervise import Failures, Worker, described
from flannel_dp.agent.timers import AUDIT_SECONDS, Timers
from flannel_dp.cluster.lease import LeaseList
from flannel_dp.errors import (
    FlannelDPError,
    NotPermitted,
    ShrinkRefused,
    SourceError,
)
from flannel_dp.reconcile.drift import Repair
from flannel_dp.reconcile.watch import Watch
from flannel_dp.sources import FollowedSource, Inbox, Snapshot

if TYPE_CHECKING:
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.reconcile.report import Report

log = logging.getLogger(__name__)

#: Different warnings that are logged, each once.
_WARNINGS = 100

#: Repairs in a row before the source's deliveries are applied again.
_REPAIRS = 16


class Agent:
    """Keep the kernel in sync with ``source``, through ``plane``.

    ``run`` works in the calling thread until ``stop``; ``start`` and ``join`` use a
    thread of its own, ``run_async`` fits into asyncio. ``audit`` is the time between
    full comparisons with the kernel in seconds (varied by a tenth), ``board`` holds
    the Status, ``holding`` decides when peers that the source lacks are removed, ``grace`` when
    those are whose leases cannot be used any more.
    ``on_ready()`` is called once, when all accepted peers were programmed, and firewall
    rules and subnet.env written, for the first time, ``on_drift(repair)`` after each
    repair, and ``on_turn()`` after each turn of the loop, ``alarm`` seconds apart at
    most, and after as many seconds as it returned. All are called on the agent's thread.

    ``stop``, ``refresh`` and ``wait_ready`` may be called from any thread and from
    signal handlers. The kernel continues to forward after the end; nothing is removed.
    """

    def __init__(
        self,
        plane: DataPlane,
        source: FollowedSource,
        *,
        audit: float = AUDIT_SECONDS,
        board: StatusBoard | None = None,
        on_ready: Callable[[], None] = lambda: None,
        on_drift: Callable[[Repair], None] = lambda repair: None,
        on_turn: Callable[[], float | None] = lambda: None,
        alarm: float | None = None,
        random: random.Random = random.Random(),  # noqa: B008 (shared on purpose)
        clock: Callable[[], float] = time.monotonic,
        holding: Holding | None = None,
        grace: Grace | None = None,
    ) -> None:
        self.plane, self.source = plane, source
        self.board = board or StatusBoard()
        self._timers, self._alarm = Timers(audit, clock, random), alarm
        self._on_ready, self._on_drift, self._on_turn = on_ready, on_drift, on_turn
        self._clock = clock
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not at the end of run(): other threads and signal handlers may still call stop().
        self._close_wake_fd = weakref.finalize(self, os.close, self._wake_fd)
        self._inbox = Inbox(self._wake)
        self._backlog = Backlog()
        self._watch: Watch | None = None
        self._stop = self._fresh = False
        self._following = False
        self._turn_due: float | None = None
        self._ready = threading.Event()
        self._holding, self._grace = holding or Holding(clock), grace or Grace(clock)
        self._warned: set[str] = set()
        self._problems = Problems(self.board)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # ---- from other threads

    def stop(self) -> None:
        """End within a second; the kernel keeps forwarding."""
        self._stop = True
        self._wake()

    def refresh(self) -> None:
        """Read everything again, from the source and from the kernel."""
        self._fresh = True
        self._wake()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the node was ready once (see ``Status``). Return False on a timeout."""
        return self._ready.wait(timeout)

    @property
    def status(self) -> Status:
        """The agent's state."""
        return self.board.status

    def start(self) -> Agent:
        """Run on a thread of its own; ``join`` raises its error."""
        self._thread = threading.Thread(target=self._run_quietly, name="flannel-dp-agent")
        self._thread.start()
        return self

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the thread. Raises the error that ended it, and TimeoutError."""
        assert self._thread is not None, "start() it first"
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the agent did not end within {timeout} s")
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Agent:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self.join()

    async def run_async(self) -> None:
        """Run under asyncio: cancelling the task stops the agent and waits for its end."""
        import asyncio

        running = asyncio.ensure_future(asyncio.to_thread(self.run))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            self.stop()
            await running
            raise

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._failure = error

    def close(self) -> None:
        """Close its descriptor, once ``run`` has returned. ``stop`` and ``refresh`` do nothing from
        then on. Without it the descriptor is closed with the object."""
        if not self._following:
            self._wake_fd = -1
            self._close_wake_fd()

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    # ---- the loop

    def run(self) -> None:
        """Work until ``stop``. Raises NotPermitted when nothing may be written at the start;
        any other failure is a problem in the status and tried again; FlannelDPError where there
        is no memory for it, again and again."""
        self.board.set(started=time.time(), origin=self.source.origin, heartbeat=self._clock())
        follower = Worker(
            "source",
            lambda: self.source.follow(self._inbox),
            board=self.board,
            on_failure=self._source_failed,
        )
        try:
            with Watch(self.plane) as self._watch:
                follower.start()
                try:
                    self._loop(follower)
                finally:
                    follower.stop()
                    self._inbox.stop()
                    follower.join(1.0)
        finally:
            self._following = follower.alive
            if not self._following:
                self._inbox.close()

    def _loop(self, follower: Worker) -> None:
        """Turn until ``stop``. After an unexpected error, note it and read everything again."""
        failures = Failures("agent")
        while not self._stop:
            if follower.out_of_memory:
                raise _no_memory()
            try:
                self._wait()
                if not self._stop:
                    self._turn()
                    self._problems.note("agent", None)
            except Exception as error:
                if isinstance(error, NotPermitted) and not self._ready.is_set():
                    raise
                try:
                    pause = failures.failed(error)
                    self._problems.note("agent", described(error))
                    self.board.set(failures=self.status.failures + 1)
                except MemoryError:
                    pause = failures.without_memory()
                if failures.out_of_memory:
                    raise _no_memory() from error
                self._pause(pause)

    def _pause(self, seconds: float) -> None:
        """Wait, unless ``stop`` comes first; the next turn reads everything again."""
        until = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        while not self._stop and (left := until - time.monotonic()) > 0:
            self.board.set(heartbeat=self._clock())
            if poller.poll(1000 * min(left, self._alarm or left)):
                os.eventfd_read(self._wake_fd)
            with suppress(Exception):
                self._call_on_turn()
        self._fresh = True
        self._timers.retry_now()
        self._wake()

    def _source_failed(self, text: str) -> None:
        hint = "the source is read again; the log has the traceback"
        self._inbox.trouble(SourceError(f"{self.source.origin}: {text}", hint=hint))

    def _wait(self) -> None:
        """Wait until something happened or is due."""
        assert self._watch is not None
        timeout = self._timers.seconds_left(self._holding.due, self._grace.due, self._turn_due)
        if self._alarm is not None:
            timeout = self._alarm if timeout is None else min(timeout, self._alarm)
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        if self._timers.pace.due() is None:
            poller.register(self._watch.fileno(), select.POLLIN)
        for fd, _ in poller.poll(None if timeout is None else timeout * 1000):
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)

    def _turn(self) -> None:
        """Do once what has become necessary."""
        assert self._watch is not None
        self.board.set(heartbeat=self._clock())
        if self._fresh:
            self._fresh = False
            self._inbox.refresh()
            self._watch.mark_dirty()
            self._timers.audit_now()
        for waiting in (self._holding, self._grace):
            if self._timers.due(waiting.due):
                waiting.mark_asked()
                self._inbox.refresh()
        delivery = self._inbox.take()
        self._backlog.add(delivery)
        if delivery.snapshot is not None:
            self._holding.arrived(_confirming(delivery.snapshot))
        self._note("source", delivery.error)
        if self._backlog.snapshot is not None and (delivery.snapshot or self._timers.retry_due):
            self._sync()
        elif self._backlog.changed:
            self._update()
        self._repair_drift()
        if self._timers.audit_due:
            self._audit()
        self._call_on_turn()

    def _call_on_turn(self) -> None:
        seconds = self._on_turn()
        self._turn_due = None if seconds is None else self._clock() + seconds

    # ---- the source's deliveries

    def _sync(self) -> None:
        """Sync a new snapshot, or the one that could not be synced before."""
        assert self._watch is not None
        snapshot = self._backlog.snapshot
        assert snapshot is not None
        held: ShrinkRefused | None = None
        try:
            claims, lacking = self.plane.complete(snapshot.claims, self._grace.over)
            self._note_lacking(self._grace.listed, lacking)
            report = self.plane.sync(
                claims,
                progress=self._watch.progress,
                keep=self._holding.keep,
                confirmed=self._holding.confirmed,
                probe=True,
            )
        except ShrinkRefused as error:  # all else is done
            held, report = error, error.report
        except SourceError as error:  # no lease of this node, say: another snapshot may have one
            self._note("leases", error)
            self._timers.retry_later()
            return
        except FlannelDPError as error:
            self._failed(error)
            return
        self._watch.remember()
        self._note_held(held)
        self._note("leases", None)
        changes = self._backlog.synced(complete=not report.family_errors)
        del snapshot, claims
        trim_heap()  # the leases are packed now: the larger part of what reading them took is free
        self._count(report, syncs=1)
        self._assess(report)
        if self._timers.audit_at is None:
            self._timers.audit_later()
        if changes and self._backlog.snapshot is None:
            self._update()

    def _update(self) -> None:
        """Apply the changes that came together."""
        if self._backlog.snapshot is not None or {*self.plane.state} != {*self.plane.families}:
            self._inbox.refresh()  # a family is out of sync: only a snapshot repairs it
            self._backlog.drop_changes()
            return
        added, removed, bad = self._backlog.changes()
        try:
            names = {*removed, *(lease.label for lease in added)}
            whole = self.plane.complete(LeaseList(added, bad), self._grace.over)
            self._note_lacking(partial(self._grace.changed, names), whole.lacking)
            added = whole.claims.leases
            removed = [name for name in removed if name not in {lease.label for lease in added}]
            report = self.plane.update(added, removed)
        except SourceError as error:  # this node's lease, or more than an update can do
            log.info("changes need a snapshot: %s", error.message)
            self._inbox.refresh()
            return
        except FlannelDPError as error:
            self._inbox.refresh()
            self._failed(error)
            return
        self._note_held()
        self._count(report, updates=1)
        self._assess(report)

    def _note_lacking(
        self, note: Callable[[Mapping[str, str]], None], lacking: Mapping[str, str]
    ) -> None:
        """Note leases that cannot be used, whose peers are kept for a while."""
        note(lacking)
        self.board.set(unusable=self._grace.kept)
        self._note("unusable", self._grace.explain())

    def _note_held(self, held: ShrinkRefused | None = None) -> None:
        """Note which peers are kept although the source lacks them, and when to ask again."""
        if not self._holding.update(self.plane.brake.held):
            self._note("shrink", None)
        elif held is not None:
            self._note("shrink", self._holding.explain(held))

    # ---- the kernel's events

    def _repair_drift(self) -> None:
        """Undo drift, and try families again that are out of sync."""
        watch = self._watch
        assert watch is not None
        for _ in range(_REPAIRS):
            if self._stop:
                return
            pending = watch.read()
            if watch.overruns != self.status.overruns:  # by this reading, or by that of a pass
                self.board.set(overruns=watch.overruns)
            if watch.device_events_seen and self._timers.retry_at is not None:
                watch.device_events_seen = False  # a device that a family waits for may have come
                self._timers.retry_soon()
            if self._timers.retry_due:
                if self._backlog.snapshot is not None:
                    self._sync()
                    continue
                if self._problems.owed and self.plane.known:  # which a repair does not read
                    self._timers.retry_done()
                    self._audit()
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
        self.board.set(drift=totals.with_repair(self.status.drift, repair))
        if repair.counts:
            fields = {f"{t}-{c}": n for (t, c), n in sorted(repair.counts.items())}
            said = " ".join(f"{name}={count}" for name, count in fields.items())
            log.info(
                "drift repaired %s seconds=%.4f", said, repair.seconds, extra={"fields": fields}
            )
            self._on_drift(repair)
        if repair.report is not None:
            self._count(repair.report)
            self._assess(repair.report)
        elif repair.counts:
            status = self.status
            written = sum(repair.counts.values())
            self.board.set(
                writes=status.writes + written, apply=status.apply.with_one(repair.seconds)
            )
            if "entries" in status.problems and self._timers.retry_at is None:
                self._timers.retry_soon()  # the failure may have recovered

    def _audit(self) -> None:
        """Compare everything with the kernel; write nothing when it is in sync."""
        assert self._watch is not None
        self._timers.audit_later()
        if self._backlog.snapshot is not None or not self.plane.known:
            return
        self._watch.dirty.clear()  # not afterwards: events may come meanwhile
        try:
            report = self.plane.resync(progress=self._watch.progress, probe=True)
        except FlannelDPError as error:
            self._failed(error)
            return
        self._watch.remember()
        if report.writes:
            log.warning("audit found drift writes=%d", report.writes)
            self.board.set(drift=totals.with_audit(self.status.drift, report))
        self.board.set(audits=self.status.audits + 1, last_audit=time.time())
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
                log.warning("%s", warning)  # there and back, each time
            elif warning not in self._warned and len(self._warned) < _WARNINGS:
                self._warned.add(warning)
                log.warning("%s", warning)
        out_of_sync = {*self.plane.families} - {*self.plane.state}
        self._problems.note_report(report)
        failing, conflicts = len(report.failures), len(report.conflicts)
        whole = "entries" in report.looked
        if whole or failing or conflicts:
            self.board.set(failing=failing, conflicts=conflicts)
        if out_of_sync or self._problems.cures(report):
            self._timers.retry_later()
        elif self._problems.open:  # an earlier pass found it, and this one did not read it
            if self._timers.retry_at is None:
                self._timers.retry_later()
        elif whole and self._backlog.snapshot is None:
            self._timers.retry_done(recovered=True)
        if not out_of_sync and not self._problems.owed and not self._ready.is_set():
            self._ready.set()
            self.board.set(ready=True)
            log.info(
                "ready: %s",
                peers_in_words(self.status.peers),
                extra={"fields": {f"peers{n}": count for n, count in self.status.peers.items()}},
            )
            self._on_ready()

    def _failed(self, error: FlannelDPError) -> None:
        """Note a pass that failed, and try again later."""
        if isinstance(error, NotPermitted) and not self._ready.is_set():
            raise error
        self.board.set(failures=self.status.failures + 1)
        self._note("kernel", error)
        self._timers.retry_later()

    def _note(self, about: str, error: Exception | None) -> None:
        if about == "source":
            self.board.set(source_ok=error is None and self._backlog.heard)
        self._problems.note(about, error)

    def _count(self, report: Report, *, syncs: int = 0, updates: int = 0) -> None:
        """Update the status."""
        known, status = self.plane.known, self.status
        rejected = self._backlog.bad_reasons()
        changes = totals.of_families(known, rejected) | totals.of_report(status, report)
        if syncs or updates:
            now = time.time()
            changes |= {"last_sync": now, "source_changed": now}
        self.board.set(**changes, syncs=status.syncs + syncs, updates=status.updates + updates)


def _confirming(snapshot: Snapshot) -> Snapshot:
    """Return the list, as one that confirms no removal where it is empty, however often it comes:
    not even this node has a lease in it, so that it takes a person (``--allow-shrink``)."""
    return snapshot if snapshot.claims.leases else replace(snapshot, consistent=False)


def _no_memory() -> FlannelDPError:
    return FlannelDPError(
        "out of memory: the leases cannot be read or written; the kernel keeps forwarding",
        hint="give the agent more memory (MemoryMax= or ulimit -v) and start it again",
    )
