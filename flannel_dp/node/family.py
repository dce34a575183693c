"""The facts of one family on this node, and the view that a pass is about. Both are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from msgspec import Struct, field

from flannel_dp._core import Claims, Table
from flannel_dp.cluster.admission import Admission
from flannel_dp.cluster.lease import Lease
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import NeighbourUse
from flannel_dp.later import Later
from flannel_dp.node.choice import is_address
from flannel_dp.node.interface import InUse

if TYPE_CHECKING:
    from flannel_dp.cluster import rejections as rejecting
else:
    rejecting = Later("flannel_dp.cluster.rejections")

Purpose = Literal["plan", "sync", "resync"]
"""``plan``: nothing will be written, and what would only fail later is told now. ``resync``: the
leases were synced before, so that the kernel's entries are compared entry by entry."""


class Family(Struct, frozen=True):
    """What is known of one family: its leases as they were accepted, and where it is.

    ``uplink`` is the external interface's ifindex, ``iface`` its name and ``uplink_mtu`` the MTU of
    the paths to the peers: the interface's, or less by the route ``mtu_said_by``.
    ``local`` is the underlay address that tunnel packets leave from and ``mac`` the MAC of the
    vxlan device; both are "" in host-gw, which has no device. ``leftovers`` are the ifindexes of
    devices of another layout that entries may be left on. ``kept`` are entries, in tables of one
    kind each, of peers without a lease that stay as they are, by the name of the peer.
    """

    admission: Admission
    uplink: int
    iface: str
    uplink_mtu: int
    local: str = ""
    mac: str = ""
    leftovers: tuple[int, ...] = ()
    kept: Mapping[str, tuple[Table, ...]] = {}
    mtu_said_by: str = ""

    @property
    def number(self) -> int:
        """4 or 6."""
        return self.admission.node.family

    @property
    def peers(self) -> Claims:
        """The accepted leases of the other nodes."""
        return self.admission.accepted


class View(Struct, frozen=True):
    """What one pass is about: each family that can be synced, and why the others cannot.

    ``refused`` are leases of broken form, ``warnings`` what else about this node a person should
    know, ``neighbours`` how full the kernel's neighbour table is.
    """

    families: list[Family]
    refused: list[rejecting.Rejection]
    errors: Mapping[int, FlannelDPError]
    warnings: tuple[str, ...] = ()
    neighbours: dict[int, NeighbourUse | None] = field(default_factory=dict)
    purpose: Purpose = "sync"

    def family(self, number: int) -> Family | None:
        """Return the facts of family 4 or 6; None where it cannot be synced."""
        return next((one for one in self.families if one.number == number), None)

    def rejections(self) -> list[rejecting.Rejection]:
        """Return all rejected leases."""
        found = list(self.refused)
        for family in self.families:
            found.extend(family.admission.rejected)
        return found


def kept_by(known: Iterable[Family]) -> tuple[InUse, ...]:
    """Return what families that were synced work with."""
    return tuple(
        InUse(
            family.number,
            family.uplink,
            family.local or family.admission.node.public_ip,
        )
        for family in known
    )


def peers_of(known: Iterable[Family]) -> Callable[[int], Iterable[str]]:
    """Return what yields the public addresses of the peers of one of these families."""
    peers = {family.number: family.peers for family in known}
    return lambda number: (
        peers[n].endpoint(i) for n in peers if n == number for i in range(len(peers[n]))
    )


def addresses_in(leases: list[Lease]) -> Callable[[int], Iterable[str]]:
    """Return what yields the public addresses of a family in a list."""

    def find(number: int) -> Iterable[str]:
        texts = (one.public_ip if number == 4 else one.public_ipv6 for one in leases)
        return (text for text in texts if is_address(text, number))

    return find
