"""The view of a node that resources are given, from leases, without a data plane."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from flannel_dp import FlannelDPError, Lease, NetworkConfig
from flannel_dp.cluster.admission import Node, pack, validate
from flannel_dp.node.family import Family, View
from flannel_dp.reconcile.resource import Result
from tests.lib.leases import NETWORK, endpoint, subnet


def facts(
    config: NetworkConfig,
    number: int,
    leases: Iterable[Lease],
    *,
    iface: str = "eth0",
    public_ip: str = "",
    mtu: int = 1500,
) -> Family:
    """Family 4 or 6 of node 0 in a cluster with these leases."""
    tunnel = config.backend.type == "vxlan"
    own = Node(number, NETWORK[number], public_ip or endpoint(number, 0), subnet=subnet(number, 0))
    claims = pack(leases, number, backend=config.backend.type, vni=config.backend.vni)
    return Family(
        validate(claims, own, need_mac=tunnel),
        uplink=2,
        iface=iface,
        uplink_mtu=mtu,
        local=own.public_ip if tunnel else "",
        mac="02:00:00:00:00:01" if tunnel else "",
    )


def view(config: NetworkConfig, leases: Iterable[Lease], *numbers: int, **options: Any) -> View:
    """The view of families ``numbers``; the others (4 or 6) that ``config`` has cannot be
    synced."""
    every = [4] * config.enable_ipv4 + [6] * config.enable_ipv6
    known = [*leases]
    return View(
        [facts(config, number, known, **options) for number in numbers],
        [],
        {n: FlannelDPError(f"eth0 has no IPv{n} address") for n in every if n not in numbers},
    )


def changed(after: Family, old: Iterable[Lease], new: Iterable[Lease]) -> Any:
    """The argument of ``update``: peers ``old`` became ``new``, with the facts ``after``."""
    packed = [pack(leases, after.number, backend="vxlan", vni=1) for leases in (old, new)]
    return SimpleNamespace(family=after, old=packed[0], new=packed[1], peers=after.peers)


def devices_done(**found: tuple[str, int, int]) -> dict[str, Result]:
    """The outcomes of devices, such as ``device4=("flannel.1", 7, 1450)``: name, ifindex, MTU."""
    return {
        name: Result(facts={"name": device, "index": index, "mtu": mtu})
        for name, (device, index, mtu) in found.items()
    }
