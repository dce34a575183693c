"""Build tables of any kind from what the caller has: iterables of values, or columns.

The ``*_table`` functions take iterables of values as callers have them
(:mod:`flannel_dp.tables.plain`) and are for hundreds of entries; the
``*_columns`` functions take buffers of bytes (``bytes``, arrays,
NumPy arrays, strided memoryviews) and cost well under a microsecond an entry.
The kernel's table is compared with the result within a scope: see
:mod:`flannel_dp.tables.scopes`.

``device`` is an ifindex, or the name of a device in the namespace ``netns`` (None: the caller's).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flannel_dp._core import Table, has_lists, widen
from flannel_dp.errors import ConfigError, FlannelDPError, Unsupported, require, shown
from flannel_dp.tables.arguments import Address, Device, Mac, NetNS, Prefix, index_of
from flannel_dp.tables.entries import (
    PROTOCOL,
    TABLE_MAIN,
    Entry,
    Fdb,
    Neighbour,
    Nexthop,
    Peer,
    Route,
)
from flannel_dp.tables.forms import check_lists, is_of_any_form

if TYPE_CHECKING:
    Numbers = array[int]
else:
    Numbers = array  # not to be subscripted before Python 3.12

Buffer = Any


def _rows(entries: Any, width: int = 2) -> Iterator[tuple[Any, ...]]:
    """Return what the caller has as tuples of ``width`` values. ConfigError for what is none."""
    items = entries.items() if isinstance(entries, Mapping) else entries
    require(isinstance(items, Iterable), "entries", entries, f"tuples of {width} values")
    for entry in items:
        fits = isinstance(entry, (tuple, list)) and len(entry) == width
        require(fits, "an entry", entry, f"a tuple of {width} values")
        yield tuple(entry)


def _column(parameter: str, given: Buffer) -> memoryview:
    try:
        return memoryview(given)
    except TypeError as error:
        raise ConfigError(
            f"{parameter} is {shown(given)}", hint=f"{parameter} takes bytes, an array or a buffer"
        ) from error


def _matrix(parameter: str, column: Buffer, width: int) -> memoryview:
    """Return a column as (n, width) bytes; flat buffers are cut into rows."""
    view = _column(parameter, column)
    if view.ndim == 2:
        return view
    fits = view.c_contiguous and view.nbytes % width == 0
    require(fits, parameter, column, f"{width} bytes for each entry")
    return (
        view.cast("B").cast("B", (view.nbytes // width, width)) if view.nbytes else _nothing(width)
    )


def _width(family: int) -> int:
    require(family in (4, 6), "family", family, "4 or 6")
    return 4 if family == 4 else 16


def _nothing(width: int) -> memoryview:
    return memoryview(bytes(width)).cast("B", (1, width))[:0]


#: Per kind of table: the fields of the key, and where the kernel itself could hold several.
_KEYS = {
    "neighbour": ("address",),
    "fdb": ("mac",),
    "nexthop": ("id",),
    "route": ("prefix",),
    "peer": ("prefix",),
    "fdb_any": ("mac",),
}
_MANY = ("fdb", "route")


def _add(table: Table, entry: Entry) -> None:
    """Add an entry, once. Raises where the table has another value under its key."""
    at = table.find(entry)
    if at < 0:
        table.add(entry)
        return
    held: Entry = table[at]
    alone = Table(table.kind)
    alone.add(entry)
    again: Entry = alone[0]  # as the table spells it
    if again == held:
        return
    keys = _KEYS[table.kind]
    pairs = [
        (name, one, other)
        for name, one, other in zip(held._fields, held, again, strict=True)
        if one != other
    ]
    what = " ".join(str(getattr(held, name)) for name in keys)
    first = " ".join(f"{name} {one}" for name, one, _ in pairs)
    second = " ".join(f"{name} {other}" for name, _, other in pairs)
    text = f"{table.kind} {what} is given twice: with {first} and with {second}"
    if table.kind in _MANY or isinstance(held, Fdb):
        raise Unsupported(
            f"{text}; a table holds one of them", hint="give one, or use a table for each"
        )
    raise ConfigError(text, hint="give one of them")


_COLUMNS_HINT = "give columns of one length: addresses, MACs as bytes, ids as array('I')"


def _whole(part: Callable[[int, int], Table], *lengths: int) -> Table:
    """Return the table of all rows, ``part(first, last + 1)`` being that of some. Raises as
    ``_add`` where two rows have one key and different values."""
    count = max(lengths)
    try:
        table = part(0, count)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, FlannelDPError):
            raise
        raise ConfigError(f"the columns make no table: {error}", hint=_COLUMNS_HINT) from error
    if len(table) < count:
        seen = Table(table.kind)
        for number in range(count):
            _add(seen, part(number, number + 1)[0])
    return table


def neighbour_table(
    device: Device,
    entries: Iterable[tuple[Address, Mac]] | Mapping[Address, Mac] | Mapping[str, str],
    *,
    netns: NetNS = None,
) -> Table:
    """Return ``{overlay address: MAC}`` as permanent neighbours of ``device``.

    Raises ConfigError for what is no device, no address or no MAC, and for an address that is
    given with two MACs.
    ``ip neigh replace ADDRESS lladdr MAC dev DEVICE nud permanent``.
    """
    table, index = Table("neighbour"), index_of("device", device, netns)
    for address, mac in _rows(entries):
        _add(table, Neighbour(index, address, mac))
    return table


def fdb_table(
    device: Device,
    entries: Iterable[tuple[Mac, Address] | Fdb] | Mapping[Mac, Address] | Mapping[str, str],
    *,
    netns: NetNS = None,
) -> Table:
    """Return ``{MAC: underlay address}`` as FDB entries of vxlan ``device``, or ``Fdb``
    entries, which may be of any form that the kernel has.

    The zero MAC and MACs of groups may be given with several destinations (a flood list).
    Raises ConfigError for what is no device, no MAC or no address and for what the kernel takes
    from no program (see ``Fdb``), Unsupported for a unicast MAC with two destinations and for what
    the kernel would not keep. The kind of the table is "fdb", or, where an entry has more
    than a unicast MAC and one destination, "fdb_any"; ``Kernel`` takes both with ``fdb_scope``.
    ``bridge fdb replace MAC dst ADDRESS dev DEVICE self permanent``, ``bridge fdb append``.
    """
    table, index = Table("fdb"), index_of("device", device, netns)
    for entry in _fdb_entries(index, entries, netns):
        if table.kind == "fdb" and is_of_any_form(entry):
            table = widen(table)
        _add(table, entry)
    if table.kind == "fdb_any":
        check_lists(table)
    return table


def _fdb_entries(device: int, entries: Any, netns: NetNS) -> Iterator[Fdb]:
    items = entries.items() if isinstance(entries, Mapping) else entries
    require(isinstance(items, Iterable), "entries", entries, "pairs or Fdb entries")
    for entry in items:
        if not isinstance(entry, Fdb):
            yield Fdb(device, *next(_rows([entry])))
            continue
        there = index_of("device", entry.device, netns)
        require(there == device, "an entry", entry, f"an entry of device {device}")
        yield entry._replace(device=device)


def nexthop_table(
    device: Device,
    entries: Iterable[tuple[int, Address]] | Mapping[int, Address] | Mapping[int, str],
    *,
    onlink: bool = True,
    protocol: int = PROTOCOL,
    netns: NetNS = None,
) -> Table:
    """Return ``{id: gateway}`` as nexthop objects on ``device``.

    ``ip nexthop replace id ID via GATEWAY dev DEVICE onlink proto PROTOCOL``;
    Linux 5.3 and later. Raises ConfigError for an id of 0, a bad address, and an id that is
    given with two gateways.
    """
    table, index = Table("nexthop"), index_of("device", device, netns)
    for number, gateway in _rows(entries):
        _add(table, Nexthop(number, gateway, index, onlink, protocol))
    return table


def route_table(
    entries: Iterable[tuple[Prefix, int | Address]] | Mapping[Prefix, Any] | Mapping[str, Any],
    *,
    device: Device = 0,
    onlink: bool = True,
    metric: int = 0,
    table: int = TABLE_MAIN,
    protocol: int = PROTOCOL,
    netns: NetNS = None,
) -> Table:
    """Return ``{prefix: nexthop id or gateway}`` as routes; gateways are on ``device``.

    ``ip route replace PREFIX nhid ID`` or ``... via GATEWAY dev DEVICE onlink``.
    Raises ConfigError for what is no device, no prefix or no address, and Unsupported for a
    prefix with two of them (several paths).
    """
    routes, index = Table("route"), index_of("device", device, netns)
    for prefix, via in _rows(entries):
        require(via is not None, f"the nexthop of {prefix}", via, "an id or a gateway")
        if isinstance(via, int):
            entry = Route(prefix, nexthop=via, metric=metric, table=table, protocol=protocol)
        else:
            entry = Route(
                prefix,
                gateway=via,
                device=index,
                onlink=onlink,
                metric=metric,
                table=table,
                protocol=protocol,
            )
        _add(routes, entry)
    return routes


def peer_table(map: int, entries: Iterable[tuple[Prefix, Address, Mac]]) -> Table:
    """Return ``(prefix, endpoint, MAC)`` as peers in a BPF map (its descriptor).

    Raises ConfigError for what is no prefix, address or MAC, and for a prefix that
    is given twice, for two peers.
    """
    table = Table("peer")
    for prefix, endpoint, mac in _rows(entries, 3):
        _add(table, Peer(prefix, endpoint, mac, map))
    return table


def neighbour_columns(
    device: Device, family: int, addresses: Buffer, macs: Buffer, *, netns: NetNS = None
) -> Table:
    """Return neighbours from columns: n x 4 (family 4) or n x 16 address bytes, n x 6 MAC bytes.

    Raises ConfigError for columns of different length or width, and as ``neighbour_table``
    for one key with two values.
    """
    index = index_of("device", device, netns)
    left, right = _matrix("addresses", addresses, _width(family)), _matrix("macs", macs, 6)

    def part(start: int, stop: int) -> Table:
        table = Table("neighbour")
        table.extend_neighbours(index, left[start:stop], right[start:stop])
        return table

    return _whole(part, len(left), len(right))


def fdb_columns(
    device: Device,
    family: int,
    macs: Buffer,
    endpoints: Buffer,
    *,
    vnis: Buffer | None = None,
    src_vnis: Buffer | None = None,
    netns: NetNS = None,
) -> Table:
    """Return FDB entries from columns: n x 6 MAC bytes, n x 4 or n x 16 underlay address bytes,
    and, where given, n native 32-bit ``vnis`` and ``src_vnis`` (0: none).

    ``family`` is the underlay's. Raises ConfigError as ``neighbour_columns``, and
    Unsupported for a unicast MAC with two destinations. The kind is that of ``fdb_table``.
    """
    index = index_of("device", device, netns)
    left, right = _matrix("macs", macs, 6), _matrix("endpoints", endpoints, _width(family))
    numbers = [None if one is None else _column("vnis", one) for one in (vnis, src_vnis)]
    try:
        wide = any(one is not None for one in numbers) or has_lists(left)
    except (TypeError, ValueError, BufferError) as error:
        raise ConfigError(f"the columns make no table: {error}", hint=_COLUMNS_HINT) from error

    def part(start: int, stop: int) -> Table:
        table = Table("fdb_any" if wide else "fdb")
        if not wide:
            table.extend_fdb(index, left[start:stop], right[start:stop])
            return table
        some = [None if one is None else one[start:stop] for one in numbers]
        table.extend_fdb_any(index, left[start:stop], right[start:stop], *some)
        return table

    return _whole(part, len(left), len(right))


def nexthop_columns(
    device: Device,
    family: int,
    ids: Buffer,
    gateways: Buffer,
    *,
    onlink: bool = True,
    protocol: int = PROTOCOL,
    netns: NetNS = None,
) -> Table:
    """Return nexthop objects from columns: n native 32-bit ids, n x 4 or n x 16 gateway bytes.

    Raises ConfigError as ``neighbour_columns``.
    """
    index = index_of("device", device, netns)
    left, right = _column("ids", ids), _matrix("gateways", gateways, _width(family))

    def part(start: int, stop: int) -> Table:
        table = Table("nexthop")
        table.extend_nexthops(index, left[start:stop], right[start:stop], protocol, onlink)
        return table

    return _whole(part, len(left), len(right))


def route_columns(
    family: int,
    prefixes: Buffer,
    lengths: Buffer,
    *,
    nexthops: Buffer | None = None,
    gateways: Buffer | None = None,
    device: Device = 0,
    onlink: bool = True,
    metric: int = 0,
    table: int = TABLE_MAIN,
    protocol: int = PROTOCOL,
    netns: NetNS = None,
) -> Table:
    """Return routes from columns: n x 4 or n x 16 prefix bytes, n length bytes, and one of
    ``nexthops`` (n native 32-bit ids) and ``gateways`` (address bytes, on ``device``).

    Host bits of prefixes must be zero, or the kernel rejects the route (EINVAL).
    Raises ConfigError for columns that do not fit together, and Unsupported for a prefix
    with two nexthops or gateways (several paths).
    """
    width, index = _width(family), index_of("device", device, netns)
    left, middle = _matrix("prefixes", prefixes, width), _column("lengths", lengths)
    objects = None if nexthops is None else _column("nexthops", nexthops)
    addresses = None if gateways is None else _matrix("gateways", gateways, width)
    if middle.nbytes and middle.format == "B":
        require(max(middle) <= 8 * width, "lengths", max(middle), f"numbers up to {8 * width}")

    def part(start: int, stop: int) -> Table:
        routes = Table("route")
        routes.extend_routes(
            left[start:stop],
            middle[start:stop],
            protocol,
            nexthops=None if objects is None else objects[start:stop],
            gateways=None if addresses is None else addresses[start:stop],
            device=index,
            onlink=onlink,
            table=table,
            metric=metric,
        )
        return routes

    return _whole(part, len(left), len(middle))


def ids_of(numbers: Iterable[int]) -> Numbers:
    """Return nexthop ids as a column. ConfigError for what is no id."""
    given = list(numbers)
    for number in given:
        require(isinstance(number, int) and 0 <= number <= 0xFFFFFFFF, "an id", number, "32 bits")
    return array("I", given)
