"""Which claims are accepted. Why the others are not is put in words in ``rejections``, on demand.

flannel trusts every lease it reads. Here a claim has to be a sane peer's: its subnet inside Network
and no other lease's, its endpoint a host of the underlay, its MAC a unicast one of its own. No set
of accepted claims ever routes an address of this node, of a tunnel's far end or of a connected
network into the overlay, unless the whole pod network is a part of that one.

Claims that cannot stand together are decided by (length, create revision, name, endpoint, MAC), the
lower one wins, in whatever order they are read. A subnet of another length than ordinary ones
comes after those, so that a wide claim displaces none of them: SubnetLen in etcd, else that which
most leases have. One whose node has
not written it since another claim with its MAC was made comes after all others. The rules
themselves are in csrc/claim.c; a lease of both families is validated for each family alone, so that
one bad half leaves the other standing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp import _core
from flannel_dp.cluster.lease import BadClaim, Lease, printable
from flannel_dp.cluster.network import NetworkConfig, network_of
from flannel_dp.errors import LeaseRejected, NotYet, SourceError

if TYPE_CHECKING:
    from flannel_dp.cluster.rejections import Rejection


#: Two numbers of ``enum fdp_reason`` in csrc/claim.h; ``rejections.Reason`` names all.
_ACCEPTED, _BAD_MAC = 0, 4


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
    ``subnet_len`` is the length of an ordinary subnet where the configuration says it, else 0;
    ``ordinary`` is it then as the last list had it, 0 where it is to be found out.
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
    subnet_len: int = 0
    ordinary: int = 0

    @property
    def described(self) -> str:
        """For people: "which is 10.244.3.0/24 by subnet.env"."""
        return f"which is {self.subnet}" + (f" by {self.said_by}" if self.said_by else "")


class OwnLease(Struct, frozen=True):
    """This node's lease: ``subnet`` ("10.244.3.0/24"), and ``mac``, "" when it has none."""

    name: str
    subnet: str
    mac: str


class Rejections(Sequence["Rejection"]):
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
        from flannel_dp.cluster import rejections

        claims, node = self.claims, self._node
        met = _met(claims, number, node) if rejections.overrules(claims, number) else None
        return rejections.rejection(
            claims,
            number,
            pods=node.pods,
            network=node.network,
            own_subnet=node.subnet,
            own=node.described,
            rival=self._rival(number),
            met=(met.what, met.remedy) if met else None,
            on=node.no_hosts.get(claims.endpoint(number), "a connected network"),
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
        from flannel_dp.cluster.rejections import Reason

        numbers = Counter(self.claims.reason(i) for i in range(len(self)))
        names = tuple(Reason) if numbers else ()
        return {str(names[number]): count for number, count in numbers.items()}


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
    """Return the leases' halves of one family, parsed and packed; those whose text
    cannot be parsed are rejected. ``has_data``: leases of this ``backend`` carry a VNI and a
    MAC."""
    claims = _core.Claims(family)
    claims.extend(leases, backend, vni, has_data)
    return claims


def first_met(protected: Iterable[Protected], subnet: str) -> Protected | None:
    """Return the first of ``protected`` that a lease of ``subnet`` would overrule."""
    length = _core.parse_prefix(subnet)[2]
    for one in protected:
        if _core.prefixes_overlap(subnet, one.prefix) and not (
            one.route and length <= _core.parse_prefix(one.prefix)[2]
        ):
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
    begin, end = int(network.network_address), int(network.broadcast_address)
    if int(first) == begin + size and int(last) == end - (size - 1):
        return None
    return str(first), str(last + (size - 1))


def is_link_local(address: str) -> bool:
    """Return whether an IPv4 address is a link-local one (RFC 3927), which nodes may have only
    where all have one."""
    return address.startswith("169.254.")


def fault(
    claims: _core.Claims, number: int, network: str, pods: tuple[str, str] | None = None
) -> str:
    """Return why this node cannot use a lease as its own. It may lack a MAC (a stable one is made
    then); nothing else."""
    judged, place = claims, number
    if claims.reason(number) == _ACCEPTED:
        alone = _core.Claims(claims.family)
        alone.take(claims, number)
        _, judged = alone.admit(
            network,
            [],
            [],
            need_mac=False,
            pods=pods,
            link_local=is_link_local(claims.endpoint(number)),
        )
        if not len(judged):
            return ""
        place = 0
    if judged.reason(place) in (_ACCEPTED, _BAD_MAC):
        return ""
    from flannel_dp.cluster.rejections import detail

    return detail(judged, place, network=network, pods=pods)


def check_own_subnet(node: Node) -> None:
    """Raise LeaseRejected where this node's own subnet overlaps a network that is connected to it,
    and that is not its pods': the existing entries then stay as they are."""
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
    if not (node.subnet_len or node.ordinary):
        node = replace(node, ordinary=ordinary_length(claims, own))
    accepted, rejected = claims.admit_by(policy_of(node, need_mac=need_mac))
    return Admission(node, own, accepted, Rejections(node, accepted, rejected))


def policy_of(node: Node, *, need_mac: bool) -> _core.Policy:
    """Return what a node knows of itself as the compiled unit takes it."""
    return _core.Policy(
        node.family,
        node.network,
        [node.public_ip, *(a for a in node.addresses if a != node.public_ip)],
        [*node.underlay, *(one.prefix for one in node.protected if not one.route)],
        node.subnet,
        node.mac,
        need_mac,
        [one.prefix for one in node.protected if one.route],
        node.no_hosts,
        node.pods,
        node.subnet_len or node.ordinary,
        is_link_local(node.public_ip),
    )


def known_length(config: NetworkConfig, claims: _core.Claims, own: OwnLease | None) -> int:
    """Return the length of an ordinary subnet where the configuration says it: where leases go by
    their subnets, as in etcd, where each node takes one of SubnetLen. 0 where they go by the nodes'
    names: podCIDRs in Kubernetes have a length that flannel's configuration does not know."""
    if own is None and not len(claims):
        return 0
    name, subnet = (own.name, own.subnet) if own else (claims.name(0), claims.subnet(0))
    if subnet.replace("/", "-") not in name.split("&"):
        return 0
    return config.subnet_len if claims.family == 4 else config.ipv6_subnet_len


def ordinary_length(claims: _core.Claims, own: OwnLease | None = None) -> int:
    """Return the subnet length that most leases have, the longer one of two that are as many: the
    same on all nodes that have the same leases. ``own`` counts once, whether it is among the claims
    or not. 0 without any."""
    kept_apart = own is not None and claims.find_name(own.name) < 0
    extra = int(own.subnet.rpartition("/")[2]) if own and kept_apart else 0
    used = (claims.lengths_in_use() | {extra}) - {0}
    if len(used) <= 1:
        return next(iter(used), 0)
    lengths = bytes(claims.lengths)
    return max(used, key=lambda length: (lengths.count(length) + (length == extra), length))


def form_rejections(
    bad: Sequence[BadClaim], leases: Sequence[Lease], orphans: Sequence[int]
) -> list[Rejection]:
    """Return claims whose very form is broken, and leases (their numbers) that claim no subnet."""
    if not (bad or orphans):
        return []
    from flannel_dp.cluster.rejections import unreadable, without_subnet

    return [unreadable(one) for one in bad] + [without_subnet(leases[one]) for one in orphans]
