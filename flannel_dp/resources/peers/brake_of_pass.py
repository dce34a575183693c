"""How one pass asks the brake: once, after everything was compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp.node.family import View
from flannel_dp.reconcile.reconciler import Pass
from flannel_dp.resources.peers.brake import Brake, Names

if TYPE_CHECKING:
    from flannel_dp.cluster.lease import Lease, LeaseList
    from flannel_dp.resources.peers.kept import HeldBack


class BrakeOfPass:
    """The brake in one pass: asked once, and what it keeps is wanted from then on."""

    def __init__(
        self,
        brake: Brake,
        leases: Sequence[Lease] | LeaseList,
        *,
        every: bool = False,
        confirmed: Names | None = None,
    ) -> None:
        self._brake, self._leases = brake, leases
        self._every, self._confirmed = every, confirmed
        self.kept: HeldBack | None = None

    def back(self, found: Pass) -> View | None:
        """Return what is wanted instead, None where nothing is kept or it is wanted already."""
        if self.kept is not None:
            return None
        self.kept = self._brake.check(
            self._leases, view_of(found), found, every=self._every, confirmed=self._confirmed
        )
        if self.kept is None:
            return None
        return replace(self.kept.view, purpose=view_of(found).purpose)


def view_of(found: Pass) -> View:
    """Return what a pass is about."""
    assert isinstance(found.view, View)
    return found.view
