"""Netlink messages about routes, nexthop objects and neighbour tables: their decoding, as structs.

Pure functions over bytes, as in :mod:`flannel_dp.kernel.messages`, with the same care.

Source of the layouts: include/uapi/linux/{rtnetlink,nexthop,neighbour}.h.
"""

from __future__ import annotations

import struct

from msgspec import Struct

from flannel_dp.kernel.messages import (
    NDTMSG,
    NHMSG,
    RT_TABLE_MAIN,
    RTM_NEWNEXTHOP,
    RTM_NEWROUTE,
    RTMSG,
    address_text,
    attributes,
    malformed,
    u32,
)

_RTNEXTHOP = struct.Struct("=HBBi")
_NDT_CONFIG = struct.Struct("=HHI")  # struct ndt_config: key_len, entry_size, entries

_RTNH_F_DEAD, _RTNH_F_ONLINK = 0x1, 0x4
_RTA_OIF, _RTA_GATEWAY, _RTA_METRICS, _RTA_MULTIPATH, _RTA_VIA = 4, 5, 8, 9, 18
_RTAX_MTU = 2
_NDTA_THRESH3, _NDTA_CONFIG, _NDTA_STATS = 4, 5, 7
#: The last of eleven numbers of struct ndt_stats, with Linux 4.3: ndts_table_fulls.
_NDT_FULL, _NDT_FULL_AT = struct.Struct("=Q"), 80
_NHA_GROUP, _NHA_OIF, _NHA_GATEWAY = 2, 5, 6


class StaticRoute(Struct, frozen=True):
    """A route of the main table as another program configured it: ``hops`` are (ifindex, gateway or
    ""), ``mtu`` is the route's own, 0 for none."""

    prefix: str
    length: int
    hops: tuple[tuple[int, str], ...]
    metric: int = 0
    mtu: int = 0


class RouteAnswer(Struct, frozen=True):
    """Where the kernel would send a packet; ``local`` when the address is the node's own."""

    oif: int
    gateway: str | None
    prefsrc: str | None
    local: bool


class DefaultRoute(Struct, frozen=True):
    """One next hop of a default route; ``metric`` 0 is the best IPv4 has, ``table`` is the
    routing table it is in, ``source`` the address that it asks to send from (``src``), ``onlink``
    that the gateway is on the link, whatever networks the interface has, ``mtu`` the route's own,
    0 for none."""

    oif: int
    gateway: str | None
    metric: int
    table: int = RT_TABLE_MAIN
    source: str | None = None
    onlink: bool = False
    mtu: int = 0


class RouteMatch(Struct, frozen=True):
    """The entry of the routing table that carries a packet: ``device`` is an ifindex, 0 when
    the entry names none, ``gateway`` "" when there is none, ``nexthop`` the id of its object
    or 0, ``local`` when the address is the node's own, ``table`` the routing table it is in,
    ``mtu`` its own, 0 for none."""

    prefix: str
    gateway: str
    device: int
    device_name: str
    nexthop: int
    protocol: int
    local: bool
    table: int = RT_TABLE_MAIN
    mtu: int = 0


class NeighbourUse(Struct, frozen=True):
    """How full the kernel's neighbour table of a family is: ``entries`` of any kind that it
    holds, ``limit`` (gc_thresh3), the number of dynamic ones that it may hold, and how many it has
    ``rejected`` since the boot, because it was full."""

    entries: int
    limit: int
    rejected: int = 0

    def is_full(self, permanent: int) -> bool:
        """Return True when dynamic entries are at their limit, ``permanent`` ones taken off:
        those are exempt from it (neigh_alloc in net/core/neighbour.c). Which of the others are
        permanent the kernel does not say, so that it must have rejected some."""
        return self.rejected > 0 and self.entries - permanent >= self.limit


