"""Find out what this node is: external interface, addresses, underlay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice

from msgspec import Struct, field

from flannel_dp.errors import NotYet
from flannel_dp.kernel.links import (
    SCOPE_LINK,
    Address,
    DefaultRoute,
    Link,
    LinkReader,
)
from flannel_dp.kernel.messages import IFA_F_DADFAILED, RT_TABLE_MAIN
from flannel_dp.node.choice import Choice, canonical, check_given
from flannel_dp.node.interface import (
    Interface,
    InUse,
    addresses_to_publish,
    best_addresses,
    default_uplink,
    is_link_local,
    is_routed_alone,
    only_single,
    source_of,
    still_there,
)

#: So many peers are asked for, as one of them may be this node.
_PEERS = 4


class Uplink(Struct, frozen=True):
    """The external interface and what is on it, by family.

    ``public`` are the addresses that other nodes may reach us at, the preferred
    one first; ``local`` is the one that tunnel packets leave from when the public
    one is not on this node (behind NAT), "" when there is none. ``on_devices`` are all addresses
    but those of our devices, as the kernel has them, ``defaults`` the default routes.
    ``holders`` are the ifindexes of the interfaces that have this node's addresses, and
    ``duplicates`` addresses that another host has, too, so that the kernel uses none. ``missing``
    says of a family why it has no public address, where that is more than that the interface has
    none. ``doubtful`` says why ``public`` may be no address of this node's: the one in use is gone,
    and what is left may be a virtual one.
    """

    link: Link
    public: dict[int, tuple[str, ...]]
    local: dict[int, str]
    addresses: dict[int, tuple[str, ...]]
    on_devices: dict[int, tuple[Address, ...]]
    defaults: dict[int, tuple[DefaultRoute, ...]]
    holders: dict[str, int] = field(default_factory=dict)
    duplicates: tuple[str, ...] = ()
    missing: dict[int, NotYet] = field(default_factory=dict)
    doubtful: dict[int, NotYet] = field(default_factory=dict)

    @property
    def surely_public(self) -> dict[int, tuple[str, ...]]:
        """``public`` of the families that have an address which is surely this node's."""
        return {n: found for n, found in self.public.items() if found and n not in self.doubtful}


def discover(
    reader: LinkReader,
    families: tuple[int, ...],
    choice: Choice,
    *,
    overlay: tuple[str, ...] = (),
    kept: tuple[InUse, ...] = (),
    peers_of: Callable[[int], Iterable[str]] = lambda family: (),
) -> Uplink:
    """Choose the external interface and the public addresses, and collect the underlay.

    Without a choice it is the interface of the public address, else the one in use: that
    of ``kept``, or of our device that is there, as long as it exists and the address that
    packets leave from is on this node. Else it is that of the main table's default route,
    as with flanneld, and no tunnel's: neither a VPN's routing policy nor a route out of our
    own device moves a node. The address in use comes first unless a flag asks for another.
    An address that chose the interface (``--iface``, ``--iface-regex``) is
    the public one of its family, unless only its own network knows it (fe80::). Of the others,
    the default route's ``src`` comes first (:func:`flannel_dp.node.interface.best_addresses`).
    ``overlay`` names our own devices, whose addresses are not the underlay's.

    An address of lo or of a dummy device leaves by the interface of the route to the first of
    ``peers_of(family)``, addresses of other nodes, else by the one in use or of the default route.

    Where an address in use is gone, a single one that is left (/32, /128) is ``doubtful``: it is
    what keepalived leaves. It takes the place by itself only where routes say that it is the
    node's own (:func:`flannel_dp.node.interface.is_routed_alone`).

    Raises NotYet when the interface does not exist, and when there is no default route to choose
    the interface by.
    """
    for family, address in choice.public.items():
        check_given(address, family)
    known = reader.addresses(family=_families_to_read(families, choice))
    ours = {found.index: found for name in overlay if (found := reader.link(name))}
    known = [a for a in known if a.index not in ours]
    duplicates = tuple(a.address for a in known if a.flags & IFA_F_DADFAILED)
    known = [a for a in known if a.address not in duplicates]
    kept = (*kept, *_kept_by(ours.values()))
    in_use = _in_use(reader, known, kept, ours)
    chosen, named = _find_by_flags(reader, known, choice, families, overlay) or (
        _find_without_choice(reader, families, in_use, ours, known),
        {},
    )
    link = chosen
    if _interface(chosen).is_local:
        link = _carrier(reader, families, in_use, ours, known, peers_of) or chosen
    holders = {a.address: a.index for a in reversed(known)}
    found_on = Uplink(link, {}, {}, {}, {}, {}, holders, duplicates)
    for family in families:
        own = [a for a in known if a.family == family]
        here = [a for a in own if a.index == chosen.index]
        found_on.addresses[family] = tuple(dict.fromkeys(a.address for a in own))
        routes = _default_routes(reader, family)
        found_on.on_devices[family], found_on.defaults[family] = tuple(own), tuple(routes)
        in_use_here = [k for k in in_use if (k.family, k.link) == (family, link.index)]
        usable = _usable_addresses(own, here, routes, link, named=bool(choice.iface))
        best = addresses_to_publish(
            usable,
            named.get(family, ()),
            next((k.address for k in in_use_here if k.address in holders), ""),
        )
        gone = [k.address for k in kept if k.family == family and k.address not in (*holders, "")]
        asked = family in choice.public or (choice.iface and family in named)
        if gone and not asked and _is_doubtful(reader, own, best, routes, link):
            found_on.doubtful[family] = _doubt(gone[0], best[0], link)
        given = canonical(choice.public[family]) if family in choice.public else ""
        if given and given not in found_on.addresses[family] and not choice.behind_nat:
            there = ", ".join(a.address for a in here) or "none"
            what = "is not an address of this node"
            if given in duplicates:
                what = "is another host's, too (duplicate address detection failed)"
            found_on.missing[family] = NotYet(
                f"{given} {what} ({link.name} has {there})",
                hint="give one of this node's own addresses as --public-ip or --public-ipv6, or "
                "say --behind-nat if it is translated to this node",
            )
            best, given = (), ""
        found_on.public[family] = (given,) if given else best
        found_on.local[family] = best[0] if best else ""
    return found_on


