"""Nexthop objects of IPv4 peers: the gateway that a peer's route uses.

``ip nexthop replace id ID via 10.244.7.0 dev flannel.1 onlink proto 138``. IPv4 gateway routes of
one device share a single hash bucket in the kernel (fib_info_hashfn_1 in
net/ipv4/fib_semantics.c leaves the gateway out), so that installing N of them costs N squared;
routes that use an object do not. A peer keeps its object's id whatever its path: one replacement
points it elsewhere.
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct

from flannel_dp._core import Recipe, parse_prefix
from flannel_dp.resources.peers.place import Placement
from flannel_dp.tables.entries import PROTOCOL, Scope
from flannel_dp.tables.scopes import nexthop_scope

#: An object's id is this plus the low 28 bits of the peer's subnet, so that a new process finds
#: the objects of the old one: 10.244.7.0 is 0x5af40700.
NEXTHOP_BASE = 0x50000000
_LOW_BITS = 0x0FFFFFFF

#: All ids that can be ours, whatever the network.
EVERY_ID = (NEXTHOP_BASE, NEXTHOP_BASE + _LOW_BITS)


class NexthopTable(Struct, frozen=True):
    """An object for each peer: on our device (``tunnel``), on the uplink (``direct``), or none.

    A layout with neither wants the table empty, so that what another layout left is removed.
    With ``has_device`` all objects on our device are this table's.
    """

    kind: ClassVar[str] = "nexthop"

    tunnel: bool = False
    direct: bool = False
    has_device: bool = True

    def recipe(self, place: Placement, family: int) -> Recipe:
        return Recipe(
            self.kind,
            family,
            tunnel=place.device if self.tunnel else None,
            direct=place.uplink if self.direct else None,
            protocol=PROTOCOL,
            base=NEXTHOP_BASE,
        )

    def scopes(self, place: Placement, family: int) -> tuple[Scope, ...]:
        """Return our objects: our protocol, an id from our range, on a device concerned."""
        ids = nexthop_ids(place.network)
        scopes = []
        if self.has_device:
            # The device is ours alone: an id from another network's range is a leftover.
            scopes.append(nexthop_scope(place.device, ids=EVERY_ID))
        others = (place.uplink, *place.leftovers)
        scopes += [nexthop_scope(device, ids=ids) for device in others if device]
        return tuple(scopes)


def nexthop_ids(network: str) -> tuple[int, int]:
    """Return the range of ids that subnets of an IPv4 network can have."""
    _, raw, length = parse_prefix(network)
    first = int.from_bytes(raw, "big") & _LOW_BITS
    last = first | ((1 << (32 - length)) - 1 & _LOW_BITS)
    return NEXTHOP_BASE + first, NEXTHOP_BASE + last


def address_of(id: int, network: str) -> bytes:
    """Return the first address of the subnet that an object of ``network`` is for."""
    _, raw, _ = parse_prefix(network)
    high = int.from_bytes(raw, "big") & ~_LOW_BITS
    return (high | (id & _LOW_BITS)).to_bytes(4, "big")
