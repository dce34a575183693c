"""Which claims are accepted, and a reason for each that is not.

flannel trusts every lease it reads. Here a claim has to be a sane peer's: its subnet inside Network
and no other lease's, its endpoint a host of the underlay, its MAC a unicast one of its own. No set
of accepted claims ever routes an address of this node, of a tunnel's far end or of a connected
network into the overlay, unless the whole pod network is a part of that one.

Claims that cannot stand together are decided by (length, create revision, name, endpoint, MAC), the
lower one wins, in whatever order they are read. A subnet of another length than this node's comes
after those of the same length, so that a wide claim displaces no ordinary ones. One whose node has
not written it since another claim with its MAC was made comes after all others. The rules
themselves are in csrc/claim.c; a lease of both families is validated for each family alone, so that
one bad half leaves the other standing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any

from msgspec import Struct

from flannel_dp import _core
from flannel_dp.cluster.lease import BadClaim, Lease, printable
from flannel_dp.cluster.network import NetworkConfig, network_of
from flannel_dp.errors import LeaseRejected, NotYet, SourceError


class Reason(StrEnum):
    """Why a claim was rejected. The order is that of ``enum fdp_reason`` in csrc/claim.h."""

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
    BROADCAST = "broadcast"
    HOLDS_NODES = "holds-nodes"


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
    Reason.UNDERLAY: "{subnet} holds addresses of this node or of its underlay: {met}",
    Reason.ENDPOINT_IN_OVERLAY: "its public address {endpoint} is inside {pods}",
    Reason.OVERLAP: "{subnet} overlaps {rival}, which comes first",
    Reason.DUPLICATE_MAC: "VtepMAC {mac} is also that of {rival}, which comes first",
    Reason.BROADCAST: "{endpoint} is the broadcast or the network address of {on}, a network that "
    "this node is on, and no host's",
    Reason.HOLDS_NODES: "{subnet} holds public addresses of nodes, and is not inside {pods}",
}

_PUBLISH = (
    "publish the lease with the address that the node has on the underlay (flanneld: --iface)"
)

_REWRITE = "correct or remove what was published under this name"

_HINTS = {
    Reason.BAD_CLAIM: "publish it with one",
    Reason.BAD_SUBNET: "publish it like 10.244.3.0/24",
    Reason.BAD_PUBLIC_IP: _PUBLISH,
    Reason.BAD_MAC: "restart flannel there, which publishes the MAC of its vxlan device",
    Reason.WRONG_BACKEND: "give all nodes one Backend in the network configuration",
    Reason.WRONG_VNI: "give all nodes one VNI in the network configuration",
    Reason.OUTSIDE_NETWORK: "remove the lease, or correct Network in the network configuration",
    Reason.OWN_SUBNET: "remove the lease, or give one of the two nodes another subnet",
    Reason.OWN_PUBLIC_IP: "remove the lease if it is an old one of this node; else "
    "publish the other node's own address",
    Reason.OWN_MAC: "give the other node's vxlan device another MAC: remove it there and restart",
    Reason.ENDPOINT_IN_OVERLAY: "publish the node's address outside of it, or choose another "
    "Network, or SubnetMin and SubnetMax that leave out the nodes' addresses",
    Reason.OVERLAP: "remove the lease that is wrong, or give its node another subnet",
    Reason.DUPLICATE_MAC: "give one of the two another MAC: remove its vxlan device and restart",
    Reason.BROADCAST: _PUBLISH,
    Reason.HOLDS_NODES: "give the node a subnet between SubnetMin and SubnetMax",
}


class Rejection(Struct, frozen=True):
    """A claim that was not accepted: ``lease`` names it, ``family`` is 4, 6 or 0 (both)."""

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


class Protected(Struct, frozen=True):
    """A prefix that no lease may overrule: ``what`` it is for people, ``remedy`` what helps if a
    lease does. With ``route`` it is a route, which only a narrower subnet overrules; one for the
    very same prefix conflicts in the kernel."""

    prefix: str
    what: str
    remedy: str
    route: bool = False


class Node(Struct, frozen=True):
    """What this node knows of itself, for one family.

    ``addresses`` are its own, on any device but the overlay's; ``underlay`` are prefixes that it
    reaches without the overlay, ``protected`` are more of them with what they are, and
    ``no_hosts`` are addresses there that no host has, with their network. ``subnet`` and
    ``mac`` are its own in the overlay, "" while they are not known; ``said_by`` names what says
    so. ``pods`` is ``pod_range()``, ``given`` is set where the user, or joining the cluster, named
    the subnet, and ``around`` are connected networks that hold the whole pod network.
    """

    family: int
    network: str
    public_ip: str
    addresses: tuple[str, ...] = ()
    underlay: tuple[str, ...] = ()
    subnet: str = ""
    mac: str = ""
    said_by: str = ""
    protected: tuple[Protected, ...] = ()
    no_hosts: dict[str, str] = {}
    pods: tuple[str, str] | None = None
    given: bool = False
    around: tuple[Protected, ...] = ()

    @property
    def described(self) -> str:
        """For people: "which is 10.244.3.0/24 by subnet.env"."""
        return f"which is {self.subnet}" + (f" by {self.said_by}" if self.said_by else "")


class OwnLease(Struct, frozen=True):
    """This node's lease: ``subnet`` ("10.244.3.0/24"), and ``mac``, "" when it has none."""

    name: str
    subnet: str
    mac: str


