"""Leases of a cluster's nodes by their number, and data planes to give them to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from flannel_dp import BackendData, DataPlane, Lease, NetworkConfig

NETWORK = {4: "10.240.0.0/12", 6: "fd00:10::/32"}
DEVICE = {4: "flannel.1", 6: "flannel-v6.1"}
PROTOCOL = "138"
HOST_GW = {"Type": "host-gw"}


def network_config(*families: int, **backend: Any) -> NetworkConfig:
    """A vxlan network of these families (default: both)."""
    families = families or (4, 6)
    document: dict[str, Any] = {
        "Backend": {"Type": "vxlan", **backend},
        "EnableIPv4": 4 in families,
        "EnableIPv6": 6 in families,
    }
    if 4 in families:
        document |= {"Network": NETWORK[4], "SubnetLen": 24}
    if 6 in families:
        document |= {"IPv6Network": NETWORK[6], "IPv6SubnetLen": 64}
    return NetworkConfig.from_json(json.dumps(document))


def address(family: int, number: int) -> str:
    """The first address of node ``number``'s subnet."""
    if family == 4:
        return f"10.{240 + (number >> 8)}.{number & 255}.0"
    return f"fd00:10:{number:x}::" if number else "fd00:10::"


def subnet(family: int, number: int) -> str:
    return f"{address(family, number)}/{24 if family == 4 else 64}"


def endpoint(family: int, number: int) -> str:
    """An underlay address that no host has."""
    if family == 4:
        return f"198.18.{number >> 8}.{number & 255}"
    return f"2001:db8:1::{number:x}"


def near(family: int, number: int) -> str:
    """An underlay address on the network of the test's hosts that no host has."""
    return f"192.0.2.{100 + number}" if family == 4 else f"2001:db8::{100 + number:x}"


def mac(family: int, number: int) -> str:
    return f"02:00:00:{family:02x}:{number >> 8:02x}:{number & 255:02x}"


def peer(number: int, **changes: Any) -> Lease:
    """Node ``number`` of the cluster, in both families."""
    fields: dict[str, Any] = {
        "subnet": subnet(4, number),
        "ipv6_subnet": subnet(6, number),
        "public_ip": endpoint(4, number),
        "public_ipv6": endpoint(6, number),
        "backend_type": "vxlan",
        "backend_data": BackendData(1, mac(4, number)),
        "backend_v6_data": BackendData(1, mac(6, number)),
    }
    return Lease(**(fields | changes))


def near_peer(number: int, **changes: Any) -> Lease:
    """Node ``number``, on the network of the test's hosts."""
    return peer(number, **{"public_ip": near(4, number), "public_ipv6": near(6, number)} | changes)


def peers(numbers: Iterable[int]) -> list[Lease]:
    return [peer(number) for number in numbers]


def lease_of(host: Any, number: int = 0) -> Lease:
    """The lease of a host of the test's network, as node ``number``."""
    return peer(number, public_ip=host.ipv4, public_ipv6=host.ipv6)


def plane(host: Any, *families: int, **options: Any) -> DataPlane:
    """A DataPlane of ``host`` (default: both families)."""
    options = {"iface": host.iface, "netns": host.ns} | options
    return DataPlane(network_config(*families), **options)


def replaced(lease: Lease, **changes: Any) -> Lease:
    """The lease with some fields changed."""
    return Lease(**{name: getattr(lease, name) for name in lease.__struct_fields__} | changes)


def half(lease: Lease, family: int) -> tuple[str, str, str]:
    """``(subnet, endpoint, MAC)`` of one family."""
    data = lease.backend_data if family == 4 else lease.backend_v6_data
    assert data is not None
    if family == 4:
        return lease.subnet, lease.public_ip, data.vtep_mac
    return lease.ipv6_subnet, lease.public_ipv6, data.vtep_mac
