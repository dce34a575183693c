"""The steps of an explanation in words: each from what should be there and what the kernel has.

Pure functions; :mod:`flannel_dp.look.walk` asks the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flannel_dp.kernel.messages import RT_TABLE_LOCAL, RT_TABLE_MAIN
from flannel_dp.kernel.route_messages import RouteMatch
from flannel_dp.look.explanation import Owner, Step, length_of
from flannel_dp.look.terminal import count, human, human_time
from flannel_dp.resources.device.view import DeviceView
from flannel_dp.resources.peers.nexthops import EVERY_ID
from flannel_dp.tables.describe import protocol_name
from flannel_dp.tables.entries import PROTOCOL

if TYPE_CHECKING:
    from flannel_dp.resources.counters.reading import Direction, Traffic

SYNC = "run 'flannel-dp sync'"


def lease_step(owner: Owner) -> Step:
    """Return the lease that has the address."""
    return Step("lease", "", f"{owner.name}: {owner.subnet} at {owner.public_ip}", True)


def device_step(device: DeviceView) -> Step:
    """Return the vxlan device, up and correct."""
    held, problem = str(device) if device.index else "", device.problem
    held = held.replace(": ", " ", 1)
    held = held.removesuffix(f", {problem}") if problem else held
    return Step("device", device.name, held, not problem, problem)


# ---- routes


def route_text(match: RouteMatch) -> str:
    """Return a route as ``ip route get fibmatch`` has it."""
    words = [match.prefix]
    words += [f"nhid {match.nexthop}"] if match.nexthop else []
    words += [f"via {match.gateway}"] if match.gateway else []
    words += [f"dev {match.device_name or match.device}"]
    if match.protocol != PROTOCOL:
        words.append(f"proto {protocol_name(match.protocol)}")
    words += [f"mtu {match.mtu}"] if match.mtu else []
    if match.table not in (RT_TABLE_MAIN, RT_TABLE_LOCAL):
        words.append(f"table {match.table}")
    return " ".join(words)


def route_step(match: RouteMatch | None, wanted: str, *, ok: bool = True, text: str = "") -> Step:
    """Return the route that carries the packet, None where there is none."""
    return Step("route", wanted, route_text(match) if match else "", ok, text)


def tunnel_route_step(
    match: RouteMatch | None, device: DeviceView, subnet: str, gateway: str
) -> Step:
    """Return the route into the tunnel; ``subnet`` is "" where nothing says what it should be
    for."""
    wanted = f"{subnet} via {gateway} dev {device.name}" if subnet else f"dev {device.name}"
    ok, text = False, ""
    if match is None:
        text = f"there is no route: {SYNC}"
    elif not device.index or match.device != device.index:
        text = _obstacle(match, subnet)
    elif subnet and match.prefix != subnet:
        text = f"the packet takes a route to another prefix: {SYNC}"
    else:
        foreign = "written by another program; a sync takes it over"
        ok, text = True, foreign if match.protocol != PROTOCOL else ""
    return route_step(match, wanted, ok=ok, text=text)


def direct_route_step(
    match: RouteMatch | None, owner: Owner, uplink: int, name: str, *, in_tunnel: bool
) -> Step:
    """Return the route to a peer on this node's own network, by the peer's public address."""
    wanted = f"{owner.subnet} via {owner.public_ip} dev {name or uplink}"
    if match is None:
        return route_step(match, wanted, ok=False, text=f"there is no route: {SYNC}")
    held = (match.prefix, match.gateway, match.device)
    if held == (owner.subnet, owner.public_ip, uplink):
        return route_step(match, wanted)
    text = f"it goes through the tunnel, and need not: {SYNC}"
    if not in_tunnel:
        text = _obstacle(match, owner.subnet)
    return route_step(match, wanted, ok=False, text=text)


def _obstacle(match: RouteMatch, subnet: str) -> str:
    """Return what to do about a route that is not the one there should be."""
    in_main = match.table == RT_TABLE_MAIN
    if in_main and (match.protocol == PROTOCOL or length_of(match.prefix) < length_of(subnet)):
        return f"the route is missing or wrong: {SYNC}"
    # iproute2 finds a route on a nexthop object by its id only.
    which = f"nhid {match.nexthop}" if match.nexthop else f"dev {match.device_name}"
    if match.table != RT_TABLE_MAIN:
        which = f"table {match.table}"
    return (
        "another program's route blocks it: remove it with "
        f"'ip route del {match.prefix} {which}', then {SYNC}"
    )


def underlay_step(address: str, match: RouteMatch | None, uplink: int, iface: str) -> Step:
    """Return why this path: what the underlay's routes say of the peer's public address."""
    if match is None:
        held = f"no route carries {address}: not direct"
    elif match.gateway:
        held = f"{address} is behind gateway {match.gateway} ({match.prefix}): not direct"
    elif match.device != uplink:
        held = f"{address} is on-link on {match.device_name}, not {iface}: not direct"
    else:
        held = f"{address} is on-link on {iface} ({match.prefix}): direct"
    return Step("underlay", "", held, True)


# ---- what a route leads to


def gateway_step(wanted: str, held: str) -> Step:
    """Return a gateway that is not the peer's."""
    return Step("gateway", wanted, held, False, f"the gateway is not the peer's: {SYNC}")


def nexthop_step(number: int, wanted: str, held: str, device: str) -> Step:
    """Return the nexthop object of a route; ``held`` is its gateway."""
    first, last = EVERY_ID
    right = bool(held) and held == (wanted or held) and first <= number <= last
    text = "" if right else f"it is not the one a sync makes: {SYNC}"
    found = f"{number} via {held} dev {device}" if held else ""
    return Step("nexthop", f"via {wanted}" if wanted else "", found, right, text)


def entry_step(name: str, key: str, held: str, wanted: str) -> Step:
    """Return one entry by its key; ``wanted`` is "" where nothing says what it should be."""
    right = bool(held) and held == (wanted or held)
    text = "" if right else f"it is {'not the one of the lease' if held else 'missing'}: {SYNC}"
    return Step(
        name, f"{key} {wanted}" if wanted else "", f"{key} {held}" if held else "", right, text
    )


def packet_step(device: DeviceView, local: str, endpoint: str, match: RouteMatch | None) -> Step:
    """Return the encapsulated packet, and the route of the underlay that carries it."""
    to = f"[{endpoint}]" if ":" in endpoint else endpoint
    packet = f"{local} -> {to}:{device.port} vni {device.vni}"
    if match is None:
        text = f"the underlay has no route to {endpoint}: check the external interface"
        return Step("packet", packet, "", False, text)
    loops = match.device == device.index
    text = f"the tunnel runs through itself: {SYNC}" if loops else ""
    return Step("packet", "", f"{packet}, by {route_text(match)}", not loops, text)


def traffic_step(
    counted: Mapping[Direction, tuple[Traffic, float | None]],
    drops: Sequence[tuple[int, str, str]],
) -> Step:
    """Return what was counted of a peer, with the seconds since its last packet; ``drops`` are
    packets, reason and direction."""
    words = []
    for direction, (traffic, since) in counted.items():
        text = f"{direction} {count(traffic.packets, 'packet')} ({human(traffic.bytes)}B)"
        words.append(text if since is None else f"{text}, last {human_time(since)} ago")
    words += [f"{packets} {reason} dropped {direction}" for packets, reason, direction in drops]
    return Step("traffic", "", "; ".join(words), True)
