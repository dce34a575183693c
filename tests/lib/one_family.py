"""A cluster of one family whose nodes are the hosts of the test's network: node N is host N."""

from __future__ import annotations

import json
from typing import Any

from flannel_dp import BackendData, Lease, NetworkConfig

NETWORK = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}


def config(family: int, **backend: Any) -> NetworkConfig:
    document: dict[str, Any] = {"Backend": {"Type": "vxlan", **backend}}
    if family == 4:
        document |= {"Network": NETWORK[4]}
    else:
        document |= {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": NETWORK[6]}
    return NetworkConfig.from_json(json.dumps(document))


def subnet(family: int, number: int) -> str:
    return f"10.244.{number}.0/24" if family == 4 else f"fd00:10:244:{number:x}::/64"


def gateway(family: int, number: int) -> str:
    """The first address of the subnet of node ``number``."""
    return subnet(family, number).partition("/")[0]


def pod(family: int, number: int) -> str:
    """An address of a pod on node ``number``."""
    return f"10.244.{number}.12" if family == 4 else f"fd00:10:244:{number:x}::12"


def endpoint(family: int, number: int) -> str:
    """The address of host ``number``."""
    return f"192.0.2.{number}" if family == 4 else f"2001:db8::{number:x}"


def node_mac(number: int) -> str:
    return f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"


def lease_from(
    family: int,
    subnet: str,
    endpoint: str,
    data: BackendData | None,
    name: str = "",
    revision: int = 0,
    **more: Any,
) -> Lease:
    """A lease with these fields of one family."""
    fields: dict[str, Any] = {"backend_type": "vxlan", "name": name, "revision": revision, **more}
    if family == 4:
        return Lease(subnet=subnet, public_ip=endpoint, backend_data=data, **fields)
    return Lease(ipv6_subnet=subnet, public_ipv6=endpoint, backend_v6_data=data, **fields)


def lease(family: int, number: int, *, kind: str = "vxlan") -> Lease:
    """That of node ``number``, whose name is "node7"."""
    data = BackendData(1, node_mac(number)) if kind == "vxlan" else None
    places = subnet(family, number), endpoint(family, number)
    return lease_from(family, *places, data, f"node{number}", backend_type=kind)


def leases(family: int, *numbers: int, kind: str = "vxlan") -> list[Lease]:
    return [lease(family, number, kind=kind) for number in numbers]
