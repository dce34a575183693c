"""Nodes that forward by an eBPF program: their pods, maps, filters and pins."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flannel_dp import DataPlane, NetworkConfig
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.forwarding.program import Forwarding
from flannel_dp.tables.scopes import peer_scope
from tests.lib.hosts import _ping
from tests.lib.leases import half, lease_of, network_config
from tests.lib.short import end_of
from tests.lib.traffic import pod

DEVICES = ("flannel.1", "flannel-v6.1")


def config(*families: int, forwarding: str = "ebpf", **backend: Any) -> NetworkConfig:
    return network_config(*families, Forwarding=forwarding, **backend)


def remove_pins(host: Any) -> None:
    """Pins outlive the namespaces of a test."""
    for device in DEVICES:
        Forwarding(device, host.ns).remove()


class PodNode:
    """A host that is a node of the cluster, number ``number``, with a pod behind it."""

    def __init__(self, lab: Any, number: int) -> None:
        self.number, self.host = number, lab.host()
        self.lease = lease_of(self.host, number)
        self.pod = pod(lab, self.host, number)

    def plane(self, *families: int, forwarding: str = "ebpf", **options: Any) -> DataPlane:
        """This node's data plane; ``backend`` are keys of the Backend object."""
        backend = options.pop("backend", {})
        options = {"iface": self.host.iface, "netns": self.host.ns} | options
        return DataPlane(config(*families, forwarding=forwarding, **backend), **options)


def reaches(ns: str, target: str, count: int = 1) -> bool:
    """Whether pings from a namespace are answered."""
    return call_in_netns(ns, _ping, target, count)


def send_ping(ns: str, target: str) -> None:
    """Send one ping, and wait for no answer."""
    call_in_netns(ns, _ping, target, 1, 0.0)


#: What the fixture ``nodes`` of tests/kernel/conftest.py gives.
Nodes = Callable[[int], list[PodNode]]


def held(dp: DataPlane, family: int) -> set[tuple[str, str, str]]:
    """The peers in the program's map, as prefix, endpoint and MAC."""
    forwarding = dp.forwarder.forwarding
    assert forwarding is not None
    with_map = Forwarding(forwarding.device, forwarding.netns)
    assert with_map.open_pinned()
    table = dp.kernel.read("peer", peer_scope(with_map.maps(family), family))
    found = {(one.prefix, one.endpoint, one.mac) for one in table}
    with_map.close()
    return found


def wanted_in_map(leases: list[Any], family: int) -> set[tuple[str, str, str]]:
    return {half(lease, family) for lease in leases}


def filters(host: Any, device: str = "flannel.1") -> set[tuple[str, int, str]]:
    """``(parent, priority, name)`` of the tc filters on a device, as tc prints them; none where
    there is no such device."""
    found = set()
    for parent in ("ingress", "egress"):
        shown = end_of(["tc", "-j", "filter", "show", "dev", device, parent], netns=host.ns)
        for one in json.loads(shown.stdout or "[]"):
            if "options" in one and "bpf_name" in one["options"]:
                found.add((parent, one["pref"], one["options"]["bpf_name"]))
    return found
