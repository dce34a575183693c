"""One node's overlay, kept equal to a cluster's leases.

leases -> admission -> desired tables -> diff with the kernel -> plan -> apply -> report
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from flannel_dp._core import Claims, Diff
from flannel_dp.cluster.lease import Claims as LeaseList
from flannel_dp.cluster.lease import Identity, Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import (
    DeviceGone,
    FlannelDPError,
    KernelError,
    NotPermitted,
    SourceError,
)
from flannel_dp.kernel.ahead import ReadAhead
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS
from flannel_dp.kernel.tables import Kernel, Progress, timed
from flannel_dp.node.uplink import Choice
from flannel_dp.node.view import Family, Leases, Resolved, Resolver, read_subnets, sized
from flannel_dp.reconcile import advice
from flannel_dp.reconcile.brake import Brake, Names
from flannel_dp.reconcile.hostrules import HostRules, sync_host
from flannel_dp.reconcile.plan import Plan, RulesChange
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.counters.resource import Counting
from flannel_dp.resources.device.plan import DevicePlan
from flannel_dp.resources.device.resource import apply_device
from flannel_dp.resources.firewall.options import RulesOptions
from flannel_dp.resources.forwarding.resource import (
    Program,
    Unfinished,
    device_changes,
    roll_back,
    stay,
)
from flannel_dp.resources.peers import prefetch
from flannel_dp.resources.peers.blackhole import blackhole
from flannel_dp.resources.peers.gateway import shared_gateway
from flannel_dp.resources.peers.stack import (
    converge,
    decide_ways,
    read_differences,
    unreachable,
)
from flannel_dp.tables.scopes import nexthop_scope

if TYPE_CHECKING:
    from flannel_dp.look.explain import Explanation
    from flannel_dp.reconcile.watch import Drift

log = logging.getLogger(__name__)


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

    Nothing is touched before the first ``sync``. Methods may be called from
    any thread; one at a time does its work, without the GIL where it is the
    kernel's.
    """

    def __init__(
        self,
        config: NetworkConfig,
        *,
        iface: str | Sequence[str] | None = None,
        iface_regex: Sequence[str] = (),
        iface_can_reach: str = "",
        public_ip: str | None = None,
        public_ipv6: str | None = None,
        behind_nat: bool = False,
        subnet: str | None = None,
        node_name: str = "",
        netns: NetNS = None,
        take_over: bool = False,
        allow_shrink: bool = False,
        nexthops: bool = True,
        rules: RulesOptions | None = None,
        subnet_file: str = "",
        ip_blackhole_route: bool | None = None,
        room: int = 0,
        counters: bool | None = None,
    ) -> None:
        self._made_with = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "config", "__class__")
        }
        self.config = config
        self.netns = netns
        public = {4: public_ip, 6: public_ipv6}
        choice = Choice(
            (iface,) if isinstance(iface, str) else tuple(iface or ()),
            tuple(iface_regex),
            iface_can_reach,
            {family: address for family, address in public.items() if address},
            behind_nat,
        )
        self.program = Program(config, netns, room=room)
        given = read_subnets(subnet)
        self.resolver = Resolver(
            config, choice, given, subnet_file, netns, take_over, self.program, node_name
        )
        self._rules = HostRules(rules, config, netns) if rules else None
        #: Families that are in line with the kernel, and all that were ever tried.
        self.state: dict[int, Family] = {}
        self.known: dict[int, Family] = {}
        self.brake = Brake(self)
        #: Called, with the lock held, after each method that wrote to the kernel.
        self.on_written: list[Callable[[], None]] = []
        self.allow_shrink, self._use_nexthops = allow_shrink, nexthops
        self._blackhole = ip_blackhole_route
        self.counting = Counting(self, counters)
        self._has_nexthops: bool | None = None
        self._kernel: Kernel | None = None
        self._warned = False
        self._lock = threading.RLock()

    def __enter__(self) -> DataPlane:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets. The kernel keeps forwarding; nothing is removed."""
        with self._lock:
            if self._kernel:
                self._kernel.close()
            self._kernel = None
            self.program.close()

    def sibling(self, config: NetworkConfig) -> DataPlane:
        """A data plane of this node with another configuration."""
        return DataPlane(config, **self._made_with)

    @property
    def kernel(self) -> Kernel:
        """The tables of the namespace, opened when first needed."""
        if self._kernel is None:
            self._kernel = Kernel(self.netns, strict=False)  # its device is its own
        return self._kernel

    @property
    def families(self) -> tuple[int, ...]:
        """The families that are switched on: 4, 6 or both."""
        return self.resolver.families

    @property
    def nexthops(self) -> bool | None:
        """Whether IPv4 routes use nexthop objects; None where the kernel has none (asked once)."""
        if self._has_nexthops is None:
            try:
                self.kernel.read("nexthop", nexthop_scope(1))  # lo: an empty answer
                self._has_nexthops = True
            except KernelError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._has_nexthops = False
        return self._use_nexthops if self._has_nexthops else None

    def plan(self, leases: Leases) -> Plan:
        """What ``sync`` would do with these leases. Reads, never writes.

        Where a device has yet to be made, its entries are shown on ``if0``. Peers
        that ``sync`` would keep are not shown as removed; a warning tells of them.
        Raises as ``sync`` (except ShrinkRefused), and KernelError when the
        tables cannot be read.
        """
        from flannel_dp.reconcile.planning import plan

        with self._lock:
            return plan(self, leases)

    def plan_rules(self, resolved: Resolved) -> tuple[RulesChange | None, tuple[str, ...]]:
        """What ``sync`` would do to the firewall, and what else a person should know of it."""
        if self._rules is None:
            return None, ()
        return self._rules.plan(resolved.families)

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
            stay(self, leases)
            renewed = self.program.ready(peers=len(sized(leases)))
            if renewed:
                self.state.clear()  # what was written is in maps that are outgrown
            with self.kernel.read_ahead() as ahead:
                with timed(report.seconds, "desired"):
                    resolved = self.resolver.resolve(
                        leases, prefetch.reader(self, leases, ahead), self.known.values()
                    )
                report.family_errors.update(resolved.errors)
                looked = [
                    (family, self._look(family, report, ahead)) for family in resolved.families
                ]
                report.seconds["snapshot"] += ahead.waited
            kept = None
            if keep or not self.allow_shrink:
                was = [(f, None if renewed else diffs) for f, diffs in looked]
                kept = self.brake.check(leases, was, every=keep, confirmed=confirmed)
            if kept:
                resolved, report.family_errors = kept.resolved, dict(kept.resolved.errors)
                looked = [(family, self._look(family, report)) for family in resolved.families]
            self.brake.note(resolved, kept)
            try:
                self._bring(looked, resolved, report, progress)
            except Unfinished as error:
                roll_back(self, leases, error.reason)
                raise error.reason from error
            report.looked |= {"kernel", "entries"}
            self._sync_host(resolved, report, probe)
            if not self._warned:
                report.warnings += advice.on_neighbours(resolved, looked)
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
            chosen = [f for n, f in self.known.items() if families is None or n in [*families]]
            if not chosen:
                raise SourceError("there is nothing to sync again", hint="call sync() first")
            if self.program.hold.reason:
                raise self.program.hold.reason
            report = Report()
            most = max(len(family.peers) for family in chosen)
            if not self.program.cramped and self.program.ready(peers=most):
                chosen = [*self.known.values()]
                self.state.clear()
            with self.kernel.read_ahead() as ahead:
                for family in chosen:
                    prefetch.start_again(family, ahead)
                with timed(report.seconds, "desired"):
                    resolved = self.resolver.again(chosen)
                report.family_errors.update(resolved.errors)
                for number in resolved.errors:
                    self.state.pop(number, None)
                looked = [(f, self._look(f, report, ahead, again=True)) for f in resolved.families]
                report.seconds["snapshot"] += ahead.waited
            try:
                self._bring(looked, resolved, report, progress)
            except Unfinished as error:  # nobody has the leases here: a sync goes back
                raise error.reason from error
            if host:
                self._sync_host(resolved, report, probe)
            if {family.number for family in chosen} == {*self.families}:
                report.looked |= {"kernel", "entries"}
            self._complete(report, started)
            return report

    def _bring(
        self,
        looked: list[tuple[Family, list[Diff] | None]],
        resolved: Resolved,
        report: Report,
        progress: Progress | None,
    ) -> None:
        """Sync the families that were looked at, and fill the report."""
        report.rejected = resolved.rejections()
        report.warnings = advice.on_sync(resolved, self.config, bool(self.nexthops))
        report.warnings += self.program.warnings()
        made = any(f.device.steps and not f.index for f in resolved.families if f.device)
        self.program.prepare(self, [family for family, _ in looked], report)
        for family, diffs in looked:
            if family.number not in report.family_errors:
                self._sync_family(family, report, progress, diffs)
        report.devices = device_changes(resolved.families)
        self.program.follow(self, self.known.values())
        report.looked.add("program")
        if self.program.crowded:
            report.problems["program"] = self.program.crowded
        if made and not report.family_errors:
            self.program.settle()
        for family in resolved.families:
            report.names |= self.names_of(family)

    def _complete(self, report: Report, started: float) -> None:
        self.counting.follow(report)
        report.looked.add("counters")
        self.written()
        if len(report.family_errors) == len(self.families):
            raise next(iter(report.family_errors.values()))
        report.seconds["total"] = time.perf_counter() - started

    def written(self) -> None:
        """Tell those who watch that what was written is what is wanted now."""
        for told in self.on_written:
            told()

    @property
    def exclusive(self) -> threading.RLock:
        """The lock that one method at a time holds, for what has to go together."""
        return self._lock

    def identity(self) -> Identity:
        """What this node has to publish so that others reach it. ConfigError as ``sync``."""
        return self.resolver.identity()

    def _sync_host(self, resolved: Resolved, report: Report, probe: bool) -> None:
        families, path = resolved.families, self.resolver.subnet_file
        rules, netns = self._rules, self.netns
        sync_host(rules, path, self.config, families, report, probe=probe, netns=netns)

    def _look(
        self,
        family: Family,
        report: Report,
        ahead: ReadAhead | None = None,
        *,
        again: bool = False,
    ) -> list[Diff] | None:
        """Read what is there before anything is written; None when that will not last.
        With ``again`` the leases were synced before."""
        if not family.exists:
            return None
        with timed(report.seconds, "desired"):
            self.want(family)
            family.lacking = self.program.lacking(family)
        try:
            before = self.known.get(family.number)
            known = before is not None and before.index == family.index
            diffs = read_differences(self.kernel, family, fetched=ahead, sure=again, known=known)
        except KernelError as error:
            self._failed(family, error, report)
            return None
        # Changing a device may flush what is on it: a new MAC takes the neighbours along. And
        # where the program is missing, its map is filled before it is attached.
        if family.lacking:
            return None
        return diffs if family.device is None or family.device.action == "none" else None

    def want(self, family: Family) -> None:
        """Work out a family's tables, and first, where it matters, the way to each peer."""
        if family.device is None or self.config.backend.direct_routing:
            ways = decide_ways(self.kernel, family)
            if ways != family.ways:
                family.ways, family.wanted = ways, []
        if family.wanted:
            return  # the tables of the sync before are the right ones still
        family.wanted = family.want(self.nexthops, self.resolver.take_over)
        if self._blackhole is not None:
            node = family.admission.node
            own = node.subnet if self._blackhole else ""
            family.aside = [blackhole(own, node.network, family.number)]
        if family.maps is not None:
            family.aside = [
                *family.aside,
                *shared_gateway(family.place(self.nexthops), family.number),
            ]

    def names_of(self, family: Family) -> dict[int, str]:
        """The devices that a family's entries are on, by ifindex."""
        names = {family.uplink: family.iface}
        if family.device is not None:
            names[family.index] = family.device.device.name
        return names

    def _sync_family(
        self,
        family: Family,
        report: Report,
        progress: Progress | None,
        diffs: list[Diff] | None,
    ) -> None:
        """One family; what goes wrong in it is noted and does not stop the other."""
        self.state.pop(family.number, None)
        self.known[family.number] = family
        try:
            for last in (False, True):
                try:
                    self._make(family, report)
                    converge(self.kernel, family, report, progress, diffs)
                    break
                except DeviceGone:
                    if last:
                        raise
                    diffs = None
                    self._plan_again(family)
            report.failures += unreachable(family)
            self.state[family.number] = family
        except NotPermitted:
            raise
        except KernelError as error:
            self._failed(family, error, report)

    def _failed(self, family: Family, error: KernelError, report: Report) -> None:
        report.family_errors[family.number] = error
        log.error("family=%d sync failed: %s", family.number, error)

    def _make(self, family: Family, report: Report) -> None:
        index = family.index
        if family.device is not None:
            if family.device.converts or (family.maps is not None and not family.index):
                self._plan_again(family)  # the other family may have made it
            with timed(report.seconds, "apply"):
                index = self._apply_device(family.device)
                if family.lacking:
                    self.program.attach(index)
        if index != family.index or not family.wanted:
            family.index, family.wanted = index, []
            with timed(report.seconds, "desired"):
                self.want(family)

    def _apply_device(self, plan: DevicePlan) -> int:
        try:
            return apply_device(plan, netns=self.netns, before_up=self.program.attach)
        except KernelError as error:
            if plan.converts:
                raise Unfinished(error) from error
            raise

    def _plan_again(self, family: Family) -> None:
        """Somebody deleted the device while we were at it: look again."""
        if family.device is None:
            return
        with LinkReader(self.netns) as reader:
            family.device = self.resolver.plan_device(
                reader, family.device.device, family.index, self.netns
            )

    def update(self, added: Iterable[Lease] = (), removed: Iterable[Lease | str] = ()) -> Report:
        """Apply a change of the cluster; the cost follows the change, not the cluster.

        Edge-triggered: what the last ``sync`` or ``update`` wrote is taken to be
        there. ``added`` are new or changed leases, ``removed`` leases or their
        keys ("10.244.7.0-24") or names. The outcome is that of a ``sync`` with
        the resulting set. Raises SourceError before the first ``sync`` and when
        the own lease changes, KernelError.
        """
        from flannel_dp.resources.peers.update import update

        with self._lock:
            if not self.state:
                raise SourceError(
                    "update() needs a state to change", hint="call sync() with all leases first"
                )
            added, removed = [*added], [*removed]
            removed += self.brake.yields(added, removed)
            try:
                return update(self, added, removed)
            finally:
                self.brake.settle()
                self.written()

    def follow(self, family: Family, old: Claims, new: Claims, report: Report) -> None:
        """Take a change of peers to where it matters beside the tables: the guard's set."""
        if self._rules is None:
            return
        try:
            self._rules.follow(family, old, new)
        except FlannelDPError as error:
            report.problems["firewall"] = error
            log.error("the guard did not follow: %s", error)

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

    def blockers(self, leases: Leases | None = None) -> tuple[str, ...]:
        """Rules of others that stop pods or the tunnel although ours are in place.

        Without ``leases`` those of the last ``sync`` are asked about. Reads, never
        writes. Raises FlannelDPError when the rules cannot be read, and as
        ``plan`` for ``leases``.
        """
        with self._lock:
            if leases is None:
                return self.blockers_of(self.state.values())
            return self.blockers_of(self.resolver.resolve(leases).families)

    def blockers_of(self, families: Iterable[Family]) -> tuple[str, ...]:
        """``blockers`` for families that are resolved already."""
        known = list(families)
        return self._rules.blockers(known) if self._rules and known else ()

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
        from flannel_dp.reconcile.cleaning import clean

        with self._lock:
            self.state.clear()
            self.known.clear()
            self.brake.held.clear()
            return clean(self, keep_device=keep_device, rules=self._rules is not None)
