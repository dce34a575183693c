"""The MACs that the kernel has learned of hosts on the underlay (ARP, neighbour discovery)."""

from __future__ import annotations

import struct

from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.netns import NetNS
from flannel_dp.kernel.socket import NetlinkSocket

_RTM_GETNEIGH = 30
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
_NDMSG = struct.Struct("=BxxxiHBB")

#: NUD_INCOMPLETE and NUD_FAILED (linux/neighbour.h): there is no usable MAC.
_NO_MAC = 0x01 | 0x20


def learned_macs(netns: NetNS, ifindex: int, family: int) -> dict[str, str]:
    """Return the MAC of each address of family 4 or 6 that is known on a device.

    Equivalent: ``ip neigh show dev NAME``. Raises KernelError.
    """
    what = f"dump IPv{family} neighbours of device {ifindex}"
    # Strict checking takes the device in an attribute only (net/core/neighbour.c).
    body = _NDMSG.pack(nl.af(family), 0, 0, 0, 0) + nl.attr_u32(_NDA_IFINDEX, ifindex)
    found: dict[str, str] = {}
    with NetlinkSocket(netns) as kernel:
        for _, payload in kernel.dump(_RTM_GETNEIGH, body, what):
            number, index, state, _, _ = _NDMSG.unpack_from(payload)
            attrs = nl.attributes(payload, _NDMSG.size, what)
            mac, address = attrs.get(_NDA_LLADDR, b""), nl.address_text(attrs.get(_NDA_DST))
            here = number == nl.af(family) and index == ifindex and not state & _NO_MAC
            if here and address and len(mac) == 6:
                found[address] = mac.hex(":")
    return found
