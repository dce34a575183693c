"""A vxlan device, for people to read."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from flannel_dp.cluster.network import NetworkConfig, devices_of
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.links import SCOPE_LINK, Link


class DeviceView(Struct, frozen=True):
    """A vxlan device as ``ip -d link`` and ``ip address`` show it.

    ``problem`` is empty, or says why it cannot carry the overlay; with ``index`` 0
    there is no device of that name. ``external`` is collect-metadata mode: a program
    forwards, and the VNI is the one that it was told.
    """

    name: str
    index: int = 0
    up: bool = False
    vni: int = 0
    port: int = 0
    local: str = ""
    lower: str = ""
    mtu: int = 0
    mac: str = ""
    external: bool = False
    addresses: tuple[str, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        if not self.index:
            return f"{self.name}: {self.problem}"
        words = [
            f"{self.name}: {'up' if self.up else 'down'}",
            f"vni {self.vni} port {self.port}",
            "forwarded by a program"
            if self.external
            else f"local {self.local or 'none'} dev {self.lower or 'none'}",
            f"mtu {self.mtu}",
            f"mac {self.mac}",
            f"address {' '.join(self.addresses) or 'none'}",
        ]
        return ", ".join([*words, self.problem] if self.problem else words)


def view_device(
    host: Host, config: NetworkConfig, number: int, program_problem: Callable[[int], str]
) -> DeviceView | None:
    """Return the vxlan device of a family, found by its name; None in host-gw, which has none.

    ``program_problem(ifindex)`` says why a program that forwards does not see its packets.
    """
    name = devices_of(config).get(number)
    if name is None:
        return None
    with host.links() as reader:
        link = reader.link(name)
        if link is None:
            return DeviceView(name, problem="there is no such device; 'flannel-dp sync' makes it")
        if link.vxlan is None:
            return DeviceView(name, problem=f"it is a {link.kind or 'device'}, not a vxlan device")
        lower = reader.link(link.vxlan.lower) if link.vxlan.lower else None
        addresses = tuple(
            f"{address.address}/{address.prefixlen}"
            for address in reader.addresses(link.index, number)
            if address.scope != SCOPE_LINK
        )
    external, backend = link.vxlan.collect_metadata, config.backend
    told = external and external == backend.collect_metadata
    return DeviceView(
        name,
        link.index,
        link.up,
        backend.vni if told else link.vxlan.vni,
        link.vxlan.port,
        link.vxlan.local or "",
        lower.name if lower else "",
        link.mtu,
        link.mac,
        link.vxlan.collect_metadata,
        addresses,
        _device_problem(config, link, addresses, program_problem),
    )


def _device_problem(
    config: NetworkConfig,
    link: Link,
    addresses: tuple[str, ...],
    program_problem: Callable[[int], str],
) -> str:
    backend = config.backend
    if link.vxlan is None or link.vxlan.collect_metadata != backend.collect_metadata:
        mode = "is" if link.vxlan and link.vxlan.collect_metadata else "is not"
        return f"it {mode} in collect-metadata mode: 'flannel-dp sync' recreates it"
    if link.vxlan.vni != backend.vni and not link.vxlan.collect_metadata:
        return f"its VNI is not {backend.vni}"
    if link.vxlan.port != backend.effective_port:
        return f"its port is not {backend.effective_port}"
    if not link.up:
        return "it is down, so it has no routes: 'flannel-dp sync' sets it up"
    if not addresses:
        return "it has no overlay address: 'flannel-dp sync' adds it"
    return program_problem(link.index)
