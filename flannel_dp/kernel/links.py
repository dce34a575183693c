"""Read devices, addresses, single routes and neighbour limits over netlink; write nothing.

It exists because importing pyroute2 takes longer than a whole sync that has nothing to change;
devices are changed by :mod:`flannel_dp.kernel.link_writer`, for the same reason.

The messages themselves are in :mod:`flannel_dp.kernel.messages`; what it defines for
callers can be imported from here.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from functools import lru_cache

from msgspec.structs import replace

from flannel_dp.errors import ConfigError, KernelError
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.ahead import RouteReader
from flannel_dp.kernel.messages import (
    IFA_F_NODAD,
    SCOPE_LINK,
    Address,
    Link,
)
from flannel_dp.kernel.netns import NetNS
from flannel_dp.kernel.route_messages import (
    DefaultRoute,
    NeighbourUse,
    RouteAnswer,
    RouteMatch,
    RouteReply,
    StaticRoute,
    next_hops,
    parse_neighbour_use,
    parse_nexthop,
    parse_route,
)
from flannel_dp.kernel.socket import NetlinkSocket

__all__ = [
    "IFA_F_NODAD",
    "SCOPE_LINK",
    "Address",
    "DefaultRoute",
    "Link",
    "LinkReader",
    "NeighbourUse",
    "RouteMatch",
    "StaticRoute",
]

_RTM_F_LOOKUP_TABLE, _RTM_F_FIB_MATCH = 0x1000, 0x2000
_EXT_MASK_SKIP_STATS = 1 << 3

# No public prefix covers these (RFC 1112 section 4, RFC 5737, RFC 7526; for IPv6 RFC 4291
# section 2.4 and RFC 9637), so that only a default route matches them, or a filter against
# such addresses made on purpose: hence three of each.
_DEFAULT_ROUTE_PROBES = {
    4: ("240.0.0.1", "198.51.100.1", "192.88.99.1"),
    6: ("4000::1", "8000::1", "3fff::1"),
}


class LinkReader(RouteReader):
    """Answer questions about the devices and the routing of one namespace; NetlinkSocket says
    how, and what it raises.

    Strict checking makes the kernel filter dumps (Linux 4.20 and later); older kernels ignore
    the filter, so replies are filtered here as well.
    """

    def __init__(self, netns: NetNS = None) -> None:
        super().__init__(netns)
        self._netns = netns
        self._links: dict[str | int, Link | None] | None = None
        self._kinds: dict[str, list[Link]] = {}
        self._addresses: dict[tuple[int | None, int], list[Address]] = {}

    def link(self, name_or_index: str | int) -> Link | None:
        """Return one device, or None when there is none.

        Equivalent: ``ip -d link show dev NAME``. Raises ConfigError for a name the
        kernel could not hold (empty, or over 15 bytes), KernelError when the kernel rejects it.
        """
        if self._links is not None and name_or_index in self._links:
            return self._links[name_or_index]
        found = self._link(name_or_index)
        if self._links is not None:
            self._links[name_or_index] = found
            if found is not None:
                self._links[found.index] = self._links[found.name] = found
        return found

    def _link(self, name_or_index: str | int) -> Link | None:
        attrs = nl.attr_u32(nl.IFLA_EXT_MASK, _EXT_MASK_SKIP_STATS)
        index = 0
        if isinstance(name_or_index, int):
            index = name_or_index
        else:
            attrs += nl.attr(nl.IFLA_IFNAME, nl.name_bytes(name_or_index))
        body = nl.IFINFOMSG.pack(0, 0, index, 0, 0) + attrs
        what = f"look up device {name_or_index}"
        try:
            replies = list(self._ask(nl.RTM_GETLINK, 0, body, what))
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return nl.parse_link(nl.only(replies, nl.RTM_NEWLINK, what), what)

    def remembering(self) -> LinkReader:
        """Make ``link``, ``links`` and ``addresses`` ask the kernel once only, from now on:
        one reading of the node, as of one moment."""
        self._links, self._kinds, self._addresses = {}, {}, {}
        return self

    def links(self, kind: str = "") -> list[Link]:
        """Return all devices, or those of one ``kind``, which the kernel picks out.

        Equivalent: ``ip -d link show [type KIND]``. Raises DumpInterrupted when the
        table changed under ten dumps in a row.
        """
        if self._links is None:
            return self._read_links(kind)
        if kind not in self._kinds:
            self._kinds[kind] = self._read_links(kind)
        return self._kinds[kind]

    def _read_links(self, kind: str) -> list[Link]:
        attrs = nl.attr_u32(nl.IFLA_EXT_MASK, _EXT_MASK_SKIP_STATS)
        if kind:
            attrs += nl.attr(nl.IFLA_LINKINFO, nl.attr(nl.IFLA_INFO_KIND, kind.encode() + b"\0"))
        what = "dump devices"
        replies = self.dump(nl.RTM_GETLINK, nl.IFINFOMSG.pack(0, 0, 0, 0, 0) + attrs, what)
        found = [nl.parse_link(reply, what) for reply in replies if reply[0] == nl.RTM_NEWLINK]
        return [link for link in found if not kind or link.kind == kind]

    def addresses(self, index: int | None = None, family: int = 0) -> list[Address]:
        """Return addresses, of one device (an ifindex) or all, of family 4, 6 or both (0).

        Equivalent: ``ip [-4|-6] address show [dev NAME]``. Raises DeviceGone when no
        device has that ifindex, DumpInterrupted as ``links``.
        """
        families = {0: (4, 6), 4: (4,), 6: (6,)}[family]
        found: list[Address] = []
        for each in families:
            found += self._addresses_of(index, each)
        return found

    def _addresses_of(self, index: int | None, family: int) -> list[Address]:
        if self._links is None:
            return self._read_addresses(index, family)
        known = self._addresses.get((None, family))
        if known is not None and index is not None:
            return [address for address in known if address.index == index]
        if (index, family) not in self._addresses:
            self._addresses[index, family] = self._read_addresses(index, family)
        return self._addresses[index, family]

    def _read_addresses(self, index: int | None, family: int) -> list[Address]:
        what = f"dump IPv{family} addresses" + (f" of device {index}" if index else "")
        body = nl.IFADDRMSG.pack(nl.af(family), 0, 0, 0, index or 0)
        found = (nl.parse_address(one, what) for one in self.dump(nl.RTM_GETADDR, body, what))
        return [one for one in found if one.family == family and index in (None, one.index)]

    def route_to(self, address: str) -> RouteAnswer | None:
        """Return the route of a packet to ``address``; None when there is none.

        None also stands for routes that reject: blackhole, unreachable, prohibit.
        Equivalent: ``ip route get ADDRESS``. Raises ConfigError when ``address`` is not an address.
        """
        reply = self._route(address, 0)
        if reply is None:
            return None
        hop = next_hops(reply.attrs, f"look up the route to {address}")[0]
        prefsrc = nl.address_text(reply.attrs.get(nl.RTA_PREFSRC))
        return RouteAnswer(hop[0], hop[1], prefsrc, reply.kind == nl.RTN_LOCAL)

    def route_match(self, address: str, *, source: str = "", iif: int = 0) -> RouteMatch | None:
        """Return the routing table's entry that carries ``address``; None as ``route_to``.

        Policy rules decide which table that is. With ``source`` and ``iif`` (an ifindex) it is the
        one for a packet that came from there, as those of pods. Linux 4.15 and later. Equivalent:
        ``ip route get ADDRESS [from SOURCE iif DEVICE] fibmatch``. Raises ConfigError when
        ``address`` is not an address.
        """
        reply = self._route(address, _RTM_F_FIB_MATCH | _table_too(address), source, iif)
        if reply is None:
            return None
        device, gateway = next_hops(reply.attrs, f"look up the route to {address}")[0]
        if not device:  # a nexthop object with sysctl net.ipv4.nexthop_compat_mode=0
            answer = self.route_to(address)
            device, gateway = (answer.oif, answer.gateway) if answer else (0, None)
        link = self.link(device) if device else None
        base = reply.attrs.get(nl.RTA_DST) or bytes(16 if ":" in address else 4)
        return RouteMatch(
            f"{ipaddress.ip_address(base)}/{reply.prefixlen}",
            gateway or "",
            device,
            link.name if link else "",
            nl.u32(reply.attrs.get(nl.RTA_NH_ID)),
            reply.protocol,
            reply.kind == nl.RTN_LOCAL,
            nl.u32(reply.attrs.get(nl.RTA_TABLE)) or nl.RT_TABLE_MAIN,
            reply.mtu,
        )

    def default_routes(self, family: int) -> list[DefaultRoute]:
        """Return the next hops of the default route in use for family 4 or 6; [] without one.

        One lookup each for at most three addresses that no public prefix covers,
        answered with the FIB entry that matched (``ip route get fibmatch``, Linux 4.15
        and later), instead of a dump: a node may hold a full BGP table. So it is what
        packets would use, policy rules included (``table`` says which one matched), and not
        standby default routes. A VPN's pair 0.0.0.0/1 and 128.0.0.0/1 is not a default route
        and hides the one there is: see ``main_default_routes``.
        """
        for probe in _DEFAULT_ROUTE_PROBES[family]:
            reply = self._route(probe, _RTM_F_FIB_MATCH | _table_too(probe))
            if reply is None:
                continue
            if reply.prefixlen == 0:
                found = _default_routes(reply)
                if not found[0].oif:
                    # A nexthop object with sysctl net.ipv4.nexthop_compat_mode=0.
                    answer = self.route_to(probe)
                    first = found[0]
                    oif, gateway = (answer.oif, answer.gateway) if answer else (0, None)
                    return [replace(first, oif=oif, gateway=gateway)] if answer else []
                return found
        return []

    def main_default_routes(self, family: int) -> list[DefaultRoute]:
        """Return the next hops of all default routes of the main table, lowest metric first.

        Equivalent: ``ip [-4|-6] route show table main default``. Standby routes are among
        them, those whose interface is down are not. Dumps the table: for IPv4 its beginning,
        because the kernel's order is that of the prefixes; for IPv6 all of it, because a
        default route comes last there. Raises DumpInterrupted as ``links``.
        """
        what = f"dump IPv{family} default routes"
        header = nl.RTMSG.pack(nl.af(family), 0, 0, 0, nl.RT_TABLE_MAIN, 0, 0, 0, 0)
        body = header + nl.attr_u32(nl.RTA_TABLE, nl.RT_TABLE_MAIN)
        found: list[DefaultRoute] = []
        # A socket of its own: a dump that is not read to its end ends with its socket.
        with NetlinkSocket(self._netns) as kernel:
            for reply in kernel.begin_dump(nl.RTM_GETROUTE, body, what):
                route = parse_route(reply, what)
                if nl.u32(route.attrs.get(nl.RTA_TABLE)) != nl.RT_TABLE_MAIN:
                    continue  # a kernel before 4.20 does not filter
                if family == 4 and any(route.attrs.get(nl.RTA_DST, b"")):
                    break
                if route.prefixlen == 0 and route.kind == nl.RTN_UNICAST and not route.dead:
                    found += self._with_object(_default_routes(route), route.attrs)
        return sorted((one for one in found if one.oif), key=lambda one: one.metric)

    def _with_object(
        self, routes: list[DefaultRoute], attrs: dict[int, bytes]
    ) -> list[DefaultRoute]:
        """Return the routes with the next hops of their nexthop object, which the kernel leaves out
        where net.ipv4.nexthop_compat_mode is 0."""
        number = nl.u32(attrs.get(nl.RTA_NH_ID))
        if not number or routes[0].oif:
            return routes
        first = routes[0]
        return [
            replace(first, oif=oif, gateway=gateway)
            for oif, gateway in self._nexthops(number, groups=True)
        ]

    def _nexthops(self, number: int, *, groups: bool) -> list[tuple[int, str | None]]:
        """(ifindex, gateway) of a nexthop object or of each member of a group, which has no
        groups in it. Equivalent: ``ip nexthop get id NUMBER``."""
        what = f"look up nexthop {number}"
        body = nl.NHMSG.pack(0, 0, 0, 0) + nl.attr_u32(nl.NHA_ID, number)
        try:
            replies = list(self._ask(nl.RTM_GETNEXTHOP, 0, body, what))
        except KernelError as error:
            if error.errno == errno.ENOENT:  # it has gone meanwhile
                return []
            raise
        members, oif, gateway = parse_nexthop(nl.only(replies, nl.RTM_NEWNEXTHOP, what), what)
        if not members or not groups:
            return [(oif, gateway)] if oif else []
        return [hop for each in members for hop in self._nexthops(each, groups=False)]

    def rules(self, family: int) -> list[bytes]:
        """Return the policy rules of family 4 or 6, undecoded and in the kernel's order; none
        where the kernel has no policy routing (CONFIG_IP_MULTIPLE_TABLES).

        Equivalent: ``ip [-4|-6] rule show``. :func:`flannel_dp.kernel.rules.parse_rule` decodes
        one; whether there are others than the kernel's own is told without.
        """
        what = f"dump IPv{family} policy rules"
        try:
            replies = self.dump(nl.RTM_GETRULE, nl.RULE_HEADER.pack(nl.af(family)), what)
        except KernelError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                return []
            raise
        return [payload for _, payload in replies]

    def neighbour_use(self, family: int) -> NeighbourUse | None:
        """Return how full the kernel's neighbour table of family 4 or 6 is, which is one for
        all devices and namespaces; None where the kernel does not say.

        Equivalent: ``ip ntable show name arp_cache`` (``ndisc_cache``).
        """
        what = "read the size of the neighbour table"
        replies = self.dump(nl.RTM_GETNEIGHTBL, nl.NDTMSG.pack(nl.af(family), 0), what)
        return next(filter(None, (parse_neighbour_use(reply, what) for reply in replies)), None)

    def _route(self, address: str, flags: int, source: str = "", iif: int = 0) -> RouteReply | None:
        """Send one RTM_GETROUTE; None when no route has the address or one rejects it."""
        what = f"look up the route to {address}"
        packed = _packed(address)
        family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
        start = _packed(source) if source else b""
        body = nl.RTMSG.pack(family, 8 * len(packed), 8 * len(start), 0, 0, 0, 0, 0, flags)
        body += nl.attr(nl.RTA_DST, packed)
        body += nl.attr(nl.RTA_SRC, start) if start else b""
        body += nl.attr_u32(nl.RTA_IIF, iif) if iif else b""
        try:
            replies = list(self._ask(nl.RTM_GETROUTE, 0, body, what))
        except KernelError as error:
            # fib_props[] in net/ipv4/fib_semantics.c: blackhole answers EINVAL, prohibit
            # EACCES, unreachable EHOSTUNREACH, throw EAGAIN; no route at all ENETUNREACH.
            refusals = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EAGAIN)
            if error.errno in refusals or (
                error.errno == errno.EINVAL and not error.kernel_message
            ):
                return None
            raise
        found = parse_route(nl.only(replies, nl.RTM_NEWROUTE, what), what)
        return None if found.kind in nl.RTN_REFUSING else found


@lru_cache(maxsize=64)
def _packed(address: str) -> bytes:
    try:
        return ipaddress.ip_address(address).packed
    except ValueError as error:
        raise ConfigError(
            f"{address!r} is not an IP address", hint="give an address without a prefix length"
        ) from error


def _table_too(address: str) -> int:
    """Return the flag by which the reply names the table. Strict checking lets IPv6 have one flag
    only; there the reply names it without."""
    return 0 if ":" in address else _RTM_F_LOOKUP_TABLE


def _default_routes(route: RouteReply) -> list[DefaultRoute]:
    """Return the next hops of one default route."""
    attrs = route.attrs
    metric, table = nl.u32(attrs.get(nl.RTA_PRIORITY)), nl.u32(attrs.get(nl.RTA_TABLE))
    source = nl.address_text(attrs.get(nl.RTA_PREFSRC))
    hops = next_hops(attrs, "look up the default route")
    onlink, mtu = route.onlink, route.mtu
    return [DefaultRoute(oif, via, metric, table, source, onlink, mtu) for oif, via in hops]
