"""ARP and ND entries: the VTEP MAC of each peer's first address.

``ip neigh replace 10.244.7.0 lladdr MAC dev flannel.1 nud permanent``, as flannel writes it
(pkg/backend/vxlan/device.go, AddARP). Permanent entries on our device are ours.
"""

from __future__ import annotations

from typing import ClassVar

from flannel_dp._core import Claims, Table
from flannel_dp.resources.peers.place import TUNNEL, PathColumn, Placement
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import neighbour_scope


class NeighbourTable:
    """An entry for each peer that is reached through the tunnel."""

    kind: ClassVar[str] = "neighbour"

    def rows(self, peers: Claims, place: Placement, paths: PathColumn) -> Table:
        table = Table(self.kind)
        table.extend_neighbours(place.device, peers.subnets, peers.macs, paths, TUNNEL)
        return table

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        return (neighbour_scope(place.device, family),)
