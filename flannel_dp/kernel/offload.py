"""What a device leaves to the hardware behind it: ``ethtool -k DEVICE``, ``ethtool -K DEVICE``.

Functions work in the network namespace of the thread that calls them. What is switched off is in
the device's alias (``ip link show``), so that it goes with the device and can be switched on again.
Source of the layouts: include/uapi/linux/{ethtool,sockios,if,if_link}.h.
"""

from __future__ import annotations

import fcntl
import logging
import socket
import struct
from collections.abc import Iterable

from flannel_dp.errors import kernel_error
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.kernel.socket import NetlinkSocket

#: Of a device: the checksums of what it sends, and cutting of what is longer than a packet. Without
#: the first the kernel does not leave the second to it.
CHECKSUM, SEGMENTS = "tx-checksum-ip-generic", "tcp-segmentation-offload"

log = logging.getLogger(__name__)

_SIOCETHTOOL = 0x8946
_GET, _SET = {CHECKSUM: 0x16, SEGMENTS: 0x1E}, {CHECKSUM: 0x17, SEGMENTS: 0x1F}
_IFLA_IFALIAS = 20
_MARK = "flannel-dp: off: "


def is_on(device: str, feature: str) -> bool:
    """Return whether a device has a feature on: ``ethtool -k DEVICE``. KernelError."""
    return bool(_ask(device, _GET[feature], 0, f"read {feature} of {device}"))


def switch_off(device: str, feature: str) -> None:
    """Switch a feature off, ``ethtool -K DEVICE FEATURE off``, and note it in the device's alias,
    after what another program has there. KernelError; NotPermitted without CAP_NET_ADMIN."""
    _ask(device, _SET[feature], 0, f"switch off {feature} of {device}")
    with _Aliases() as aliases:
        alias = aliases.read(device)
        off = {*_noted(alias), feature}
        aliases.write(device, alias.partition(_MARK)[0] + _MARK + " ".join(sorted(off)))


def switch_on_again(device: str) -> tuple[str, ...]:
    """Undo ``switch_off``, by the device's alias; return which features are on again, () where
    there is no such device. KernelError."""
    if device not in (name for _, name in socket.if_nameindex()):
        return ()
    with _Aliases() as aliases:
        alias = aliases.read(device)
        found = _noted(alias)
        for feature in found:
            _ask(device, _SET[feature], 1, f"switch on {feature} of {device}")
        if found:
            aliases.write(device, alias.partition(_MARK)[0])
    return found


def all_on_again(netns: NetNS, devices: Iterable[str]) -> None:
    """Undo ``switch_off`` of these devices, as far as they exist in a namespace. KernelError."""
    for device in devices:
        for feature in call_in_netns(netns, switch_on_again, device):
            log.info(
                "Switched on %(feature)s of %(device)s again",
                {"feature": feature, "device": device},
            )


def _noted(alias: str) -> tuple[str, ...]:
    return tuple(word for word in alias.partition(_MARK)[2].split() if word in _SET)


class _Aliases(NetlinkSocket):
    """Read and write ``ip link set DEVICE alias TEXT``."""

    def read(self, device: str) -> str:
        what = f"look up device {device}"
        body = nl.IFINFOMSG.pack(0, 0, socket.if_nametoindex(device), 0, 0)
        for _, data in self._ask(nl.RTM_GETLINK, 0, body, what):
            found = nl.attributes(data, nl.IFINFOMSG.size, what).get(_IFLA_IFALIAS, b"")
            return found.rstrip(b"\0").decode(errors="replace")
        return ""

    def write(self, device: str, alias: str) -> None:
        body = nl.IFINFOMSG.pack(0, 0, socket.if_nametoindex(device), 0, 0)
        body += nl.attr(_IFLA_IFALIAS, alias.encode())
        self.change(nl.RTM_NEWLINK, 0, body, f"set the alias of {device}")


def _ask(device: str, command: int, value: int, what: str) -> int:
    """Run one command of ethtool that takes or gives a number."""
    import ctypes

    cell = ctypes.create_string_buffer(struct.pack("=II", command, value), 8)
    request = struct.pack("16sP", nl.name_bytes(device), ctypes.addressof(cell)).ljust(40, b"\0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            fcntl.ioctl(asked, _SIOCETHTOOL, request)
        except OSError as error:
            raise kernel_error(error.errno or 0, what) from error
    return int(struct.unpack("=II", cell.raw)[1])
