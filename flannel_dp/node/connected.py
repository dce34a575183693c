"""What this node reaches without the overlay, as far as leases could overrule it.

A lease becomes a route, and a route for a part of a connected network, of a static route or of a
gateway would take that traffic into the tunnel. Gathered here: the networks of all devices that
are neither ours nor this node's own pod bridge, other addresses of this node, static routes and
gateways, of those that meet the pod network; and the addresses of connected networks that no host
has, which no node can be published with. The rules are csrc/claim.c's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from ipaddress import ip_address, ip_network, summarize_address_range

from msgspec import Struct

from flannel_dp._core import address_text, parse_address, parse_prefix
from flannel_dp.cluster.admission import Protected
from flannel_dp.kernel.links import SCOPE_LINK, Address, DefaultRoute, Link, LinkReader, StaticRoute

_BITS = {4: 32, 6: 128}

#: Devices that programs make and may leave behind: a leftover is removed with its device.
_LEFT_BEHIND = frozenset({"bridge", "dummy", "vxlan"})

#: Addresses that mean something else on every link (RFC 3927, RFC 1122, RFC 5771; RFC 4291).
_SPECIAL = {
    4: (
        ("169.254.0.0/16", "link-local addresses"),
        ("127.0.0.0/8", "loopback addresses"),
        ("224.0.0.0/4", "multicast addresses"),
        ("0.0.0.0/8", "addresses of no host"),
        ("255.255.255.255/32", "the broadcast address"),
    ),
    6: (
        ("fe80::/10", "link-local addresses"),
        ("ff00::/8", "multicast addresses"),
        ("::/127", "loopback addresses"),
    ),
}
_NETWORK_HINT = "choose a Network in the network configuration that has no such addresses"


class Connected(Struct, frozen=True):
    """``protected`` is what no lease may overrule, ``no_hosts`` are addresses of connected
    networks that no node can have, broadcast and network addresses, with their network.
    ``around`` are connected networks that all pods' addresses are a part of."""

    protected: tuple[Protected, ...] = ()
    no_hosts: dict[str, str] = {}
    around: tuple[Protected, ...] = ()


def connected(
    reader: LinkReader,
    family: int,
    addresses: Collection[Address],
    routes: Iterable[StaticRoute],
    defaults: Iterable[DefaultRoute],
    *,
    network: str,
    subnet: str,
    ours: Collection[int],
    pods: tuple[str, str] | None = None,
) -> Connected:
    """Return what leases inside ``network`` could overrule.

    ``addresses`` are those of all devices but ``ours`` (ifindexes), and ``pods`` is the range of
    pods' addresses, where that is less than the network. What lies in ``subnet``, this node's own,
    is its pods'. ``reader`` is asked for the devices that a lease could meet only.
    """
    span, own = _Span.of(network), _Span.of(subnet) if subnet else None
    inner = _Span.between(*pods) if pods else span
    found: dict[str, Protected] = {}
    no_hosts: dict[str, str] = {}
    for one in addresses:
        if one.family != family or (family == 6 and one.scope == SCOPE_LINK):
            continue
        no_hosts |= _no_hosts(one)
        if own and own.holds(one.address) and _is_pods(reader, one, own):
            continue
        for protected in _of_address(reader, one, span):
            found.setdefault(protected.prefix, protected)
    for route in routes:
        for protected in _of_route(reader, family, route, span, inner, ours):
            if not (own and own.holds(route.prefix) and own.length <= route.length):
                found.setdefault(protected.prefix, protected)
    for default in defaults:
        found |= _gateway(reader, family, (default.oif, default.gateway or ""), span, found)
    for special in _special(family, network):
        found.setdefault(special.prefix, special)
    networks = [each for each in found.values() if not each.route]
    around = [each for each in networks if _Span.of(each.prefix).is_around(inner)]
    for each in around:
        del found[each.prefix]
        if not _Span.of(each.prefix).is_around(span):
            for part in _rest(family, _Span.of(each.prefix), inner):
                found.setdefault(part, Protected(part, each.what, each.remedy))
    return Connected(tuple(found.values()), no_hosts, tuple(around))


class _Span(Struct, frozen=True):
    """The addresses of a prefix, as numbers."""

    version: int
    first: int
    last: int
    length: int

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, prefix: str) -> _Span:
        version, raw, length = parse_prefix(prefix)
        rest = (1 << (8 * len(raw) - length)) - 1
        first = int.from_bytes(raw, "big") & ~rest
        return cls(version, first, first | rest, length)

    def holds(self, address: str) -> bool:
        version, raw = parse_address(address)
        return version == self.version and self.first <= int.from_bytes(raw, "big") <= self.last

    @classmethod
    def between(cls, first: str, last: str) -> _Span:
        """Return the addresses from ``first`` to ``last``; ``length`` is that of all of them."""
        version, raw = parse_address(first)
        low, high = (int.from_bytes(parse_address(one)[1], "big") for one in (first, last))
        return cls(version, low, high, 8 * len(raw) - (low ^ high).bit_length())

    def is_all_of(self, other: _Span) -> bool:
        """Return whether it holds the other one."""
        same = other.version == self.version
        return same and self.first <= other.first and other.last <= self.last

    def is_around(self, other: _Span) -> bool:
        """Return whether it is larger than the other one, and holds it."""
        return self.is_all_of(other) and (self.first, self.last) != (other.first, other.last)

    def meets(self, other: _Span) -> bool:
        same = other.version == self.version
        return same and other.first <= self.last and other.last >= self.first