class Rejections(Sequence[Rejection]):
    """Rejected claims of one family; the texts are made when they are read."""

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
        node, hint = self._node, _HINTS.get(reason, "")
        met = _met(claims, number, node) if reason is Reason.UNDERLAY else None
        detail = claims.detail(number) or _text(claims, number, reason, node.network).format(
            subnet=claims.subnet(number),
            endpoint=claims.endpoint(number),
            mac=claims.mac(number),
            network=node.network,
            pods=_pods(node.network, node.pods),
            own_subnet=node.subnet,
            own=node.described,
            rival=self._rival(number),
            met=met.what if met else "",
            on=node.no_hosts.get(claims.endpoint(number), "a connected network"),
        )
        return Rejection(
            printable(claims.name(number)),
            node.family,
            reason,
            f"{detail} - {met.remedy if met else hint}",
        )

    def _rival(self, number: int) -> str:
        rival = self.claims.rival(number)
        if not 0 <= rival < len(self._accepted):
            return "another lease"
        return f"{printable(self._accepted.name(rival))} at {self._accepted.endpoint(rival)}"

    def __iter__(self) -> Iterator[Rejection]:
        return (self[i] for i in range(len(self)))

    def reasons(self) -> dict[str, int]:
        """Return how many claims were rejected for each reason."""
        numbers = Counter(self.claims.reason(i) for i in range(len(self)))
        return {str(_BY_NUMBER[number]): count for number, count in numbers.items()}


class Admission(Struct, frozen=True):
    """What became of all claims of one family: peers in ``accepted``, the rest rejected."""

    node: Node
    own: OwnLease | None
    accepted: _core.Claims
    rejected: Rejections

    def all_claims(self) -> _core.Claims:
        """Return every claim but this node's, as if none had been validated."""
        claims = _core.Claims(self.node.family)
        for known in (self.accepted, self.rejected.claims):
            for number in range(len(known)):
                claims.take(known, number)
        claims.reopen()
        return claims


def pack(
    leases: Iterable[Lease], family: int, *, backend: str, vni: int, has_data: bool = True
) -> _core.Claims:
    """Return the leases' halves of one family, parsed and packed; text that cannot be is
    refused. ``has_data``: leases of this ``backend`` carry a VNI and a MAC."""
    claims = _core.Claims(family)
    claims.extend(leases, backend, vni, has_data)
    return claims


def first_met(protected: Iterable[Protected], subnet: str) -> Protected | None:
    """Return the first of ``protected`` that a lease of ``subnet`` would overrule."""
    from ipaddress import ip_network

    net: Any = ip_network(subnet)
    for one in protected:
        theirs = ip_network(one.prefix)
        if net.overlaps(theirs) and not (one.route and net.prefixlen <= theirs.prefixlen):
            return one
    return None


def _met(claims: _core.Claims, number: int, node: Node) -> Protected:
    """Return what a claim would overrule."""
    from ipaddress import ip_network

    met = first_met(node.protected, claims.subnet(number))
    if met is not None:
        return met
    net: Any = ip_network(claims.subnet(number))
    inside = [a for a in (node.public_ip, *node.addresses) if ip_network(a).subnet_of(net)]
    what = f"{', '.join(inside)} of this node"
    return Protected(str(net), what, "correct the lease, or choose another Network")


def pod_range(config: NetworkConfig, family: int) -> tuple[str, str] | None:
    """Return the first and the last address from SubnetMin to SubnetMax, where the configuration
    narrows them down; None where the whole network is pods'.

    With flannel's own example (Network 10.0.0.0/8, SubnetMin 10.10.0.0, SubnetMax 10.99.0.0) nodes
    have addresses in the rest of the network.
    """
    network: Any = config.network if family == 4 else config.ipv6_network
    length = config.subnet_len if family == 4 else config.ipv6_subnet_len
    first: Any = config.subnet_min if family == 4 else config.ipv6_subnet_min
    last: Any = config.subnet_max if family == 4 else config.ipv6_subnet_max
    size = 1 << (network.max_prefixlen - length)
    if first == network[0] + size and last == network[-1] - (size - 1):
        return None
    return str(first), str(last + (size - 1))


