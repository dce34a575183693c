"""When a family's tables are read while its leases are: only large ones, on known devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flannel_dp.node.view import Ahead, Family, Leases, sized
from flannel_dp.resources.device import vxlan
from flannel_dp.resources.peers.layouts import layout_scopes
from flannel_dp.resources.peers.place import Placement
from flannel_dp.resources.peers.stack import to_dump

if TYPE_CHECKING:
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.kernel.ahead import ReadAhead

#: From so many leases on, the tables are read while the leases are.
_READ_AHEAD = 2000


def reader(plane: DataPlane, leases: Leases, ahead: ReadAhead) -> Ahead | None:
    """Begin to read a family's tables while its leases are judged, where that pays."""
    backend = plane.config.backend
    if backend.direct_routing or backend.by_program or len(sized(leases)) < _READ_AHEAD:
        return None
    nexthops, take_boot = plane.nexthops, plane.resolver.take_over

    def start(number: int, device: int, uplink: int) -> None:
        network = vxlan.network_of(plane.config, number)
        place = Placement(device, uplink, network, nexthops, take_boot=take_boot)
        before, count = plane.known.get(number), len(sized(leases))
        known = before is not None and before.index == device
        ahead.start(to_dump(layout_scopes(place, number), count, known=known), count)

    return start


def start_again(family: Family, ahead: ReadAhead) -> None:
    """Begin to read a family's tables while the node is looked at, where that pays."""
    if (
        family.index
        and (family.ways, family.maps) == (None, None)
        and len(family.peers) >= _READ_AHEAD
    ):
        scopes = [scope for wanted in family.tables for scope in wanted.scopes]
        chosen = [scope for scope in scopes if scope.device or scope.type]
        ahead.start(to_dump(chosen, len(family.peers), known=True), len(family.peers))
