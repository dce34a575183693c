"""ARP and ND entries: the VTEP MAC of each peer's first address.

``ip neigh replace 10.244.7.0 lladdr MAC dev flannel.1 nud permanent``, as flannel writes it
(pkg/backend/vxlan/device.go, AddARP). Permanent entries on our device are ours.
"""

from __future__ import annotations

from typing import ClassVar

from flannel_dp._core import Recipe
from flannel_dp.resources.peers.place import Placement
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import neighbour_scope


class NeighbourTable:
    """An entry for each peer that is reached through the tunnel."""

    kind: ClassVar[str] = "neighbour"

    def recipe(self, place: Placement, family: int) -> Recipe:
        return Recipe(self.kind, family, tunnel=place.device)

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        return (neighbour_scope(place.device, family),)