def _pods(network: str, pods: tuple[str, str] | None) -> str:
    return f"the pods' addresses {pods[0]} to {pods[1]}" if pods else f"the network {network}"


def is_link_local(address: str) -> bool:
    """Return whether an IPv4 address is a link-local one (RFC 3927), which nodes may have only
    where all have one."""
    return address.startswith("169.254.")


def _text(claims: _core.Claims, number: int, reason: Reason, network: str) -> str:
    if reason is Reason.OUTSIDE_NETWORK and claims.subnet(number) == network:
        return "{subnet} is the whole network, of which a node has a smaller part"
    return _TEXTS[reason]


def fault(
    claims: _core.Claims, number: int, network: str, pods: tuple[str, str] | None = None
) -> str:
    """Return why this node cannot use a lease as its own. It may lack a MAC (a stable one is made
    then); nothing else."""
    reason = _BY_NUMBER[claims.reason(number)]
    if reason is Reason.ACCEPTED:
        alone = _core.Claims(claims.family)
        alone.take(claims, number)
        _, refused = alone.admit(
            network,
            [],
            [],
            need_mac=False,
            pods=pods,
            link_local=is_link_local(claims.endpoint(number)),
        )
        if len(refused):
            reason = _BY_NUMBER[refused.reason(0)]
    if reason in (Reason.ACCEPTED, Reason.BAD_MAC):
        return ""
    return claims.detail(number) or _text(claims, number, reason, network).format(
        subnet=claims.subnet(number),
        endpoint=claims.endpoint(number),
        mac=claims.mac(number),
        network=network,
        pods=_pods(network, pods),
        own_subnet="",
        own="",
        rival="",
        met="",
        on="",
    )


def check_own_subnet(node: Node) -> None:
    """Raise LeaseRejected where this node's own subnet overlaps a network that is connected to it,
    and that is not its pods': then what is there stays as it is."""
    networks = [one for one in node.protected if not one.route]
    met = first_met(networks, node.subnet) if node.subnet else None
    if met is not None:
        raise LeaseRejected(
            f"the subnet of this node, {node.described}, overlaps {met.what}",
            reason="own-lease",
            hint=met.remedy,
        )


def check_public(config: NetworkConfig, family: int, address: str) -> None:
    """Raise NotYet where other nodes would reject a lease with this public address.

    A configuration, and an address, may be corrected while a node waits.
    """
    first = config.subnet_min if family == 4 else config.ipv6_subnet_min
    length = config.subnet_len if family == 4 else config.ipv6_subnet_len
    subnet = f"{first}/{length}"
    lease = (
        Lease(subnet=subnet, public_ip=address, backend_type=config.backend.type)
        if family == 4
        else Lease(ipv6_subnet=subnet, public_ipv6=address, backend_type=config.backend.type)
    )
    claims = _core.Claims(family)
    claims.extend([lease], config.backend.type, config.backend.vni, False)
    why = fault(claims, 0, network_of(config, family), pod_range(config, family))
    if why:
        raise NotYet(
            f"this node cannot be published with {address}: {why}",
            hint="choose another Network, or SubnetMin and SubnetMax that leave out the nodes' "
            "addresses, or name another address with --iface, --public-ip or --public-ipv6",
        )


def validate(
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
    if not len(claims):  # a change that only removes
        none = _core.Claims(claims.family)
        return Admission(node, own, none, Rejections(node, none, _core.Claims(claims.family)))
    accepted, rejected = claims.admit(
        node.network,
        [node.public_ip, *(a for a in node.addresses if a != node.public_ip)],
        [*node.underlay, *(one.prefix for one in node.protected if not one.route)],
        node.subnet,
        node.mac,
        need_mac,
        routes=[one.prefix for one in node.protected if one.route],
        no_hosts=node.no_hosts,
        pods=node.pods,
        subnet_length=int(node.subnet.rpartition("/")[2]),
        link_local=is_link_local(node.public_ip),
    )
    return Admission(node, own, accepted, Rejections(node, accepted, rejected))


def form_rejections(
    bad: Sequence[BadClaim], leases: Sequence[Lease], orphans: Iterable[int]
) -> list[Rejection]:
    """Return claims whose very form is broken, and leases (their numbers) that claim no subnet."""
    refused = [
        Rejection(claim.name, 0, Reason(claim.reason), f"{claim.detail} - {_REWRITE}")
        for claim in bad
    ]
    refused += [
        Rejection(
            printable(leases[number].label),
            0,
            Reason.BAD_CLAIM,
            f"{_TEXTS[Reason.BAD_CLAIM]} - {_HINTS[Reason.BAD_CLAIM]}",
        )
        for number in orphans
    ]
    return refused
