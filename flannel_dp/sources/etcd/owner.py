"""Which lease in etcd is this node's: by evidence, the strongest first.

flannel's pkg/subnet/etcd takes the lease that has the node's public address, and nothing
else. A node whose address has changed does not find its lease by that, and of two
nodes that swapped their addresses each takes the other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from ipaddress import ip_address
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp.cluster.claims import lease_of_key_value
from flannel_dp.cluster.lease import Identity, Lease
from flannel_dp.sources.etcd.choice import subnets_of
from flannel_dp.sources.notes import read_note, write_note

#: What a lease says of a family that its node has no address of.
_NO_ADDRESS = ("", "0.0.0.0")


class OwnerEvidence(IntEnum):
    """What says that a lease is this node's; the greatest one decides.

    ``ADDRESS`` is flannel's rule: the lease has the public address of this node. ``MAC``: it has
    the MAC of this node's device. ``DEVICE``: it has that MAC, and the public address or the
    subnet that this node had. ``HELD``: the etcd lease that this node itself attached to the key
    still is attached, which ends when any other node writes the key.
    """

    NONE = 0
    ADDRESS = 1
    MAC = 2
    DEVICE = 3
    HELD = 4


class AttachedLease(Struct, frozen=True):
    """The key's last part and the id of the etcd lease that this node attached to it."""

    name: str = ""
    lease: int = 0


def evidence(
    kv: Any, identity: Identity, previous: Mapping[int, str], held: AttachedLease
) -> OwnerEvidence:
    """Return the evidence that the key ``kv`` (mvccpb.KeyValue) is the lease of this node.

    ``previous`` are the subnets that this node had, by family.
    """
    name = last_part(kv.key)
    if kv.lease and (name, kv.lease) == (held.name, held.lease):
        return OwnerEvidence.HELD
    if not _may_be_of(kv.value, identity):  # quickly, as there are many
        return OwnerEvidence.NONE
    claim = lease_of_key_value(name, kv.value, kv.create_revision)
    if not isinstance(claim, Lease):
        return OwnerEvidence.NONE
    address = _has_address(claim, identity)
    if not _has_mac(claim, identity):
        return OwnerEvidence.ADDRESS if address else OwnerEvidence.NONE
    same = bool(previous) and subnets_of(name) == dict(previous)
    return OwnerEvidence.DEVICE if address or same else OwnerEvidence.MAC


def is_published_by(kv: Any, identity: Identity) -> bool:
    """Return whether the node of this public address published the key."""
    claim = lease_of_key_value(last_part(kv.key), kv.value, kv.create_revision)
    return isinstance(claim, Lease) and _has_address(claim, identity)


def with_former(identity: Identity, kv: Any, subnets: Mapping[int, str]) -> Identity:
    """Return the identity, completed by what this node's own key says of a family that the node has
    no address of yet: at boot the two come one after the other, and peers keep what they know."""
    claim = lease_of_key_value(last_part(kv.key), kv.value, kv.create_revision)
    if not isinstance(claim, Lease) or claim.backend_type != identity.backend:
        return identity
    public, macs = dict(identity.public), dict(identity.macs)
    for family, address, data in (
        (4, claim.public_ip, claim.backend_data),
        (6, claim.public_ipv6, claim.backend_v6_data),
    ):
        if family in public or family not in subnets or address in _NO_ADDRESS:
            continue
        if identity.macs:
            if data is None or data.vni not in (identity.vni, identity.vni & 0xFFFF):
                continue
            macs[family] = data.vtep_mac
        public[family] = address
    return replace(identity, public=public, macs=macs)


def _may_be_of(value: bytes, identity: Identity) -> bool:
    """Return whether a text of ours occurs in the value at all; an IPv6 address has several
    texts."""
    if 4 not in identity.public or b'"0.0.0.0"' in value:
        return True
    lowered = value.lower()
    texts = (identity.public[4], *identity.macs.values())
    return any(text.encode() in lowered for text in texts)


def _has_address(claim: Lease, identity: Identity) -> bool:
    """Return the IPv4 address decides, where both have one, as in flannel."""
    family = 4 if 4 in identity.public and claim.public_ip not in _NO_ADDRESS else 6
    text = claim.public_ip if family == 4 else claim.public_ipv6
    try:
        return ip_address(text) == ip_address(identity.public.get(family, ""))
    except ValueError:
        return False


def _has_mac(claim: Lease, identity: Identity) -> bool:
    data = {4: claim.backend_data, 6: claim.backend_v6_data}
    return any(
        found.vtep_mac.lower() == mac.lower()
        for family, mac in identity.macs.items()
        if mac and (found := data[family]) is not None
    )


def last_part(key: bytes) -> str:
    """Return the last part of a key, which names the subnets."""
    return key.rpartition(b"/")[2].decode("utf-8", "replace")


class Note:
    """Keep an AttachedLease in a file for the next process of this node; "" keeps nothing.

    A file that is missing or cannot be read is no evidence: a lease is recognised by the other
    evidence then.
    """

    def __init__(self, path: str = "") -> None:
        self._path = path

    def read(self) -> AttachedLease:
        return read_note(self._path, AttachedLease) or AttachedLease()

    def write(self, held: AttachedLease) -> None:
        write_note(self._path, held)
