"""Looking at an overlay that a program forwards: its peers, and whether packets get to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flannel_dp.resources.device import vxlan
from flannel_dp.resources.peers.gateway import GATEWAY_MAC, GATEWAYS
from flannel_dp.tables.entries import PROTOCOL, Neighbour, Peer, Route
from flannel_dp.tables.scopes import neighbour_scope, peer_scope, route_scope

if TYPE_CHECKING:
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.resources.device.view import DeviceView


def held_peers(dataplane: DataPlane, number: int) -> list[Peer]:
    """The peers of one family that the program forwards to; none where it is not loaded.

    ``bpftool map dump pinned .../forward-peers4``. Raises Conflict, KernelError.
    """
    dataplane.program.ready(load=False)
    held = dataplane.program.maps(number)
    return [*dataplane.kernel.read("peer", peer_scope(held, number))] if held else []


def program_problem(dataplane: DataPlane, index: int) -> str:
    """Why the program does not see the packets of a device; "" where it does."""
    dataplane.program.ready(load=False)
    forwarding = dataplane.program.forwarding
    assert forwarding is not None
    if not forwarding.is_open:
        return "its forwarding program is not loaded: 'flannel-dp sync' loads it"
    missing = forwarding.missing(index)
    if missing:
        where = " and ".join(missing)
        return f"its forwarding program is not attached ({where}): 'flannel-dp sync' attaches it"
    return ""


def trunk_state(dataplane: DataPlane, number: int, device: DeviceView) -> str:
    """What is missing on the way of all peers: "ok", or what ``show`` calls it."""
    if not device.index:
        return "no device"
    if device.problem:
        return "no program" if "program" in device.problem else "no device"
    network, gateway = vxlan.network_of(dataplane.config, number), GATEWAYS[number]
    scope = route_scope(number, device=device.index, exclusive=True)
    routes = {one.prefix: one for one in dataplane.kernel.read("route", scope)}
    found = routes.get(network)
    if not isinstance(found, Route) or found.gateway != gateway:
        return "no route"
    neighbour = dataplane.kernel.get(
        neighbour_scope(device.index, number), Neighbour(device.index, gateway, GATEWAY_MAC)
    )
    if not isinstance(neighbour, Neighbour) or neighbour.mac != GATEWAY_MAC:
        return "no neighbour"
    return "ok" if found.protocol == PROTOCOL else "foreign"
