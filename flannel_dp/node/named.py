"""Find the interface and the addresses that flags name: by a name, an address, a pattern, or what
is reached through it."""

from __future__ import annotations

from collections.abc import Iterable

from flannel_dp.errors import ConfigError, NotYet
from flannel_dp.kernel.links import Address, Link, LinkReader
from flannel_dp.node.choice import Choice, canonical
from flannel_dp.node.interface import best_addresses, is_link_local, is_loopback, is_temporary

#: The addresses that may be published because they chose the interface, by family.
Named = dict[int, tuple[str, ...]]


def find_link(
    reader: LinkReader,
    known: list[Address],
    choice: Choice,
    families: tuple[int, ...],
    overlay: tuple[str, ...],
) -> tuple[Link, Named] | None:
    """Return the interface that the flags choose, with the addresses of it that they name; None
    where they leave it open. Raises NotYet when it does not exist."""
    for place, name in enumerate(choice.iface):
        _, _, zone = name.partition("%")  # fe80::1%eth0, RFC 4007
        address = None if zone else _address_of(known, name)
        found = reader.link(address.index) if address else _by_name(reader, zone or name)
        if found:
            return found, _addresses_named(known, found, choice.iface[place:]) if address else {}
    for pattern in choice.regex:
        found = _by_pattern(reader, known, pattern, families, overlay)
        if found:
            return found, _matching(known, found, pattern, families)
    if choice.can_reach:
        answer = reader.route_to(choice.can_reach)
        index = answer.oif if answer else 0
        if answer and answer.local:  # an address of this node: by lo, says the kernel
            at = _address_of(known, choice.can_reach)
            index = at.index if at else 0
        found = reader.link(index) if index else None
        if answer and found and found.name not in overlay:
            return found, _source_first(known, found, answer.prefsrc)
    if choice.iface or choice.regex or choice.can_reach:
        there = ", ".join(link.name for link in reader.links() if link.name != "lo")
        wanted = ", ".join([*choice.iface, *choice.regex, *filter(None, [choice.can_reach])])
        raise NotYet(
            f"there is no interface {wanted!r} (there are: {there or 'none'})",
            hint="name the interface that reaches the other nodes with --iface",
        )
    for text in choice.public.values():
        address = _address_of(known, text)
        found = reader.link(address.index) if address else None
        if found:
            return found, {}
    return None


def _addresses_named(known: list[Address], link: Link, texts: Iterable[str]) -> Named:
    """Return the addresses of ``link`` among ``texts``, the first of each family. One that only its
    own network knows (fe80::) names the interface alone."""
    found: Named = {}
    for text in texts:
        address = _address_of(known, text)
        if address and address.index == link.index and not is_link_local(address):
            found.setdefault(address.family, (address.address,))
    return found


def _matching(known: list[Address], link: Link, pattern: str, families: tuple[int, ...]) -> Named:
    """Return the addresses of ``link`` that match, the preferred one of each family first."""
    import re

    expression, found = re.compile(pattern), {}
    for family in families:
        here = [a for a in known if (a.index, a.family) == (link.index, family)]
        found[family] = best_addresses(a for a in here if expression.search(a.address))
    return found


def _source_first(known: list[Address], link: Link, source: str | None) -> Named:
    """Return all addresses of the family, the one that the kernel sends from first. RFC 6724
    prefers IPv6 addresses that do not last (use_tempaddr); those are left out all the same."""
    here = [a for a in known if a.index == link.index]
    chosen = next((a for a in here if a.address == source), None)
    if chosen is None or is_temporary(chosen):
        return {}
    best = best_addresses((a for a in here if a.family == chosen.family), chosen.address)
    return {chosen.family: best} if chosen.address in best else {}


def _by_name(reader: LinkReader, name: str) -> Link | None:
    try:
        return reader.link(name)
    except ConfigError:  # no device can have this name
        return None


def _by_pattern(
    reader: LinkReader,
    known: list[Address],
    pattern: str,
    families: tuple[int, ...],
    overlay: tuple[str, ...],
) -> Link | None:
    """Return the first interface with an address of each family that matches, else with one of any,
    else with a name that does (flannel's pkg/ipmatch)."""
    import re

    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"--iface-regex: {pattern!r}: {error}", hint="correct the regular expression"
        ) from error
    matched: dict[int, set[int]] = {}
    for address in known:
        if not is_loopback(address) and expression.search(address.address):
            matched.setdefault(address.index, set()).add(address.family)
    both = [index for index in matched if matched[index] >= {*families}]
    for index in both or matched:
        return reader.link(index)
    usable = {address.index for address in known if not is_loopback(address)}
    links = (
        link
        for link in reader.links()
        if link.name not in overlay and (link.name != "lo" or link.index in usable)
    )
    return next((link for link in links if expression.search(link.name)), None)


def _address_of(known: list[Address], text: str) -> Address | None:
    try:
        wanted = canonical(text)
    except ValueError:
        return None
    return next((one for one in known if one.address == wanted), None)
