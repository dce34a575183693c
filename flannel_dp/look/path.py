"""What of other programs diverts packets of pods, for views that have no leases."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from flannel_dp.cluster.network import families_of, network_of
from flannel_dp.errors import FlannelDPError
from flannel_dp.look.explanation import holds
from flannel_dp.resources.path.place import Place
from flannel_dp.resources.path.resource import PathChange, read_path, shortest_route

if TYPE_CHECKING:
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.resources.device.view import DeviceView


def find_diversions(overlay: Overlay, devices: dict[int, DeviceView | None]) -> PathChange:
    """Read policy rules, their tables and addresses, for families by number.

    This node's subnet is that of its device or of subnet.env; where neither is there, devices
    with a pod network's address are not compared. Raises FlannelDPError as ``Host.links``.
    """
    config = overlay.config
    subnets: dict[int, str] = {}
    with suppress(FlannelDPError):
        subnets |= overlay.resolver.previous()
    for number, device in devices.items():
        if found := subnet_of_device(overlay, number, device.addresses if device else ()):
            subnets[number] = found
    networks = {number: network_of(config, number) for number in families_of(config)}
    uplinks = {device.lower for device in devices.values() if device and device.lower}
    with overlay.host.links() as reader:
        indexes = {name: link.index for name in uplinks if (link := reader.link(name))}
    places = [
        Place(
            number,
            networks,
            subnets,
            shortest_route(config, number, subnets.get(number, "")),
            uplink=indexes.get(device.lower, 0) if device else 0,
            local=device.local if device else "",
            device=device.index if device else 0,
            device_name=device.name if device else "",
        )
        for number, device in devices.items()
    ]
    return read_path(overlay.host, places)


def subnet_of_device(overlay: Overlay, number: int, addresses: Sequence[str]) -> str:
    """This node's subnet by the address of its device and flannel's subnet length, "" without."""
    config = overlay.config
    length = config.subnet_len if number == 4 else config.ipv6_subnet_len
    inside = [text.partition("/")[0] for text in addresses]
    found = [text for text in inside if holds(network_of(config, number), text)]
    return f"{found[0]}/{length}" if found else ""
