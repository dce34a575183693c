"""What every peer is given: one cluster's nodes as plain text, and where to put them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_interface, ip_network
from pathlib import Path

from bench.cluster import Case
from flannel_dp.cluster.lease import Lease

#: Where all subnets of bench.cluster are.
NETWORK = {4: "10.0.0.0/7", 6: "fd00:10::/32"}


@dataclass(frozen=True)
class Node:
    """A node of the cluster but our own. ``gateway`` is what its route leads by."""

    subnet: str
    gateway: str
    mac: str
    endpoint: str


@dataclass(frozen=True)
class Job:
    """One case in one namespace. ``messages`` is the floor's file, ``folder`` is for the
    others' files; ``device`` is the one that the routes lead out of."""

    case: Case
    netns: str
    folder: Path
    device: str
    messages: Path

    @cached_property
    def nodes(self) -> list[Node]:
        """All peers, in the order in which the library is given them."""
        return list(_nodes(self.case))

    @property
    def tunnelled(self) -> bool:
        """Whether peers have neighbours and FDB entries beside their routes."""
        return self.case.layout == "vxlan"

    def write(self, name: str, lines: Iterator[str]) -> Path:
        """A file of ``lines``, in the job's folder."""
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path


def device(case: Case) -> str:
    """The device that a case's routes lead out of."""
    if case.layout == "host-gw":
        return "eth0"
    return "flannel.1" if case.family == 4 else "flannel-v6.1"


def _nodes(case: Case) -> Iterator[Node]:
    own = case.own
    for lease in case.leases:
        if _subnet(lease, case.family) == _subnet(own, case.family):
            continue
        # The lease's own text may carry more than the address; the kernel prints neither.
        subnet = str(ip_network(_subnet(lease, case.family)))
        where = lease.public_ip if case.family == 4 else lease.public_ipv6
        endpoint = str(ip_interface(str(where)).ip)
        tunnelled = case.layout == "vxlan"
        gateway = subnet.partition("/")[0] if tunnelled else endpoint
        yield Node(subnet, gateway, _mac(lease, case.family) if tunnelled else "", endpoint)


def _subnet(lease: Lease, family: int) -> str:
    return str(lease.subnet if family == 4 else lease.ipv6_subnet)


def _mac(lease: Lease, family: int) -> str:
    data = lease.backend_data if family == 4 else lease.backend_v6_data
    if data is None or data.vtep_mac is None:
        raise ValueError(f"{lease} has no VtepMAC: bench.cluster makes leases that have one")
    return str(data.vtep_mac)
