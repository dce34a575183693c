"""What an instance of flannel-dp locks. A node may be in several networks, each with an instance of
its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from ipaddress import ip_address, ip_network

from flannel_dp.cluster.network import (
    NetworkConfig,
    devices_of,
    families_of,
    network_of,
    other_devices,
)
from flannel_dp.kernel.links import LinkReader


def lock_names(
    config: NetworkConfig, links: Callable[[], AbstractContextManager[LinkReader]]
) -> tuple[str, ...]:
    """Return what an instance locks: its vxlan devices; with host-gw, which has none, its networks,
    and vxlan devices that are in them, of the layout before or of another instance.

    Raises KernelError.
    """
    if devices_of(config):
        return other_devices(config)
    networks = [network_of(config, family) for family in families_of(config)]
    names = [f"host-gw-{network.replace('/', '-')}" for network in networks]
    with links() as reader:
        names += [name for name in other_devices(config) if _is_in(reader, name, networks)]
    return tuple(names)


def _is_in(reader: LinkReader, name: str, networks: list[str]) -> bool:
    """Return whether a device is there and has an address in one of the networks."""
    link = reader.link(name)
    if link is None:
        return False
    addresses = [ip_address(one.address) for one in reader.addresses(link.index)]
    return any(address in ip_network(network) for address in addresses for network in networks)
