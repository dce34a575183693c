"""Two networks on one node: the second one's configuration and leases, by its backend."""

from __future__ import annotations

import json
from typing import Any

from flannel_dp.cluster.lease import BackendData, Lease

SECOND = {4: "10.11.0.0/16", 6: "fd00:11::/48"}

#: The backends of two networks on one node; that of the first one is vxlan with VNI 1.
BACKENDS: dict[str, dict[str, Any]] = {
    "host-gw": {"Type": "host-gw"},
    "another VNI": {"Type": "vxlan", "VNI": 9_999},
    "another port": {"Type": "vxlan", "VNI": 2, "Port": 8473},
    "direct": {"Type": "vxlan", "VNI": 2, "DirectRouting": True},
}


def second_document(backend: dict[str, Any]) -> str:
    """The second network's net-conf.json."""
    document = {
        "Network": SECOND[4],
        "EnableIPv6": True,
        "IPv6Network": SECOND[6],
        "Backend": backend,
    }
    return json.dumps(document)


def second_leases(host: Any, backend: dict[str, Any]) -> list[Lease]:
    """This node's lease in the second network, and those of three others."""

    def lease(number: int, v4: str, v6: str) -> Lease:
        data = [
            BackendData(backend.get("VNI", 1), f"02:00:00:{family:02x}:99:{number:02x}")
            if backend["Type"] == "vxlan"
            else None
            for family in (4, 6)
        ]
        return Lease(
            subnet=f"10.11.{number}.0/24",
            ipv6_subnet=f"fd00:11:0:{number:x}::/64",
            public_ip=v4,
            public_ipv6=v6,
            backend_type=backend["Type"],
            backend_data=data[0],
            backend_v6_data=data[1],
        )

    others = [lease(n, f"192.0.2.{200 + n}", f"2001:db8::{200 + n:x}") for n in (1, 2, 3)]
    return [lease(9, host.ipv4, host.ipv6), *others]