def _find_by_flags(
    reader: LinkReader,
    known: list[Address],
    choice: Choice,
    families: tuple[int, ...],
    overlay: tuple[str, ...],
) -> tuple[Link, dict[int, tuple[str, ...]]] | None:
    if choice.is_open:
        return None
    from flannel_dp.node.named import find_link

    return find_link(reader, known, choice, families, overlay)


def _is_doubtful(
    reader: LinkReader,
    own: list[Address],
    best: tuple[str, ...],
    routes: list[DefaultRoute],
    link: Link,
) -> bool:
    """Return whether the first of ``best``, which is left, may be a virtual address."""
    if not only_single(own, best):
        return False
    statics = reader.static_routes(own[0].family)
    return not is_routed_alone(best[0], link.index, routes, statics)


def _doubt(gone: str, left: str, link: Link) -> NotYet:
    length = 128 if ":" in left else 32
    return NotYet(
        f"{gone}, which this node was reached at, is gone, and {left}/{length}, which is left on "
        f"{link.name}, may be a virtual address",
        hint="give the node an address with a network; if this one is its own, say so with --iface "
        "ADDRESS, --public-ip or --public-ipv6",
    )


def _usable_addresses(
    own: list[Address],
    here: list[Address],
    routes: list[DefaultRoute],
    link: Link,
    *,
    named: bool,
) -> tuple[str, ...]:
    """Return the addresses of the interface, the default route's preferred source first: it may be
    on another device, where a routing protocol announces it, unless the interface was ``named``."""
    source, gateway = source_of(routes, link.index)
    best = best_addresses(here, source, gateway)
    elsewhere = [a for a in own if a.address == source and a not in here]
    if elsewhere and not named:
        best = (*best_addresses(elsewhere), *best)
    return best


def _kept_by(devices: Iterable[Link]) -> Iterator[InUse]:
    """Yield what our devices work with: ``dev`` and ``local`` of ``ip -d link``."""
    for device in devices:
        tunnel = device.vxlan
        if tunnel and tunnel.local and not device.lower_elsewhere:
            family = 6 if ":" in tunnel.local else 4
            yield InUse(family, tunnel.lower, tunnel.local)


