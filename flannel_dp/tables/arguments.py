"""Names of devices in a network namespace, and the types of what tables and scopes take."""

from __future__ import annotations

from socket import if_nametoindex

from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.tables.plain import Address, Device, Mac, Prefix, address_of, mac_of, prefix_of
from flannel_dp.tables.plain import index_of as index_by

__all__ = [
    "Address",
    "Device",
    "Mac",
    "NetNS",
    "Prefix",
    "address_of",
    "index_of",
    "mac_of",
    "prefix_of",
]


def index_of(parameter: str, device: object, netns: NetNS = None) -> int:
    """Return the ifindex of a device that is given by its ifindex, or by its name in ``netns``
    (None: the namespace of the caller).

    Raises NotYet where there is no such device or namespace, ConfigError for what names none; both
    name the ``parameter``. ``ip -n NETNS link show dev NAME``.
    """
    return index_by(parameter, device, lambda name: call_in_netns(netns, if_nametoindex, name))
