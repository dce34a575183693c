"""Where the entries of one family are, and what a table of peers has to offer."""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeAlias

from msgspec import Struct

from flannel_dp._core import Recipe, Table
from flannel_dp.tables.entries import Scope

#: How a peer is reached: through the tunnel, or directly on the underlay.
TUNNEL, DIRECT = 0, 1

#: The kinds of entries that peers can have.
KINDS = frozenset({"peer", "fdb", "neighbour", "nexthop", "route"})

#: The tag of an entry that belongs to no single peer.
NO_PEER = 0xFFFFFFFE

PathColumn: TypeAlias = bytes | bytearray | None
"""A byte for each peer, TUNNEL or DIRECT; None where all are reached the same way."""


class DesiredTable(Struct, frozen=True):
    """One table as it should be, and the part of the kernel's that it is the whole of.

    ``shared`` tables have no entry for a single peer.
    """

    table: Table
    scopes: tuple[Scope, ...]
    shared: bool = False


class Placement(Struct, frozen=True):
    """Where one family's entries are.

    ``device`` is the vxlan device's ifindex (0 where there is none; with ``is_made`` False it has
    yet to be made), ``uplink`` the external interface's (0: unknown), ``network`` the pod network,
    ``leftovers`` other devices that entries of ours may be left on. ``nexthops`` says whether
    routes use nexthop objects, ``kinds`` which kinds of entries the kernel has for the family.
    ``take_boot`` counts flanneld's routes on the uplink as ours to remove. ``map`` is the map (its
    descriptor) of the program that forwards, 0 where there is none (yet).
    """

    device: int
    uplink: int
    network: str
    nexthops: bool = True
    kinds: frozenset[str] = KINDS
    leftovers: tuple[int, ...] = ()
    take_boot: bool = False
    map: int = 0
    is_made: bool = True


class PeerTable(Protocol):
    """One table with an entry for each peer that it is for, tagged with the peer's number."""

    kind: ClassVar[str]

    def recipe(self, place: Placement, family: int) -> Recipe:
        """Return what makes the entry of a peer of family 4 or 6."""
        ...

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        """Return the part of the kernel's table that these entries are the whole of."""
        ...