def _in_use(
    reader: LinkReader, known: list[Address], kept: tuple[InUse, ...], ours: Collection[int]
) -> tuple[InUse, ...]:
    holders: dict[str, tuple[int, ...]] = {}
    for one in kept:
        holders[one.address] = tuple(a.index for a in known if a.address == one.address)
    indexes = [one.link for one in kept if one.link]
    indexes += [index for at in holders.values() for index in at]
    links = _interfaces(reader, indexes, ours)
    usable = set()
    for one in kept:
        here = [a for a in known if (a.index, a.family) == (one.link, one.family)]
        if best_addresses(a for a in here if a.scope < SCOPE_LINK):
            usable.add((one.link, one.family))
    return still_there(kept, links, holders, usable)


def _interface(
    link: Link, ours: Collection[int] = (), addressed: Collection[int] | None = None
) -> Interface:
    return Interface(
        link.index,
        link.name,
        link.kind,
        link.mac,
        link.index in ours,
        bool(link.master),
        addressed is None or link.index in addressed,
    )


def _interfaces(
    reader: LinkReader,
    indexes: Iterable[int],
    ours: Collection[int],
    addressed: Collection[int] | None = None,
) -> dict[int, Interface]:
    links = (reader.link(index) for index in dict.fromkeys(indexes))
    return {link.index: _interface(link, ours, addressed) for link in links if link}


def _carrier(
    reader: LinkReader,
    families: tuple[int, ...],
    in_use: tuple[InUse, ...],
    ours: Collection[int],
    known: list[Address],
    peers_of: Callable[[int], Iterable[str]],
) -> Link | None:
    """Return the interface that packets leave by whose source is on lo or on a dummy device."""
    for peer in (peer for family in families for peer in islice(peers_of(family), _PEERS)):
        answer = reader.route_to(peer)
        found = reader.link(answer.oif) if answer and not answer.local else None
        if found and not (_interface(found, ours).is_tunnel or _interface(found).is_local):
            return found
    try:
        found = _find_without_choice(reader, families, in_use, ours, known)
    except NotYet:
        return None
    return None if _interface(found).is_local else found


def _find_without_choice(
    reader: LinkReader,
    families: tuple[int, ...],
    in_use: tuple[InUse, ...],
    ours: Collection[int],
    known: list[Address],
) -> Link:
    """Return the interface in use, else that of a default route."""
    for index in (kept.link for kept in in_use):
        found = reader.link(index)
        if found:
            return found
    tunnels: dict[str, None] = {}
    for family in families:
        addressed = {a.index for a in known if a.family == family and not is_link_local(a)}
        for read in (
            partial(_default_routes, reader),
            reader.main_default_routes,
        ):  # standby ones are in the latter
            routes = [route.oif for route in read(family)]
            links = _interfaces(reader, routes, ours, addressed)
            chosen = default_uplink(routes, links)
            found = reader.link(chosen.index) if chosen else None
            if found:
                return found
            tunnels |= dict.fromkeys(link.name for link in links.values())
    if tunnels:
        raise NotYet(
            f"the default route uses {', '.join(tunnels)}, a tunnel or a pod's device, and there "
            "is none out of another interface",
            hint="name the interface that reaches the other nodes with --iface, the tunnel if it "
            "is the one",
        )
    raise NotYet(
        "there is no default route, so the external interface is unknown",
        hint="name the interface that reaches the other nodes with --iface",
    )


def _default_routes(reader: LinkReader, family: int) -> list[DefaultRoute]:
    """Return the default route of the main table, as flanneld takes it, before that of another
    table. What packets would use is the cheaper question, and mostly the same."""
    used = reader.default_routes(family)
    if used and all(route.table == RT_TABLE_MAIN for route in used):
        return used
    return [*reader.main_default_routes(family), *used]


def _families_to_read(families: tuple[int, ...], choice: Choice) -> int:
    """Return one family, or 0 for both where the other one may name the interface."""
    named = [*choice.iface, *choice.regex, *choice.public.values()]
    return families[0] if len(families) == 1 and not any(map(_may_be_address, named)) else 0


def _may_be_address(text: str) -> bool:
    return ":" in text or "." in text or "\\" in text


def published_at(addresses: Mapping[int, str]) -> tuple[InUse, ...]:
    """Return what a lease says of where the node is: an address, on whatever interface has it."""
    return tuple(InUse(number, 0, canonical(text)) for number, text in addresses.items())
