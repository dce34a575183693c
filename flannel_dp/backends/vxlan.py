"""flannel's vxlan layout: per peer a neighbour, an FDB entry and a route.

For a peer with subnet 10.244.7.0/24, public address 192.0.2.7 and VTEP MAC m:

* route      10.244.7.0/24 via 10.244.7.0 on the vxlan device, onlink
* neighbour  10.244.7.0 has MAC m
* fdb        m is behind 192.0.2.7

as flannel's pkg/backend/vxlan/vxlan_network.go writes them. For IPv4 the route
hangs on a nexthop object that carries the gateway, because IPv4 gateway routes
of one device share a single hash bucket in the kernel (fib_info_hashfn_1 in
net/ipv4/fib_semantics.c leaves the gateway out), so that installing N of them
costs N squared. IPv6 has no such bucket and carries its gateway itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from flannel_dp import tables
from flannel_dp._core import Claims, Table
from flannel_dp.backends.device import VxlanDevice, overlay_mtu
from flannel_dp.config import NetworkConfig
from flannel_dp.entries import Scope

#: A nexthop object's id is this plus the low 28 bits of the peer's subnet:
#: a new process finds the objects of the old one without asking anybody, and
#: ``ip nexthop`` shows 10.244.7.0 as 0x5af40700.
NEXTHOP_BASE = 0x50000000

#: Below this many peers, gateway routes cost the same as nexthop objects do.
PLAIN_ROUTES_LIMIT = 2000


@dataclass(frozen=True, slots=True)
class Wanted:
    """One table as it should be, and the part of the kernel's that it is the whole of."""

    table: Table
    scopes: tuple[Scope, ...]


def desired(
    peers: Claims, device: int, *, network: str, uplink: int, nexthops: bool | None
) -> list[Wanted]:
    """The tables of one family for ``peers`` on vxlan ``device`` (ifindex), in the order
    in which they are added. Entries of peer i are tagged i.

    ``network`` is the pod network; routes of our protocol to it on ``uplink``
    (the external interface's ifindex, 0: unknown) are leftovers and removed.
    ``nexthops`` is for IPv4 only: True uses nexthop objects, False does not
    and removes those there are, None is for kernels without them (before 5.3).
    """
    family = peers.family
    neighbours = tables.neighbour_columns(device, family, peers.subnets, peers.macs)
    fdb = tables.fdb_columns(device, family, peers.macs, peers.endpoints)
    wanted = [
        Wanted(neighbours, (tables.neighbour_scope(device, family),)),
        Wanted(fdb, (tables.fdb_scope(device),)),
    ]
    scopes = [tables.route_scope(family, device=device, exclusive=True)]
    if uplink:
        scopes.append(tables.route_scope(family, device=uplink, within=network))
    if family == 4 and nexthops is not None:
        ids = peers.nexthop_ids(NEXTHOP_BASE)
        objects = (
            tables.nexthop_columns(device, family, ids, peers.subnets)
            if nexthops
            else Table("nexthop")
        )
        wanted.append(Wanted(objects, (nexthop_scope(device),)))
    if family == 4 and nexthops:
        routes = tables.route_columns(family, peers.subnets, peers.lengths, nexthops=ids)
    else:
        routes = tables.route_columns(
            family, peers.subnets, peers.lengths, gateways=peers.subnets, device=device
        )
    wanted.append(Wanted(routes, tuple(scopes)))
    return wanted


def device(
    config: NetworkConfig,
    family: int,
    *,
    lower: int,
    lower_mtu: int,
    local: str,
    subnet: str,
    mac: str,
) -> VxlanDevice:
    """The vxlan device of one family, on the external interface ``lower`` (ifindex).

    ``local`` is the node's public address, ``subnet`` its own subnet, whose first
    address the device gets as /32 or /128 (no broadcast, no connected route).
    """
    return VxlanDevice(
        name=device_name(config, family),
        vni=config.backend.vni,
        lower=lower,
        local=local,
        port=config.backend.effective_port,
        mtu=overlay_mtu(config.backend.mtu or lower_mtu, family),
        mac=mac,
        address=f"{subnet.partition('/')[0]}/{32 if family == 4 else 128}",
        network=network_of(config, family),
        learning=config.backend.learning,
        gbp=config.backend.gbp,
    )


def nexthop_scope(device: int) -> Scope:
    """Our nexthop objects on ``device``: our protocol, and an id from our range."""
    return tables.nexthop_scope(device, 4, ids=(NEXTHOP_BASE, NEXTHOP_BASE + (1 << 28) - 1))


def device_name(config: NetworkConfig, family: int) -> str:
    """``flannel.<VNI>`` or ``flannel-v6.<VNI>``."""
    return config.device_v4 if family == 4 else config.device_v6


def network_of(config: NetworkConfig, family: int) -> str:
    """The pod network of one family as text."""
    return str(config.network if family == 4 else config.ipv6_network)


def families_of(config: NetworkConfig) -> tuple[int, ...]:
    """The families that are switched on, 4 before 6."""
    return (4,) * config.enable_ipv4 + (6,) * config.enable_ipv6
