"""What one data plane is made of: its parts, and the resources that it keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from flannel_dp._core import Claims
from flannel_dp.cluster.backend import Mode
from flannel_dp.cluster.network import NetworkConfig, devices_of
from flannel_dp.kernel.host import Host
from flannel_dp.node.choice import read_subnets
from flannel_dp.node.view import Resolver
from flannel_dp.options import Options
from flannel_dp.reconcile.reconciler import AnyResource
from flannel_dp.resources.device.resource import DeviceResource
from flannel_dp.resources.forwarding.forwarder import Forwarder
from flannel_dp.resources.path.resource import PathResource
from flannel_dp.resources.peers.resource import PeersResource
from flannel_dp.resources.peers.state import State

if TYPE_CHECKING:
    from flannel_dp.resources.counters.resource import CountersResource
    from flannel_dp.resources.counters.store import Counters
    from flannel_dp.resources.counters.traffic import TrafficReader
    from flannel_dp.resources.firewall.resource import FirewallResource

Composed: TypeAlias = tuple[type[Forwarder], Callable[..., list[AnyResource]]]
"""Who forwards, and the resources of that."""


def _kernel_forwards() -> Composed:
    def resources(*args: Any, keep: bool, cleans: bool) -> list[AnyResource]:
        if keep or not cleans:
            return []
        from flannel_dp.resources.forwarding.resource import what_remains

        return what_remains(*args)

    return Forwarder, resources


def _program_forwards() -> Composed:
    from flannel_dp.resources.forwarding.ebpf import ProgramForwarder
    from flannel_dp.resources.forwarding.resource import of_program

    return ProgramForwarder, of_program


#: What there is in each mode; loaded where it is the one.
_FORWARDING: dict[Mode, Callable[[], Composed]] = {
    "vxlan": _kernel_forwards,
    "host-gw": _kernel_forwards,
    "ebpf": _program_forwards,
}


def forwarder_of(config: NetworkConfig) -> type[Forwarder]:
    """Return who forwards to the peers of a network."""
    return _FORWARDING[config.backend.mode]()[0]


class Parts:
    """The parts of one data plane, from what the user asked for."""

    def __init__(
        self,
        config: NetworkConfig,
        options: Options,
        lock: threading.RLock,
        more: Sequence[AnyResource] = (),
    ) -> None:
        self.config, self._options, self._lock = config, options, lock
        self._more = tuple(more)
        #: The names of the resources that the caller adds.
        self.added = tuple(one.name for one in more)
        self.host = Host(options.netns, use_nexthops=options.wants_objects)
        forwarder, self._of_forwarding = _FORWARDING[config.backend.mode]()
        self.forwarder = forwarder(
            config, options.netns, room=options.room, run_dir=options.run_dir
        )
        self.resolver = Resolver(
            config,
            options.choice,
            read_subnets(options.subnet),
            options.subnet_file,
            options.netns,
            options.node_name,
            self.host.links,
            options.patient,
        )
        families = self.resolver.families
        self.peers = {
            number: PeersResource(
                config,
                number,
                wants_blackhole=options.ip_blackhole_route,
                take_boot=options.take_over,
                as_flanneld=options.hand_back,
                takes_mtus=options.path_mtus and not options.hand_back,
            )
            for number in families
        }
        self.firewall: FirewallResource | None = None
        if options.rules:
            from flannel_dp.resources.firewall.resource import FirewallResource

            self.firewall = FirewallResource(options.rules, config)

    @cached_property
    def counters(self) -> CountersResource:
        """The counters of the devices' traffic, loaded where they are asked for."""
        from flannel_dp.resources.counters.resource import CountersResource

        return CountersResource(self._store, wanted=bool(self._options.counters))

    @cached_property
    def counting(self) -> TrafficReader:
        """The reader of these counters; it names peers as they were written last."""
        from flannel_dp.resources.counters.traffic import TrafficReader

        devices, dropped = devices_of(self.config), self.forwarder.dropped
        return TrafficReader(self._store, devices, self._peers_of, self._lock, dropped)

    @cached_property
    def _store(self) -> Counters:
        from flannel_dp.resources.counters.store import Counters

        devices, options = [*devices_of(self.config).values()], self._options
        return Counters(devices, options.netns, run_dir=options.run_dir)

    @property
    def known(self) -> dict[int, State]:
        """What was written of each family (4, 6) that was ever synced."""
        return {n: one.state for n, one in self.peers.items() if one.state is not None}

    @property
    def state(self) -> dict[int, State]:
        """What was written of each family that is in sync."""
        return {n: one for n, one in self.known.items() if self.peers[n].in_sync}

    def _peers_of(self, number: int) -> Claims | None:
        """Return the peers of one family as they were written last, with the lock held."""
        state = self.peers[number].state if number in self.peers else None
        return state.peers if state is not None else None

    def resources(self, *, keep_device: bool = False, cleans: bool = False) -> list[AnyResource]:
        """Return what this node holds; the order is in each one's ``after``.

        ``cleans``: counters of another run are to go, too, and the device with ``keep_device``
        stays.
        """
        config, options = self.config, self._options
        found = self._of_forwarding(config, self.forwarder, keep=keep_device, cleans=cleans)
        for number in devices_of(config):
            device = DeviceResource(
                config, number, self.forwarder, take_over=options.take_over, keep=keep_device
            )
            found.append(device)
        found += self.peers.values()
        if self.firewall:
            found.append(self.firewall)
        if options.subnet_file and not options.hand_back:
            from flannel_dp.resources.subnet_file import SubnetFileResource

            masq = bool(options.rules and options.rules.ip_masq)
            found.append(SubnetFileResource(options.subnet_file, config, ip_masq=masq))
        if options.counters is not None or cleans:
            found.append(self.counters)
        if not cleans:
            found.append(PathResource(config))
        return [*found, *self._more]
