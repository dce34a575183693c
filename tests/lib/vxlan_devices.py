"""Single vxlan devices: one to ask for, plan and apply in one step,
and what iproute2 shows and makes."""

from __future__ import annotations

from typing import Any

from flannel_dp.kernel.links import LinkReader
from flannel_dp.resources.device.change import apply_device
from flannel_dp.resources.device.plan import DevicePlan, plan_device
from flannel_dp.resources.device.vxlan import VxlanDevice, overlay_mtu


def wanted_device(host: Any, family: int, **changes: Any) -> VxlanDevice:
    """A device as the vxlan backend would ask for it on ``host``."""
    values: dict[str, Any] = {
        "name": "flannel.1" if family == 4 else "flannel-v6.1",
        "vni": 1,
        "lower": host.ifindex,
        "local": host.underlay(family),
        "port": 8472,
        "mtu": overlay_mtu(1500, family),
        "mac": "02:00:00:00:00:03",
        "address": "10.244.3.0/32" if family == 4 else "fd00:10:244:3::/128",
        "network": "10.244.0.0/16" if family == 4 else "fd00:10:244::/48",
    }
    return VxlanDevice(**values | changes)


def plan(host: Any, want: VxlanDevice, *, take_over: bool = False) -> DevicePlan:
    with LinkReader(host.ns) as reader:
        return plan_device(reader, want, take_over=take_over, netns=host.ns)


def sync(host: Any, want: VxlanDevice, *, take_over: bool = False) -> DevicePlan:
    """Plan and apply, require that nothing is left to do, return what was planned."""
    made = plan(host, want, take_over=take_over)
    index = apply_device(made, netns=host.ns)
    again = plan(host, want)
    assert (again.action, again.changes, again.ifindex) == ("none", (), index)
    return made


def shown(host: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = host.ip_json("link", "show", "dev", name)[0]
    return found


def overlay_addresses(host: Any, want: VxlanDevice) -> set[str]:
    entries = host.ip_json(f"-{want.family} addr show dev {want.name}")[0]["addr_info"]
    return {f"{e['local']}/{e['prefixlen']}" for e in entries if e["scope"] != "link"}


def add_vxlan(host: Any, want: VxlanDevice, **changes: str) -> None:
    """Make a device by iproute2; ``changes`` replaces words, "" drops an option."""
    options = {
        "id": str(want.vni),
        "local": want.local,
        "dev": host.iface,
        "dstport": str(want.port),
        "flags": "nolearning",
    } | changes
    flags = options.pop("flags")
    words = " ".join(f"{key} {value}" for key, value in options.items() if value)
    host.ip(f"link add {want.name} type vxlan {words} {flags}")
