"""One node's overlay, kept equal to a cluster's leases: the face of the library.

One lock around each pass; the passes are in passes.py, what they are over in composition.py.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Unpack

from msgspec.structs import asdict, replace

from flannel_dp.cluster.lease import Identity, Lease, LeaseList, Leases, Listed
from flannel_dp.cluster.network import NetworkConfig, devices_of
from flannel_dp.composition import Parts
from flannel_dp.errors import SourceError, require
from flannel_dp.kernel.tables import Kernel, Progress
from flannel_dp.later import Later
from flannel_dp.locks import Locks
from flannel_dp.node.family import Family
from flannel_dp.options import Keywords, Options
from flannel_dp.passes import Passes, formed, listed
from flannel_dp.reconcile.plan import Plan
from flannel_dp.reconcile.reconciler import AnyResource
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.forwarding.convert import Conversion
from flannel_dp.resources.peers.brake import Names
from flannel_dp.resources.peers.state import State

if TYPE_CHECKING:
    from flannel_dp.look import explain as explaining
    from flannel_dp.reconcile import drift as drifting
    from flannel_dp.resources.counters import resource as counted
    from flannel_dp.resources.counters import traffic
    from flannel_dp.resources.peers import last_good
else:
    explaining = Later("flannel_dp.look.explain")
    drifting = Later("flannel_dp.reconcile.drift")
    counted = Later("flannel_dp.resources.counters.resource")
    traffic = Later("flannel_dp.resources.counters.traffic")
    last_good = Later("flannel_dp.resources.peers.last_good")


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
    a sync remove all or nearly all peers, with ``path_mtus`` routes keep the MTUs of their own that
    they have at the first sync (``set_path_mtus``), ``nexthops=False`` writes plain gateway routes.
    ``rules`` are the firewall rules to keep (default: none are touched), and
    ``subnet_file`` is the subnet.env to keep, which also remembers the subnet.
    ``ip_blackhole_route`` drops packets to this node's subnet that no pod takes (False: no
    longer; None: not read). ``room`` is how many peers of a family a program that
    forwards has room for (0: as many as there are). ``counters`` counts packets per peer in the
    kernel (False: no longer; None: existing ones stay). ``patient`` syncs one family although the
    address that ``public_ip`` or ``public_ipv6`` names for the other is not on this node yet.
    ``hand_back`` writes entries as flanneld does, for a flanneld that is started next, and leaves
    subnet.env as it is.

    One instance at a time writes: the first ``sync`` or ``clean``, or ``hold``, takes the lock of
    each device (:class:`flannel_dp.DeviceLock`) in ``run_dir``, and ``close`` releases them.
    Until then another one, in this process too, gets Busy. ``lock=False`` is for a caller that
    holds them itself.

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
        require(isinstance(config, NetworkConfig), "config", config, "a NetworkConfig")
        self.config, self.options, self._more = config, Options(**keywords), tuple(resources)
        for one in self._more:
            require(hasattr(one, "compare"), "a resource", one, "a Resource (docs/extending.md)")
        #: The lock that one method at a time holds, for what has to go together.
        self.exclusive = self._lock = threading.RLock()
        self._parts = parts = Parts(config, self.options, self._lock, resources)
        self.host, self.forwarder, self.resolver = parts.host, parts.forwarder, parts.resolver
        self.peers = parts.peers
        #: The network namespace, and the families that are switched on: 4, 6 or both.
        self.netns, self.families = self.options.netns, parts.resolver.families
        self._locks = Locks(config, self.options, parts.host.links)
        #: Whether filters of the devices matter: a program forwards or counts.
        self.watches_filters = parts.forwarder.watches_filters or bool(self.options.counters)
        self._passes = Passes(parts)
        self.reconciler, self.brake = self._passes.reconciler, self._passes.brake
        self._conversion = Conversion(config, self._sync_as)
        #: Whether a sync may remove all or nearly all peers.
        self.allow_shrink = self.options.allow_shrink
        #: Called, with the lock held, after each method that wrote to the kernel.
        self.on_written, self.written = self._passes.on_written, self._passes.written

    def __enter__(self) -> DataPlane:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets, release the locks. The kernel keeps forwarding; nothing is removed."""
        with self._lock:
            self.host.close()
            self.forwarder.close()
            self._locks.release()

    def hold(self) -> None:
        """Take the lock of each device of this network now, if ``lock`` is set: before leases are
        read, so that who writes last has also read last. Later calls do nothing, until ``close``.

        Raises Busy, which names the process that holds one; NotPermitted and KernelError where
        there can be no file in ``run_dir``. ``flock -n /run/flannel-dp/INODE-DEVICE.lock ...``.
        """
        with self._lock:
            self._locks.take()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One method at a time, and with the locks of the devices."""
        with self._lock:
            self._locks.take()
            yield

    def sibling(self, config: NetworkConfig) -> DataPlane:
        """Return a data plane of this node with another configuration, for the time that this one
        holds the locks."""
        return DataPlane(config, resources=self._more, **{**asdict(self.options), "lock": False})

    @property
    def kernel(self) -> Kernel:
        """The tables of the namespace, opened when first needed."""
        return self.host.kernel

    @property
    def nexthops(self) -> bool | None:
        """Whether IPv4 routes use nexthop objects; None where the kernel has none (asked once)."""
        return self.host.nexthops

    @property
    def counters(self) -> counted.CountersResource:
        """The counters of the devices' traffic."""
        return self._parts.counters

    @property
    def counting(self) -> traffic.TrafficReader:
        """The reader of these counters."""
        return self._parts.counting

    @property
    def known(self) -> dict[int, State]:
        """What was written of each family (4, 6) that was ever synced."""
        return self._parts.known

    @property
    def state(self) -> dict[int, State]:
        """What was written of each family that is in sync."""
        return self._parts.state

    def complete(self, claims: LeaseList, left_out: Collection[str] = ()) -> last_good.Completed:
        """Return the claims, those that are unreadable or incomplete completed by what their
        peers had before; see ``LastGood.complete``. Reads, never writes."""
        with self._lock:
            return self._passes.last_good.complete(claims, left_out)

    def identity(self) -> Identity:
        """Return what this node has to publish so that others reach it. ConfigError as ``sync``."""
        return self.resolver.identity()

    def plan(self, leases: Leases) -> Plan:
        """Return what ``sync`` would do with these leases. Reads, never writes.

        Where a device has yet to be made, its entries have the ifindex 0. Peers
        that ``sync`` would keep are not shown as removed; ``held`` and a warning name them.
        What would fail for one family, entry or resource is in the plan, as it would be in the
        report; a warning says where another instance owns the device. Raises as ``sync``, except
        ShrinkRefused and Busy.
        """
        with self._lock:
            brakes = not self.allow_shrink
            plan = formed(lambda good: self._passes.plan(good, brakes=brakes), listed(leases))
            if busy := self._locks.taken():
                text = f"sync would change nothing now (exit code 5): {busy.message}"
                plan = replace(plan, warnings=(*plan.warnings, text))
            return plan

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

        Level-triggered: the kernel's entries are the start; stale ones are
        removed, correct ones are not written. ``leases`` are the whole cluster,
        this node included; an object that cannot be a lease, such as one with a number for an
        address, is rejected ("bad-claim"). ``progress(done, total)`` is called now and then. With
        ``probe`` rules of other programs that stop packets are looked for also where no rule
        of ours had to be written (``Report.blockers``).

        Peers that the list lacks are kept where these are all or nearly all (all
        but one of three or more; over half and over ten), unless ``allow_shrink``
        was given, and with ``keep`` whenever there is one. Then all else is done,
        and ShrinkRefused is raised, with the report. What is kept is part of the
        state, as if it was still in the list, until a later sync. ``confirmed`` are
        names of peers, by family, that are removed in any case.

        Raises SourceError without a lease of this node or subnet, ConfigError and Conflict
        for an interface or device that cannot be used, NotPermitted without
        CAP_NET_ADMIN, Busy; then nothing was written. What fails for one family or entry
        only is in the report.
        """
        found, brakes = listed(leases), keep or not self.allow_shrink
        with self._writing(), self._conversion.of_sync(found):
            return formed(
                lambda good: self._passes.sync(
                    good,
                    brakes=brakes,
                    every=keep,
                    confirmed=confirmed,
                    probe=probe,
                    progress=progress,
                ),
                found,
            )

    def resync(
        self,
        families: Iterable[int] | None = None,
        *,
        host: bool = True,
        progress: Progress | None = None,
        probe: bool = False,
    ) -> Report:
        """Make the kernel agree with the leases of the last ``sync`` and ``update`` again.

        For ``families`` (4, 6; default: all), on the node as it is now: a device that is gone is
        made again, an external interface that came back is found. Without ``host`` firewall rules
        and subnet.env are not read; ``probe`` as in ``sync``. Nothing is written where all is in
        sync. Raises as ``sync``; SourceError before the first one."""
        with self._writing(), self._conversion.of_resync():
            return self._passes.resync(families, host=host, probe=probe, progress=progress)

    def diversions(self) -> Report:
        """Read again what of other programs diverts packets of pods: policy rules, routes of other
        tables, addresses. Writes nothing, and costs the same however many peers there are.

        ``Report.diversions`` has it by family. ``ip rule``, ``ip route show table all``,
        ``ip address``. Raises KernelError.
        """
        with self._lock:
            return self._passes.diversions()

    def update(self, added: Iterable[Lease] = (), removed: Iterable[Lease | str] = ()) -> Report:
        """Apply a change of the cluster; the cost follows the change, not the cluster.

        Edge-triggered: what the last ``sync`` or ``update`` wrote is assumed to
        exist. ``added`` are new or changed leases, ``removed`` leases or their
        keys ("10.244.7.0-24") or names; ``Report.unknown`` has those that no lease had.
        The outcome is that of a ``sync`` with the resulting set. Raises SourceError before the
        first ``sync`` and when this node's lease changes, KernelError.
        """
        with self._lock:  # as ``_writing``, whose generator would take a fiftieth of the time
            self._locks.take()
            require(isinstance(removed, Iterable), "removed", removed, "leases or their names")
            gone = [*removed]
            return formed(lambda good: self._passes.update(good, gone), listed(added))

    def path_mtus(self) -> dict[str, int]:
        """Return the MTUs in bytes that routes of peers have of their own, by subnet."""
        with self._lock:
            return {k: v for one in self.peers.values() for k, v in one.mtus.items()}

    def set_path_mtus(self, mtus: Mapping[str, int]) -> Report:
        """Give the routes of these peers, by subnet, an MTU of their own in bytes, and all others
        the device's: for paths that take less (``Prober.narrow`` finds them).

        It is part of what is wanted from then on: drift is repaired, and ``sync`` keeps it, as long
        as this object lives; with the option ``path_mtus`` the first ``sync`` takes what the routes
        have. The cost follows the change. Subnets of no peer are passed over; IPv6 takes no less
        than 1280. ``ip route replace 10.244.7.0/24 ... mtu 1350``. Raises ConfigError for what is
        no subnet or MTU (68 to 65520), Busy, KernelError.
        """
        from flannel_dp.resources.peers.narrow import checked

        chosen = checked(mtus)
        report = Report()
        with self._writing():
            for number, peers in self.peers.items():
                report.add(peers.set_mtus(self.host, chosen[number]))
            self.written()
        return report

    def watch(self, *, timeout: float | None = None) -> Iterator[drifting.Drift]:
        """Undo, as it happens, changes of other programs to the entries of the last ``sync``;
        yields it.

        Waits for the kernel's events, and comes to its end when none came for
        ``timeout`` seconds (None: never). A loop over it keeps one node in sync; an
        ``Agent`` also follows a source. ``ip monitor route neigh nexthop link`` and
        ``bridge monitor fdb`` show the events. Raises SourceError before the first
        ``sync``, and as ``resync``.
        """
        from flannel_dp.reconcile.watch import watch

        if not self.known:
            raise SourceError("there is nothing to watch yet", hint="call sync() first")
        return watch(self, timeout=timeout)

    def blockers(self, leases: Leases | None = None) -> tuple[str, ...]:
        """Return rules of other programs that stop pods or the tunnel although ours are in place.

        Without ``leases`` those of the last ``sync`` are asked about. Reads, never
        writes. Raises FlannelDPError when the rules cannot be read, and as
        ``plan`` for ``leases``.
        """
        with self._lock:
            if leases is None:
                return self.blockers_of([state.family for state in self.state.values()])
            return self.blockers_of(self.resolver.resolve(leases).families)

    def blockers_of(self, families: Iterable[Family]) -> tuple[str, ...]:
        """Return ``blockers`` for families that are resolved already."""
        return self._passes.blockers(families)

    def explain(self, address: str) -> explaining.Explanation:
        """Return what happens to a packet to ``address``, and why. Reads, never writes.

        Raises ConfigError for a text that is no address.
        """
        from flannel_dp.look.explain import explain

        require(isinstance(address, str), "address", address, "an IP address as text")
        with self._lock:
            return explain(self, address)

    def clean(self, *, keep_device: bool = False, only_rules: bool = False) -> Report:
        """Remove exactly what is ours: routes, nexthops, then the devices with the rest,
        and the firewall rules, if there were ``rules``.

        ``keep_device`` empties the devices and leaves them there, with the offloads switched on
        again that ``flannel-dp probe --fix-offload`` has switched off; ``only_rules`` removes the
        firewall rules and nothing else. Raises Conflict when a device of our name is none of ours,
        Busy.
        """
        with self._lock if only_rules else self._writing():
            report = self._passes.clean(keep_device=keep_device, only_rules=only_rules)
            if keep_device:
                from flannel_dp.kernel.offload import all_on_again

                all_on_again(self.host.netns, devices_of(self.config).values())
            return report

    def _sync_as(self, config: NetworkConfig, leases: Listed) -> bool:
        with self.sibling(config) as other:
            return other.sync(leases).ok
