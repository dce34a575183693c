"""The command on a node, with its files: a network configuration and a list of leases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flannel_dp.command.cli import main
from tests.lib.kernel import everything
from tests.lib.leases import DEVICE

SUBNET = {4: "10.244.{}.0/24", 6: "fd00:10:244:{:x}::/64"}


def net_conf(family: int, **backend: Any) -> dict[str, Any]:
    document: dict[str, Any] = {"Backend": {"Type": "vxlan", **backend}}
    if family == 4:
        return document | {"Network": "10.244.0.0/16"}
    return document | {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:10:244::/48"}


def lease(family: int, number: int, **changes: Any) -> dict[str, Any]:
    """Node ``number`` as our own list has it."""
    version = "" if family == 4 else "v6"
    address = f"192.0.2.{number}" if family == 4 else f"2001:db8::{number:x}"
    values: dict[str, Any] = {
        "Subnet" if family == 4 else "IPv6Subnet": SUBNET[family].format(number),
        f"PublicIP{version}": address,
        "BackendType": "vxlan",
        "BackendData" if family == 4 else "BackendV6Data": {
            "VNI": 1,
            "VtepMAC": f"02:00:00:00:00:{number:02x}",
        },
        "Name": f"node{number}",
    }
    return values | changes


class Cluster:
    """A node with its files; ``run`` is the command on it."""

    def __init__(self, host: Any, family: int, folder: Path) -> None:
        self.host, self.family, self.folder = host, family, folder
        self.device = DEVICE[family]
        self.net_conf, self.leases = folder / "net-conf.json", folder / "leases.json"
        self.net_conf.write_text(json.dumps(net_conf(family)))
        self.write(lease(family, number) for number in range(1, 5))

    def write(self, leases: Any) -> None:
        self.leases.write_text(json.dumps({"leases": list(leases)}))

    def arguments(self, command: str, *more: str) -> list[str]:
        made = [command, "--netns", self.host.ns, "--net-conf", str(self.net_conf)]
        if command != "clean":
            made += ["--leases", str(self.leases)]
        iface = [] if "--iface" in more else ["--iface", "eth0"]
        return [*made, *iface, *more]

    def run(self, command: str, *more: str) -> int:
        return main(self.arguments(command, *more))

    def state(self) -> list[str]:
        """All that the command could have touched, and all that it must not."""
        return everything(self.host)

    def subnets(self) -> set[str]:
        found = self.host.ip_json(f"-{self.family} route show dev {self.device} proto 138")
        return {entry["dst"] for entry in found}
