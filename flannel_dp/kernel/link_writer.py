"""Writes devices and addresses: ``ip link add|set|delete`` and ``ip address add|delete``.

On :mod:`flannel_dp.kernel.socket`, for the few attributes that a vxlan device of flannel's has:
importing pyroute2 takes longer than making the device and all else that a first sync does.
What is read back, and by whom, is the caller's. ``tests/kernel/test_link_writer.py`` compares the
devices with those that pyroute2 makes.

Source of the layouts: include/uapi/linux/{rtnetlink,if_link,if_addr}.h.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Self

from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.netns import NetNS
from flannel_dp.kernel.socket import NetlinkSocket

_EXCL, _CREATE = 0x200, 0x400  # NLM_F_EXCL, NLM_F_CREATE


class LinkWriter:
    """A socket that writes devices in one namespace; a context manager.

    Every method raises KernelError with the kernel's own words: NotPermitted without
    CAP_NET_ADMIN, DeviceGone where there is no such device. ``what`` says in errors what was tried.
    """

    def __init__(self, netns: NetNS = None) -> None:
        self._netlink = NetlinkSocket(netns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._netlink.close()

    def add(self, name: str, kind: str, *, mtu: int, mac: str, data: bytes, what: str) -> None:
        """Make a device, which is down; ``data`` are the attributes of its kind
        (``vxlan_data``). ``ip link add NAME address MAC mtu MTU type KIND ...``."""
        body = (
            _header(0)
            + nl.attr(nl.IFLA_IFNAME, nl.name_bytes(name))
            + nl.attr_u32(nl.IFLA_MTU, mtu)
            + nl.attr(nl.IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
            + _link_info(kind, data)
        )
        self._netlink.change(nl.RTM_NEWLINK, _CREATE | _EXCL, body, what)

    def set(
        self,
        index: int,
        *,
        what: str,
        name: str = "",
        mtu: int = 0,
        mac: str = "",
        up: bool | None = None,
    ) -> None:
        """Change what is given of a device: ``ip link set ...``."""
        body = _header(index, up)
        if name:
            body += nl.attr(nl.IFLA_IFNAME, nl.name_bytes(name))
        if mtu:
            body += nl.attr_u32(nl.IFLA_MTU, mtu)
        if mac:
            body += nl.attr(nl.IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
        self._netlink.change(nl.RTM_NEWLINK, 0, body, what)

    def set_kind(self, index: int, kind: str, data: bytes, *, what: str) -> None:
        """Change attributes of the device's kind: ``ip link set DEVICE type KIND ...``."""
        self._netlink.change(nl.RTM_NEWLINK, 0, _header(index) + _link_info(kind, data), what)

    def delete(self, index: int, *, what: str) -> None:
        """Delete a device: ``ip link delete DEVICE``."""
        self._netlink.change(nl.RTM_DELLINK, 0, _header(index), what)

    def add_address(self, index: int, address: str, *, what: str) -> None:
        """Give a device an address with its prefix length; IPv6 is not searched for duplicates.
        ``ip address add ADDRESS dev DEVICE nodad``."""
        body = _address(index, address, added=True)
        self._netlink.change(nl.RTM_NEWADDR, _CREATE | _EXCL, body, what)

    def delete_address(self, index: int, address: str, *, what: str) -> None:
        """Take an address from a device: ``ip address delete ADDRESS dev DEVICE``."""
        self._netlink.change(nl.RTM_DELADDR, 0, _address(index, address, added=False), what)


def vxlan_data(
    *,
    vni: int | None = None,
    lower: int | None = None,
    local: str = "",
    port: int | None = None,
    learning: bool | None = None,
    external: bool = False,
    gbp: bool = False,
) -> bytes:
    """Return the attributes of a vxlan device that are given.

    ``ip link add ... type vxlan id VNI dev LOWER local LOCAL dstport PORT [no]learning [external]
    [gbp]``, ``lower`` being an ifindex.
    """
    data = b""
    if vni is not None:
        data += nl.attr_u32(nl.VX_ID, vni)
    if lower is not None:
        data += nl.attr_u32(nl.VX_LINK, lower)
    if local:
        packed = ipaddress.ip_address(local).packed
        data += nl.attr(nl.VX_LOCAL if len(packed) == 4 else nl.VX_LOCAL6, packed)
    if learning is not None:
        data += nl.attr(nl.VX_LEARNING, bytes((learning,)))
    if port is not None:
        data += nl.attr(nl.VX_PORT, struct.pack("!H", port))
    if external:
        data += nl.attr(nl.VX_METADATA, b"\1")
    if gbp:
        data += nl.attr(nl.VX_GBP, b"")
    return data


def _header(index: int, up: bool | None = None) -> bytes:
    flags = nl.IFF_UP if up else 0
    return nl.IFINFOMSG.pack(0, 0, index, flags, 0 if up is None else nl.IFF_UP)


def _link_info(kind: str, data: bytes) -> bytes:
    return nl.attr(
        nl.IFLA_LINKINFO,
        nl.attr(nl.IFLA_INFO_KIND, kind.encode()) + nl.attr(nl.IFLA_INFO_DATA, data),
    )


def _address(index: int, text: str, *, added: bool) -> bytes:
    interface = ipaddress.ip_interface(text)
    # Our addresses are ours by lease: waiting a second for duplicates would only lose packets.
    flags = nl.IFA_F_NODAD if added and interface.version == 6 else 0
    header = nl.IFADDRMSG.pack(
        nl.af(interface.version), interface.network.prefixlen, flags, 0, index
    )
    packed = interface.packed
    return header + nl.attr(nl.IFA_LOCAL, packed) + nl.attr(nl.IFA_ADDRESS, packed)
