"""Peers in the map of the program that forwards: endpoint and VTEP MAC of each subnet.

``bpftool map dump`` shows it. The map is ours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from flannel_dp._core import Recipe
from flannel_dp.resources.peers.paths import Paths
from flannel_dp.resources.peers.place import Placement
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import peer_scope


class PeerMap:
    """An entry for each peer, whatever its path: packets from all of them are checked."""

    kind: ClassVar[str] = "peer"

    def recipe(self, place: Placement, family: int) -> Recipe:
        return Recipe(self.kind, family, tunnel=0, direct=0, map=place.map)

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        return (peer_scope(place.map, family),)

    def left_out(self, paths: Paths) -> Sequence[int]:
        return ()
