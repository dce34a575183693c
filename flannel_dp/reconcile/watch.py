"""Drift: changes of other programs to our tables and devices, seen in the kernel's events and
undone.

``Watch`` keeps one event socket. Of each event only the comparison with what is
wanted counts, so that it does not matter who wrote: an entry that is as desired is
an echo of our own. A key that differs is repaired alone, at a cost that does
not grow with their number. What events cannot say (a device that went
down takes its IPv4 routes with it in silence, a new MAC its neighbours, a
full queue anything) makes a family *dirty*: it is read again, and what is
missing is written.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from flannel_dp._core import Events, Watched
from flannel_dp.errors import KernelError, Overrun, require
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import open_netns
from flannel_dp.kernel.route_messages import parse_route
from flannel_dp.reconcile.drift import Blame, Drift, Repair, count_report, count_result, naming
from flannel_dp.reconcile.resource import FiltersChanged
from flannel_dp.reconcile.watchable import (
    DeviceState,
    Watchable,
    Written,
    address_of,
    compared,
    filter_of,
    scopes_of_events,
)
from flannel_dp.tables.entries import EventFilter

if TYPE_CHECKING:
    from flannel_dp.kernel.links import Address

log = logging.getLogger(__name__)

#: Bytes of events that may wait: a device with 30,000 neighbours goes down in one moment.
RCVBUF = 32 << 20

#: So many touched keys are repaired one by one; reading the table is cheaper for more.
_SPOTS = 512


class Watch:
    """Follows the kernel on behalf of one data plane, from the first ``sync`` on.

    For one thread, while others may use the data plane. ``fileno`` becomes readable
    when something happened; then ``read`` and, where it says so, ``repair``. Raises
    KernelError when the socket is unavailable.
    """

    def __init__(self, kept: Watchable, *, rcvbuf: int = RCVBUF) -> None:
        require(hasattr(kept, "reconciler"), "kept", kept, "a DataPlane or a Keeper")
        self._kept, self._host = kept, kept.reconciler.host
        self._filter = EventFilter(every_link=True)
        with open_netns(self._host.netns) as fd:
            self._events = Events(fd, self._filter, rcvbuf)
        self._views: list[tuple[int, Watched]] = []
        self._devices: dict[int, DeviceState] = {}
        #: The netlink ports of the programs that changed a device last, by its ifindex.
        self._ports: dict[int, int] = {}
        #: Devices whose filters or qdiscs came or went.
        self._filters_changed: set[int] = set()
        #: Families that have to be read again.
        self.dirty: set[int] = set()
        #: How often the kernel had to drop events, and how many were read.
        self.overruns = 0
        self.seen = 0
        #: Devices came, went or changed while something of ours could not be done.
        self.device_events_seen = False
        #: Policy rules, or routes that they have looked up before ours, came or went.
        self.path_changed = False
        kept.on_written.append(self._echo)

    def close(self) -> None:
        """Close the socket."""
        if self._echo in self._kept.on_written:
            self._kept.on_written.remove(self._echo)
        self._events.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """For select, poll and epoll."""
        return int(self._events.fileno())

    @property
    def pending(self) -> bool:
        """Whether there is something to repair. Events of a family that is out of sync wait for the
        next attempt to sync it, which reads it whole."""
        return bool(self.dirty) or any(self._touched().values())

    def _touched(self) -> dict[int, int]:
        """Return how many keys are touched, by family, of those that are in sync."""
        return {
            number: sum(view.touched for n, view in self._views if n == number)
            for number in self._kept.state
        }

    def progress(self, done: int, total: int) -> None:
        """A progress function for a large sync: takes its echoes before the queue is full."""
        self.read()

    def read(self) -> bool:
        """Read the events that have come; return True where there is something to repair."""
        with self._kept.exclusive:  # the tables must not change while they are compared
            self._watch_tables()
            self._read()
            return self.pending

    def _echo(self) -> None:
        """A pass wrote: what the kernel says of that is compared with what was wanted then."""
        self.read()

    def _read(self) -> None:
        watched = [view for _, view in self._views]
        while True:
            before = [(view.events, view.touched) for view in watched]
            try:
                count, messages = self._events.read(watched)
            except Overrun:
                self.overruns += 1
                self.mark_dirty()
                log.warning(
                    "Events of the kernel were lost, %(overruns)d times so far; everything "
                    "is read again",
                    {"overruns": self.overruns},
                )
                continue
            self.seen += count
            self._mark_routes(before)
            for kind, body, port in messages:
                try:
                    self._take_event(kind, body, port)
                except KernelError:  # not to be read: it may have said anything
                    self.mark_dirty()
            if not count:
                self._check_programs()
                return

    def _mark_routes(self, before: list[tuple[int, int]]) -> None:
        """Mark families whose nexthop objects went: their routes went without an event, also
        where the object is back already."""
        for (number, view), (events, touched) in zip(self._views, before, strict=True):
            if view.kind == "nexthop" and view.events - events > view.touched - touched:
                self.dirty.add(number)

    def mark_dirty(self, families: Iterable[int] | None = None) -> None:
        """Take nothing for granted any more: the next repair reads these families again."""
        self.dirty |= {*self._kept.known} if families is None else {*families}

    # ---- what is watched

    def _watch_tables(self) -> None:
        """Watch the tables that are wanted now; a family's tables are recreated by a sync."""
        wanted = [
            (resource.families[0], one)
            for resource in self._kept.reconciler.resources
            for one in resource.watched()
        ]
        same = len(wanted) == len(self._views) and all(
            view.table is one.table for (_, view), (_, one) in zip(self._views, wanted, strict=True)
        )
        if not same:
            before = {id(view.table): (number, view) for number, view in self._views}
            self._views = [
                before.pop(id(one.table))
                if id(one.table) in before
                else (n, Watched(one.table, scopes_of_events(one)))
                for n, one in wanted
            ]
            # What events said of a table that is no more was said before its successor
            # was compared with the kernel, or after.
            self.dirty |= {n for n, view in before.values() if view.touched} & {*self._kept.known}
        self._narrow_filter()

    def _narrow_filter(self) -> None:
        """Let the kernel send the events that concern us, and no others."""
        chosen = filter_of(self._kept, self._host.kernel.channel.port)
        if chosen != self._filter:
            self._events.set_filter(chosen)
            self._filter = chosen

    def remember(self) -> None:
        """Note the devices as they are after a sync; what changes from here on is drift.

        A device that is not as before may have been changed since: its families are read again.
        """
        with self._kept.exclusive:
            self._watch_tables()
            before, self._devices = self._devices, self._read_devices()
            for index in self._ours:
                was, now = before.get(index), self._devices.get(index)
                if was is None or now is None or not self._alike(was, now):
                    self._mark_device(index, self._kept.state)

    def _read_devices(self) -> dict[int, DeviceState]:
        found: dict[int, DeviceState] = {}
        with LinkReader(self._host.netns) as reader:
            for index in self._ours:
                try:
                    link = reader.link(index)
                    addresses = reader.addresses(index) if link else []
                except KernelError:  # it went away between the two
                    continue
                if link:
                    found[index] = DeviceState(link, frozenset(map(address_of, addresses)))
        return found

    def _take_event(self, kind: int, body: bytes, port: int) -> None:
        """One event about a device, an address, a policy rule or a route of another table."""
        if kind in nl.PROGRAMS:
            self._filters_changed.add(nl.parse_device_of_program(body, "read an event"))
            return
        what = "read an event"
        if kind in nl.RULES:
            self.path_changed = True
            return
        if kind in (nl.RTM_NEWROUTE, nl.RTM_DELROUTE):
            self.path_changed |= self._may_divert(body, what)
            return
        if kind in (nl.RTM_NEWADDR, nl.RTM_DELADDR):
            address = nl.parse_address((nl.RTM_NEWADDR, body), what)
            if address.index not in self._ours:
                self._mark_rival(address)
                self.device_events_seen |= self._filter.every_link
                return
            self.device_events_seen = True
            device = self._devices.get(address.index)
            known = device is not None and address_of(address) in device.addresses
            if known != (kind == nl.RTM_NEWADDR):
                self._mark_device(address.index, port=port)
            return
        self.device_events_seen = True
        link = nl.parse_link((kind, body), what)
        device = self._devices.get(link.index)
        if device is None:
            return
        if kind == nl.RTM_DELLINK or not self._alike(device._replace(link=link), device):
            self._mark_device(link.index, port=port)

    @property
    def _ours(self) -> tuple[int, ...]:
        """The devices that are watched whatever happens to them."""
        return (*self._filter.tunnels, *self._filter.uplinks)

    def _mark_rival(self, address: Address) -> None:
        """Another device got or lost an address in the network. One in a peer's subnet decides
        whether the peer's lease is accepted; those in this node's subnet are pods' business."""
        family = self._kept.known.get(address.family)
        there = ip_address(address.address)
        if family is None or there not in ip_network(family.network):
            return
        if there not in ip_network(family.subnet):
            self.mark_dirty([address.family])

    def _may_divert(self, body: bytes, what: str) -> bool:
        """Return whether a route of another table than main is any other's than one to a pod of
        this node, as some plugins have one for each."""
        route = parse_route((nl.RTM_NEWROUTE, body), what)
        target = nl.address_text(route.attrs.get(nl.RTA_DST))
        if target is None:
            return True
        there = ip_address(target)
        family = self._kept.known.get(there.version)
        return family is None or there not in ip_network(family.subnet)

    def _check_programs(self) -> None:
        """Read the filters of devices whose filters or qdiscs came or went, once for all events."""
        changed, self._filters_changed = self._filters_changed, set()
        for index in changed & {*self._filter.tunnels}:
            try:
                if self._kept.reconciler.concerned(FiltersChanged(index)):
                    self._mark_device(index, self._kept.state)
            except KernelError:  # not to be seen: anything may have become of it
                self.mark_dirty()

    def _alike(self, one: DeviceState, other: DeviceState) -> bool:
        ours = other.link.index in self._filter.tunnels
        same = compared(one.link, ours) == compared(other.link, ours)
        return same and one.addresses == other.addresses

    def _mark_device(
        self, index: int, families: Mapping[int, Written] | None = None, *, port: int = 0
    ) -> None:
        if port:
            self._ports[index] = port
        chosen = self._kept.known if families is None else families
        self.mark_dirty(number for number, family in chosen.items() if index in family.devices)

    # ---- repair

    def repair(self) -> Repair:
        """Undo what ``read`` found. Raises as ``DataPlane.resync``."""
        started = time.perf_counter()
        repair = Repair()
        with self._kept.exclusive:
            touched = self._touched()
            if sum(touched.values()) > _SPOTS:
                self.mark_dirty(number for number, count in touched.items() if count)
            if not self.dirty:
                self._repair_entries(repair)
            if self.dirty:
                self._resync(repair)
        repair.seconds = time.perf_counter() - started
        return repair

    def _repair_entries(self, repair: Repair) -> None:
        """Entries one by one, from what the events said of them."""
        for number, family in self._kept.state.items():
            views = [view for n, view in self._views if n == number]
            _orphan(views)
            blame = Blame((number, view) for view in views)
            diffs = [view.take() for view in views]
            if not any(len(diff) or diff.conflicts() for diff in diffs):
                continue
            results = self._host.kernel.apply(diffs, tags=len(family.peers))
            if any(r.counts()["failed"] or r.diff.conflicts() for r in results):
                self.dirty.add(number)  # the kernel is not as the events made it look
            for result in results:
                count_result(repair, blame, number, result)
        self._kept.written()

    def _resync(self, repair: Repair) -> None:
        """Whole families, read again."""
        families = {*self.dirty}
        self.dirty.clear()
        self.device_events_seen = False
        try:
            with self.naming(repair):
                for number, view in self._views:
                    if number in families:
                        view.forget()  # the tables are read now
                report = self._kept.resync(families, host=False, progress=self.progress)
        except BaseException:
            self.dirty |= families
            raise
        self.dirty -= families & {*report.family_errors}  # the caller decides when to try again
        changed = any(device.action != "none" for device in report.devices)
        self.remember()
        if changed:
            # What the kernel said of the device since may be our doing or another
            # program's; reading once more decides.
            self.dirty |= families & {*self._kept.state}
        count_report(repair, report)

    def naming(self, repair: Repair) -> AbstractContextManager[None]:
        """Name in ``repair`` the entries that a pass within the block writes."""
        devices, ports = self._devices, self._ports
        repair.ports = {devices[at].link.name: ports[at] for at in {*ports} & {*devices}}
        self._ports = {}
        return naming(repair, self._host, self._views)


def watch(kept: Watchable, *, timeout: float | None = None) -> Iterator[Drift]:
    """See ``DataPlane.watch``."""
    with Watch(kept) as watching:
        watching.remember()
        watching.mark_dirty()  # what happened since the last sync was not seen
        poller = select.poll()
        poller.register(watching.fileno(), select.POLLIN)
        while True:
            while watching.read():
                yield from watching.repair().drifts()
            if not poller.poll(None if timeout is None else timeout * 1000):
                return


def _orphan(views: list[Watched]) -> None:
    nexthops = [view for view in views if view.kind == "nexthop" and view.touched]
    for nexthop in nexthops:
        for view in views:
            if view.kind == "route":
                view.orphan(nexthop)
