"""How each peer is reached: through the tunnel, or directly on the underlay.

In some layouts all peers are reached the same way, in others each has its own path. A layout names
the class for it (:mod:`flannel_dp.resources.peers.layouts`), and no caller has to know which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

from msgspec import Struct

from flannel_dp._core import Claims, Pages
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.tables import Kernel
from flannel_dp.node.family import Family
from flannel_dp.resources.peers.place import DIRECT, TUNNEL
from flannel_dp.tables.entries import Route, Scope
from flannel_dp.tables.scopes import address_family

#: No daemon has this protocol number: in a scope with it, everything is foreign.
_NO_PROTOCOL = 255


def whole_main_table(family: int) -> Scope:
    """Return the main table with every route counted as foreign; a conflict is one that blocks
    ours."""
    return Scope("route", address_family(family), protocol=_NO_PROTOCOL)


class SamePath:
    """All peers are reached the same way: no peer has anything that could change."""

    column: ClassVar[bytearray | None] = None
    apart = False
    ways = b""
    direct = 0

    @classmethod
    def decide(cls, kernel: Kernel, family: Family, whole: Pages | None = None) -> SamePath:
        return SAME

    @classmethod
    def ask(cls, host: Host, peers: Claims, uplink: int) -> SamePath:
        return SAME

    @classmethod
    def direct_if(cls, asked: Callable[[], bool]) -> bool:
        return False

    @classmethod
    def rule(cls, kernel: Kernel, family: Family, others: str) -> str:
        return ""

    def tunnelled(self) -> Sequence[int]:
        return ()


class PathOfEach(Struct):
    """Each peer has its path, a byte in ``column``: TUNNEL or DIRECT."""

    column: bytearray
    apart: ClassVar[bool] = True

    @classmethod
    def decide(cls, kernel: Kernel, family: Family, whole: Pages | None = None) -> PathOfEach:
        """Decide for all peers of a family, from one reading of the main routing table.

        Direct when the longest prefix that holds its public address leads out of the external
        interface without a gateway. flannel asks the kernel for each peer (ip.DirectRouting),
        and does not look at the interface. ``whole`` is that table where it was read already.
        """
        underlay = kernel.read("route", whole_main_table(family.number), whole=whole)
        return cls(family.peers.ways(underlay, family.uplink))

    @classmethod
    def ask(cls, host: Host, peers: Claims, uplink: int) -> PathOfEach:
        """Return the same for so few peers that the kernel is asked for each."""
        column = bytearray(len(peers))
        with host.links() as reader:
            for number in range(len(peers)):
                answer = reader.route_to(peers.endpoint(number))
                direct = answer and answer.gateway is None and answer.oif == uplink
                column[number] = DIRECT if direct else TUNNEL
        return cls(column)

    @classmethod
    def direct_if(cls, asked: Callable[[], bool]) -> bool:
        """Return whether one peer is reached directly, by asking."""
        return asked()

    @classmethod
    def rule(cls, kernel: Kernel, family: Family, others: str) -> str:
        """Return which peers take which path, in words, with the networks that are on-link now;
        ``others`` says how the other peers are reached."""
        here = whole_main_table(family.number)._replace(device=family.uplink)
        networks = [
            route.prefix
            for route in kernel.read("route", here)
            if isinstance(route, Route)
            and route.is_plain
            and not (route.gateway or route.nexthop or route.prefix.startswith("fe80:"))
        ]
        return (
            f"public addresses on-link on {family.iface} ({', '.join(networks) or 'none'}) are "
            f"reached directly, the others {others}"
        )

    @property
    def ways(self) -> bytes:
        """The path of each peer; nothing where all have the same."""
        return bytes(self.column)

    @property
    def direct(self) -> int:
        """How many peers are reached directly."""
        return sum(self.column)

    def tunnelled(self) -> Sequence[int]:
        """Return the numbers of the peers that are not reached directly."""
        if TUNNEL not in self.column:
            return ()
        return [number for number, path in enumerate(self.column) if path == TUNNEL]


Paths: TypeAlias = SamePath | PathOfEach

SAME = SamePath()
