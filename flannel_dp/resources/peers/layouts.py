"""Which tables a layout writes for its peers, and in which order.

==================  ========  =========  ======  =========  ===================  ======
layout              peer map  gateway    fdb     neighbour  nexthop              route
==================  ========  =========  ======  =========  ===================  ======
vxlan               -         -          all     all        all, our device      all
vxlan + direct      -         -          tunnel  tunnel     tunnel and direct    all
host-gw             -         -          -       -          direct, uplink       direct
eBPF                all       one        -       -          empty                empty
eBPF + direct       all       one        -       -          direct, uplink       direct
==================  ========  =========  ======  =========  ===================  ======

A row is chosen once, in ``layout_of``; nobody else asks which layout it is. Tables are written
from left to right and removed from right to left. The FDB comes before the neighbours: a peer
with a new MAC is reached by the old one until the neighbour names the new one, which has its FDB
entry by then. ``blackhole`` is an option of every layout.
"""

from __future__ import annotations

from flannel_dp._core import Claims, Table
from flannel_dp.resources.peers.fdb import FdbTable
from flannel_dp.resources.peers.neighbours import NeighbourTable
from flannel_dp.resources.peers.nexthops import NexthopTable
from flannel_dp.resources.peers.peer_map import PeerMap
from flannel_dp.resources.peers.place import DesiredTable, Paths, PeerTable, Placement
from flannel_dp.resources.peers.routes import RouteTable
from flannel_dp.tables.entries import Scope

Layout = tuple[PeerTable, ...]

_TUNNEL = (FdbTable(), NeighbourTable())

VXLAN: Layout = (*_TUNNEL, NexthopTable(tunnel=True), RouteTable(tunnel=True))
VXLAN_DIRECT: Layout = (
    *_TUNNEL,
    NexthopTable(tunnel=True, direct=True),
    RouteTable(tunnel=True, direct=True),
)
HOST_GW: Layout = (NexthopTable(direct=True), RouteTable(direct=True))
EBPF: Layout = (PeerMap(), NexthopTable(), RouteTable())
EBPF_DIRECT: Layout = (PeerMap(), NexthopTable(direct=True), RouteTable(direct=True))


def layout_of(place: Placement, family: int, *, mixed: bool) -> Layout:
    """The tables of a family; ``mixed`` where peers differ in how they are reached.

    Only IPv4 has nexthop objects, and only where the kernel knows them.
    """
    if place.map is not None:
        layout = EBPF_DIRECT if mixed else EBPF
    elif place.device is None:
        layout = HOST_GW
    else:
        layout = VXLAN_DIRECT if mixed else VXLAN
    if family == 4 and place.nexthops is not None:
        return layout
    return tuple(table for table in layout if not isinstance(table, NexthopTable))


def desired(peers: Claims, place: Placement, paths: Paths = None) -> list[DesiredTable]:
    """The tables of ``peers``, in the order in which they are written.

    Entries of peer i are tagged i. ``paths`` has a byte for each peer, TUNNEL or DIRECT; without
    it all go through the tunnel, or in host-gw all direct. A peer of host-gw whose path is not
    DIRECT gets no entry.
    """
    layout = layout_of(place, peers.family, mixed=paths is not None)
    return [
        DesiredTable(table.rows(peers, place, paths), table.scopes(place, peers.family))
        for table in layout
    ]


def desired_tables(peers: Claims, place: Placement, paths: Paths = None) -> list[Table]:
    """The tables of ``desired`` alone, where what they are the whole of is known."""
    layout = layout_of(place, peers.family, mixed=paths is not None)
    if not len(peers):
        return [Table(table.kind) for table in layout]
    return [table.rows(peers, place, paths) for table in layout]


def layout_scopes(place: Placement, family: int, *, mixed: bool = False) -> list[Scope]:
    """All scopes of a family's tables in order, before there are any peers."""
    layout = layout_of(place, family, mixed=mixed)
    return [scope for table in layout for scope in table.scopes(place, family)]
