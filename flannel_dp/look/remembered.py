"""The network as a node remembers it, for views and clean while its source is unreachable.

subnet.env says the networks and the length of subnets, and the vxlan device VNI and port.
"""

from __future__ import annotations

import json
import re

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.cluster.subnet_env import read_subnet_env
from flannel_dp.kernel.links import Link, LinkReader
from flannel_dp.kernel.netns import NetNS

_DEVICE = re.compile(r"flannel(?:-v6)?\.(\d+)")


def remembered_config(netns: NetNS, subnet_file: str) -> NetworkConfig | None:
    """Return the network that ``subnet_file`` and the node's devices tell of; None where there is
    no such file, or where devices of several networks are there.

    Direct routes are taken for peers, as nothing says whether they are wanted. Raises KernelError.
    """
    said = read_subnet_env(subnet_file)
    with LinkReader(netns) as reader:
        found = [
            (int(name[1]), link)
            for link in reader.links("vxlan")
            if (name := _DEVICE.fullmatch(link.name))
        ]
    if not said.networks or len({vni for vni, _ in found}) > 1:
        return None
    document: dict[str, object] = {
        "EnableIPv4": 4 in said.networks,
        "EnableIPv6": 6 in said.networks,
        "Backend": _backend(*found[0]) if found else {"Type": "host-gw"},
    }
    keys = {4: ("Network", "SubnetLen"), 6: ("IPv6Network", "IPv6SubnetLen")}
    for family, network in said.networks.items():
        key, length = keys[family]
        document[key] = network
        if family in said.subnets:
            document[length] = int(said.subnets[family].rpartition("/")[2])
    return NetworkConfig.from_json(json.dumps(document), origin=subnet_file)


def _backend(vni: int, link: Link) -> dict[str, object]:
    port = link.vxlan.port if link.vxlan else 0
    return {"Type": "vxlan", "VNI": vni, "Port": port, "DirectRouting": True}
