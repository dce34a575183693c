"""Looking at an overlay that a program forwards: its peers, and whether packets get to it."""

from __future__ import annotations

from flannel_dp.cluster.network import NetworkConfig, devices_of, other_devices
from flannel_dp.errors import ConfigError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS
from flannel_dp.resources.forwarding.forwarder import Forwarder


def in_present_mode(
    config: NetworkConfig, netns: NetNS, run_dir: str = DEFAULT_DIRECTORY
) -> NetworkConfig:
    """Return the network in the mode of forwarding that this node is in, where the configuration
    names none: eBPF where there is a device in collect-metadata mode with a map of ours.

    Raises KernelError.
    """
    if config.names_forwarding or not devices_of(config):
        return config
    with LinkReader(netns) as reader:
        links = [reader.link(name) for name in other_devices(config)]
    names = [link.name for link in links if link and link.vxlan and link.vxlan.collect_metadata]
    if not names:
        return config
    from flannel_dp.resources.forwarding.pinned import remains

    try:
        ours = any(remains(name, netns, run_dir) for name in names)
        return config.with_forwarding("ebpf") if ours else config
    except ConfigError:  # the configuration has what that mode cannot have
        return config


def held_map(forwarder: Forwarder, number: int) -> int:
    """Return the descriptor of the map with the peers of one family that the program forwards to;
    0 where none is loaded.

    ``bpftool map dump pinned .../forward-peers4``. Raises Conflict, KernelError.
    """
    forwarder.find()
    return forwarder.maps(number)


def program_problem(forwarder: Forwarder, index: int) -> str:
    """Return why the program does not see the packets of a device; "" where it does."""
    return forwarder.problem(index)
