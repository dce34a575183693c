"""Find out what this node is: external interface, addresses, underlay."""

from __future__ import annotations

from dataclasses import dataclass

from flannel_dp._core import parse_address, parse_prefix
from flannel_dp.errors import ConfigError
from flannel_dp.kernel.links import (
    IFA_F_DADFAILED,
    IFA_F_TENTATIVE,
    SCOPE_LINK,
    Address,
    Link,
    LinkReader,
)

_IFA_F_TEMPORARY, _IFA_F_DEPRECATED = 0x01, 0x20


@dataclass(frozen=True, slots=True)
class Uplink:
    """The external interface and what is on it.

    ``public`` maps a family to the address other nodes reach us at; families
    for which there is none are missing.
    """

    link: Link
    public: dict[int, str]
    addresses: dict[int, tuple[str, ...]]
    underlay: dict[int, tuple[str, ...]]


def discover(
    reader: LinkReader,
    families: tuple[int, ...],
    *,
    iface: str | None = None,
    public_ip: str | None = None,
    public_ipv6: str | None = None,
    overlay: tuple[str, ...] = (),
) -> Uplink:
    """Choose the external interface and the public addresses, and collect the underlay.

    ``iface`` is a name or an address; without one, the interface of the public
    address, else of the default route (flannel's order). ``overlay`` names our
    own devices, whose addresses are not the underlay's.

    Raises ConfigError when the interface is not there, when a public address is
    none of this node's, and when nothing says which interface to use.
    """
    given = {4: public_ip, 6: public_ipv6}
    for family, address in given.items():
        if address:
            _check_family(address, family)
    known = reader.addresses()
    link = _find_link(reader, known, iface, [a for a in given.values() if a], families)
    names = {link.index: link.name}
    overlay_indexes = {found.index for name in overlay if (found := reader.link(name))}
    addresses: dict[int, tuple[str, ...]] = {}
    underlay: dict[int, tuple[str, ...]] = {}
    public: dict[int, str] = {}
    for family in families:
        own = [a for a in known if a.family == family and a.index not in overlay_indexes]
        addresses[family] = tuple(dict.fromkeys(a.address for a in own))
        underlay[family] = _underlay(reader, [a for a in own if a.index == link.index], family)
        chosen = given[family] or _best(own, link.index)
        if given[family] and canonical(chosen) not in {canonical(a) for a in addresses[family]}:
            there = ", ".join(a.address for a in own if a.index == link.index) or "none"
            raise ConfigError(
                f"{chosen} is not an address of this node ({names[link.index]} has {there})",
                hint="give one of this node's own addresses as --public-ip or --public-ipv6",
            )
        if chosen:
            public[family] = canonical(chosen)
    return Uplink(link, public, addresses, underlay)


def canonical(address: str) -> str:
    """An address as the kernel prints it."""
    from socket import AF_INET, AF_INET6, inet_ntop

    _, raw = parse_address(address)
    return inet_ntop(AF_INET if len(raw) == 4 else AF_INET6, raw)


def _check_family(address: str, family: int) -> None:
    try:
        _, raw = parse_address(address)
    except ValueError:
        raw = b""
    if len(raw) != (4 if family == 4 else 16):
        flag = "--public-ip" if family == 4 else "--public-ipv6"
        raise ConfigError(
            f"{flag}: {address!r} is not an IPv{family} address",
            hint="give a plain address without a prefix length",
        )


def _find_link(
    reader: LinkReader,
    known: list[Address],
    iface: str | None,
    public: list[str],
    families: tuple[int, ...],
) -> Link:
    if iface:
        found = _by_address(reader, known, iface) or reader.link(iface)
        if found is None:
            there = ", ".join(link.name for link in reader.links() if link.name != "lo")
            raise ConfigError(
                f"there is no interface {iface!r} (there are: {there or 'none'})",
                hint="name the interface that reaches the other nodes with --iface",
            )
        return found
    for address in public:
        found = _by_address(reader, known, address)
        if found:
            return found
    for family in families:
        for route in reader.default_routes(family):
            found = reader.link(route.oif)
            if found:
                return found
    raise ConfigError(
        "there is no default route that would tell the external interface",
        hint="name the interface that reaches the other nodes with --iface",
    )


def _by_address(reader: LinkReader, known: list[Address], address: str) -> Link | None:
    try:
        wanted = canonical(address)
    except ValueError:
        return None
    for one in known:
        if one.address == wanted:
            return reader.link(one.index)
    return None


def _best(addresses: list[Address], index: int) -> str:
    """flannel's preference: global before link-local, lasting before temporary; the
    deprecated and those still being checked are left out. "" when there is none."""
    usable = [
        a
        for a in addresses
        if a.index == index
        and not a.flags & (_IFA_F_DEPRECATED | IFA_F_TENTATIVE | IFA_F_DADFAILED)
        and not (a.family == 6 and a.scope == SCOPE_LINK)
    ]
    usable.sort(
        key=lambda a: (
            a.scope >= SCOPE_LINK,
            bool(a.flags & _IFA_F_TEMPORARY) if a.family == 6 else False,
        )
    )
    return usable[0].address if usable else ""


def _underlay(reader: LinkReader, addresses: list[Address], family: int) -> tuple[str, ...]:
    """Prefixes that the external interface reaches directly, and the gateway."""
    bits = 32 if family == 4 else 128
    prefixes = []
    for a in addresses:
        if a.scope == SCOPE_LINK and family == 6:
            continue
        _, _, length = parse_prefix(f"{a.address}/{a.prefixlen}")
        if 0 < length < bits:
            prefixes.append(f"{a.address}/{length}")
    prefixes += [
        f"{route.gateway}/{bits}"
        for route in reader.default_routes(family)
        if route.gateway and (":" in route.gateway) == (family == 6)
    ]
    return tuple(dict.fromkeys(prefixes))
