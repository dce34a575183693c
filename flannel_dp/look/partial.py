"""Peers of which the kernel has some entries and lacks others.

Each entry that flannel-dp writes for a peer says what it is of: a route has its subnet, a
neighbour and the id of a nexthop object its first address, and an FDB entry its MAC alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from flannel_dp._core import address_text, parse_address, parse_prefix
from flannel_dp.resources.peers.blackhole import is_blackhole
from flannel_dp.resources.peers.gateway import GATEWAYS
from flannel_dp.resources.peers.nexthops import address_of
from flannel_dp.resources.peers.present import PresentPeer, incomplete
from flannel_dp.tables.entries import Entry

if TYPE_CHECKING:
    from flannel_dp.look.held import HeldFamily

#: States of a peer whose route is there and leads nowhere, or to several nodes.
_BROKEN = frozenset({"no nexthop", "no neighbour", "no fdb", "ok", "foreign"})


class _Part(Struct):
    """What is known of one peer."""

    subnet: str
    endpoint: str = ""
    mac: str = ""
    entries: list[Entry] = field(default_factory=list)


def present_peers(held: HeldFamily) -> list[PresentPeer]:
    """Return the peers that packets reach, and those of which some entries are there."""
    whole = [
        PresentPeer(subnet.replace("/", "-"), subnet, endpoint, mac)
        for subnet, endpoint, mac in held.reached()
    ]
    return [*whole, *incomplete_peers(held)]


def incomplete_peers(held: HeldFamily) -> Iterator[PresentPeer]:
    """Yield the peers that are there and that packets do not reach."""
    ours: dict[str, list[Any]] = {
        one.table.kind: [entry for entry, is_ours in one.entries() if is_ours]
        for one in held.tables
    }
    reached = [*held.reached()]
    whole = {subnet.partition("/")[0] for subnet, _, _ in reached}
    macs = {mac for _, _, mac in reached}
    parts: dict[str, _Part] = {}
    for address, entry in _named(held, ours):
        if address in whole:
            continue
        part = parts.setdefault(address, _Part(address))
        part.entries.append(entry)
        part.subnet = getattr(entry, "prefix", part.subnet)
        part.mac = getattr(entry, "mac", part.mac)
        device = held.device.index if held.device else 0
        if getattr(entry, "gateway", "") and entry.device not in (0, device):
            part.endpoint = entry.gateway
    used = macs | {one.mac for one in ours.get("neighbour", ())}
    by_mac = {part.mac: part for part in parts.values() if part.mac}
    for entry in ours.get("fdb", ()):
        if entry.mac in by_mac:
            by_mac[entry.mac].entries.append(entry)
            by_mac[entry.mac].endpoint = entry.endpoint
        elif entry.mac not in used and entry.endpoint:
            yield incomplete("", entry.endpoint, entry.mac, [entry])
    for part in parts.values():
        if part.mac not in macs or not part.mac:  # else it is left of a peer that is there
            yield incomplete(part.subnet, part.endpoint, part.mac, part.entries)


def _named(held: HeldFamily, ours: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    """Yield each entry that names a peer's subnet, with the first address of that."""
    # With a map a route into the device is no peer's: one route leads to all of them.
    ways = {"direct"} if "peer" in ours else {"direct", "tunnel"}
    broken = {one.subnet for one in held.peers if one.state in _BROKEN and one.way in ways}
    for entry in ours.get("route", ()):
        if entry.prefix in broken and entry.is_plain and not is_blackhole(entry):
            yield entry.prefix.partition("/")[0], entry
    for entry in ours.get("nexthop", ()):
        yield address_text(address_of(entry.id, held.network)), entry
    _, inner, length = parse_prefix(held.network)
    rest = 8 * len(inner) - length
    for entry in ours.get("neighbour", ()):
        _, raw = parse_address(entry.address)
        inside = int.from_bytes(raw, "big") >> rest == int.from_bytes(inner, "big") >> rest
        if inside and entry.address != GATEWAYS[held.number]:
            yield entry.address, entry
