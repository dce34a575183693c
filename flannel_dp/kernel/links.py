"""Read devices, their addresses and single routes over netlink, and write nothing.

It exists because importing pyroute2 takes longer than a whole sync that has nothing to change;
what changes a device (:mod:`flannel_dp.resources.device.plan`) does use pyroute2.

The messages themselves are in :mod:`flannel_dp.kernel.messages`; what it defines for
callers can be imported from here.
"""

from __future__ import annotations

import errno
import ipaddress
import socket

from flannel_dp.errors import ConfigError, KernelError
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.messages import (
    IFA_F_DADFAILED,
    IFA_F_NODAD,
    IFA_F_TENTATIVE,
    SCOPE_LINK,
    Address,
    DefaultRoute,
    Link,
    RouteAnswer,
    VxlanInfo,
    malformed,
)
from flannel_dp.kernel.netns import NetNS
from flannel_dp.kernel.socket import Asker

__all__ = [
    "IFA_F_DADFAILED",
    "IFA_F_NODAD",
    "IFA_F_TENTATIVE",
    "SCOPE_LINK",
    "Address",
    "DefaultRoute",
    "Link",
    "LinkReader",
    "RouteAnswer",
    "VxlanInfo",
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


class LinkReader(Asker):
    """Answers questions about the devices of one namespace; see Asker for how and what it raises.

    Strict checking makes the kernel filter dumps (Linux 4.20 and later); older kernels ignore
    the filter, so replies are filtered here as well.
    """

    def __init__(self, netns: NetNS = None) -> None:
        super().__init__(netns)
        self._netns = netns
        self._links: dict[str | int, Link | None] | None = None

    def link(self, name_or_index: str | int) -> Link | None:
        """Return one device, or None when there is none.

        Equivalent: ``ip -d link show dev NAME``. Raises ConfigError for a name the
        kernel could not hold (empty, or over 15 bytes), KernelError when it refuses.
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
        """Make ``link`` ask the kernel for each device once only, from now on: for one look
        at a node, which then is of one moment."""
        self._links = {}
        return self

    def links(self, kind: str = "") -> list[Link]:
        """Return all devices, or those of one ``kind``, which the kernel picks out.

        Equivalent: ``ip -d link show [type KIND]``. Raises DumpInterrupted when the
        table changed under ten dumps in a row.
        """
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
            what = f"dump IPv{each} addresses" + (f" of device {index}" if index else "")
            body = nl.IFADDRMSG.pack(nl.af(each), 0, 0, 0, index or 0)
            for reply in self.dump(nl.RTM_GETADDR, body, what):
                address = nl.parse_address(reply, what)
                if address.family == each and index in (None, address.index):
                    found.append(address)
        return found

    def route_to(self, address: str) -> RouteAnswer | None:
        """Ask where a packet to ``address`` would go; None when no route would carry it.

        None also stands for routes that refuse: blackhole, unreachable, prohibit.
        Equivalent: ``ip route get ADDRESS``. Raises ConfigError when ``address`` is none.
        """
        reply = self._route(address, 0)
        if reply is None:
            return None
        kind, _, attrs = reply
        hop = nl.next_hops(attrs, f"look up the route to {address}")[0]
        prefsrc = nl.address_text(attrs.get(nl.RTA_PREFSRC))
        return RouteAnswer(hop[0], hop[1], prefsrc, kind == nl.RTN_LOCAL)

    def default_routes(self, family: int) -> list[DefaultRoute]:
        """Return the next hops of the default route in use for family 4 or 6; [] without one.

        One lookup each for at most three addresses that no public prefix covers,
        answered with the FIB entry that matched (``ip route get fibmatch``, Linux 4.15
        and later), instead of a dump: a node may hold a full BGP table. So it tells what
        packets would use, policy rules included (``table`` says which one matched), and not
        standby default routes. A VPN's pair 0.0.0.0/1 and 128.0.0.0/1 is not a default route
        and hides the one there is: see ``main_default_routes``.
        """
        for probe in _DEFAULT_ROUTE_PROBES[family]:
            # Strict checking lets IPv6 have one flag only; it tells the table without.
            table_too = _RTM_F_LOOKUP_TABLE if family == 4 else 0
            reply = self._route(probe, _RTM_F_FIB_MATCH | table_too)
            if reply is None:
                continue
            _, prefixlen, attrs = reply
            if prefixlen == 0:
                found = _default_routes(attrs)
                if not found[0].oif:
                    # A nexthop object with sysctl net.ipv4.nexthop_compat_mode=0.
                    answer = self.route_to(probe)
                    first = found[0]
                    return (
                        [DefaultRoute(answer.oif, answer.gateway, first.metric, first.table)]
                        if answer
                        else []
                    )
                return found
        return []

    def main_default_routes(self, family: int) -> list[DefaultRoute]:
        """Return the next hops of all default routes of the main table, lowest metric first.

        Equivalent: ``ip [-4|-6] route show table main default``. Standby routes are among
        them, those whose interface is down are not, nor is one on a nexthop object where
        net.ipv4.nexthop_compat_mode is 0. Dumps the table: for IPv4 its beginning, because
        the kernel's order is that of the prefixes; for IPv6 all of it, because a default
        route comes last there. Raises DumpInterrupted as ``links``.
        """
        what = f"dump IPv{family} default routes"
        header = nl.RTMSG.pack(nl.af(family), 0, 0, 0, nl.RT_TABLE_MAIN, 0, 0, 0, 0)
        body = header + nl.attr_u32(nl.RTA_TABLE, nl.RT_TABLE_MAIN)
        found: list[DefaultRoute] = []
        with Asker(self._netns) as asker:  # a dump that is not read to its end ends with it
            for kind, data in asker.begin_dump(nl.RTM_GETROUTE, body, what):
                if kind != nl.RTM_NEWROUTE or len(data) < nl.RTMSG.size:
                    raise malformed(what)
                fields = nl.RTMSG.unpack_from(data)
                attrs = nl.attributes(data, nl.RTMSG.size, what)
                if nl.u32(attrs.get(nl.RTA_TABLE)) != nl.RT_TABLE_MAIN:
                    continue  # a kernel before 4.20 does not filter
                if family == 4 and any(attrs.get(nl.RTA_DST, b"")):
                    break
                if fields[1] == 0 and fields[7] == nl.RTN_UNICAST and not fields[8] & nl.RTNH_DEAD:
                    found += _default_routes(attrs)
        return sorted((one for one in found if one.oif), key=lambda one: one.metric)

    def _route(self, address: str, flags: int) -> tuple[int, int, dict[int, bytes]] | None:
        """One RTM_GETROUTE: (type, prefix length, attributes), None when nothing carries it."""
        what = f"look up the route to {address}"
        try:
            packed = ipaddress.ip_address(address).packed
        except ValueError as error:
            raise ConfigError(
                f"{address!r} is not an IP address", hint="give an address without a prefix length"
            ) from error
        family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
        body = nl.RTMSG.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, flags)
        try:
            replies = list(self._ask(nl.RTM_GETROUTE, 0, body + nl.attr(nl.RTA_DST, packed), what))
        except KernelError as error:
            # fib_props[] in net/ipv4/fib_semantics.c: blackhole answers EINVAL, prohibit
            # EACCES, unreachable EHOSTUNREACH, throw EAGAIN; no route at all ENETUNREACH.
            refusals = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EAGAIN)
            if error.errno in refusals or (
                error.errno == errno.EINVAL and not error.kernel_message
            ):
                return None
            raise
        _, data = nl.only(replies, nl.RTM_NEWROUTE, what)
        if len(data) < nl.RTMSG.size:
            raise malformed(what)
        header = nl.RTMSG.unpack_from(data)
        if header[7] in nl.RTN_REFUSING:
            return None
        return header[7], header[1], nl.attributes(data, nl.RTMSG.size, what)


def _default_routes(attrs: dict[int, bytes]) -> list[DefaultRoute]:
    """The next hops of one default route."""
    metric, table = nl.u32(attrs.get(nl.RTA_PRIORITY)), nl.u32(attrs.get(nl.RTA_TABLE))
    hops = nl.next_hops(attrs, "look up the default route")
    return [DefaultRoute(oif, gateway, metric, table) for oif, gateway in hops]
