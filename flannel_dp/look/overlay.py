"""What the views read of a node: the parts of a data plane that they use, and no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.kernel.host import Host
from flannel_dp.node.family import Family
from flannel_dp.node.view import Resolver
from flannel_dp.reconcile.reconciler import Reconciler
from flannel_dp.resources.counters.traffic import TrafficReader
from flannel_dp.resources.forwarding.forwarder import Forwarder
from flannel_dp.resources.peers.state import State


class Overlay(Protocol):
    """A data plane as the views see it; they never write."""

    @property
    def config(self) -> NetworkConfig: ...
    @property
    def host(self) -> Host: ...
    @property
    def forwarder(self) -> Forwarder: ...
    @property
    def resolver(self) -> Resolver: ...
    @property
    def families(self) -> tuple[int, ...]: ...
    @property
    def known(self) -> dict[int, State]: ...
    @property
    def state(self) -> dict[int, State]: ...
    @property
    def reconciler(self) -> Reconciler: ...
    @property
    def counting(self) -> TrafficReader: ...
    def blockers_of(self, families: Iterable[Family]) -> tuple[str, ...]: ...
