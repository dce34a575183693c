"""The evidence for :mod:`flannel_dp.node.path`, read where a pass has seen something unusual.

Of routes only those of tables that a policy rule before that of table main names are read, as the
kernel filters them; never table main.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from msgspec.structs import replace

from flannel_dp._core import Claims, parse_prefix, prefix_holds
from flannel_dp.cluster.lease import printable
from flannel_dp.errors import DumpInterrupted
from flannel_dp.kernel.links import SCOPE_LINK, Address, Link, LinkReader
from flannel_dp.kernel.messages import RT_TABLE_LOCAL, RT_TABLE_MAIN
from flannel_dp.kernel.rules import (
    LOOKUP,
    PolicyRule,
    TableRoute,
    parse_rule,
    parse_table_route,
    read_routes,
)
from flannel_dp.kernel.socket import NetlinkSocket
from flannel_dp.node.path import (
    Diversion,
    Ground,
    answering_rule,
    asked_before_main,
    diversions,
    holds,
)
from flannel_dp.node.rivals import (
    foreign_addresses,
    narrower_routes,
    network_of_address,
    rival_devices,
)
from flannel_dp.resources.path.place import Place

log = logging.getLogger(__name__)

#: So many tables are read in one pass.
_TABLES = 16

#: So many peers are looked at to find one that is behind a router.
_FAR = 64

#: So many routes of one table: about 10 ms.
_ROUTES = 4096

#: So many dumps of one table that changed meanwhile.
_DUMPS = 3


def diversions_of(
    reader: LinkReader,
    place: Place,
    rules: Sequence[bytes],
    local: Sequence[tuple[int, bytes]],
    on_device: Sequence[Address],
) -> tuple[Diversion, ...]:
    """Return what is in the way of packets of pods. Raises KernelError."""
    addresses = reader.addresses()
    parsed = [parse_rule(data, "read a policy rule") for data in rules]
    ground = ground_of(reader, place, addresses)
    tables = _Tables(reader, place.number, local)
    diverted = [
        found
        for one in (ground, *_of_tunnel(ground, place, addresses))
        for found in diversions(parsed, tables.read(parsed, one), one)
    ]
    inside = [a for a in addresses if a.family == place.number and a.index != place.device]
    links = _links(reader, inside, place)
    owners = {
        one.address: owner
        for one in inside
        if one.index in links and (owner := _owner(place.claims, one.address))
    }
    return (
        *diverted,
        *foreign_addresses(
            place.number,
            place.device_name,
            on_device,
            [*place.subnets.values()],
            place.network,
        ),
        *rival_devices(
            ground,
            addresses,
            links,
            owners,
            uplink=place.uplink,
            networks=[*place.networks.values()],
        ),
        *narrower_routes(ground, place.routes, _narrowed(place)),
    )


def rule_that_answers(
    reader: LinkReader,
    place: Place,
    rules: Sequence[bytes],
    table: int,
    length: int,
    priority: int,
) -> str:
    """Return the policy rule by which a route of ``length`` in ``table`` answers packets of pods,
    else (``table`` 0: none does) the one of number ``priority``; "" for none."""
    parsed = [parse_rule(data, "read a policy rule") for data in rules]
    found = None
    if table:
        found = answering_rule(parsed, ground_of(reader, place, reader.addresses()), table, length)
    elif priority >= 0:
        found = next((one for one in parsed if one.priority == priority), None)
    return f"{found.priority}: {found}" if found else ""


def ground_of(reader: LinkReader, place: Place, addresses: Sequence[Address]) -> Ground:
    """Return the facts about this node that rules and routes are validated by."""
    pods = {
        one.index for one in addresses if one.index != place.device and _is_in(place.subnet, one)
    }
    return Ground(
        place.number,
        place.network,
        place.subnet,
        place.length,
        place.device,
        frozenset(pods),
        _names(reader),
    )


def _of_tunnel(ground: Ground, place: Place, addresses: Sequence[Address]) -> Iterator[Ground]:
    """Yield where packets of the tunnel go: the networks of the external interface, and one peer
    that is in none of them, of the first few."""
    if not place.local:
        return
    near = [
        f"{one.address}/{one.prefixlen}"
        for one in addresses
        if (one.index, one.family) == (place.uplink, place.number)
        and one.scope < SCOPE_LINK
        and one.prefixlen < (32 if one.family == 4 else 128)
    ]
    near = [*map(network_of_address, near)]
    prefixes = dict.fromkeys(near)
    for claims in place.claims[:1]:
        for number in range(min(len(claims), _FAR)):
            end = claims.endpoint(number)
            if not any(prefix_holds(network, end) for network in near):
                prefixes[f"{end}/{32 if place.number == 4 else 128}"] = None
                break
    for prefix in prefixes:
        length = parse_prefix(prefix)[2] if prefix in near else 0
        yield replace(ground, network=prefix, length=length, local=place.local, uplink=place.uplink)


class _Tables:
    """The routes of tables that are looked up before table main, each read once."""

    def __init__(
        self, kernel: NetlinkSocket, family: int, local: Sequence[tuple[int, bytes]]
    ) -> None:
        self._kernel, self._family = kernel, family
        parsed = (parse_table_route(reply, family, RT_TABLE_LOCAL) for reply in local)
        self._known = {RT_TABLE_LOCAL: [route for route in parsed if route is not None]}

    def read(self, rules: Sequence[PolicyRule], ground: Ground) -> dict[int, list[TableRoute]]:
        """Return those that packets to ``ground.network`` may meet. Raises KernelError."""
        asked, _ = asked_before_main(rules, ground)
        for one in asked:
            table = one.rule.table
            if one.rule.action != LOOKUP or table == RT_TABLE_MAIN or table in self._known:
                continue
            if len(self._known) > _TABLES:
                log.info(
                    "There are more than %(most)d routing tables: the others are not compared",
                    {"most": _TABLES},
                )
                break
            self._known[table] = self._routes(table)
        return self._known

    def _routes(self, table: int) -> list[TableRoute]:
        for _ in range(_DUMPS - 1):
            try:
                return self._read(table)
            except DumpInterrupted:
                continue
        return self._read(table)

    def _read(self, table: int) -> list[TableRoute]:
        found = [*islice(read_routes(self._kernel, self._family, table), _ROUTES + 1)]
        if len(found) > _ROUTES:
            self._kernel.abandon()
            log.info(
                "Routing table %(table)d has more than %(most)d routes: the rest is not compared",
                {"table": table, "most": _ROUTES},
            )
        return found[:_ROUTES]


def _names(reader: LinkReader) -> Callable[[int], str]:
    known: dict[int, str] = {}

    def name(index: int) -> str:
        if index not in known:
            link = reader.link(index)
            known[index] = link.name if link else f"if{index}"
        return known[index]

    return name


def _links(reader: LinkReader, addresses: Sequence[Address], place: Place) -> dict[int, Link]:
    """Return the devices with an address in the network that is not in this node's subnet."""
    found: dict[int, Link] = {}
    for one in addresses:
        if one.index in found or not _is_in(place.network, one) or _is_in(place.subnet, one):
            continue
        link = reader.link(one.index)
        if link is not None:
            found[one.index] = link
    return found


def _is_in(prefix: str, address: Address) -> bool:
    bits = 32 if address.family == 4 else 128
    return holds(prefix, f"{address.address}/{bits}")


def _narrowed(place: Place) -> dict[str, tuple[str, str]]:
    """Return the accepted lease, and its subnet, of each static route that is only a part of it."""
    found: dict[str, tuple[str, str]] = {}
    for route in place.routes:
        address, _, length = route.prefix.partition("/")
        owner = _owner(place.claims[:1], address)
        if owner and int(owner[1].partition("/")[2]) < int(length):
            found[route.prefix] = owner
    return found


def _owner(claims: Sequence[Claims], address: str) -> tuple[str, str] | None:
    """Return the lease that covers an address, and its subnet."""
    for one in claims:
        for length in sorted({*memoryview(one.lengths).tolist()}, reverse=True):
            number = one.find_subnet(f"{address}/{length}")
            if number >= 0:
                return printable(one.name(number)), one.subnet(number)
    return None
