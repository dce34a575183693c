"""What diverts packets of pods although our entries are right, as a resource that never writes.

``ip rule``, ``ip route show table TABLE`` and ``ip address`` show it. On an ordinary node a pass
asks for the policy rules of a family and the addresses on our device, and decides without decoding
more; what a finding means is in :mod:`flannel_dp.node.path`, which is loaded where there is one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import parse_address, parse_prefix
from flannel_dp.cluster.network import NetworkConfig, families_of, network_of
from flannel_dp.errors import DeviceGone, KernelError
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.links import SCOPE_LINK, Address, LinkReader
from flannel_dp.node.family import Family, View
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Done, Resource, Result
from flannel_dp.resources.path.place import Place

if TYPE_CHECKING:
    from flannel_dp.node.path import Diversion

NAME = "path"

#: The kernel's own rules: "from all lookup TABLE", by table (fib_default_rules_init).
_USUAL = {255: 0, 254: 32766, 253: 32767}
HEADER = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr
#: FRA_PRIORITY, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_PROTOCOL: what all rules have.
_PLAIN = frozenset({6, 14, 15, 21})
_NOT_SUPPRESSED = b"\xff\xff\xff\xff"


class PathChange(Struct, frozen=True):
    """What was found of each family that was read. Never anything to write."""

    found: Mapping[int, tuple[Diversion, ...]]
    unread: tuple[str, ...] = ()
    facts: Mapping[str, Any] = {}

    @property
    def is_empty(self) -> bool:
        """Always: it is for other programs to remove."""
        return True

    def lines(self) -> Iterator[str]:
        """Nothing: they are warnings."""
        return iter(())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was found and what could not be read, in words."""
        return (*(str(one) for found in self.found.values() for one in found), *self.unread)


class PathResource(Resource[tuple[Place, ...], PathChange]):
    """Other programs' policy rules, routes and addresses in the way of pods' packets."""

    name = NAME
    after = ("device4", "device6")

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config

    def desired(self, view: View) -> tuple[Place, ...]:
        """Return one place for each family of the view."""
        return places_of(self._config, view.families)

    def compare(self, host: Host, desired: tuple[Place, ...] | None, done: Done) -> PathChange:
        """Read rules and addresses. What cannot be read is a warning, no error."""
        places = []
        for place in desired or ():
            facts = done[f"device{place.number}"].facts if f"device{place.number}" in done else {}
            device = {"device": facts.get("index", 0), "device_name": facts.get("name", "")}
            places.append(replace(place, **device))
        return read_path(host, places) if places else PathChange({})

    def record(self, report: Report, change: PathChange | None, outcome: Result) -> None:
        """Add what was found as warnings, and by family for those who act on it."""
        super().record(report, change, outcome)
        if change is not None:
            report.diversions |= change.found
            report.warnings += change.warnings
            report.looked |= {f"{NAME}{number}" for number in change.found}


def places_of(config: NetworkConfig, families: Sequence[Family]) -> tuple[Place, ...]:
    """Return one place for each family of which leases are known; ``device`` is yet to be filled
    in."""
    nodes = [family.admission.node for family in families]
    return tuple(
        Place(
            family.number,
            {number: network_of(config, number) for number in families_of(config)},
            {node.family: node.subnet for node in nodes},
            shortest_route(config, family.number, family.admission.node.subnet),
            family.uplink,
            family.local,
            family.admission.node.addresses,
            (family.admission.accepted, family.admission.rejected.claims),
            tuple(one for one in family.admission.node.protected if one.route),
        )
        for family in families
    )


def shortest_route(config: NetworkConfig, family: int, subnet: str) -> int:
    """Return the prefix length of the shortest route that packets of pods need: a program takes the
    route of the whole network, the kernel one for each peer."""
    network = network_of(config, family)
    return int(parse_prefix(config.backend.routed(network, subnet or network))[2])


def read_path(host: Host, places: Iterable[Place]) -> PathChange:
    """Read what is in the way. Writes nothing; what cannot be read is in ``unread``.

    Four or five requests for a family where nothing is unusual. Else all addresses are read, and
    the tables that policy rules name, at most 16.
    """
    found: dict[int, tuple[Diversion, ...]] = {}
    unread: list[str] = []
    read: set[int] = set()
    with host.links() as reader:
        addresses = cache(reader.addresses)
        for place in places:
            try:
                shared = place.device in read
                found[place.number] = _read_place(reader, place, addresses, shared=shared)
            except DeviceGone:  # between two questions: the resource that owns it tells
                continue
            except KernelError as error:
                unread.append(f"policy rules and addresses cannot be read: {error}")
            read.add(place.device)
    return PathChange(found, tuple(unread))


def _read_place(
    reader: LinkReader,
    place: Place,
    addresses: Callable[[], Sequence[Address]],
    *,
    shared: bool,
) -> tuple[Diversion, ...]:
    """Return what is in the way of one family; ``addresses`` reads those of this node. Of a device
    that both ``shared`` it was asked already."""
    rules = reader.rules(place.number)
    local = reader.written_to_table(place.number, nl.RT_TABLE_LOCAL)
    on_device = reader.addresses(place.device) if place.device and not shared else []
    suspect = (
        not are_usual(tuple(rules))
        or local
        or place.routes
        or any(_is_foreign(address, place) for address in on_device)
        or (place.addresses is None or any(map(_outside(place), place.addresses)))
    )
    if not suspect:
        return ()
    from flannel_dp.resources.path.evidence import diversions_of

    return diversions_of(reader, place, rules, local, on_device, addresses())


@lru_cache(maxsize=8)
def are_usual(rules: tuple[bytes, ...]) -> bool:
    """Return whether these are the kernel's own three rules, or fewer, and table main is among
    them."""
    tables = []
    for data in rules:
        _, dst, src, tos, table, _, _, action, flags = HEADER.unpack_from(data)
        attrs = nl.attributes(data, HEADER.size, "read a policy rule")
        number, suppress = nl.u32(attrs.get(6)), nl.u32(attrs.get(14, _NOT_SUPPRESSED))
        plain = action == 1 and not (dst or src or tos or flags or attrs.keys() - _PLAIN)
        if not plain or suppress != 0xFFFFFFFF or _USUAL.get(table, -1) != number:
            return False
        tables.append(table)
    return not rules or nl.RT_TABLE_MAIN in tables


def _is_foreign(address: Address, place: Place) -> bool:
    """Return whether an address on our device may be another program's; decided in full
    elsewhere."""
    if address.family == 6 and address.scope == SCOPE_LINK:
        return False
    return all(address.address != text.partition("/")[0] for text in place.subnets.values())


def _outside(place: Place) -> Callable[[str], bool]:
    """Return whether an address of this node is in the network and not in this node's subnet."""
    inner, outer = _prefix(place.subnet), _prefix(place.network)

    def outside(address: str) -> bool:
        value = int.from_bytes(parse_address(address)[1], "big")
        return value >> outer[1] == outer[0] and value >> inner[1] != inner[0]

    return outside


def _prefix(prefix: str) -> tuple[int, int]:
    """Return the leading bits of a prefix, and how many follow; a value that nothing has for ""."""
    if not prefix:
        return -1, 0
    _, raw, length = parse_prefix(prefix)
    shift = 8 * len(raw) - length
    return int.from_bytes(raw, "big") >> shift, shift
