"""Look on while others work: the overlay as it is, and what happens to it, without leases.

For ``flannel-dp show --watch``, which may run beside an agent. What the kernel held at
the last look stands for what is wanted, so that every event is a change against it.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flannel_dp._core import ADD, REMOVE, Events, Watched
from flannel_dp.errors import KernelError, Overrun
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.netns import open_netns
from flannel_dp.look.held import FamilyReader
from flannel_dp.look.live_turns import DriftLine
from flannel_dp.look.show import Overview, show
from flannel_dp.tables.describe import describe
from flannel_dp.tables.entries import Entry, EventFilter, Neighbour

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Leases
    from flannel_dp.look.overlay import Overlay

_CHANGES = {ADD: "deleted", REMOVE: "added"}

#: The state of a neighbour that is being deleted (linux/neighbour.h).
_NUD_FAILED = 0x20

#: So many messages are read before the caller has its turn again.
_MOST = 4096


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

    def fileno(self) -> int:
        """Return the descriptor that is readable when there are events."""
        return self._events.fileno()

    def events(self, timeout: float | None) -> list[DriftLine]:
        """Return what happened within ``timeout`` seconds, in the kernel's order; return as soon as
        something did.

        Messages are read one by one, so that what was deleted and added again are two events, even
        where both were waiting.
        """
        poller = select.poll()
        poller.register(self._events.fileno(), select.POLLIN)
        poller.poll(None if timeout is None else max(0.0, timeout) * 1000)
        watched = [view for _, view in self._views]
        found: list[DriftLine] = []
        for _ in range(_MOST):
            try:
                count, messages = self._events.read(watched, most=1)
            except Overrun:
                for view in watched:
                    view.forget()
                return [*found, DriftLine(time.time(), 0, "", "overrun", "events were lost")]
            if not count:
                break
            found += self._of_tables(time.time())
            for kind, body, _ in messages:
                if kind in (nl.RTM_NEWLINK, nl.RTM_DELLINK):
                    told = _link(kind, body)
                    found += [DriftLine(time.time(), 0, "device", "link", text) for text in told]
        return found

    def _of_tables(self, now: float) -> Iterator[DriftLine]:
        """Yield what one message says of the tables."""
        for number, nexthops in self._views:
            if nexthops.kind != "nexthop" or not nexthops.touched:
                continue
            for other, routes in self._views:
                if routes.kind == "route" and other == number:
                    routes.orphan(nexthops)  # the kernel has no event for these
        for number, view in self._views:
            if view.touched:
                for change, what in self._told(view):
                    yield DriftLine(now, number, view.kind, change, what)

    def _told(self, view: Watched) -> list[tuple[str, str]]:
        """Return what changed in one table, which from then on is as the kernel has it: an entry
        that comes back is another change."""
        diff = view.take()
        told = []
        for number in range(len(diff)):
            op, before, now = diff.operation(number)
            if isinstance(now, Neighbour) and now.state & _NUD_FAILED:
                op, now = ADD, None  # the first of the kernel's two messages about a deletion
            entry = now if before is None else before
            assert entry is not None
            what = self._key(entry)
            if before is not None and now is not None:
                what += f", now {self._key(now).partition(' ')[2]}"
            told.append((_CHANGES.get(op, "changed"), what))
            if before is not None:
                view.table.discard(before)
            if now is not None:
                view.table.add(now)
        told += [("foreign", self._key(taken)) for _, taken in diff.conflicts()]
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
