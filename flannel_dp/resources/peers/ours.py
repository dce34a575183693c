"""Where entries of ours can be, whatever layout wrote them and on whichever device.

Clean removes them all, and views read them: a layout that the node had before is seen as well as
the one that it has. What a layout's own table is the whole of says each table's ``scopes``.
"""

from __future__ import annotations

from flannel_dp.kernel.host import Host
from flannel_dp.resources.peers.nexthops import EVERY_ID, nexthop_ids
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import (
    fdb_scope,
    neighbour_scope,
    nexthop_scope,
    peer_scope,
    route_scope,
)


def every_scope(
    host: Host, family: int, network: str, *, device: int = 0, map: int = 0
) -> list[tuple[Scope, ...]]:
    """Return the scopes of each kind of table, in the order in which the tables are written.

    ``device`` is the vxlan device's ifindex and ``map`` the descriptor of the program's map, 0
    where there is none. All of the device is ours, and its scope comes last: what it says of an
    entry counts. Raises KernelError.
    """
    found: list[tuple[Scope, ...]] = []
    if map:
        found.append((peer_scope(map, family),))
    if device:
        found += [(fdb_scope(device),), (neighbour_scope(device, family),)]
    if host.keeps("nexthop", family):
        nexthops = nexthop_scope(0, ids=nexthop_ids(network))
        on_device = (nexthop_scope(device, ids=EVERY_ID),) if device else ()
        found.append((nexthops, *on_device))
    routes = route_scope(family, within=network)
    through = (route_scope(family, device=device, exclusive=True),) if device else ()
    found.append((routes, *through))
    return found
