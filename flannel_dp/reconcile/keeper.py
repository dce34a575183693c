"""Keep tables of one's own true: written once, and restored whenever another program changes them.

For programs with peers of their own and no flannel leases. It is the watch of a data plane
(:mod:`flannel_dp.reconcile.watch`) over tables in the place of a cluster's leases: an event socket,
no polling, and repairs of single entries.
"""

from __future__ import annotations

import os
import select
from collections.abc import AsyncIterator, Iterable, Iterator

from flannel_dp._core import Table
from flannel_dp.errors import ConfigError, require
from flannel_dp.kernel.tables import Kernel
from flannel_dp.reconcile.drift import Repair
from flannel_dp.reconcile.kept_tables import KeptTables
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.watch import Watch
from flannel_dp.tables.entries import Entry, Scope


class Keeper:
    """Keeps ``wanted`` tables in the kernel, within ``scope``, until it is closed.

    A context manager, which :func:`keep` makes. Entering writes what is missing, changes what
    differs and removes what is in the scope and not wanted (``report`` says what); after that

    * ``for repair in kept`` (and ``async for``) waits for the kernel's events, undoes what other
      programs do to the entries, and yields each :class:`Repair`;
    * ``kept.update(added, removed)`` changes what is wanted, at a cost that follows the change.

    ``update``, ``resync`` and ``stop`` may be called from any thread. The kernel object is the
    caller's and stays open. What a program writes through the same kernel object beside the
    keeper is not seen as drift.

    ``ip monitor`` and ``bridge monitor`` show the events.
    """

    def __init__(
        self,
        kernel: Kernel,
        wanted: Table | Iterable[Table],
        scope: Scope | Iterable[Scope],
        *,
        timeout: float | None = None,
    ) -> None:
        require(isinstance(kernel, Kernel), "kernel", kernel, "a Kernel")
        fits = timeout is None or (isinstance(timeout, (int, float)) and timeout >= 0)
        require(fits, "timeout", timeout, "seconds or None")
        self._kept, self._timeout = KeptTables(kernel, wanted, scope), timeout
        #: What the last writing of all tables did: on entering, and by ``resync``.
        self.report = Report()
        self._watch: Watch | None = None
        self._calls, self._stopped = -1, False

    # ---- life

    def __enter__(self) -> Keeper:
        self._calls = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watch = Watch(self._kept)
        try:
            self._watch.remember()
            self._watch.dirty.clear()  # all is read now, and what happens from here on is seen
            self.resync()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop following events. The entries stay in the kernel."""
        self.stop()
        with self._kept.exclusive:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
            if self._calls >= 0:
                os.close(self._calls)
                self._calls = -1

    def stop(self) -> None:
        """Have the loop over repairs end, from any thread."""
        with self._kept.exclusive:
            self._stopped = True
            if self._calls >= 0:
                os.eventfd_write(self._calls, 1)

    # ---- repairs

    def __iter__(self) -> Iterator[Repair]:
        """Wait for drift, undo it, and yield what was done; end with ``stop``, and after
        ``timeout`` seconds without any. Raises KernelError, and Unsupported as ``Kernel.diff``."""
        watch, poller = self._watching(), select.poll()
        poller.register(watch.fileno(), select.POLLIN)
        poller.register(self._calls, select.POLLIN)
        while not self._stopped:
            while (repair := self._turn()) is not None:
                yield repair
            if not poller.poll(None if self._timeout is None else self._timeout * 1000):
                return

    async def __aiter__(self) -> AsyncIterator[Repair]:
        """The same in asyncio: nothing waits but the event loop's own selector."""
        import asyncio

        watch, woken = self._watching(), asyncio.Event()
        loop, descriptors = asyncio.get_running_loop(), (watch.fileno(), self._calls)
        for one in descriptors:
            loop.add_reader(one, woken.set)
        try:
            while not self._stopped:
                while (repair := self._turn()) is not None:
                    yield repair
                woken.clear()
                try:
                    await asyncio.wait_for(woken.wait(), self._timeout)
                except TimeoutError:
                    return
        finally:
            for one in descriptors:
                loop.remove_reader(one)

    def _turn(self) -> Repair | None:
        """Read the events that have come; repair, and return what was done, None for nothing."""
        while not self._stopped and self._watching().read():
            repair = self._watching().repair()
            if repair.counts or (repair.report is not None and not repair.report.ok):
                return repair
        return None

    # ---- changes

    def update(self, added: Iterable[Entry] = (), removed: Iterable[Entry] = ()) -> Report:
        """Change what is wanted: ``added`` are new and changed entries, ``removed`` entries of
        which only the key counts (the MAC of an FDB entry, and in a flood list the destination; the
        prefix of a route).

        Nothing is read, and the cost follows the change. ``Report.unknown`` has what was to be
        removed and is not wanted. Raises ConfigError for an entry of a kind that is not kept,
        NotPermitted, KernelError.
        """
        newcomers, leaving = [*added], [*removed]
        with self._kept.exclusive:
            watch = self._watching()
            report, other_devices = self._kept.update(newcomers, leaving)
            if other_devices:
                watch.remember()
        return report

    def resync(self) -> Report:
        """Read all tables and write what differs, as entering does; returns ``report``.

        For a program that has reasons of its own to doubt (an audit). Raises as ``Kernel.diff`` and
        ``Kernel.apply``.
        """
        with self._kept.exclusive:
            self._watching()
            self.report = self._kept.resync()
            return self.report

    def _watching(self) -> Watch:
        if self._watch is None:
            raise ConfigError(
                "the keeper is not open", hint="use it in a with statement: with keep(...) as kept"
            )
        return self._watch


def keep(
    kernel: Kernel,
    wanted: Table | Iterable[Table],
    scope: Scope | Iterable[Scope],
    *,
    timeout: float | None = None,
) -> Keeper:
    """Return a context manager that keeps ``wanted`` tables in the kernel, within ``scope``.

    ``wanted`` is one table or one of each kind, ``scope`` one scope or several, each for the table
    of its kind. The tables are copied. ``timeout`` ends a loop over the repairs after so many
    seconds without events (None: never). ::

        with keep(kernel, fdb_table("vxlan0", peers), fdb_scope("vxlan0")) as kept:
            for repair in kept:
                print(repair)

    Raises ConfigError for a table without a scope, Unsupported for what the kernel has no events
    for (peers in a BPF map, routes of other tables than main) and for more than 8 devices.
    """
    return Keeper(kernel, wanted, scope, timeout=timeout)
