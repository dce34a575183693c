"""Peers in the map of the program that forwards: endpoint and VTEP MAC of each subnet.

``bpftool map dump`` shows it. The map is ours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from flannel_dp._core import Claims, Table
from flannel_dp.resources.peers.paths import Paths
from flannel_dp.resources.peers.place import PathColumn, Placement
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import peer_scope


class PeerMap:
    """An entry for each peer, whatever its path: packets from all of them are checked."""

    kind: ClassVar[str] = "peer"

    def rows(self, peers: Claims, place: Placement, paths: PathColumn) -> Table:
        table = Table(self.kind)
        table.extend_peers(place.map, peers.subnets, peers.lengths, peers.macs, peers.endpoints)
        return table

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        return (peer_scope(place.map, family),)

    def find(self, table: Table, place: Placement, subnet: str) -> int:
        return table.find((subnet, "::", "00:00:00:00:00:00", place.map))

    def rivals(
        self, peers: Claims, number: int, table: Table, lengths: bytes, place: Placement
    ) -> tuple[int, bool]:
        return peers.rivals(number, table, lengths, place.map)

    def left_out(self, paths: Paths) -> Sequence[int]:
        return ()
