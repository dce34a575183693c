"""The vxlan backend's devices: what flannel's ``Backend`` object asks for."""

from __future__ import annotations

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.resources.device.wanted import VxlanDevice, overlay_mtu


def device(
    config: NetworkConfig,
    family: int,
    *,
    lower: int,
    lower_mtu: int,
    local: str,
    subnet: str,
    mac: str,
) -> VxlanDevice:
    """The vxlan device of one family, on the external interface ``lower`` (ifindex).

    Where a program forwards, both families have the same one, with an MTU that suits both.

    ``local`` is the node's public address, ``subnet`` its own subnet, whose first
    address the device gets as /32 or /128 (no broadcast, no connected route).
    """
    external = config.backend.by_program
    under = 6 if external and config.enable_ipv6 else family
    return VxlanDevice(
        name=device_name(config, family),
        vni=config.backend.vni,
        lower=lower,
        local=local,
        port=config.backend.effective_port,
        mtu=overlay_mtu(config.backend.mtu or lower_mtu, under),
        mac=mac,
        address=f"{subnet.partition('/')[0]}/{32 if family == 4 else 128}",
        network=network_of(config, family),
        learning=config.backend.learning,
        gbp=config.backend.gbp,
        external=external,
    )


def device_name(config: NetworkConfig, family: int) -> str:
    """``flannel.<VNI>`` or ``flannel-v6.<VNI>``; where a program forwards, the first that is
    switched on stands for both."""
    if config.backend.by_program:
        family = families_of(config)[0]
    return config.device_v4 if family == 4 else config.device_v6


def other_devices(config: NetworkConfig) -> tuple[str, ...]:
    """The devices that this node has, or would have with the other kind of forwarding: each
    would be in the way of ours, and all are locked."""
    return tuple(
        config.device_v4 if family == 4 else config.device_v6 for family in families_of(config)
    )


def network_of(config: NetworkConfig, family: int) -> str:
    """The pod network of one family as text."""
    return str(config.network if family == 4 else config.ipv6_network)


def families_of(config: NetworkConfig) -> tuple[int, ...]:
    """The families that are switched on, 4 before 6."""
    return (4,) * config.enable_ipv4 + (6,) * config.enable_ipv6
