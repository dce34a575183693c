"""What is asked about the path of one family's packets."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from flannel_dp._core import Claims
from flannel_dp.cluster.admission import Protected


class Place(Struct, frozen=True):
    """What is asked about one family.

    ``device`` is the ifindex of our device, 0 without one, and ``length`` the prefix length of our
    shortest route. ``addresses`` are this node's own, None where they have to be read. ``claims``
    are the peers' leases, accepted or not. ``network`` and ``subnet``, "" while not known, are
    among those of all families, ``networks`` and ``subnets``. ``local`` is the address that
    packets of the tunnel leave from, ``uplink`` the external interface's ifindex. ``routes`` are
    static routes of table main inside ``network``.
    """

    number: int
    networks: Mapping[int, str]
    subnets: Mapping[int, str]
    length: int
    uplink: int = 0
    local: str = ""
    addresses: tuple[str, ...] | None = None
    claims: tuple[Claims, ...] = ()
    routes: tuple[Protected, ...] = ()
    device: int = 0
    device_name: str = ""

    @property
    def network(self) -> str:
        return self.networks[self.number]

    @property
    def subnet(self) -> str:
        return self.subnets.get(self.number, "")
