"""What was written for the peers of one family. Its one writer is the peers resource."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, field

from flannel_dp._core import Claims, Table
from flannel_dp.node.family import Family
from flannel_dp.resources.peers.layouts import Layout
from flannel_dp.resources.peers.paths import Paths
from flannel_dp.resources.peers.place import NO_PEER, DesiredTable, Placement


class State(Struct):
    """The tables of one family as they were written last, and what finds a peer in them.

    ``layout`` says which tables they are, ``paths`` how each peer is reached.
    ``tables`` have an entry for each peer, ``shared`` have none for a single peer. ``lengths`` are
    those of the peers' subnets (of some that left, too). ``macs`` finds a peer by its MAC where the
    FDB does not, once that was asked for.
    """

    family: Family
    place: Placement
    layout: Layout
    paths: Paths
    tables: list[DesiredTable]
    shared: list[DesiredTable]
    lengths: set[int]
    macs: Table | None = field(default=None)

    @property
    def number(self) -> int:
        """4 or 6."""
        return self.family.number

    @property
    def peers(self) -> Claims:
        """The accepted leases of the other nodes."""
        return self.family.peers

    @property
    def index(self) -> int:
        """The vxlan device's ifindex; 0 where there is none."""
        return self.place.device

    @property
    def uplink(self) -> int:
        """The external interface's ifindex."""
        return self.family.uplink

    @property
    def network(self) -> str:
        """The pod network of the family."""
        return self.place.network

    @property
    def subnet(self) -> str:
        """This node's subnet."""
        return self.family.admission.node.subnet

    @property
    def devices(self) -> frozenset[int]:
        """The ifindexes of the devices that matter to this family: a change of one matters."""
        return frozenset((self.index, self.family.uplink, *self.place.leftovers))

    @property
    def all_tables(self) -> list[DesiredTable]:
        """All tables, in the order in which they are written."""
        return [*self.shared, *self.tables]

    @property
    def routes(self) -> DesiredTable:
        """The table that everything else is there for; it is written last."""
        return self.tables[-1]

    @property
    def peer_table(self) -> DesiredTable:
        """The table that has an entry for each peer, whatever its path."""
        kind = self.layout.list_of_all.kind
        found = self.tables[-1]  # it is this one in most layouts
        return found if found.table.kind == kind else _of_kind(self.tables, kind)

    @property
    def unreachable(self) -> Sequence[int]:
        """The numbers of accepted peers that no route can be written for."""
        return self.layout.list_of_all.left_out(self.paths)

    def find_mac(self, mac: str) -> int:
        """Return the number of the peer with this MAC, -1 where there is none."""
        return _peer(self.layout.find_mac(mac, self.index, self.tables[0].table, self.every_mac))

    def every_mac(self) -> Table:
        """Return all peers by MAC: ``macs``, made when it is first asked for."""
        if self.macs is None:
            self.macs = mac_table(self.peers)
        return self.macs

    def find_subnet(self, subnet: str) -> int:
        """Return the number of the peer with this subnet, -1 where there is none.

        Raises ValueError for a text that is no prefix.
        """
        table = self.peer_table.table
        place = self.layout.list_of_all.find(table, self.place, subnet)
        return place if place < 0 else _peer(table.tag(place))

    def rivals(self, new: Claims, number: int, lengths: bytes) -> tuple[int, bool]:
        """Return the peer with the subnet of claim ``number`` of ``new``, and whether others
        overlap."""
        table = self.peer_table.table
        same, others = self.layout.list_of_all.rivals(new, number, table, lengths, self.place)
        return _peer(same), others


def _of_kind(tables: Sequence[DesiredTable], kind: str) -> DesiredTable:
    return next(one for one in tables if one.table.kind == kind)


def _peer(tag: int) -> int:
    """Return the number of the peer that an entry is tagged with, -1 where it is kept without a
    lease."""
    return -1 if tag == NO_PEER else tag


def mac_table(peers: Claims) -> Table:
    """Return peers by MAC, as an FDB of no device."""
    table = Table("fdb")
    table.extend_fdb(0, peers.macs, peers.endpoints)
    return table
