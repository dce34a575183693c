"""The evidence for :mod:`flannel_dp.node.path`, read where a pass has seen something unusual.

Of routes only those of tables that a policy rule before that of table main names are read, as the
kernel filters them; never table main.

On a node with a VPN's rules that is each pass, mostly with the answers of the one before. So all is
read, but decided again only where an answer is another one: a decision is a pure function of what
was read (:class:`_Evidence`), and the last ones are remembered by that. One that needs a device's
name is not: names are not part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Claims, parse_prefix, prefix_holds
from flannel_dp.cluster.lease import printable
from flannel_dp.errors import DumpInterrupted
from flannel_dp.kernel.links import SCOPE_LINK, Address, LinkReader
from flannel_dp.kernel.messages import RT_TABLE_LOCAL, RT_TABLE_MAIN, address_text
from flannel_dp.kernel.rules import (
    LOOKUP,
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

#: So many decisions are remembered: of both families, for a data plane or two.
_REMEMBERED = 6

_Replies = tuple[tuple[int, bytes], ...]
_Names = Callable[[int], str]


class _Evidence(Struct, frozen=True):
    """All that a decision about one family's packets follows from, but for the routes of tables.

    The fields of a place, with the ``networks`` and ``subnets`` of all families; ``endpoints``
    are those of the first peers, packed. ``rules`` and ``table_local`` are undecoded.
    """

    number: int
    network: str
    subnet: str
    length: int
    uplink: int
    local: str
    device: int
    device_name: str
    networks: tuple[str, ...]
    subnets: tuple[str, ...]
    endpoints: bytes
    rules: tuple[bytes, ...]
    table_local: _Replies
    addresses: tuple[Address, ...]
    on_device: tuple[Address, ...]


class _NameNeeded(Exception):
    """The decision takes the name of a device."""


def diversions_of(
    reader: LinkReader,
    place: Place,
    rules: Sequence[bytes],
    local: Sequence[tuple[int, bytes]],
    on_device: Sequence[Address],
    addresses: Sequence[Address],
) -> tuple[Diversion, ...]:
    """Return what is in the way of packets of pods; ``addresses`` are all of this node. Raises
    KernelError."""
    evidence = _Evidence(
        place.number,
        place.network,
        place.subnet,
        place.length,
        place.uplink,
        place.local,
        place.device,
        place.device_name,
        (*place.networks.values(),),
        (*place.subnets.values(),),
        memoryview(place.claims[0].endpoints)[:_FAR].tobytes() if place.claims else b"",
        tuple(rules),
        tuple(local),
        tuple(addresses),
        tuple(on_device),
    )
    names = _names(reader)
    try:
        tables = _tables_remembered(evidence)
    except _NameNeeded:
        tables = _tables_asked(evidence, names)
    read = _read_tables(reader, place.number, tables)
    try:
        diverted = _remembered(evidence, read)
    except _NameNeeded:
        diverted = _decided(evidence, read, names)
    suspects = _with_addresses_of_pods(evidence)
    if not (suspects or place.routes):
        return diverted
    ground = _ground(evidence, names)
    links = {index: link for index in suspects if (link := reader.link(index)) is not None}
    owners = {
        one.address: owner
        for one in addresses
        if (one.family, one.index in links) == (place.number, True)
        and (owner := _owner(place.claims, one.address))
    }
    return (
        *diverted,
        *rival_devices(
            ground,
            addresses,
            links,
            owners,
            uplink=place.uplink,
            networks=evidence.networks,
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
    return _ground_with(place, addresses, _names(reader))


def _ground(evidence: _Evidence, names: _Names) -> Ground:
    return _ground_with(evidence, evidence.addresses, names)


def _ground_with(place: Place | _Evidence, addresses: Sequence[Address], names: _Names) -> Ground:
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
        names,
    )


# ---- what follows from the evidence alone


def _no_name(index: int) -> str:
    raise _NameNeeded


@lru_cache(_REMEMBERED)
def _tables_remembered(evidence: _Evidence) -> tuple[int, ...]:
    return _tables_asked(evidence, _no_name)


def _tables_asked(evidence: _Evidence, names: _Names) -> tuple[int, ...]:
    """Return the tables, beside local and main, that packets may meet before table main."""
    rules = [parse_rule(data, "read a policy rule") for data in evidence.rules]
    return tuple(
        dict.fromkeys(
            one.rule.table
            for ground in _grounds(evidence, names)
            for one in asked_before_main(rules, ground)[0]
            if one.rule.action == LOOKUP and one.rule.table not in (RT_TABLE_LOCAL, RT_TABLE_MAIN)
        )
    )


@lru_cache(_REMEMBERED)
def _remembered(
    evidence: _Evidence, tables: tuple[tuple[int, _Replies], ...]
) -> tuple[Diversion, ...]:
    return _decided(evidence, tables, _no_name)


def _decided(
    evidence: _Evidence, tables: tuple[tuple[int, _Replies], ...], names: _Names
) -> tuple[Diversion, ...]:
    """Return what rules, routes of tables and addresses on our device divert."""
    rules = [parse_rule(data, "read a policy rule") for data in evidence.rules]
    read = {
        table: [
            route
            for reply in replies
            if (route := parse_table_route(reply, evidence.number, table)) is not None
        ]
        for table, replies in ((RT_TABLE_LOCAL, evidence.table_local), *tables)
    }
    return (
        *(
            found
            for ground in _grounds(evidence, names)
            for found in diversions(rules, read, ground)
        ),
        *foreign_addresses(
            evidence.number,
            evidence.device_name,
            evidence.on_device,
            evidence.subnets,
            evidence.network,
        ),
    )


def _grounds(evidence: _Evidence, names: _Names) -> Iterator[Ground]:
    """Yield where packets of pods go, and then those of the tunnel: the networks of the external
    interface, and one peer that is in none of them, of the first few."""
    ground = _ground(evidence, names)
    yield ground
    if not evidence.local:
        return
    near = [
        f"{one.address}/{one.prefixlen}"
        for one in evidence.addresses
        if (one.index, one.family) == (evidence.uplink, evidence.number)
        and one.scope < SCOPE_LINK
        and one.prefixlen < (32 if one.family == 4 else 128)
    ]
    near = [*map(network_of_address, near)]
    prefixes = dict.fromkeys(near)
    size = 4 if evidence.number == 4 else 16
    for at in range(0, len(evidence.endpoints), size):
        end = address_text(evidence.endpoints[at : at + size])
        if end and not any(prefix_holds(network, end) for network in near):
            prefixes[f"{end}/{8 * size}"] = None
            break
    for prefix in prefixes:
        length = parse_prefix(prefix)[2] if prefix in near else 0
        yield replace(
            ground, network=prefix, length=length, local=evidence.local, uplink=evidence.uplink
        )


@lru_cache(_REMEMBERED)
def _with_addresses_of_pods(evidence: _Evidence) -> tuple[int, ...]:
    """Return the devices with an address in the network that is not in this node's subnet."""
    return tuple(
        dict.fromkeys(
            one.index
            for one in evidence.addresses
            if one.family == evidence.number
            and one.index != evidence.device
            and _is_in(evidence.network, one)
            and not _is_in(evidence.subnet, one)
        )
    )


