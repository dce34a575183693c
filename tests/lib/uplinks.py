"""Hosts with several addresses, default routes and interfaces, and which of them are published."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp.cluster.lease import Identity
from tests.lib.kernel import stranger
from tests.lib.leases import DEVICE, lease_of, peer, plane

SECOND = {4: "192.0.2.101", 6: "2001:db8::101"}


LENGTH = {4: 24, 6: 64}


@pytest.fixture(name="two")
def two_fixture(host: Any) -> Any:
    """A host with a second address of each family."""
    for family, address in SECOND.items():
        nodad = "nodad" if family == 6 else ""
        host.ip(f"-{family} address add {address}/{LENGTH[family]} dev eth0 {nodad}")
    # Of IPv6 addresses the kernel shows the youngest first.
    host.ip(f"address del {host.ipv6}/64 dev eth0")
    host.ip(f"address add {host.ipv6}/64 dev eth0 nodad")
    return host


def published(host: Any, *families: int, **choice: Any) -> dict[int, str]:
    with plane(host, *families, **({"iface": None} | choice)) as dp:
        identity: Identity = dp.identity()
    return identity.public


def local(host: Any, family: int) -> tuple[str, str]:
    """The interface below the vxlan device, and the address that its packets leave from."""
    info = host.ip_json(f"link show {DEVICE[family]}")[0]["linkinfo"]["info_data"]
    return info["link"], info["local" if family == 4 else "local6"]


GATEWAY = {4: "192.0.2.254", 6: "2001:db8::fe"}


VPN = {4: "100.64.0.19", 6: "fd7a:115c::19"}


ANYWHERE = {4: ("0.0.0.0/1", "128.0.0.0/1"), 6: ("::/1", "8000::/1")}


@pytest.fixture(name="routed")
def routed_fixture(host: Any) -> Any:
    """A host with a default route of each family, which the kernel uses last."""
    for family, gateway in GATEWAY.items():
        host.ip(f"-{family} route add default via {gateway} dev eth0 metric 5000")
    return host


def vpn(host: Any, family: int, *, kind: str = "tun", table: str = "52") -> None:
    """A VPN's device, and its default route in a table that comes before the main one."""
    if kind == "tun":
        host.ip("tuntap add dev vpn0 mode tun")
    else:
        host.ip(f"link add vpn0 type {kind}")
    length = {4: 32, 6: 128}[family]
    host.ip(f"-{family} address add {VPN[family]}/{length} dev vpn0")
    host.ip("link set vpn0 up")
    if table != "main":
        host.ip(f"-{family} rule add pref 5270 lookup {table}")
    host.ip(f"-{family} route add default dev vpn0 table {table}")


def cluster(host: Any) -> list[Any]:
    return [lease_of(host), peer(1), peer(2)]


def second_interface(host: Any, family: int, metric: int) -> str:
    """eth1, and a default route out of it; return its address."""
    stranger(host, "eth1")
    address = {4: "198.51.100.7", 6: "2001:db8:77::7"}[family]
    gateway = {4: "198.51.100.254", 6: "2001:db8:77::fe"}[family]
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {address}/{LENGTH[family]} dev eth1 {nodad}")
    host.ip(f"-{family} route add default via {gateway} dev eth1 metric {metric}")
    return address
