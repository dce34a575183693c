"""Peers in the map of the program that forwards: endpoint and VTEP MAC of each subnet.

``bpftool map dump`` shows it. The map is ours alone.
"""

from __future__ import annotations

from typing import ClassVar

from flannel_dp._core import Claims, Table
from flannel_dp.resources.peers.place import Paths, Placement
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import peer_scope


class PeerMap:
    """An entry for each peer, whatever its path: packets from all of them are checked."""

    kind: ClassVar[str] = "peer"

    def rows(self, peers: Claims, place: Placement, paths: Paths) -> Table:
        table = Table(self.kind)
        assert place.map is not None
        table.extend_peers(place.map, peers.subnets, peers.lengths, peers.macs, peers.endpoints)
        return table

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        assert place.map is not None
        return (peer_scope(place.map, family),)