# ---- asking the kernel


def _read_tables(
    reader: NetlinkSocket, family: int, tables: Sequence[int]
) -> tuple[tuple[int, _Replies], ...]:
    """Return the routes of tables, undecoded. Raises KernelError."""
    if len(tables) > _TABLES:
        log.info(
            "There are more than %(most)d routing tables: the others are not compared",
            {"most": _TABLES},
        )
    return tuple((table, _routes(reader, family, table)) for table in tables[:_TABLES])


def _routes(reader: NetlinkSocket, family: int, table: int) -> _Replies:
    for _ in range(_DUMPS - 1):
        try:
            return _routes_once(reader, family, table)
        except DumpInterrupted:
            continue
    return _routes_once(reader, family, table)


def _routes_once(reader: NetlinkSocket, family: int, table: int) -> _Replies:
    found = (*islice(read_routes(reader, family, table), _ROUTES + 1),)
    if len(found) > _ROUTES:
        reader.abandon()
        log.info(
            "Routing table %(table)d has more than %(most)d routes: the rest is not compared",
            {"table": table, "most": _ROUTES},
        )
    return found[:_ROUTES]


def _names(reader: LinkReader) -> _Names:
    known: dict[int, str] = {}

    def name(index: int) -> str:
        if index not in known:
            link = reader.link(index)
            known[index] = link.name if link else f"if{index}"
        return known[index]

    return name


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
