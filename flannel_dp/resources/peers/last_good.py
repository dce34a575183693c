"""Leases that became unreadable or incomplete, completed by what their peers had before.

flanneld ignores such a lease, and so keeps the peer's entries. Here the missing parts are taken
from the peers as this process wanted them last, else as the kernel has them. What is published
and can be read is never replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from socket import AF_INET, AF_INET6
from typing import NamedTuple

from msgspec.structs import replace

from flannel_dp._core import parse_address
from flannel_dp.cluster.lease import BackendData, BadClaim, Lease, LeaseList, parse_subnet_key
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import LeaseRejected
from flannel_dp.resources.peers.brake import InKernel
from flannel_dp.resources.peers.present import PresentPeer
from flannel_dp.resources.peers.resource import PeersResource


class Completed(NamedTuple):
    """Claims, and what the leases that were completed lack, by their names."""

    claims: LeaseList
    lacking: dict[str, str]


class LastGood:
    """What the peers of one data plane were known by last."""

    def __init__(
        self, config: NetworkConfig, peers: Mapping[int, PeersResource], in_kernel: InKernel
    ) -> None:
        self._config, self._peers, self._in_kernel = config, peers, in_kernel

    def complete(self, claims: LeaseList, left_out: Collection[str] = ()) -> Completed:
        """Return the claims with leases that can be used in place of those that cannot, where
        a peer was known before; those of ``left_out`` stay as they are.

        A claim that cannot be read stays among the bad ones, and a lease is added. Raises
        KernelError where the kernel has to be read and cannot be.
        """
        look_up = _LookUp(self._peers, self._in_kernel)
        leases, lacking = claims.leases, dict[str, str]()
        for number, lease in enumerate(claims.leases):
            if not (lacks := self._lacks(lease)):
                continue
            whole = self._completed(lease, lacks, look_up)
            if whole is lease:
                continue
            lacking[lease.label] = ", ".join(lacks.values())
            if lease.label not in left_out:
                leases = [*leases] if leases is claims.leases else leases
                leases[number] = whole
        for bad in claims.bad:
            known = self._known(bad, look_up)
            if known is None:
                continue
            lacking[bad.name] = bad.detail
            if bad.name not in left_out:
                leases = [*leases, known]
        return Completed(LeaseList(leases, claims.bad), lacking)

    def _lacks(self, lease: Lease) -> dict[int, str]:
        """Return what a lease lacks, by family; {} for one that is complete."""
        backend, found = self._config.backend, dict[int, str]()
        for number in self._peers:
            if number == 4:
                subnet, address, data = lease.subnet, lease.public_ip, lease.backend_data
            else:
                subnet, address, data = lease.ipv6_subnet, lease.public_ipv6, lease.backend_v6_data
            if not subnet:
                continue
            if not _is_address(address, number):
                found[number] = f"its IPv{number} public address is {_said(address)}"
            elif not lease.backend_type:
                found[number] = "its backend type is missing"
            elif lease.backend_type.lower() == backend.type:
                mac = data.vtep_mac if data else ""
                if not backend.takes_mac(mac):
                    found[number] = f"its IPv{number} VtepMAC is {_said(mac)}"
        return found

    def _completed(self, lease: Lease, lacks: Collection[int], look_up: _LookUp) -> Lease:
        for number in lacks:
            subnet = lease.subnet if number == 4 else lease.ipv6_subnet
            peer = look_up.peer(number, lease.label, (subnet,))
            if peer is not None and peer.subnet == subnet:
                lease = self._with(lease, number, peer)
        return lease

    def _known(self, bad: BadClaim, look_up: _LookUp) -> Lease | None:
        """Return the lease that an unreadable one was before, None where that is unknown."""
        found = Lease(name=bad.name, revision=look_up.revision(bad.name))
        for number in self._peers:
            peer = look_up.peer(number, bad.name, bad.subnets or _subnets_of_key(bad.name))
            if peer is not None:
                subnet = {"subnet" if number == 4 else "ipv6_subnet": peer.subnet}
                found = self._with(replace(found, **subnet), number, peer)
        return found if found.key else None

    def _with(self, lease: Lease, number: int, peer: PresentPeer) -> Lease:
        """Return the lease with what a peer was known by, and with what it still says itself."""
        backend = self._config.backend
        old = lease.backend_data if number == 4 else lease.backend_v6_data
        data: BackendData | None = old
        if not backend.takes_mac(old.vtep_mac if old else ""):
            data = backend.data(peer.mac)
        old_address = lease.public_ip if number == 4 else lease.public_ipv6
        address = old_address if _is_address(old_address, number) else peer.endpoint
        lease = replace(lease, backend_type=lease.backend_type or backend.type)
        if number == 4:
            return replace(lease, public_ip=address, backend_data=data)
        return replace(lease, public_ipv6=address, backend_v6_data=data)


class _LookUp:
    """Finds a peer as it was last; the kernel is read at most once, and only where this process
    has not wanted any peers yet."""

    def __init__(self, peers: Mapping[int, PeersResource], in_kernel: InKernel) -> None:
        self._peers, self._in_kernel = peers, in_kernel
        self._read: dict[int, dict[str, PresentPeer]] = {}

    def peer(self, family: int, name: str, subnets: Collection[str]) -> PresentPeer | None:
        """Return the peer of this name, or of one of the subnets where names are unknown."""
        state = self._peers[family].state
        if state is not None:
            held = state.peers
            n = held.find_name(name)
            if n < 0:
                return None
            return PresentPeer(name, held.subnet(n), held.endpoint(n), held.mac(n))
        if family not in self._read:
            there = self._in_kernel(family, False)
            self._read[family] = {one.subnet: one for one in there if one.is_complete}
        found = (self._read[family].get(subnet) for subnet in subnets)
        return next((one for one in found if one is not None), None)

    def revision(self, name: str) -> int:
        """Return the create revision that the lease of this name had."""
        for one in self._peers.values():
            if one.state is not None and (n := one.state.peers.find_name(name)) >= 0:
                return one.state.peers.revision(n)
        return 0


def _is_address(text: str, family: int) -> bool:
    try:
        found, raw = parse_address(text)
    except ValueError:
        return False
    return found == (AF_INET if family == 4 else AF_INET6) and any(raw)


def _subnets_of_key(name: str) -> tuple[str, ...]:
    try:
        return tuple(filter(None, parse_subnet_key(name)))
    except LeaseRejected:
        return ()


def _said(text: str) -> str:
    return repr(text) if text else "missing"
