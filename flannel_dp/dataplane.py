"""One node's overlay, kept equal to a cluster's leases: the face of the library.

leases -> view of this node -> resources compared -> guarded -> applied -> report
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from msgspec.structs import asdict

from flannel_dp.cluster.lease import Identity, Lease, LeaseList
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.composition import Parts
from flannel_dp.errors import SourceError
from flannel_dp.kernel.netns import NetNS
from flannel_dp.kernel.tables import Kernel, Progress, timed
from flannel_dp.node.family import Family, View
from flannel_dp.node.view import Leases, count_leases
from flannel_dp.notices import about_node, full_neighbours
from flannel_dp.options import Keywords, Options
from flannel_dp.reconcile.plan import Plan
from flannel_dp.reconcile.reconciler import AnyResource, Pass, Reconciler
from flannel_dp.reconcile.report import Report, merge_devices
from flannel_dp.resources.device.resource import DeviceDifference, Unfinished
from flannel_dp.resources.forwarding import convert
from flannel_dp.resources.peers.brake import Brake, Names
from flannel_dp.resources.peers.resource import PeersChange
from flannel_dp.resources.peers.state import State
from flannel_dp.resources.peers.update import prepare

if TYPE_CHECKING:
    from flannel_dp.look.explain import Explanation
    from flannel_dp.reconcile.drift import Drift

log = logging.getLogger(__name__)

#: Resources that belong to the node as a whole, which ``resync(host=False)`` leaves out.
_HOST = frozenset({"firewall", "subnet file"})

#: Resources that a plan does not show, and so need not be able to read.
_NOT_PLANNED = frozenset({"subnet file", "counters"})


class DataPlane:
    """The overlay of one node.

    ``config`` is the network; ``iface`` the external interface (names or
    addresses, the first that is there; or ``iface_regex``, ``iface_can_reach``;
    default: that of the public address, the one in use, or of the default route), ``public_ip``
    and ``public_ipv6`` the addresses this node's lease was published with
    (default: the interface's; with ``behind_nat`` they need not be on this
    node), ``subnet`` this node's subnet, which no lease overrules ("10.244.3.0/24", or one of
    each family separated by a comma), ``node_name`` the name of this node's lease where the
    cluster gives it one (Kubernetes), ``netns`` the namespace (default: the caller's).
    ``take_over`` replaces a foreign device of our name, ``allow_shrink`` lets
    a sync remove all or nearly all peers, ``nexthops=False`` writes plain gateway routes.
    ``rules`` are the firewall rules to keep (default: none are touched), and
    ``subnet_file`` is the subnet.env to keep, which also remembers the subnet.
    ``ip_blackhole_route`` drops packets to the own subnet that no pod takes (False: no
    longer; None: not looked at). ``room`` is how many peers of a family a program that
    forwards has room for (0: as many as there are). ``counters`` counts packets per peer in the
    kernel (False: no longer; None: whatever there is stays).

    ``resources`` are more things to keep on this node (:mod:`flannel_dp.reconcile.resource`).

    Nothing is touched before the first ``sync``. Methods may be called from
    any thread; one at a time does its work, without the GIL where it is the
    kernel's.
    """

    def __init__(
        self,
        config: NetworkConfig,
        *,
        resources: Sequence[AnyResource] = (),
        **keywords: Unpack[Keywords],
    ) -> None:
        self.config, self.options, self._more = config, Options(**keywords), tuple(resources)
        options = self.options
        self._lock = threading.RLock()
        parts = Parts(config, options, self._lock, resources)
        self.host, self.forwarder, self.resolver = parts.host, parts.forwarder, parts.resolver
        self.counters, self.counting = parts.counters, parts.counting
        self.peers, self.firewall, self._parts = parts.peers, parts.firewall, parts
        self.reconciler = Reconciler(self.host, parts.resources())
        self.brake = Brake(config, self._with_kept, self.peers, self._peers_in_kernel)
        self.cooldown = convert.Cooldown()
        #: Whether a sync may remove all or nearly all peers.
        self.allow_shrink = options.allow_shrink
        #: Called, with the lock held, after each method that wrote to the kernel.
        self.on_written: list[Callable[[], None]] = []
        self._warned = False

    def __enter__(self) -> DataPlane:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets. The kernel keeps forwarding; nothing is removed."""
        with self._lock:
            self.host.close()
            self.forwarder.close()

    def sibling(self, config: NetworkConfig) -> DataPlane:
        """A data plane of this node with another configuration."""
        return DataPlane(config, resources=self._more, **asdict(self.options))

    @property
    def netns(self) -> NetNS:
        """The network namespace."""
        return self.options.netns

    @property
    def kernel(self) -> Kernel:
        """The tables of the namespace, opened when first needed."""
        return self.host.kernel

    @property
    def families(self) -> tuple[int, ...]:
        """The families that are switched on: 4, 6 or both."""
        return self.resolver.families

    @property
    def nexthops(self) -> bool | None:
        """Whether IPv4 routes use nexthop objects; None where the kernel has none (asked once)."""
        return self.host.nexthops

    @property
    def known(self) -> dict[int, State]:
        """What was written of each family (4, 6) that was ever synced."""
        return {n: one.state for n, one in self.peers.items() if one.state is not None}

    @property
    def state(self) -> dict[int, State]:
        """What was written of each family that is in sync."""
        return {n: one for n, one in self.known.items() if self.peers[n].in_sync}

    @property
    def watches_filters(self) -> bool:
        """Whether filters of the devices matter: a program forwards or counts."""
        return self.forwarder.watches_filters or bool(self.options.counters)

    @property
    def exclusive(self) -> threading.RLock:
        """The lock that one method at a time holds, for what has to go together."""
        return self._lock

    def identity(self) -> Identity:
        """What this node has to publish so that others reach it. ConfigError as ``sync``."""
        return self.resolver.identity()

    # ---- a pass over all of it

    def plan(self, leases: Leases) -> Plan:
        """What ``sync`` would do with these leases. Reads, never writes.

        Where a device has yet to be made, its entries are shown on ``if0``. Peers
        that ``sync`` would keep are not shown as removed; a warning tells of them.
        Raises as ``sync`` (except ShrinkRefused), and KernelError when the
        tables cannot be read.
        """
        with self._lock, self.host.looking():
            checked = self.forwarder.check()
            leases = leases if isinstance(leases, LeaseList) else [*leases]
            known = [state.family for state in self.known.values()]
            view = self.resolver.resolve(leases, known=known, purpose="plan")
            self._probe(True)
            found = self._planned(view)
            kept = None if self.allow_shrink else self.brake.check(leases, view, found)
            if kept:
                view = kept.view
                found = self._planned(view)
            held = kept.refusal(planned=True) if kept else None
            report = self._told(view, found)
            changes = found.changes
            peers = [one for one in changes.values() if isinstance(one, PeersChange)]
            unread = map(str, report.problems.values())
            return Plan(
                tuple(table for one in peers for table in one.tables),
                report.devices,
                view.rejections(),
                (*((str(held),) if held else ()), *report.warnings, *unread),
                report.rules,
                checked,
                {
                    one.name: [*changes[one.name].lines()]
                    for one in self._more
                    if one.name in changes
                },
            )

    def _planned(self, view: View) -> Pass:
        """Compare everything. What cannot be read is an error, as a plan is whole; only of
        subnet.env and counters, of which it shows nothing, it is a warning."""
        found = self.reconciler.compare(view)
        for name, error in found.failed().items():
            if name not in _NOT_PLANNED:
                raise error
        return found

    def sync(
        self,
        leases: Leases,
        *,
        progress: Progress | None = None,
        keep: bool = False,
        confirmed: Names | None = None,
        probe: bool = False,
    ) -> Report:
        """Make the kernel agree with exactly these leases.

        Level-triggered: whatever is there is the start, what is stale is
        removed, what is right is not written. ``leases`` are the whole cluster,
        this node included. ``progress(done, total)`` is called now and then. With
        ``probe`` rules of others that stop packets are looked for also where no rule
        of ours had to be written (``Report.blockers``).

        Peers that the list lacks are kept where these are all or nearly all (all
        but one of three or more; over half and over ten), unless ``allow_shrink``
        was given, and with ``keep`` whenever there is one. Then all else is done,
        and ShrinkRefused is raised, with the report. What is kept is part of the
        state, as if it was still in the list, until a later sync. ``confirmed`` are
        names of peers, by family, that are removed in any case.

        Raises SourceError without an own lease or subnet, ConfigError and Conflict
        for an interface or device that cannot be used, NotPermitted without
        CAP_NET_ADMIN; then nothing was written. What fails for one family or entry
        only is in the report.
        """
        with self._lock:
            started = time.perf_counter()
            report = Report()
            leases = leases if isinstance(leases, LeaseList) else [*leases]
            self._stay_in_mode(leases)
            known = [state.family for state in self.known.values()]
            with self.host.reading_ahead() as ahead:
                with timed(report.seconds, "desired"):
                    view = self.resolver.resolve(leases, self._read_ahead(leases), known)
                self._probe(probe)
                found = self.reconciler.compare(view)
                report.seconds["snapshot"] += ahead.waited
            kept = None
            if keep or not self.allow_shrink:
                kept = self.brake.check(leases, view, found, every=keep, confirmed=confirmed)
            if kept:
                view = kept.view
                found = self.reconciler.compare(view)
            self.brake.note(view, kept)
            try:
                self._apply(found, view, report, progress)
            except Unfinished as error:
                self._go_back(leases, error.reason)
                raise error.reason from error
            report.looked |= {"kernel", "entries"} | self._nothing_to_see()
            if not self._warned:
                report.warnings += full_neighbours(view, found)
                self._warned = True
            self._complete(report, started)
            if kept:
                kept.refuse(report)
            return report

    def resync(
        self,
        families: Iterable[int] | None = None,
        *,
        host: bool = True,
        progress: Progress | None = None,
        probe: bool = False,
    ) -> Report:
        """Make the kernel agree with the leases of the last ``sync`` and ``update`` again.

        For ``families`` (4, 6; default: all), on the node as it is now: a device that
        is gone is made again, an external interface that came back is found. Without
        ``host`` firewall rules and subnet.env are not looked at; ``probe`` as in ``sync``.
        Nothing is written where all is right. Raises as ``sync``; SourceError before the first one.
        """
        with self._lock:
            started = time.perf_counter()
            if self.cooldown.reason:
                raise self.cooldown.reason
            chosen = [n for n in self.known if families is None or n in [*families]]
            if not chosen:
                raise SourceError("there is nothing to sync again", hint="call sync() first")
            report = Report()
            with self.host.reading_ahead() as ahead:
                for number in chosen:
                    self.peers[number].read_again(self.host)
                with timed(report.seconds, "desired"):
                    view = self.resolver.again(self.known[number].family for number in chosen)
                self._probe(probe)
                found = self.reconciler.compare(view, self._serving(chosen, host=host))
                report.seconds["snapshot"] += ahead.waited
            try:
                self._apply(found, view, report, progress)
            except Unfinished as error:  # the leases are not at hand: a sync goes back
                raise error.reason from error
            if {*chosen} == {*self.families}:
                report.looked |= {"kernel", "entries"}
            if host:
                report.looked |= self._nothing_to_see()
            self._complete(report, started)
            return report

    def _nothing_to_see(self) -> set[str]:
        """The kinds of problems of resources that were not asked for: there are none."""
        composed = {one.name for one in self.reconciler.resources}
        absent = {*_HOST - composed}
        return absent | {"forwarding"} if self.firewall is None else absent

    def _serving(self, families: Sequence[int], *, host: bool) -> list[str]:
        """The resources of these families, and of the node where that is asked for."""
        return [
            one.name
            for one in self.reconciler.resources
            if (not one.families or {*one.families} & {*families})
            and (host or one.name not in _HOST)
        ]

    def _apply(self, found: Pass, view: View, report: Report, progress: Progress | None) -> None:
        """Write what was compared, and fill the report."""
        replaced = [
            name
            for one in found.changes.values()
            if isinstance(one, DeviceDifference)
            for name in one.goes
        ]
        convert.check_failing(self.host, replaced, view.errors)
        for number in view.errors:
            self.peers[number].in_sync = False
        self.host.progress = progress
        try:
            self.reconciler.apply(found, view)
        finally:
            self.host.progress = None
        report.rejected = view.rejections()
        report.family_errors.update(view.errors)
        report.add(self._told(view, found))

    def _told(self, view: View, found: Pass) -> Report:
        """What every resource says of a pass."""
        report = Report(warnings=about_node(view, self.config))
        for one in self.reconciler.resources:
            if one.name in found.done:
                one.record(report, found.changes.get(one.name), found.done[one.name])
        report.looked |= {one.name for one in self._more if one.name in found.changes}
        for number, error in report.family_errors.items():
            if number not in view.errors:
                log.error("family=%d sync failed: %s", number, error)
        return report

    def _complete(self, report: Report, started: float) -> None:
        report.looked |= {"counters", "program"}
        self.written()
        if len(report.family_errors) == len(self.families):
            raise next(iter(report.family_errors.values()))
        report.seconds["total"] = time.perf_counter() - started

    def written(self) -> None:
        """Tell those who watch that what was written is what is wanted now."""
        for told in self.on_written:
            told()

    def _probe(self, wanted: bool) -> None:
        if self.firewall:
            self.firewall.probe = wanted

    def _read_ahead(self, leases: Leases) -> Callable[[int, int, int], None]:
        """Begin to read a family's tables while its leases are judged."""
        count = count_leases(leases)

        def start(number: int, device: int, uplink: int) -> None:
            self.peers[number].read_ahead(self.host, device, uplink, count)

        return start

    # ---- the mode of forwarding

    def _stay_in_mode(self, leases: Leases) -> None:
        """Where a change of the mode failed a short while ago: sync the mode that is there, and
        raise what it failed with. The device stays."""
        reason = self.cooldown.reason
        if reason is not None:
            convert.go_back(self.config, self._sync_other(leases), reason)
            raise reason

    def _go_back(self, leases: Leases, error: Any) -> None:
        """The new device could not be made, and the old one is gone."""
        log.error("forwarding=%s failed, going back: %s", self.config.backend.forwarding, error)
        self.cooldown.begin(error)
        convert.go_back(self.config, self._sync_other(leases), error)

    def _sync_other(self, leases: Leases) -> Callable[[NetworkConfig], bool]:
        from flannel_dp.errors import ShrinkRefused

        def sync(config: NetworkConfig) -> bool:
            try:
                with self.sibling(config) as other:
                    return other.sync(leases).ok
            except ShrinkRefused as held:  # what the list lacks is kept, and all else is done
                return held.report is not None and held.report.ok

        return sync

    # ---- the brake

    def _with_kept(self, leases: LeaseList) -> View:
        known = [state.family for state in self.known.values()]
        return self.resolver.resolve(leases, known=known)

    def _peers_in_kernel(self, number: int, converts: bool) -> Iterator[tuple[str, str, str]]:
        """Subnet, endpoint and MAC ("" for a direct route) of each complete peer there is; those
        of the other mode of forwarding where the device ``converts``."""
        from flannel_dp.look.held import FamilyReader

        if converts:
            with self.sibling(convert.other_mode(self.config)) as other:
                yield from FamilyReader.of(other, number).held().reached()
        else:
            yield from FamilyReader.of(self, number).held().reached()

    # ---- changes

    def update(self, added: Iterable[Lease] = (), removed: Iterable[Lease | str] = ()) -> Report:
        """Apply a change of the cluster; the cost follows the change, not the cluster.

        Edge-triggered: what the last ``sync`` or ``update`` wrote is taken to be
        there. ``added`` are new or changed leases, ``removed`` leases or their
        keys ("10.244.7.0-24") or names. The outcome is that of a ``sync`` with
        the resulting set. Raises SourceError before the first ``sync`` and when
        the own lease changes, KernelError.
        """
        with self._lock:
            started = time.perf_counter()
            if not self.state:
                raise SourceError(
                    "update() needs a state to change", hint="call sync() with all leases first"
                )
            added, removed = [*added], [*removed]
            removed += self.brake.yields(added, removed)
            try:
                report = self._update(added, removed)
            finally:
                self.brake.forget_removed()
                self.written()
            report.seconds["total"] = time.perf_counter() - started
            return report

    def _update(self, added: list[Lease], removed: list[Lease | str]) -> Report:
        from flannel_dp.cluster import admission

        report = Report()
        orphans = [n for n, lease in enumerate(added) if not (lease.subnet or lease.ipv6_subnet)]
        rejected = admission.form_rejections([], added, orphans)
        for state in self.state.values():
            with timed(report.seconds, "desired"):
                change = prepare(state, added, removed, pack=self.resolver.pack, host=self.host)
            rejected += change.rejected
            for name, outcome in self.reconciler.update(change).items():
                self.reconciler[name].record(report, None, outcome)
        report.rejected = rejected
        return report

    def watch(self, *, timeout: float | None = None) -> Iterator[Drift]:
        """Undo, as it happens, what others do to the entries of the last ``sync``; yields it.

        Waits for the kernel's events, and comes to its end when none came for
        ``timeout`` seconds (None: never). A loop over it keeps one node in line; an
        ``Agent`` also follows a source. ``ip monitor route neigh nexthop link`` and
        ``bridge monitor fdb`` show the events. Raises SourceError before the first
        ``sync``, and as ``resync``.
        """
        from flannel_dp.reconcile.watch import watch

        if not self.known:
            raise SourceError("there is nothing to watch yet", hint="call sync() first")
        return watch(self, timeout=timeout)

    # ---- looking

    def blockers(self, leases: Leases | None = None) -> tuple[str, ...]:
        """Rules of others that stop pods or the tunnel although ours are in place.

        Without ``leases`` those of the last ``sync`` are asked about. Reads, never
        writes. Raises FlannelDPError when the rules cannot be read, and as
        ``plan`` for ``leases``.
        """
        with self._lock:
            if leases is None:
                return self.blockers_of([state.family for state in self.state.values()])
            return self.blockers_of(self.resolver.resolve(leases).families)

    def blockers_of(self, families: Iterable[Family]) -> tuple[str, ...]:
        """``blockers`` for families that are resolved already."""
        view = View([*families], [], {})
        return self.firewall.blockers(self.host, view) if self.firewall and view.families else ()

    def explain(self, address: str) -> Explanation:
        """What happens to a packet to ``address``, and why. Reads, never writes.

        Raises ConfigError for a text that is no address.
        """
        from flannel_dp.look.explain import explain

        with self._lock:
            return explain(self, address)

    def clean(self, *, keep_device: bool = False) -> Report:
        """Remove exactly what is ours: routes, nexthops, then the devices with the rest,
        and the firewall rules, if there were ``rules``.

        ``keep_device`` empties the devices and leaves them there. Raises Conflict
        when a device of our name is none of ours.
        """
        with self._lock:
            started = time.perf_counter()
            self.brake.held.clear()
            report = Report()
            composed = self._parts.resources(keep_device=keep_device, cleans=True)
            found = Reconciler(self.host, composed).clean()
            for one in composed:
                one.record(report, found.changes.get(one.name), found.done[one.name])
            report.family_errors.clear()
            report.problems |= found.failed()
            report.devices = merge_devices(report.devices)
            report.seconds["total"] = time.perf_counter() - started
            return report
