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

from flannel_dp._core import Recipe
from flannel_dp.resources.peers.nexthops import NEXTHOP_BASE
from flannel_dp.resources.peers.paths import Paths
from flannel_dp.resources.peers.place import Placement
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

    def recipe(self, place: Placement, family: int) -> Recipe:
        # Both paths use the object of the same id.
        direct = self.direct or (self.by_object and self.tunnel)
        return Recipe(
            self.kind,
            family,
            tunnel=place.device if self.tunnel else None,
            direct=place.uplink if direct else None,
            protocol=PROTOCOL if self.by_object else self.protocol,
            base=NEXTHOP_BASE if self.by_object else 0,
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

    def left_out(self, paths: Paths) -> Sequence[int]:
        return () if self.tunnel else paths.tunnelled()
