"""What a bridge says of its ports."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.links import LinkReader

_AF_BRIDGE, _BRVLAN = 7, 2  # linux/socket.h, RTEXT_FILTER_BRVLAN of linux/rtnetlink.h
_IFLA_AF_SPEC, _VLAN_INFO = 26, 2  # IFLA_BRIDGE_VLAN_INFO of linux/if_bridge.h


class BridgeReader(LinkReader):
    """LinkReader, and the VLANs of ports."""

    def vlans(self, device: int) -> list[int]:
        """Return the VLANs of a port (an ifindex); none for a device that is no port.

        ``bridge vlan show dev DEVICE``. Raises as ``LinkReader.links``.
        """
        body = nl.IFINFOMSG.pack(_AF_BRIDGE, 0, 0, 0, 0) + nl.attr_u32(nl.IFLA_EXT_MASK, _BRVLAN)
        what = "dump the VLANs of bridges"
        for _, payload in self.dump(nl.RTM_GETLINK, body, what):
            if nl.IFINFOMSG.unpack_from(payload)[2] == device:
                spec = nl.attributes(payload, nl.IFINFOMSG.size, what).get(_IFLA_AF_SPEC, b"")
                return [*_vlans(spec)]
        return []


def _vlans(spec: bytes) -> Iterator[int]:
    """Yield the numbers of IFLA_BRIDGE_VLAN_INFO, one attribute for each."""
    at = 0
    while at + 8 <= len(spec):
        length, kind, _, vlan = struct.unpack_from("=HHHH", spec, at)
        if length < 8:
            return
        if kind & 0x3FFF == _VLAN_INFO:
            yield vlan
        at += (length + 3) & ~3