class RouteReply(Struct, frozen=True):
    """One RTM_NEWROUTE: ``kind`` is an RTN_* value, ``attrs`` are the RTA_* attributes."""

    prefixlen: int
    protocol: int
    kind: int
    dead: bool
    attrs: dict[int, bytes]
    onlink: bool = False

    @property
    def mtu(self) -> int:
        """The MTU that the route has of its own (``ip route add ... mtu 1400``), 0 for none."""
        metrics = self.attrs.get(_RTA_METRICS)
        return u32(attributes(metrics, 0, "route metrics").get(_RTAX_MTU)) if metrics else 0


def parse_route(reply: tuple[int, bytes], what: str) -> RouteReply:
    """Return one route of an answer or a dump."""
    kind, data = reply
    if kind != RTM_NEWROUTE or len(data) < RTMSG.size:
        raise malformed(what)
    _, prefixlen, _, _, _, protocol, _, type_, flags = RTMSG.unpack_from(data)
    attrs = attributes(data, RTMSG.size, what)
    dead, onlink = bool(flags & _RTNH_F_DEAD), bool(flags & _RTNH_F_ONLINK)
    return RouteReply(prefixlen, protocol, type_, dead, attrs, onlink)


def parse_neighbour_use(reply: tuple[int, bytes], what: str) -> NeighbourUse | None:
    """Return the use of a neighbour table (neightbl_fill_info in net/core/neighbour.c); None for a
    message about one device's parameters."""
    attrs = attributes(reply[1], NDTMSG.size, what)
    config, limit = attrs.get(_NDTA_CONFIG), u32(attrs.get(_NDTA_THRESH3))
    if config is None or len(config) < _NDT_CONFIG.size or not limit:
        return None
    stats = attrs.get(_NDTA_STATS, b"")
    rejected = _NDT_FULL.unpack_from(stats, _NDT_FULL_AT)[0] if len(stats) > _NDT_FULL_AT else 0
    return NeighbourUse(_NDT_CONFIG.unpack_from(config)[2], limit, rejected)


def next_hops(attrs: dict[int, bytes], what: str) -> list[tuple[int, str | None]]:
    """(ifindex, gateway) of each next hop of a route, those whose interface is down last; one
    (0, None) when it names none."""
    if _RTA_MULTIPATH not in attrs:
        return [(u32(attrs.get(_RTA_OIF)), _gateway(attrs))]
    found: list[tuple[int, str | None]] = []
    dead: list[tuple[int, str | None]] = []
    data, offset = attrs[_RTA_MULTIPATH], 0
    while offset + _RTNEXTHOP.size <= len(data):
        length, flags, _, ifindex = _RTNEXTHOP.unpack_from(data, offset)
        if length < _RTNEXTHOP.size or offset + length > len(data):
            raise malformed(what)
        inner = attributes(data[: offset + length], offset + _RTNEXTHOP.size, what)
        (dead if flags & _RTNH_F_DEAD else found).append((ifindex, _gateway(inner)))
        offset += (length + 3) & ~3
    return [*found, *dead] or [(0, None)]


def parse_nexthop(reply: tuple[int, bytes], what: str) -> tuple[list[int], int, str | None]:
    """Return the members of a nexthop group, else the ifindex and the gateway of a nexthop
    object."""
    kind, data = reply
    if kind != RTM_NEWNEXTHOP or len(data) < NHMSG.size:
        raise malformed(what)
    attrs = attributes(data, NHMSG.size, what)
    group = attrs.get(_NHA_GROUP, b"")
    members = [u32(group[at:]) for at in range(0, len(group) - 7, 8)]  # struct nexthop_grp
    return members, u32(attrs.get(_NHA_OIF)), address_text(attrs.get(_NHA_GATEWAY))


def _gateway(attrs: dict[int, bytes]) -> str | None:
    """Return the gateway; RTA_VIA is one of the other family (RFC 5549), after its 2-byte
    family."""
    return address_text(attrs.get(_RTA_GATEWAY)) or address_text(attrs.get(_RTA_VIA, b"")[2:])
