"""FDB entries: the underlay address behind each peer's VTEP MAC.

``bridge fdb replace MAC dst ADDRESS dev flannel.1 self permanent``, as flannel writes it
(pkg/backend/vxlan/device.go, AddFDB). Every entry on our device is ours.
"""

from __future__ import annotations

from typing import ClassVar

from flannel_dp._core import Recipe
from flannel_dp.resources.peers.place import Placement
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import fdb_scope


class FdbTable:
    """An entry for each peer that is reached through the tunnel."""

    kind: ClassVar[str] = "fdb"

    def recipe(self, place: Placement, family: int) -> Recipe:
        return Recipe(self.kind, family, tunnel=place.device)

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        return (fdb_scope(place.device),)
