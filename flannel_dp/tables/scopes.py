"""Scopes: which part of a kernel table is read, and what in it is ours to change or remove.

A table is compared with the kernel's entries in its scopes: entries of the scope that the
table lacks are removed, entries outside of it are never touched.
"""

from __future__ import annotations

from flannel_dp.tables.entries import PROTOCOL, TABLE_MAIN, Scope

AF_INET, AF_INET6, AF_BRIDGE = 2, 10, 7


def address_family(family: int) -> int:
    """Return AF_INET for 4, AF_INET6 for 6."""
    return {4: AF_INET, 6: AF_INET6}[family]


def neighbour_scope(device: int, family: int) -> Scope:
    """Return all permanent neighbours of one family on ``device``: it is ours alone."""
    return Scope("neighbour", address_family(family), device)


def fdb_scope(device: int) -> Scope:
    """Return the whole FDB of vxlan ``device``: it is ours alone."""
    return Scope("fdb", AF_BRIDGE, device)


def nexthop_scope(
    device: int,
    family: int = 4,
    *,
    ids: tuple[int, int] = (1, 0xFFFFFFFF),
    protocol: int = PROTOCOL,
) -> Scope:
    """Return the nexthop objects on ``device`` that carry ``protocol`` and an id in ``ids``."""
    return Scope("nexthop", address_family(family), device, protocol, ids=ids)


def peer_scope(map: int, family: int) -> Scope:
    """Return all peers of one family in ``map`` (its descriptor): it is ours alone."""
    return Scope("peer", address_family(family), map)


def route_scope(
    family: int,
    *,
    device: int = 0,
    exclusive: bool = False,
    within: str = "",
    table: int = TABLE_MAIN,
    protocol: int = PROTOCOL,
) -> Scope:
    """Return routes of one table: those with ``protocol`` inside ``within``, or, with
    ``exclusive``, all on ``device`` except the kernel's own."""
    return Scope(
        "route",
        address_family(family),
        device,
        protocol,
        exclusive,
        marked=not exclusive,
        within=within,
        table=table,
    )