@lru_cache(maxsize=4)
def _special(family: int, network: str) -> tuple[Protected, ...]:
    """Return the special addresses that are inside a pod network."""
    pods = _Span.of(network)
    return tuple(
        Protected(prefix, what, _NETWORK_HINT)
        for prefix, what in _SPECIAL[family]
        if pods.meets(_Span.of(prefix))
    )


@lru_cache(maxsize=8)
def _rest(family: int, outer: _Span, inner: _Span) -> tuple[str, ...]:
    """Return what of ``outer`` is not ``inner``, which is a part of it, as prefixes."""
    size = _BITS[family] // 8
    ends = ((outer.first, inner.first - 1), (inner.last + 1, outer.last))
    parts = [
        summarize_address_range(*(ip_address(n.to_bytes(size, "big")) for n in (low, high)))
        for low, high in ends
        if low <= high
    ]
    return tuple(str(one) for part in parts for one in part)


def _is_pods(reader: LinkReader, one: Address, own: _Span) -> bool:
    """Return whether an address inside this node's subnet is that of its pod bridge, or of a pod's
    device (the ptp plugin): an interface of a network that is larger than the subnet is neither."""
    if one.prefixlen >= own.length:
        return True
    link = reader.link(one.index)
    return link is not None and link.kind == "bridge"


@lru_cache(maxsize=64)
def _no_hosts(one: Address) -> dict[str, str]:
    """Return broadcast and network address of an address's network, with that network. /31 and /32
    have none (RFC 3021), and IPv6 has no broadcast; there the network address is that of all
    routers (RFC 4291 2.6.1)."""
    bits = _BITS[one.family]
    has_network = 0 < one.prefixlen < bits - 1
    if not one.broadcast and not has_network:
        return {}
    span = _Span.of(f"{one.peer or one.address}/{one.prefixlen}")
    first, last = (address_text(n.to_bytes(bits // 8, "big")) for n in (span.first, span.last))
    network = f"{first}/{one.prefixlen}"
    found = {one.broadcast: network} if one.broadcast else {}
    if has_network:
        found[first] = network
        if one.family == 4:
            found[last] = network
    return found


def _of_address(reader: LinkReader, one: Address, pods: _Span) -> Iterator[Protected]:
    """Yield the network of an address, the other end of its link, and the address alone."""
    bits = _BITS[one.family]
    prefix = f"{one.peer or one.address}/{one.prefixlen}"
    if one.prefixlen and (one.peer or one.prefixlen < bits):
        span = _Span.of(prefix)
        if pods.meets(span):
            link = reader.link(one.index)
            if not (span.length <= pods.length and link and link.kind == "bridge"):
                net = str(ip_network(prefix, strict=False))
                ends = f"{one.address} peer {net}" if one.peer else f"{one.address}/{one.prefixlen}"
                name = _name(link, one.index)
                what = f"the other end {net} of {name}" if one.peer else f"the network of {name}"
                yield Protected(net, f"{what}, which has {ends}", _remove(link, one, ends))
                return
    if pods.holds(one.address):
        link = reader.link(one.index)
        text = f"{one.address}/{one.prefixlen}"
        what = f"{one.address}, an address of {_name(link, one.index)}"
        yield Protected(f"{one.address}/{bits}", what, _remove(link, one, text))


def _remove(link: Link | None, one: Address, text: str) -> str:
    name = _name(link, one.index)
    if link and link.kind in _LEFT_BEHIND:
        return f"if {name} is left over from earlier, remove it: ip link delete {name}"
    return (
        f"correct the lease, choose another Network, or remove the address: "
        f"ip address del {text} dev {name}"
    )


def _of_route(
    reader: LinkReader,
    family: int,
    route: StaticRoute,
    pods: _Span,
    inner: _Span,
    ours: Collection[int],
) -> Iterator[Protected]:
    """Yield a static route inside the pod network, and its gateways. One that holds all pods'
    addresses (``inner``) says nothing of a part of them, no more than a default route does."""
    if any(oif in ours for oif, _ in route.hops):
        return  # flanneld's
    for hop in route.hops:
        yield from _gateway(reader, family, hop, pods, {}).values()
    prefix = f"{route.prefix}/{route.length}"
    if _Span.of(prefix).is_all_of(inner) or not pods.holds(route.prefix):
        return
    ways = " ".join(_way(reader, hop) for hop in route.hops)
    yield Protected(
        prefix,
        f"the static route {prefix} {ways}",
        f"correct the lease, or remove the route: ip -{family} route del {prefix} {ways}",
        route=True,
    )


def _gateway(
    reader: LinkReader, family: int, hop: tuple[int, str], pods: _Span, known: dict[str, Protected]
) -> dict[str, Protected]:
    oif, address = hop
    if not address or not pods.holds(address):
        return {}
    prefix = f"{address}/{_BITS[family]}"
    what = f"the gateway {address} on {_name(reader.link(oif), oif)}"
    return {prefix: known.get(prefix, Protected(prefix, what, "choose another Network or gateway"))}


def _way(reader: LinkReader, hop: tuple[int, str]) -> str:
    oif, gateway = hop
    via = f"via {gateway} " if gateway else ""
    return f"{via}dev {_name(reader.link(oif), oif)}"


def _name(link: Link | None, index: int) -> str:
    return link.name if link else f"device {index}"
