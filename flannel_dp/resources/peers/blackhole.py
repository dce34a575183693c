"""A blackhole for this node's subnet: packets to a pod that is gone do not leave the node.

``ip route add blackhole 10.244.1.0/24 metric 4294901760 proto 138``: flanneld's
``--ip-blackhole-route``. Without it such packets follow the default route, and come back.
"""

from __future__ import annotations

from flannel_dp._core import Table
from flannel_dp.resources.peers.place import NO_PEER, DesiredTable
from flannel_dp.tables.entries import BLACKHOLE, Route
from flannel_dp.tables.scopes import route_scope

#: Behind the metric of any route that a pod's bridge makes: it catches what no pod has taken.
BLACKHOLE_METRIC = 0xFFFF0000


def is_blackhole(route: Route) -> bool:
    """Return whether a route is such a one."""
    return (route.type, route.metric) == (BLACKHOLE, BLACKHOLE_METRIC)


def blackhole(subnet: str, network: str, family: int) -> DesiredTable:
    """Return the route for this node's ``subnet``; "" wants none and removes what is left."""
    table = Table("route")
    if subnet:
        table.add(Route(subnet, metric=BLACKHOLE_METRIC, type=BLACKHOLE), NO_PEER)
    scope = route_scope(family, within=network)._replace(type=BLACKHOLE)
    return DesiredTable(table, (scope,), shared=True)
