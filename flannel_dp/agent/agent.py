"""The agent: keep the kernel in sync with a source for as long as it runs.

One thread waits for the source's deliveries, the kernel's events and the next due time,
and then calls ``sync`` for a snapshot, ``update`` for changes, or repairs the entries,
else the family, that another program changed. The source reads on a thread of its own.
Only audits and retries are due by the clock (``timers``).
"""

from __future__ import annotations

import os
import random
import select
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.agent.grace import Grace
from flannel_dp.agent.holding import Holding
from flannel_dp.agent.renamed import renamed
from flannel_dp.agent.status import Status, StatusBoard
from flannel_dp.agent.supervise import Failures, Worker, described
from flannel_dp.agent.timers import AUDIT_SECONDS, Timers
from flannel_dp.agent.work import Changed, Work
from flannel_dp.errors import (
    FlannelDPError,
    NotPermitted,
    SourceError,
    require,
)
from flannel_dp.later import Later
from flannel_dp.reconcile.drift import Repair
from flannel_dp.reconcile.watch import Watch
from flannel_dp.sources import FollowedSource, Inbox
from flannel_dp.threads import Thread

if TYPE_CHECKING:
    from flannel_dp import dataplane as planes
else:
    planes = Later("flannel_dp.dataplane")


class Agent:
    """Keep the kernel in sync with ``source``, through ``dataplane``.

    ``run`` works in the calling thread until ``stop``; ``start`` and ``join`` use a
    thread of its own, ``run_async`` fits into asyncio. ``audit`` is the time between
    full comparisons with the kernel in seconds (varied by a tenth), ``board`` holds
    the Status, ``holding`` decides when peers that the source lacks are removed, ``grace`` when
    those are whose leases cannot be used any more, ``chronicle`` keeps events for those that ask.
    ``on_ready()`` is called once, when all accepted peers were programmed, and firewall
    rules and subnet.env written, for the first time, ``on_drift(repair)`` after each
    repair, ``on_peers(changed)`` after each pass with what of the peers it was about (None:
    anything), and ``on_turn()`` after each turn of the loop, ``alarm`` seconds apart at
    most, and after as many seconds as it returned. All are called on the agent's thread.

    ``stop``, ``refresh`` and ``wait_ready`` may be called from any thread and from
    signal handlers. The kernel continues to forward after the end; nothing is removed.
    """

    @renamed(plane="dataplane")
    def __init__(
        self,
        dataplane: planes.DataPlane,
        source: FollowedSource,
        *,
        audit: float = AUDIT_SECONDS,
        board: StatusBoard | None = None,
        on_ready: Callable[[], None] = lambda: None,
        on_drift: Callable[[Repair], None] = lambda repair: None,
        on_peers: Callable[[Changed | None], None] = lambda changed: None,
        on_turn: Callable[[], float | None] = lambda: None,
        alarm: float | None = None,
        random: random.Random = random.Random(),  # noqa: B008 (shared on purpose)
        clock: Callable[[], float] = time.monotonic,
        holding: Holding | None = None,
        grace: Grace | None = None,
        chronicle: Chronicle | None = None,
    ) -> None:
        require(hasattr(dataplane, "sync"), "dataplane", dataplane, "a DataPlane")
        require(hasattr(source, "follow"), "source", source, "a source with snapshot and follow")
        self.plane, self.source = dataplane, source
        self.board = board or StatusBoard()
        self._timers, self._alarm = Timers(audit, clock, random), alarm
        self._on_turn = on_turn
        self._clock = clock
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not at the end of run(): other threads and signal handlers may still call stop().
        self._close_wake_fd = weakref.finalize(self, os.close, self._wake_fd)
        #: Can be read when a signal has come, -1 where none do (``process.signals``).
        self.signal_fd = -1
        self._inbox = Inbox(self._wake)
        self._watch: Watch | None = None
        self._stop = self._fresh = False
        self._following = False
        self._turn_due: float | None = None
        self._work = Work(
            dataplane,
            self._inbox,
            board=self.board,
            timers=self._timers,
            holding=holding or Holding(clock),
            grace=grace or Grace(clock),
            on_ready=on_ready,
            on_drift=on_drift,
            on_peers=on_peers,
            stopped=lambda: self._stop,
            wake=self._wake,
            chronicle=chronicle,
        )
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

    def nudge(self) -> None:
        """Have a turn of the loop now, for what ``on_turn`` does."""
        self._wake()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the node was ready once (see ``Status``). Return False on a timeout."""
        return self._work.ready.wait(timeout)

    @property
    def status(self) -> Status:
        """The agent's state."""
        return self.board.status

    def start(self) -> Agent:
        """Run on a thread of its own; ``join`` raises its error."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._run_quietly, name="flannel-dp-agent")
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
        """Work until ``stop``. Raises Busy when another instance holds a device (see
        ``DataPlane.hold``), NotPermitted when nothing may be written at the start;
        any other failure is a problem in the status and tried again; FlannelDPError where there
        is no memory for it, again and again."""
        self.plane.hold()
        self.board.set(started=time.time(), origin=self.source.origin, heartbeat=self._clock())
        follower = Worker(
            "source",
            lambda: self.source.follow(self._inbox),
            board=self.board,
            on_failure=self._source_failed,
        )
        try:
            with Watch(self.plane) as self._watch:
                self._work.watch = self._watch
                follower.start()
                try:
                    self._loop(follower)
                finally:
                    follower.stop()
                    self._inbox.stop()
                    follower.join(1.0)
        finally:
            self._work.flush(all=True)
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
                    self._work.problems.note("agent", None)
            except Exception as error:
                if isinstance(error, NotPermitted) and not self._work.ready.is_set():
                    raise
                try:
                    pause = failures.failed(error)
                    self._work.problems.note("agent", described(error))
                    self.board.set(failures=self.status.failures + 1)
                except MemoryError:
                    pause = failures.without_memory()
                if failures.out_of_memory:
                    raise _no_memory() from error
                self._pause(pause)

    def _pause(self, seconds: float) -> None:
        """Wait, unless ``stop`` comes first; the next turn reads everything again."""
        until = time.monotonic() + seconds
        poller = self._poller()
        while not self._stop and (left := until - time.monotonic()) > 0:
            self.board.set(heartbeat=self._clock())
            self._poll(poller, min(left, self._alarm or left))
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
        timeout = self._timers.seconds_left(*self._work.due, self._turn_due)
        if self._alarm is not None:
            timeout = self._alarm if timeout is None else min(timeout, self._alarm)
        poller = self._poller()
        if self._timers.pace.due() is None:
            poller.register(self._watch.fileno(), select.POLLIN)
        self._poll(poller, timeout)

    def _poller(self) -> select.poll:
        poller = select.poll()
        for fd in (self._wake_fd, self.signal_fd):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        return poller

    def _poll(self, poller: select.poll, timeout: float | None) -> None:
        for fd, _ in poller.poll(None if timeout is None else timeout * 1000):
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)
            elif fd == self.signal_fd:
                os.read(self.signal_fd, 4096)  # the handlers are called by now, or next

    def _turn(self) -> None:
        """Do once what has become necessary."""
        assert self._watch is not None
        self.board.set(heartbeat=self._clock())
        if self._fresh:
            self._fresh = False
            self._work.read_again()
        self._work.deliver()
        self._work.repair_drift()
        self._work.look_at_path()
        if self._timers.audit_due:
            self._work.audit()
        self._work.flush()
        self._call_on_turn()

    def _call_on_turn(self) -> None:
        seconds = self._on_turn()
        self._turn_due = None if seconds is None else self._clock() + seconds


def _no_memory() -> FlannelDPError:
    return FlannelDPError(
        "out of memory: the leases cannot be read or written; the kernel keeps forwarding",
        hint="give the agent more memory (MemoryMax= or ulimit -v) and start it again",
    )
