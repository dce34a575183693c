"""Decide which interface and which of its addresses this node is reached at.

All functions are pure: what was read from the kernel is handed in as values. What worked until
now outweighs a route look-up: a wrong interface or source address cuts the node off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from msgspec import Struct

from flannel_dp._core import parse_address, parse_prefix
from flannel_dp.kernel.messages import IFA_F_DADFAILED, IFA_F_TENTATIVE, SCOPE_LINK, Address
from flannel_dp.kernel.route_messages import DefaultRoute, StaticRoute

_IFA_F_TEMPORARY, _IFA_F_DEPRECATED, _IFA_F_PERMANENT = 0x01, 0x20, 0x80
#: The same bit says "secondary" of an IPv4 and "temporary" of an IPv6 address.
_IFA_F_SECONDARY = _IFA_F_TEMPORARY

#: The kernel's words for devices that carry packets inside other packets. The default route of
#: a VPN leads out of one; nodes that reach each other through one need ``--iface``.
_TUNNELS = {"amt", "bareudp", "erspan", "geneve", "gre", "gretap", "gtp", "ip6erspan", "ip6gre"}
_TUNNELS |= {"ip6gretap", "ip6tnl", "ipip", "l2tpeth", "netkit", "ovpn", "ovpn-dco", "sit", "tun"}
_TUNNELS |= {"vti", "vti6", "vxlan", "wireguard", "xfrm"}
#: What CNI plugins call the end of a pod's device that is on the node.
_PODS = ("veth", "cali", "lxc", "azv")


class Interface(Struct, frozen=True):
    """A device of this node. ``kind`` is the kernel's word for it (``ip -d link``), ``mac`` ""
    where it has no layer 2; ``ours`` is set for flannel-dp's own devices, ``is_port`` for one that
    belongs to a bridge or another device, and ``has_address`` where it has one of the family."""

    index: int
    name: str
    kind: str = ""
    mac: str = ""
    ours: bool = False
    is_port: bool = False
    has_address: bool = True

    @property
    def is_tunnel(self) -> bool:
        """Whether it cannot be the external interface unless the user says so."""
        return self.ours or (self.kind in _TUNNELS and not self.is_tap)

    @property
    def is_tap(self) -> bool:
        """Whether it is a tap device: a VPN's, or a machine's only interface."""
        return self.kind == "tun" and bool(self.mac)

    @property
    def is_local(self) -> bool:
        """Whether it leads to no other node: addresses on it are announced by a routing protocol
        and reached by way of other interfaces."""
        return self.name == "lo" or self.kind == "dummy"

    @property
    def is_pods(self) -> bool:
        """Whether it is the end of a pod's device that is on the node. A container's own
        eth0 is a veth as well."""
        return self.kind == "veth" and (self.is_port or not self.has_address)

    @property
    def is_doubtful(self) -> bool:
        """Whether any other interface is rather the external one."""
        return self.is_tap or self.is_local or self.name.startswith(_PODS)


class InUse(Struct, frozen=True):
    """What one family works with: the interface ``link`` (ifindex) and the address that it
    sends from, "" where any address of the interface will do."""

    family: int
    link: int
    address: str


def still_there(
    kept: Iterable[InUse],
    links: Mapping[int, Interface],
    holders: Mapping[str, Collection[int]],
    usable: Collection[tuple[int, int]] = (),
) -> tuple[InUse, ...]:
    """Return what of ``kept`` this node still has.

    ``holders`` are the interfaces of each address. An interface stays as long as it has its
    address, or one that another interface only announces. An address that is on another
    interface now, such as a bridge, takes the node there. ``usable`` are the interfaces and
    families with an address to publish: one that only has another address stays, last.
    """
    found: list[InUse] = []
    rest: list[InUse] = []
    for one in kept:
        at = holders.get(one.address, ())
        link = links.get(one.link)
        if link and link.ours:
            continue
        if link and (one.link in at or any(links[i].is_local for i in at if i in links)):
            found.append(one)
            continue
        others = [links[i] for i in at if i in links]
        moved = next((each for each in others if not (each.is_tunnel or each.is_local)), None)
        if moved:
            found.append(InUse(one.family, moved.index, one.address))
        elif link and (one.link, one.family) in usable:
            rest.append(InUse(one.family, one.link, ""))
    return (*found, *rest)


def default_uplink(routes: Iterable[int], links: Mapping[int, Interface]) -> Interface | None:
    """Return the interface of the first default route that leads out of no tunnel and to no pod,
    one that is doubtful only where there is no other.

    ``routes`` are the ifindexes of the default routes, the best first.
    """
    known = [links[index] for index in routes if index in links]
    known = [link for link in known if not (link.is_tunnel or link.is_pods)]
    return next((link for link in known if not link.is_doubtful), known[0] if known else None)


def addresses_to_publish(
    usable: tuple[str, ...], named: tuple[str, ...], kept: str
) -> tuple[str, ...]:
    """Return the addresses of one family that other nodes may reach this one at, best first.

    ``named`` are those that a flag asked for, () for none; ``kept`` is the one in use, "" for
    none. It comes first unless the flags ask for others.
    """
    found = named or usable
    if kept and (kept in found or not named):
        return (kept, *(address for address in found if address != kept))
    return found


def source_of(routes: Iterable[DefaultRoute], link: int) -> tuple[str, str]:
    """Return the preferred source and the gateway of the first default route out of ``link``,
    "" for none."""
    for route in routes:
        if route.oif == link:
            return route.source or "", route.gateway or ""
    return "", ""


def best_addresses(
    addresses: Iterable[Address], source: str = "", gateway: str = ""
) -> tuple[str, ...]:
    """Return the addresses of one interface and family that may be published, the best first.

    Left out are addresses that are deprecated, still being checked or a duplicate, loopback
    (127.0.0.1, ::1), link-local or temporary ones of IPv6, and, where there are others,
    secondary ones of IPv4 and single ones (/32, /128) that were added for good: a virtual one
    (keepalived) may be another node's the next moment.

    ``source``, the preferred source of the default route (``src``), comes first. The rest is in
    the kernel's order by: global before link-local (IPv4), RFC 6724's precedence (IPv6), the
    network of the ``gateway``, which is what the kernel sends from, prefix before single address,
    permanent before dynamic (flannel's pkg/ip).
    """
    usable = [one for one in addresses if _is_usable(one)]
    prefixed = any(_has_prefix(one) and one.scope < SCOPE_LINK for one in usable)
    lasting = [one for one in usable if not _is_virtual(one, prefixed)] or usable
    lasting.sort(
        key=lambda one: (
            one.scope >= SCOPE_LINK,
            -_precedence(one.address) if one.family == 6 else 0,
            not _is_near(one, gateway),
            not _has_prefix(one),
            not one.flags & _IFA_F_PERMANENT,
        )
    )
    found = tuple(one.address for one in lasting)
    if source in (one.address for one in usable):
        return (source, *(address for address in found if address != source))
    return found


def is_in_prefix(address: str, prefix: str) -> bool:
    """Return whether the network ``prefix`` has an address; False across families."""
    family, net, length = parse_prefix(prefix)
    other, raw = parse_address(address)
    rest = 8 * len(net) - length
    ours, theirs = (int.from_bytes(each, "big") >> rest for each in (net, raw))
    return family == other and ours == theirs


def is_loopback(address: Address) -> bool:
    """Return whether no other node can reach it: flannel's pkg/ip takes global and link-local ones
    only. An address of lo that is no 127.0.0.0/8 may be one that a routing protocol announces."""
    return address.address == "::1" or (address.family == 4 and address.address.startswith("127."))


def is_temporary(address: Address) -> bool:
    """Return whether it is one of RFC 8981: the next one takes its place within a day."""
    return address.family == 6 and bool(address.flags & _IFA_F_TEMPORARY)


def only_single(addresses: Iterable[Address], best: Collection[str]) -> bool:
    """Return whether all of ``best`` are single addresses (/32, /128) that were added for good.

    Where another address went away, such a one is what keepalived left: a virtual address, which
    may be another node's the next moment.
    """
    single = {
        one.address
        for one in addresses
        if not _has_prefix(one) and one.flags & _IFA_F_PERMANENT  # a cloud's has a lifetime
    }
    return bool(best) and single.issuperset(best)


def is_routed_alone(
    address: str, link: int, defaults: Iterable[DefaultRoute], statics: Iterable[StaticRoute]
) -> bool:
    """Return whether routes were configured for a node whose own address is the single one
    ``address`` on ``link``.

    Such a node has no connected network, so that a route has to say what is on the link: the
    default route has no gateway, has one with ``onlink``, or asks to send from the address
    (``src``), or a static route without gateway leads to the gateway or to the address's network.
    """
    near = {address}
    for default in defaults:
        if default.oif == link:
            if default.source == address or default.onlink or not default.gateway:
                return True
            near.add(default.gateway)
    on_link = [r for r in statics if r.length and (link, "") in r.hops]
    return any(is_in_prefix(one, f"{r.prefix}/{r.length}") for r in on_link for one in near)


def is_link_local(address: Address) -> bool:
    """Return whether it is an IPv6 address that only its own network knows."""
    return address.family == 6 and address.scope == SCOPE_LINK


def _is_usable(one: Address) -> bool:
    unusable = _IFA_F_DEPRECATED | IFA_F_TENTATIVE | IFA_F_DADFAILED
    return not (one.flags & unusable or is_loopback(one) or is_link_local(one) or is_temporary(one))


def _is_virtual(one: Address, prefixed: bool) -> bool:
    """Return whether it is rather a second address of the interface than this node's. DHCPv6 gives
    single addresses, which do not last for good."""
    if one.family == 4 and one.flags & _IFA_F_SECONDARY:
        return True
    lasts = one.family == 4 or bool(one.flags & _IFA_F_PERMANENT)
    return prefixed and not _has_prefix(one) and lasts


def _has_prefix(address: Address) -> bool:
    return address.prefixlen < (32 if address.family == 4 else 128)


def _is_near(one: Address, gateway: str) -> bool:
    """Return whether the gateway is in the network of an address."""
    return bool(gateway) and is_in_prefix(gateway, f"{one.address}/{one.prefixlen}")


#: RFC 6724, section 2.1: prefix in bytes, its length, precedence; all else has 40.
_PRECEDENCE = (
    (b"\x20\x02", 16, 30),  # 2002::/16, 6to4
    (b"\x20\x01\x00\x00", 32, 5),  # 2001::/32, Teredo
    (b"\xfc", 7, 3),  # fc00::/7, unique local
    (b"\xfe\xc0", 10, 1),  # fec0::/10, site-local
    (b"\x3f\xfe", 16, 1),  # 3ffe::/16, 6bone
)


def _precedence(address: str) -> int:
    _, raw = parse_address(address)
    value = int.from_bytes(raw, "big")
    for prefix, length, precedence in _PRECEDENCE:
        wanted = int.from_bytes(prefix.ljust(16, b"\0"), "big")
        if value >> (128 - length) == wanted >> (128 - length):
            return precedence
    return 40
