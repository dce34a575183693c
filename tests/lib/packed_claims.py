"""Leases of peers as packed claims, and the node that validates them: for the tests of claims
and of their admission in C."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp import _core
from flannel_dp.cluster.lease import BackendData, Lease
from flannel_dp.cluster.rejections import Reason
from tests.lib.one_family import NETWORK, endpoint, lease_from, node_mac, subnet

OWN_SUBNET = {4: "10.244.3.0/24", 6: "fd00:10:244:3::/64"}
OWN_ADDRESSES = {4: ("192.0.2.3", "10.244.200.9"), 6: ("2001:db8::3", "fd00:10:244:c8::9")}
UNDERLAY = {4: ("192.0.2.0/24", "10.244.128.0/24"), 6: ("2001:db8::/64", "fd00:10:244:80::/64")}
#: What admission knows besides, for half of the tests.
RULES: dict[int, dict[str, Any]] = {
    4: {
        "routes": ("10.244.8.0/23", "10.244.6.0/24"),
        "no_hosts": ("192.0.2.0", "192.0.2.255", "192.0.2.11"),
        "subnet_length": 24,
        "pods": ("10.244.4.0", "10.244.127.255"),
        "link_local": True,
    },
    6: {
        "routes": ("fd00:10:244:8::/63", "fd00:10:244:6::/64"),
        "no_hosts": ("2001:db8::", "2001:db8::b"),
        "subnet_length": 64,
        "pods": ("fd00:10:244:4::", "fd00:10:244:7f:ffff:ffff:ffff:ffff"),
        "link_local": True,
    },
}
OWN_MAC = "02:00:00:00:00:03"
FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


def lease(family: int, subnet: str, endpoint: str, mac: str, *more: Any, **fields: Any) -> Lease:
    """``more`` are its name and its revision."""
    return lease_from(family, subnet, endpoint, BackendData(1, mac), *more, **fields)


def pack(family: int, leases: list[Lease], need_mac: bool = True) -> _core.Claims:
    claims = _core.Claims(family)
    claims.extend(leases, "vxlan", 1, need_mac)
    return claims


def admit(
    claims: _core.Claims, need_mac: bool = True, **rules: Any
) -> tuple[_core.Claims, _core.Claims]:
    family = claims.family
    return claims.admit(
        NETWORK[family],
        OWN_ADDRESSES[family],
        UNDERLAY[family],
        OWN_SUBNET[family],
        OWN_MAC,
        need_mac,
        **rules,
    )


def peer(family: int, number: int, **more: Any) -> Lease:
    fields = {
        "subnet": subnet(family, number),
        "endpoint": endpoint(family, number),
        "mac": node_mac(number),
        "name": f"node{number}",
        **more,
    }
    return lease(family, **fields)


def reason(number: int) -> str:
    return str(list(Reason)[number])


def numbered(family: int, numbers: Any) -> _core.Claims:
    """Leases of nodes by their numbers, up to 65,535."""
    made = []
    for number in numbers:
        high, low = divmod(number, 256)
        subnet = f"10.{high}.{low}.0/24" if family == 4 else f"fd00:{high:x}:{low:x}::/64"
        endpoint = f"192.0.{high}.{low}" if family == 4 else f"2001:db8:{high:x}::{low:x}"
        mac = f"02:00:00:00:{high:02x}:{low:02x}"
        made.append(lease(family, subnet, endpoint, mac, f"node{number}"))
    return pack(family, made)
