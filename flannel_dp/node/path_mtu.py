"""The MTU of the paths to the peers, where routes have one of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

from msgspec import Struct

from flannel_dp._core import Claims, Table
from flannel_dp.kernel.links import Address, DefaultRoute, Link, StaticRoute
from flannel_dp.kernel.messages import ANY
from flannel_dp.tables.entries import BLACKHOLE, Route

#: The metric of an IPv6 network that comes of an address (IP6_RT_PRIO_ADDRCONF); IPv4 has 0.
_CONNECTED = {4: 0, 6: 256}


class PathMtu(Struct, frozen=True):
    """The MTU of the paths to the peers; ``said_by`` is the route that lowers it, "" for the
    interface's own."""

    mtu: int
    said_by: str = ""


class _Way(Struct, frozen=True):
    prefix: str
    gateway: str
    metric: int
    mtu: int


def path_mtu(
    link: Link,
    peers: Claims,
    networks: Iterable[Address],
    defaults: Iterable[DefaultRoute],
    statics: Iterable[StaticRoute],
) -> PathMtu:
    """Return the least MTU of the routes out of ``link``, the external interface, that carry a
    packet to one of the ``peers``.

    ``networks`` are the addresses of this node, of which the connected routes come. Other
    interfaces do not count: the kernel looks up the path of a tunnel that is bound to one among
    the routes out of it. Equivalent: the ``mtu`` of ``ip route get PEER oif LINK``.
    """
    ways = list(_ways(link.index, peers.family, networks, defaults, statics))
    for mtu in sorted({way.mtu for way in ways if 0 < way.mtu < link.mtu}):
        if any(peers.ways(_marked(ways, mtu, link.index), link.index)):
            said_by = next(way for way in ways if way.mtu == mtu)
            via = f"via {said_by.gateway} " if said_by.gateway else ""
            return PathMtu(mtu, f"route {said_by.prefix} {via}dev {link.name} mtu {mtu}")
    return PathMtu(link.mtu)


def _ways(
    link: int,
    family: int,
    networks: Iterable[Address],
    defaults: Iterable[DefaultRoute],
    statics: Iterable[StaticRoute],
) -> Iterator[_Way]:
    """Yield the routes out of ``link``: of two for one prefix with one metric the configured one
    first, which has replaced the kernel's."""
    for static in statics:
        for oif, gateway in static.hops:
            if oif == link:
                prefix = f"{static.prefix}/{static.length}"
                yield _Way(prefix, gateway, static.metric, static.mtu)
    for default in defaults:
        if default.oif == link:
            yield _Way(f"{ANY[family]}/0", default.gateway or "", default.metric, default.mtu)
    for one in networks:
        if one.index == link and one.family == family:
            net = ip_network(f"{one.peer or one.address}/{one.prefixlen}", strict=False)
            yield _Way(str(net), "", _CONNECTED[family], 0)


def _marked(ways: Iterable[_Way], mtu: int, link: int) -> Table:
    """Return the routes, with those of ``mtu`` as the ones that Claims.ways() calls direct."""
    table = Table("route")
    for way in ways:
        route = Route(way.prefix, metric=way.metric, type=BLACKHOLE)
        if table.find(route) < 0:
            if way.mtu == mtu:
                route = Route(way.prefix, device=link, metric=way.metric)
            table.add(route)
    return table
