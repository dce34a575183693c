"""Which tables a layout writes for its peers, in which order, and how a peer is found in them.

==================  ========  =========  ======  =========  ===================  ======
layout              peer map  gateway    fdb     neighbour  nexthop              route
==================  ========  =========  ======  =========  ===================  ======
vxlan               -         -          all     all        all, our device      all
vxlan + direct      -         -          tunnel  tunnel     tunnel and direct    all
host-gw             -         -          -       -          direct, uplink       direct
eBPF                all       one        -       -          empty                empty
eBPF + direct       all       one        -       -          direct, uplink       direct
==================  ========  =========  ======  =========  ===================  ======

A row is chosen once, in ``layout_of``; no other module asks which layout it is. Tables are written
from left to right and removed from right to left. The FDB comes before the neighbours: a peer
with a new MAC is reached by the old one until the neighbour names the new one, which has its FDB
entry by then. ``blackhole`` is an option of every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Claims, Recipe
from flannel_dp.cluster.backend import Backend, Mode
from flannel_dp.resources.peers.fdb import FdbTable
from flannel_dp.resources.peers.neighbours import NeighbourTable
from flannel_dp.resources.peers.nexthops import NexthopTable
from flannel_dp.resources.peers.paths import PathOfEach, Paths, SamePath
from flannel_dp.resources.peers.peer_map import PeerMap
from flannel_dp.resources.peers.place import DesiredTable, PathColumn, PeerTable, Placement
from flannel_dp.resources.peers.routes import PROTOCOL_BOOT, RouteTable
from flannel_dp.tables.entries import Scope


class PeerList(PeerTable, Protocol):
    """The table that has an entry for each peer, whatever its path."""

    def left_out(self, paths: Paths) -> Sequence[int]:
        """Return the numbers of accepted peers that have no entry: they cannot be reached."""
        ...


MacsIn: TypeAlias = Literal["first", "apart", "none"]
"""Where a peer is found by its MAC: in the first of the tables (the FDB, which has all peers), or
in a table that is kept for this, as peers in a map, or reached directly, are not in the FDB;
"none": peers have no MAC."""


def _no_tables(place: Placement, family: int) -> list[DesiredTable]:
    return []


def _shared_gateway(place: Placement, family: int) -> list[DesiredTable]:
    from flannel_dp.resources.peers.gateway import shared_gateway

    return shared_gateway(place, family)


class Layout(Struct, frozen=True):
    """One row of the matrix.

    ``tables`` are those with an entry for each peer, in order; ``plain`` are they where no nexthop
    objects are used: objects that there are have to go. ``list_of_all`` is the one of them that
    has all peers. ``shared`` makes the tables that have none for a single peer,
    ``paths`` decides how each peer is reached. ``needs_mac``: peers have a VTEP MAC, and
    ``macs_in`` says where the peer that has one is found. ``direct``: peers may be reached on the
    underlay, so that routes to their own addresses are theirs, and flanneld's are taken over.
    ``reads_ahead``: the tables are known before the peers are. ``carrier`` names the device of
    the entries in errors, ``others`` says how peers that are not on-link are reached.
    """

    tables: tuple[PeerTable, ...]
    plain: tuple[PeerTable, ...]
    list_of_all: PeerList
    shared: Callable[[Placement, int], list[DesiredTable]] = _no_tables
    paths: type[SamePath] | type[PathOfEach] = SamePath
    needs_mac: bool = True
    macs_in: MacsIn = "apart"
    direct: bool = False
    reads_ahead: bool = False
    carrier: str = "the vxlan device"
    others: str = "through {device}"

    def as_flanneld(self) -> Layout:
        """Return this layout as flanneld has it: gateway routes of its protocol, and no nexthop
        objects."""
        plain = tuple(
            replace(one, protocol=PROTOCOL_BOOT) if isinstance(one, RouteTable) else one
            for one in self.plain
        )
        of_all = next(one for one in plain if isinstance(one, RouteTable))
        return replace(self, tables=plain, plain=plain, list_of_all=of_all, reads_ahead=False)

    def at(self, place: Placement) -> list[PeerTable]:
        """Return the tables that the kernel has, where nexthop objects are used or not."""
        chosen = self.tables if place.nexthops else self.plain
        return [one for one in chosen if one.kind in place.kinds]

    def desired(
        self, peers: Claims, place: Placement, paths: PathColumn = None
    ) -> list[DesiredTable]:
        """Return the tables of ``peers``, in the order in which they are written.

        Entries of peer i are tagged i. ``paths`` has a byte for each peer, TUNNEL or DIRECT;
        without it all go through the tunnel, or in host-gw all direct. A peer of host-gw whose
        path is not DIRECT gets no entry.
        """
        return [
            DesiredTable(
                table.recipe(place, peers.family).table(peers, paths),
                table.scopes(place, peers.family),
            )
            for table in self.at(place)
        ]

    def recipes(self, place: Placement, family: int) -> list[Recipe]:
        """Return what makes the entries of each of these tables."""
        return [table.recipe(place, family) for table in self.at(place)]

    def scopes(self, place: Placement, family: int) -> list[Scope]:
        """Return all scopes of a family's tables in order, before there are any peers."""
        return [scope for table in self.at(place) for scope in table.scopes(place, family)]


def _row(
    *others: PeerTable, routes: RouteTable, peer_map: PeerMap | None = None, **rest: Any
) -> Layout:
    """Return a layout whose peers are all in the map, where it has one, else in the routes."""
    tables: tuple[PeerTable, ...] = (*others, routes)
    if peer_map is not None:
        tables = (peer_map, *tables)
    return Layout(tables, tuple(map(_plain, tables)), peer_map or routes, **rest)


def _plain(table: PeerTable) -> PeerTable:
    """Return the table as it is without nexthop objects."""
    if isinstance(table, NexthopTable):
        return NexthopTable(has_device=table.has_device)
    return replace(table, by_object=False) if isinstance(table, RouteTable) else table


_TUNNEL = (FdbTable(), NeighbourTable())

VXLAN = _row(
    *_TUNNEL,
    NexthopTable(tunnel=True),
    routes=RouteTable(tunnel=True),
    macs_in="first",
    reads_ahead=True,
)
VXLAN_DIRECT = _row(
    *_TUNNEL,
    NexthopTable(tunnel=True, direct=True),
    routes=RouteTable(tunnel=True, direct=True),
    paths=PathOfEach,
    direct=True,
)
HOST_GW = _row(
    NexthopTable(direct=True, has_device=False),
    routes=RouteTable(direct=True),
    paths=PathOfEach,
    needs_mac=False,
    macs_in="none",
    direct=True,
    carrier="{iface}",
    others="not at all",
)
EBPF = _row(NexthopTable(), routes=RouteTable(), peer_map=PeerMap(), shared=_shared_gateway)
EBPF_DIRECT = _row(
    NexthopTable(direct=True),
    routes=RouteTable(direct=True),
    peer_map=PeerMap(),
    shared=_shared_gateway,
    paths=PathOfEach,
    direct=True,
)

_ROWS: dict[tuple[Mode, bool], Layout] = {
    ("vxlan", False): VXLAN,
    ("vxlan", True): VXLAN_DIRECT,
    ("host-gw", True): HOST_GW,
    ("ebpf", False): EBPF,
    ("ebpf", True): EBPF_DIRECT,
}


def layout_of(backend: Backend) -> Layout:
    """Return the layout that a network's backend asks for."""
    return _ROWS[backend.mode, backend.routes_directly]
