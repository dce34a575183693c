"""Which claims are believed, and a reason for each that is not.

flannel trusts every lease it reads. Here a claim has to be a sane peer's: its
subnet inside Network and nobody else's, its endpoint a host of the underlay,
its MAC a unicast one of its own. No set of accepted claims ever routes an
address of the underlay, of this node or of a tunnel's far end into the
overlay.

Claims that cannot stand together are decided by (create revision, name,
endpoint, MAC), the lower one wins: every node comes to the same winner in
whatever order it reads them. One whose node has not written it since another claim
with its MAC was made comes after all others. The rules themselves are in csrc/claim.c; a lease
of both families is judged for each family alone, so that one bad half leaves
the other standing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any

from msgspec import Struct

from flannel_dp import _core
from flannel_dp.cluster.lease import BadClaim, Lease, printable
from flannel_dp.errors import SourceError


class Reason(StrEnum):
    """Why a claim was refused. The order is that of ``enum fdp_reason`` in csrc/claim.h."""

    ACCEPTED = "accepted"
    BAD_CLAIM = "bad-claim"
    BAD_SUBNET = "bad-subnet"
    BAD_PUBLIC_IP = "bad-public-ip"
    BAD_MAC = "bad-mac"
    WRONG_BACKEND = "wrong-backend"
    WRONG_VNI = "wrong-vni"
    OUTSIDE_NETWORK = "outside-network"
    OWN_SUBNET = "own-subnet"
    OWN_PUBLIC_IP = "own-public-ip"
    OWN_MAC = "own-mac"
    UNDERLAY = "underlay"
    ENDPOINT_IN_OVERLAY = "endpoint-in-overlay"
    OVERLAP = "overlap"
    DUPLICATE_MAC = "duplicate-mac"
    BAD_KEY = "bad-key"


_BY_NUMBER = tuple(Reason)

_TEXTS = {
    Reason.BAD_CLAIM: "it has no subnet",
    Reason.BAD_SUBNET: "its subnet is not a prefix",
    Reason.BAD_PUBLIC_IP: "{endpoint} is no address a host can have on the underlay",
    Reason.BAD_MAC: "VtepMAC {mac} is not a unicast MAC address",
    Reason.WRONG_BACKEND: "it was published by another backend",
    Reason.WRONG_VNI: "it belongs to an overlay with another VNI",
    Reason.OUTSIDE_NETWORK: "{subnet} is not inside the network {network}",
    Reason.OWN_SUBNET: "{subnet} overlaps {own_subnet}, the subnet of this node",
    Reason.OWN_PUBLIC_IP: "{endpoint} is an address of this node, {own}",
    Reason.OWN_MAC: "VtepMAC {mac} is that of this node",
    Reason.UNDERLAY: "{subnet} holds addresses of this node or of its underlay",
    Reason.ENDPOINT_IN_OVERLAY: "its public address {endpoint} is inside the network {network}",
    Reason.OVERLAP: "{subnet} overlaps {rival}, which comes first",
    Reason.DUPLICATE_MAC: "VtepMAC {mac} is also that of {rival}, which comes first",
}


class Rejection(Struct, frozen=True):
    """A claim that was not believed: ``lease`` names it, ``family`` is 4, 6 or 0 (both)."""

    lease: str
    family: int
    reason: Reason
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {
            "lease": self.lease,
            "family": self.family,
            "reason": str(self.reason),
            "detail": self.detail,
        }


class Node(Struct, frozen=True):
    """What this node knows of itself, for one family.

    ``addresses`` are its own, on any device but the overlay's; ``underlay``
    are prefixes it reaches without the overlay (the external interface's, the
    gateway). ``subnet`` and ``mac`` are its own in the overlay, "" while they
    are not known; ``said_by`` names what says so.
    """

    family: int
    network: str
    public_ip: str
    addresses: tuple[str, ...] = ()
    underlay: tuple[str, ...] = ()
    subnet: str = ""
    mac: str = ""
    said_by: str = ""

    @property
    def described(self) -> str:
        """For people: "which is 10.244.3.0/24 by subnet.env"."""
        return f"which is {self.subnet}" + (f" by {self.said_by}" if self.said_by else "")


class OwnLease(Struct, frozen=True):
    """The own lease: ``subnet`` ("10.244.3.0/24"), and ``mac``, "" when it has none."""

    name: str
    subnet: str
    mac: str


class Rejections(Sequence[Rejection]):
    """Refused claims of one family; the texts are made when somebody looks."""

    def __init__(self, node: Node, accepted: _core.Claims, rejected: _core.Claims) -> None:
        self._node = node
        self._accepted = accepted
        self.claims = rejected

    def __len__(self) -> int:
        return len(self.claims)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        claims = self.claims
        reason = _BY_NUMBER[claims.reason(number)]
        detail = claims.detail(number) or _TEXTS[reason].format(
            subnet=claims.subnet(number),
            endpoint=claims.endpoint(number),
            mac=claims.mac(number),
            network=self._node.network,
            own_subnet=self._node.subnet,
            own=self._node.described,
            rival=self._rival(number),
        )
        return Rejection(printable(claims.name(number)), self._node.family, reason, detail)

    def _rival(self, number: int) -> str:
        rival = self.claims.rival(number)
        if not 0 <= rival < len(self._accepted):
            return "another lease"
        return f"{printable(self._accepted.name(rival))} at {self._accepted.endpoint(rival)}"

    def __iter__(self) -> Iterator[Rejection]:
        return (self[i] for i in range(len(self)))

    def reasons(self) -> dict[str, int]:
        """Return how many claims were refused for each reason."""
        numbers = Counter(self.claims.reason(i) for i in range(len(self)))
        return {str(_BY_NUMBER[number]): count for number, count in numbers.items()}


class Admission(Struct, frozen=True):
    """What became of all claims of one family: peers in ``accepted``, the rest refused."""

    node: Node
    own: OwnLease | None
    accepted: _core.Claims
    rejected: Rejections

    def all_claims(self) -> _core.Claims:
        """Return every claim but the own one, as if none had been judged."""
        claims = _core.Claims(self.node.family)
        for known in (self.accepted, self.rejected.claims):
            for number in range(len(known)):
                claims.take(known, number)
        claims.reopen()
        return claims


def pack(leases: Iterable[Lease], family: int, *, backend: str, vni: int) -> _core.Claims:
    """Return the leases' halves of one family, parsed and packed; text that cannot be is
    refused."""
    claims = _core.Claims(family)
    claims.extend(leases, backend, vni, backend == "vxlan")
    return claims


def fault(claims: _core.Claims, number: int, network: str) -> str:
    """Return why this node cannot use a lease as its own. It may lack a MAC (a stable one is made
    then); nothing else."""
    reason = _BY_NUMBER[claims.reason(number)]
    if reason is Reason.ACCEPTED:
        alone = _core.Claims(claims.family)
        alone.take(claims, number)
        _, refused = alone.admit(network, [], [], need_mac=False)
        if len(refused):
            reason = _BY_NUMBER[refused.reason(0)]
    if reason in (Reason.ACCEPTED, Reason.BAD_MAC):
        return ""
    return claims.detail(number) or _TEXTS[reason].format(
        subnet=claims.subnet(number),
        endpoint=claims.endpoint(number),
        mac=claims.mac(number),
        network=network,
        own_subnet="",
        own="",
        rival="",
    )


def judge(
    claims: _core.Claims, node: Node, *, own: OwnLease | None = None, need_mac: bool = True
) -> Admission:
    """Decide about packed claims. ``node.subnet`` and ``node.mac`` are this node's own.

    Raises SourceError when the node has neither a lease nor a subnet: then
    nothing says which part of the overlay is its own.
    """
    if not node.subnet:
        raise SourceError(
            f"no lease was published with {node.public_ip}, the public address of this node",
            hint="publish this node's lease, name its subnet (--subnet), "
            "or give the address it was published with (--public-ip, --public-ipv6)",
        )
    accepted, rejected = claims.admit(
        node.network,
        [node.public_ip, *(a for a in node.addresses if a != node.public_ip)],
        node.underlay,
        node.subnet,
        node.mac,
        need_mac,
    )
    return Admission(node, own, accepted, Rejections(node, accepted, rejected))


def form_rejections(
    bad: Sequence[BadClaim], leases: Sequence[Lease], orphans: Iterable[int]
) -> list[Rejection]:
    """Return claims whose very form is broken, and leases (their numbers) that claim no subnet."""
    refused = [Rejection(claim.name, 0, Reason(claim.reason), claim.detail) for claim in bad]
    refused += [
        Rejection(printable(leases[number].label), 0, Reason.BAD_CLAIM, _TEXTS[Reason.BAD_CLAIM])
        for number in orphans
    ]
    return refused
