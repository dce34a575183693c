"""Routes to the peers' subnets.

Through the tunnel ``ip route replace 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink``, as
flannel writes it (pkg/backend/vxlan/vxlan_network.go), with the gateway in a nexthop object for
IPv4; directly ``ip route replace 10.244.7.0/24 via 192.0.2.7 dev eth0``
(pkg/backend/route_network.go). Ours have protocol 138, or are on our device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from msgspec import Struct

from flannel_dp._core import Claims, Table
from flannel_dp.resources.peers.nexthops import NEXTHOP_BASE
from flannel_dp.resources.peers.paths import Paths
from flannel_dp.resources.peers.place import DIRECT, TUNNEL, PathColumn, Placement
from flannel_dp.tables.entries import PROTOCOL, Scope
from flannel_dp.tables.scopes import route_scope

#: flanneld's routes carry the mark of ``ip route add`` (RTPROT_BOOT).
PROTOCOL_BOOT = 3


class RouteTable(Struct, frozen=True):
    """A route for each peer: through our device (``tunnel``), by the uplink (``direct``), or none.

    With both, every peer has one of the two, as its path says. With neither the table is wanted
    empty. All routes on our device are this table's where routes go through it. ``by_object``
    has the gateway in a nexthop object. ``protocol`` is the mark of our routes; with another one
    they are written as flanneld's, and stay ours until then.
    """

    kind: ClassVar[str] = "route"

    tunnel: bool = False
    direct: bool = False
    by_object: bool = True
    protocol: int = PROTOCOL

    def rows(self, peers: Claims, place: Placement, paths: PathColumn) -> Table:
        routes = Table(self.kind)
        if self.by_object:
            self._by_nexthop(routes, peers, paths)
            return routes
        if self.tunnel:
            routes.extend_routes(
                peers.subnets,
                peers.lengths,
                self.protocol,
                gateways=peers.subnets,
                device=place.device,
                ways=paths,
                way=TUNNEL,
            )
        if self.direct:
            routes.extend_routes(
                peers.subnets,
                peers.lengths,
                self.protocol,
                gateways=peers.endpoints,
                device=place.uplink,
                onlink=False,
                ways=paths,
                way=DIRECT,
            )
        return routes

    def _by_nexthop(self, routes: Table, peers: Claims, paths: PathColumn) -> None:
        if not (self.tunnel or self.direct):
            return
        # Both paths use the nexthop of the same id.
        chosen = None if self.tunnel else paths
        ids = peers.nexthop_ids(NEXTHOP_BASE)
        routes.extend_routes(
            peers.subnets, peers.lengths, PROTOCOL, nexthops=ids, ways=chosen, way=DIRECT
        )

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        """Return all routes on our device, and those of our protocol into the network.

        Where routes of ours go to the uplink all routes there are read: one of flanneld's in
        place of ours is adopted.
        """
        scopes = []
        if self.tunnel:
            scopes.append(route_scope(family, device=place.device, exclusive=True))
        if place.uplink:
            scope = route_scope(family, device=place.uplink, within=place.network)
            scopes.append(scope._replace(marked=False) if self.direct else scope)
        scopes += [
            route_scope(family, device=device, within=place.network) for device in place.leftovers
        ]
        if place.take_boot and place.uplink:
            scopes.append(
                route_scope(
                    family, device=place.uplink, within=place.network, protocol=PROTOCOL_BOOT
                )
            )
        return tuple(scopes)

    def find(self, table: Table, place: Placement, subnet: str) -> int:
        return table.find((subnet,))

    def rivals(
        self, peers: Claims, number: int, table: Table, lengths: bytes, place: Placement
    ) -> tuple[int, bool]:
        return peers.rivals(number, table, lengths)

    def left_out(self, paths: Paths) -> Sequence[int]:
        return () if self.tunnel else paths.tunnelled()
