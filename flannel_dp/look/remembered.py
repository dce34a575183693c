"""The network as a node knows it, for views and clean while its source is unreachable or not named.

A running agent says all of it. Without one, subnet.env says the networks and the length of subnets,
and the vxlan device VNI and port.
"""

from __future__ import annotations

import json
import re

from msgspec import Struct

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.cluster.subnet_env import read_subnet_env
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import Link, LinkReader
from flannel_dp.kernel.netns import NetNS
from flannel_dp.look.asking import ask_agents
from flannel_dp.look.terminal import count

_DEVICE = re.compile(r"flannel(?:-v6)?\.(\d+)")


class Remembered(Struct, frozen=True):
    """The network, who says so, and the interface of this node's tunnel ("": not known); ``notes``
    say what else the agent has to tell."""

    config: NetworkConfig
    origin: str
    iface: str = ""
    notes: str = ""


def remembered(run_dir: str, netns: NetNS, subnet_file: str) -> Remembered | None:
    """Return what the one agent that runs says of the network, else ``subnet_file`` ("": there is
    none); None where neither does. Raises KernelError."""
    told = _agents_network(run_dir, netns)
    if told is not None or not subnet_file:
        return told
    config = remembered_config(netns, subnet_file)
    return None if config is None else Remembered(config, subnet_file)


def _agents_network(run_dir: str, netns: NetNS) -> Remembered | None:
    try:
        (agent,) = ask_agents(run_dir, netns)
        origin = f"the running agent (process {agent['pid']})"
        config = NetworkConfig.from_json(agent["net_conf"], origin=origin)
    except (FlannelDPError, ValueError, KeyError):  # none, several, or one without a network yet
        return None
    ifaces = {one["interface"] for one in agent["families"].values()} - {""}
    rejected = sum(agent["rejected"]["reasons"].values())
    counts = ((len(agent["problems"]), "problem"), (rejected, "rejected lease"))
    notes = " and ".join(count(number, word) for number, word in counts if number)
    return Remembered(config, origin, ifaces.pop() if len(ifaces) == 1 else "", notes)


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
