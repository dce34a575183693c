"""What an agent keeps in sync, as far as its work takes it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Lease, LeaseList
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.kernel.tables import Progress
    from flannel_dp.reconcile.report import Report
    from flannel_dp.resources.peers.brake import Brake
    from flannel_dp.resources.peers.last_good import Completed
    from flannel_dp.resources.peers.state import State


class Kept(Protocol):
    """The passes of a data plane, and what they have written of each family."""

    @property
    def config(self) -> NetworkConfig: ...
    @property
    def families(self) -> tuple[int, ...]: ...
    @property
    def known(self) -> Mapping[int, State]: ...
    @property
    def state(self) -> Mapping[int, State]: ...
    @property
    def brake(self) -> Brake: ...
    def complete(self, claims: LeaseList, left_out: Collection[str] = ()) -> Completed: ...
    def sync(
        self,
        leases: LeaseList,
        *,
        progress: Progress | None = None,
        keep: bool = False,
        confirmed: Mapping[int, set[str]] | None = None,
        probe: bool = False,
    ) -> Report: ...
    def update(self, added: Iterable[Lease], removed: Iterable[Lease | str]) -> Report: ...
    def resync(
        self,
        families: Iterable[int] | None = None,
        *,
        host: bool = True,
        progress: Progress | None = None,
        probe: bool = False,
    ) -> Report: ...
    def diversions(self) -> Report: ...
