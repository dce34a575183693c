"""What was written for the peers of one family. Its one writer is the peers resource."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from flannel_dp._core import Claims, Roster, Table
from flannel_dp.cluster.admission import policy_of
from flannel_dp.node.family import Family
from flannel_dp.resources.peers.layouts import Layout, MacsIn
from flannel_dp.resources.peers.paths import Paths
from flannel_dp.resources.peers.place import DesiredTable, Placement


class State(Struct):
    """The tables of one family as they were written last, and what finds a peer in them.

    ``layout`` says which tables they are, ``paths`` how each peer is reached.
    ``tables`` have an entry for each peer, ``shared`` have none for a single peer. ``roster`` finds
    a peer in them, once that was asked for. ``mtus`` are MTUs that routes have of their own, as a
    table of routes without anything else; None where none ever had.
    """

    family: Family
    place: Placement
    layout: Layout
    paths: Paths
    tables: list[DesiredTable]
    shared: list[DesiredTable]
    roster: Roster | None = None
    mtus: Table | None = None

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
    def local(self) -> str:
        """The underlay address that tunnel packets leave from, "" in host-gw."""
        return self.family.local

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
    def unreachable(self) -> Sequence[int]:
        """The numbers of accepted peers that no route can be written for."""
        return self.layout.list_of_all.left_out(self.paths)

    def peer_roster(self) -> Roster:
        """Return what finds a peer and follows a change of a few, made when first asked for."""
        admitted, made = self.family.admission, self.roster
        if made is not None and made.peers is admitted.accepted:
            return made
        kinds = [one.table.kind for one in self.tables]
        own = admitted.own
        self.roster = made = Roster(
            admitted.accepted,
            admitted.rejected.claims,
            policy_of(admitted.node, need_mac=self.layout.needs_mac),
            [one.table for one in self.tables],
            self.layout.recipes(self.place, self.number),
            kinds.index(self.layout.list_of_all.kind),
            _MACS_IN[self.layout.macs_in],
            own.name if own else "",
            own.subnet if own else "",
        )
        return made


#: The number of the table that has all MACs, as ``Roster`` takes it.
_MACS_IN: dict[MacsIn, int | None] = {"first": 0, "apart": -1, "none": None}
