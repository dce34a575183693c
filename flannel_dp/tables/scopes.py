"""Scopes: which part of a kernel table is read, and what in it is ours to change or remove.

A table is compared with the kernel's entries in its scopes: entries of the scope that the
table lacks are removed, entries outside of it are never touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flannel_dp._core import parse_prefix
from flannel_dp.errors import require
from flannel_dp.later import Later
from flannel_dp.tables.entries import PROTOCOL, TABLE_MAIN, Scope

if TYPE_CHECKING:
    from flannel_dp.tables import arguments
else:
    arguments = Later("flannel_dp.tables.arguments")

AF_INET, AF_INET6, AF_BRIDGE = 2, 10, 7


def address_family(family: int) -> int:
    """Return AF_INET for 4, AF_INET6 for 6. ConfigError for anything else."""
    require(family in (4, 6), "family", family, "4 or 6")
    return AF_INET if family == 4 else AF_INET6


def _index(device: int | str, netns: str | int | None) -> int:
    """Return the ifindex of ``device``; a name is looked up in ``netns``."""
    if type(device) is int and 0 <= device <= 0x7FFFFFFF:
        return device
    return arguments.index_of("device", device, netns)


def _check_number(parameter: str, value: object, least: int, what: str) -> None:
    fits = isinstance(value, int) and least <= value <= 0x7FFFFFFF
    require(fits, parameter, value, f"{what}, {least} or more")


def _check_range(parameter: str, value: tuple[int, int], what: str) -> None:
    pair = isinstance(value, tuple) and len(value) == 2
    pair = pair and all(isinstance(one, int) for one in value)
    require(pair and 0 <= value[0] <= value[1] <= 0xFFFFFFFF, parameter, value, what)


def _family_of(prefix: str) -> int:
    """Return 4 or 6, the family of a prefix; 0 for what is none."""
    try:
        return 4 if parse_prefix(prefix)[0] == AF_INET else 6
    except (TypeError, ValueError):
        return 0


def neighbour_scope(device: int | str, family: int, *, netns: str | int | None = None) -> Scope:
    """Return all permanent neighbours of one family on ``device``: it is ours alone.

    ``device`` is, as in all of these, an ifindex, or a name in the namespace ``netns`` (None: the
    caller's). Raises ConfigError for a value that names no device, family or map.
    """
    return Scope("neighbour", address_family(family), _index(device, netns))


def fdb_scope(
    device: int | str,
    *,
    owner: str = "",
    side: str = "self",
    src_vnis: tuple[int, int] = (0, 0xFFFFFFFF),
    netns: str | int | None = None,
) -> Scope:
    """Return FDB entries of vxlan ``device``, or of the bridge that it is a port of.

    ``owner`` says which of them a sync may remove where its table lacks them, and overwrite:
    "plain" entries (unicast, no flags), those with "extern_learn", or "all", which takes in the
    destinations of the zero MAC and of groups. Entries of others stay; one in the place of a
    wanted one is a conflict. By default that is "plain", and "all" for a ``Kernel`` with
    ``strict=False``. What the kernel learned stays in any case. The kernel keeps one state and
    one set of flags for all destinations of a MAC: one that is added to the list of another
    program gives them its own.

    ``side``: entries of the device ("self"), of its bridge ("master"), or both ("").
    ``src_vnis``: the first and the last VNI, on a device of several VNIs.
    ``bridge fdb show dev DEVICE``. Raises ConfigError for what is no device, owner, side or range.
    """
    require(
        owner in ("", "all", "plain", "extern_learn"), "owner", owner, "all, plain or extern_learn"
    )
    require(side in ("self", "master", ""), "side", side, 'self, master, or "" for both')
    _check_range("src_vnis", src_vnis, "the first and the last VNI")
    index = _index(device, netns)
    return Scope("fdb", AF_BRIDGE, index, ids=src_vnis, owner=owner, side=side)


def nexthop_scope(
    device: int | str,
    family: int = 4,
    *,
    ids: tuple[int, int] = (1, 0xFFFFFFFF),
    protocol: int = PROTOCOL,
    netns: str | int | None = None,
) -> Scope:
    """Return the nexthop objects on ``device`` that carry ``protocol`` and an id in ``ids``.
    Raises ConfigError for what is no device, family or range."""
    _check_number("protocol", protocol, 0, "a protocol of routes")
    _check_range("ids", ids, "the first and the last id")
    return Scope("nexthop", address_family(family), _index(device, netns), protocol, ids=ids)


def peer_scope(map: int, family: int) -> Scope:
    """Return all peers of one family in ``map`` (its descriptor): it is ours alone. Raises
    ConfigError for what is no descriptor or family."""
    _check_number("map", map, 0, "the descriptor of a BPF map")
    return Scope("peer", address_family(family), map)


def route_scope(
    family: int,
    *,
    device: int | str = 0,
    exclusive: bool = False,
    within: arguments.Prefix = "",
    table: int = TABLE_MAIN,
    protocol: int = PROTOCOL,
    netns: str | int | None = None,
) -> Scope:
    """Return routes of one table: those with ``protocol`` inside ``within`` (a prefix), or, with
    ``exclusive``, all on ``device`` except the kernel's own. Raises ConfigError for what is no
    device, family, prefix or table."""
    index = _index(device, netns)
    inside = arguments.prefix_of("within", within) if within and type(within) is not str else within
    _check_number("protocol", protocol, 0, "a protocol of routes")
    _check_number("table", table, 0, "a routing table's number")
    if inside:
        require(_family_of(str(inside)) == family, "within", within, f"a prefix of family {family}")
    return Scope(
        "route",
        address_family(family),
        index,
        protocol,
        exclusive,
        marked=not exclusive,
        within=str(inside),
        table=table,
    )
