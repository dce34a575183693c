"""What leads packets to the program that forwards: one route and one neighbour for all peers.

``ip route replace 10.244.0.0/16 via 169.254.138.1 dev flannel.1 onlink`` and
``ip neigh replace 169.254.138.1 lladdr 02:8a:00:00:00:01 dev flannel.1 nud permanent``.
"""

from __future__ import annotations

from collections.abc import Mapping

from flannel_dp._core import Table
from flannel_dp.resources.peers.place import NO_PEER, DesiredTable, Placement
from flannel_dp.tables.entries import PROTOCOL, Neighbour, Route
from flannel_dp.tables.scopes import neighbour_scope, route_scope

#: The gateway of the network's route: link-local, the address of no node, and on the device
#: because the route says onlink. The program puts the peer's MAC in place of the gateway's.
GATEWAYS = {4: "169.254.138.1", 6: "fe80::8a"}
GATEWAY_MAC = "02:8a:00:00:00:01"


def shared_gateway(place: Placement, family: int) -> list[DesiredTable]:
    """Return the neighbour and the route, in the order in which they are written."""
    gateway, device = GATEWAYS[family], place.device
    neighbours, routes = Table("neighbour"), Table("route")
    neighbours.add(Neighbour(device, gateway, GATEWAY_MAC), NO_PEER)
    routes.add(Route(place.network, gateway=gateway, device=device, onlink=True), NO_PEER)
    return [
        DesiredTable(neighbours, (neighbour_scope(device, family),), shared=True),
        DesiredTable(routes, (route_scope(family, device=device, exclusive=True),), shared=True),
    ]


def is_shared_gateway(route: Route, network: str, family: int) -> bool:
    """Return whether a route is the one that leads all packets to the program."""
    return (route.prefix, route.gateway) == (network, GATEWAYS[family])


def gateway_state(route: Route | None, neighbours: Mapping[str, Neighbour], family: int) -> str:
    """Return what is missing on the path of all peers: "ok", or what ``show`` calls it.

    ``route`` is the shared one as the kernel has it, ``neighbours`` are those of the device.
    """
    if route is None:
        return "no route"
    neighbour = neighbours.get(GATEWAYS[family])
    if neighbour is None or neighbour.mac != GATEWAY_MAC:
        return "no neighbour"
    return "ok" if route.protocol == PROTOCOL else "foreign"
