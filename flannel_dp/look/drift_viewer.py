"""Look on while others work: the overlay as it is, and what happens to it, without leases.

For ``flannel-dp show --watch``, which may run beside an agent. What the kernel held at
the last look stands for what is wanted, so that every event is a change against it.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from flannel_dp._core import ADD, REMOVE, Events, Watched
from flannel_dp.errors import KernelError, Overrun
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.netns import open_netns
from flannel_dp.look.held import FamilyReader
from flannel_dp.look.live_turns import DriftLine
from flannel_dp.look.show import Overview, show
from flannel_dp.tables.describe import describe
from flannel_dp.tables.entries import Entry, EventFilter

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Leases
    from flannel_dp.look.overlay import Overlay

_CHANGES = {ADD: "deleted", REMOVE: "added"}

#: Of one burst, so many entries are named.
_NAMED = 100


class DriftViewer:
    """Reads and never writes. A context manager; raises KernelError when it cannot listen."""

    def __init__(self, overlay: Overlay, leases: Leases | None = None) -> None:
        self._overlay, self._leases = overlay, leases
        with open_netns(overlay.host.netns) as fd:
            self._events = Events(fd, EventFilter(every_link=True))
        self._names: dict[int, str] = {}
        self._views: list[tuple[int, Watched]] = []

    def __enter__(self) -> DriftViewer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._events.close()

    def read(self) -> Overview:
        """Return the overlay now; what happens from here on is a change against it."""
        overlay = self._overlay
        readers = [FamilyReader.of(overlay, number) for number in overlay.families]
        with overlay.host.links() as links:
            self._names = {link.index: link.name for link in links.links()}
        self._events.set_filter(
            EventFilter(
                tunnels=tuple(one.index for one in readers if one.index),
                networks=tuple(one.network for one in readers),
                every_link=True,
            )
        )
        held = [one.held() for one in readers]
        self._views = [
            (one.number, Watched(read.table, read.scopes))
            for one in held
            for read in one.tables
            if read.has_events
        ]
        return show(overlay, self._leases, held)

    def events(self, timeout: float | None) -> list[DriftLine]:
        """Return what happened within ``timeout`` seconds; returns as soon as something did."""
        poller = select.poll()
        poller.register(self._events.fileno(), select.POLLIN)
        poller.poll(None if timeout is None else max(0.0, timeout) * 1000)
        now = time.time()
        try:
            _, messages = self._events.read([view for _, view in self._views])
        except Overrun:
            for _, view in self._views:
                view.forget()
            return [DriftLine(now, 0, "", "overrun", "events were lost")]
        found = [
            DriftLine(now, number, view.kind, change, what)
            for number, view in self._views
            if view.touched
            for change, what in self._told(view)
        ]
        for kind, body in messages:
            if kind in (nl.RTM_NEWLINK, nl.RTM_DELLINK):
                found += [DriftLine(now, 0, "device", "link", text) for text in _link(kind, body)]
        return found

    def _told(self, view: Watched) -> list[tuple[str, str]]:
        """Return what changed in one table, which from then on is as the kernel has it: an entry
        that comes back is another change."""
        diff = view.take()
        told = []
        changes = [diff.operation(number) for number in range(len(diff))]
        for op, before, now in changes[:_NAMED]:
            entry = now if before is None else before
            assert entry is not None
            told.append((_CHANGES.get(op, "changed"), self._key(entry)))
        if len(diff) > _NAMED:
            told.append(("changed", f"and {len(diff) - _NAMED} more"))
        told += [("foreign", self._key(taken)) for _, taken in diff.conflicts()]
        for _, before, now in changes:
            if before is not None:
                view.table.discard(before)
            if now is not None:
                view.table.add(now)
        return told

    def _key(self, entry: Entry) -> str:
        """Return an entry without the name of its table."""
        return describe(entry, self._names).partition(" ")[2]


def _link(kind: int, body: bytes) -> list[str]:
    try:
        link = nl.parse_link((kind, body), "read an event")
    except KernelError:
        return []
    if kind == nl.RTM_DELLINK:
        return [f"{link.name} is gone"]
    state = "up" if link.up else "down"
    return [f"{link.name} is {state}, mtu {link.mtu}, mac {link.mac}"]
