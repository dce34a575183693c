"""Made-up clusters: leases in memory and as a file, the same at every call.

Node 0 is the one that the benchmark runs on. Every node has one /24 of
10.0.0.0/7 (or one /64 of fd00:10::/32), a public address in 172.16.0.0/12 (or
2001:db8::/64) and a MAC of its own. The list is shuffled: sources sort by name
or key at best, never by subnet. Where half of the peers are reached directly,
the others have an address in FAR, which a router is in front of.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

from msgspec.structs import replace

from flannel_dp.cluster.lease import BackendData, Lease
from flannel_dp.cluster.network import NetworkConfig

#: As many nodes as 10.0.0.0/7 has /24 subnets that 10.0.0.0/24 is not one of.
MOST_NODES = 131_000

#: Where the second generation of nodes has its public addresses, and the router there.
FAR = {4: "172.17.0.0/16", 6: "2001:db8::1:0/112"}
ROUTER = {4: "172.31.255.254", 6: "2001:db8::ffff:ffff"}

_CONFIGS = {
    4: '{"Network": "10.0.0.0/7", "SubnetLen": 24, "Backend": %s}',
    6: '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10::/32", '
    '"IPv6SubnetLen": 64, "Backend": %s}',
}

_BACKENDS = {
    "vxlan": '{"Type": "vxlan"}',
    "direct": '{"Type": "vxlan", "DirectRouting": true}',
    "host-gw": '{"Type": "host-gw"}',
    "ebpf": '{"Type": "vxlan", "Forwarding": "ebpf"}',
}


def config(family: int, layout: str = "vxlan") -> NetworkConfig:
    """The network configuration of one family, 4 or 6: vxlan, direct, host-gw or ebpf."""
    return NetworkConfig.from_json(_CONFIGS[family] % _BACKENDS[layout])


def mac(number: int, generation: int = 0) -> str:
    """A locally administered MAC; ``generation`` gives the same node another one."""
    low = (number * 2_654_435_761 + 97 * generation) & 0xFFFFFFFF
    return f"02:{generation & 0xFF:02x}:" + ":".join(
        f"{low >> shift & 0xFF:02x}" for shift in (24, 16, 8, 0)
    )


def lease(family: int, number: int, generation: int = 0, *, named: bool = False) -> Lease:
    """Node ``number``'s lease; a later ``generation`` has moved and has a new MAC.

    ``named`` leases have a node's name, as those from Kubernetes do.
    """
    name = f"node-{number:05d}.example.net" if named else ""
    data = BackendData(vni=1, vtep_mac=mac(number, generation))
    subnet = number + 1
    if family == 4:
        where = number + 1 + generation * 0x10000
        return Lease(
            subnet=f"{10 + (subnet >> 16)}.{subnet >> 8 & 0xFF}.{subnet & 0xFF}.0/24",
            public_ip=f"172.{16 + (where >> 16)}.{where >> 8 & 0xFF}.{where & 0xFF}",
            backend_type="vxlan",
            backend_data=data,
            name=name,
        )
    high, low = divmod(number + 1, 0x10000)
    return Lease(
        ipv6_subnet=f"fd00:10:{subnet >> 8:x}:{subnet & 0xFF:x}::/64",
        public_ipv6=str(IPv6Address(f"2001:db8::{generation + high:x}:{low:x}")),
        backend_type="vxlan",
        backend_v6_data=data,
        name=name,
    )


def leases(family: int, nodes: int, *, named: bool = False) -> list[Lease]:
    """The whole cluster of ``nodes`` peers and this node, in an order of no meaning."""
    if nodes > MOST_NODES:
        raise ValueError(f"a cluster here has at most {MOST_NODES} nodes, not {nodes}")
    # in memory as in the list
    return [lease(family, number, named=named) for number in _order(nodes)]


def churned(family: int, nodes: int) -> list[Lease]:
    """``leases``, after every hundredth node has moved."""
    return [lease(family, number, number % 100 == 50) for number in _order(nodes)]


def _order(nodes: int) -> list[int]:
    order = list(range(nodes + 1))
    random.Random(nodes).shuffle(order)
    return order


def arranged(family: int, nodes: int, layout: str) -> list[Lease]:
    """``leases`` for a layout: for "direct", every other peer is in FAR."""
    members = leases(family, nodes)
    if layout == "host-gw":
        return [replace(member, backend_type="host-gw") for member in members]
    if layout == "direct":
        return [lease(family, number, generation=number % 2) for number in _order(nodes)]
    return members


def public_address(family: int) -> str:
    """This node's own address, with the prefix length of the underlay."""
    own = lease(family, 0)
    return f"{own.public_ip}/12" if family == 4 else f"{own.public_ipv6}/64"


def write_file(path: Path, members: list[Lease]) -> Path:
    """``members`` in the project's own list form."""
    text = ",\n".join(member.to_json() for member in members)
    path.write_text(f'{{"leases": [\n{text}\n]}}\n', encoding="utf-8")
    return path


@dataclass(frozen=True)
class Case:
    """A size and a family of cluster, and its layout: vxlan, direct, host-gw or ebpf."""

    family: int
    nodes: int
    layout: str = "vxlan"

    @property
    def config(self) -> NetworkConfig:
        return config(self.family, self.layout)

    @property
    def leases(self) -> list[Lease]:
        return arranged(self.family, self.nodes, self.layout)

    @property
    def own(self) -> Lease:
        """The lease of node 0."""
        return arranged(self.family, 0, self.layout)[0]

    def __str__(self) -> str:
        layout = "" if self.layout == "vxlan" else f" {self.layout},"
        return f"IPv{self.family},{layout} {self.nodes:,} nodes"
