"""Whether a change of leases says something new of this node, which takes a sync."""

from __future__ import annotations

from collections.abc import Iterable

from flannel_dp._core import Claims, parse_address
from flannel_dp.cluster import admission
from flannel_dp.cluster.admission import Admission
from flannel_dp.cluster.lease import Lease
from flannel_dp.errors import SourceError
from flannel_dp.node.family import Family


def check_own_lease(family: Family, packed: Claims, removed: Iterable[Lease | str]) -> None:
    """Raise SourceError where the change says something new of this node: who it is decides about
    everything else, and takes all leases (:mod:`flannel_dp.node.identity`)."""
    admitted = family.admission
    same = _check_added(admitted, packed) if len(packed) else set[int]()
    if admitted.own and not same and any(_is_own(admitted, one) for one in removed):
        raise SourceError(
            f"the lease of this node, {admitted.own.name}, was removed",
            hint="call sync() with all leases",
        )


def _check_added(admitted: Admission, packed: Claims) -> set[int]:
    """Raise it for the leases that are new or changed; return the numbers of this node's own."""
    node, same = admitted.node, mark_own(packed, admitted)
    about = {packed.find_subnet(node.subnet): None}
    # Its addresses are thousands where services are on a device.
    endpoints = {packed.endpoint(number) for number in range(len(packed))}
    if node.public_ip in endpoints or not endpoints.isdisjoint(node.addresses):
        here = {node.public_ip, *node.addresses}
        about |= {number: None for number in range(len(packed)) if packed.endpoint(number) in here}
    own_name = packed.find_name(admitted.own.name) if admitted.own else -1
    about[own_name] = None
    for number in about:
        if number < 0 or number in same or _is_known(admitted, packed, number):
            continue
        if number == own_name or not admission.fault(packed, number, node.network):
            raise SourceError(
                f"the lease of this node, {packed.name(number)}, has changed",
                hint="call sync() with all leases",
            )
    return same


def mark_own(packed: Claims, admitted: Admission) -> set[int]:
    """Mark this node's unchanged lease in a change, and return its numbers."""
    node, same = admitted.node, set[int]()
    for number in packed.find_endpoint(parse_address(node.public_ip)[1]):
        unchanged = packed.mac(number) in (node.mac, "00:00:00:00:00:00")
        if packed.subnet(number) == node.subnet and unchanged:
            packed.mark_own(number)
            same.add(number)
    return same


def _is_known(admitted: Admission, packed: Claims, number: int) -> bool:
    """Return whether a claim was rejected before as it is now."""
    held = admitted.rejected.claims
    place = held.find_name(packed.name(number))
    return place >= 0 and (held.subnet(place), held.endpoint(place), held.mac(place)) == (
        packed.subnet(number),
        packed.endpoint(number),
        packed.mac(number),
    )


def _is_own(admitted: Admission, lease: Lease | str) -> bool:
    """Return whether a lease that goes is this node's, by its name or, for a key, by its subnet."""
    own = admitted.own
    if own is None or label_of(lease) == own.name:
        return own is not None
    return isinstance(lease, str) and own.subnet in lease.replace("-", "/").split("&")


def label_of(lease: Lease | str) -> str:
    """Return the name that a lease, or its key or name, is known by."""
    return lease if isinstance(lease, str) else lease.name or lease.key
