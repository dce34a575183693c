"""Why a claim was rejected, in words: the reason, its detail and the remedy.

Loaded when something was rejected; the decisions are made in ``admission`` and csrc/claim.c.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from flannel_dp.cluster.lease import BadClaim, Lease, printable

if TYPE_CHECKING:
    from flannel_dp._core import Claims


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


def rejection(
    claims: Claims, number: int, *, met: tuple[str, str] | None = None, **facts: Any
) -> Rejection:
    """Return the rejected claim ``number`` in words.

    ``met`` is what the claim would overrule and what helps (see ``overrules``); ``facts`` are
    those of ``detail``.
    """
    reason = _BY_NUMBER[claims.reason(number)]
    said = detail(claims, number, met=met[0] if met else "", **facts)
    return Rejection(
        printable(claims.name(number)),
        claims.family,
        reason,
        f"{said} - {met[1] if met else _HINTS.get(reason, '')}",
    )


def overrules(claims: Claims, number: int) -> bool:
    """Return whether a claim was rejected because it holds addresses that are not pods'."""
    return _BY_NUMBER[claims.reason(number)] is Reason.UNDERLAY


def detail(
    claims: Claims,
    number: int,
    *,
    network: str,
    pods: tuple[str, str] | None = None,
    own_subnet: str = "",
    own: str = "",
    rival: str = "",
    met: str = "",
    on: str = "",
) -> str:
    """Return why a claim was rejected, as a sentence without the remedy."""
    reason = _BY_NUMBER[claims.reason(number)]
    return claims.detail(number) or _text(claims, number, reason, network).format(
        subnet=claims.subnet(number),
        endpoint=claims.endpoint(number),
        mac=claims.mac(number),
        network=network,
        pods=_pods(network, pods),
        own_subnet=own_subnet,
        own=own,
        rival=rival,
        met=met,
        on=on,
    )


def unreadable(claim: BadClaim) -> Rejection:
    """Return the rejection of a claim whose form is broken."""
    return Rejection(claim.name, 0, Reason(claim.reason), f"{claim.detail} - {_REWRITE}")


def without_subnet(lease: Lease) -> Rejection:
    """Return the rejection of a lease that claims no subnet."""
    text = f"{_TEXTS[Reason.BAD_CLAIM]} - {_HINTS[Reason.BAD_CLAIM]}"
    return Rejection(printable(lease.label), 0, Reason.BAD_CLAIM, text)


def _pods(network: str, pods: tuple[str, str] | None) -> str:
    return f"the pods' addresses {pods[0]} to {pods[1]}" if pods else f"the network {network}"


def _text(claims: Claims, number: int, reason: Reason, network: str) -> str:
    if reason is Reason.OUTSIDE_NETWORK and claims.subnet(number) == network:
        return "{subnet} is the whole network, of which a node has a smaller part"
    return _TEXTS[reason]
