"""A vxlan device as it should be: its attributes, and where two of them come from."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from msgspec import Struct

# What one inner packet grows by on the underlay, less the outer Ethernet header, which is
# not counted in the underlay's MTU either (RFC 7348 section 5).
INNER_ETHERNET: Final = 14
VXLAN_HEADER: Final = 8
UDP_HEADER: Final = 8
IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
OVERHEAD_IPV4: Final = IPV4_HEADER + UDP_HEADER + VXLAN_HEADER + INNER_ETHERNET
OVERHEAD_IPV6: Final = IPV6_HEADER + UDP_HEADER + VXLAN_HEADER + INNER_ETHERNET

MACHINE_ID: Final = "/etc/machine-id"


class VxlanDevice(Struct, frozen=True):
    """A vxlan device as it should be.

    ``lower`` is the ifindex of the external interface, ``local`` the underlay address
    that tunnel packets are sent from; its family is the family of the tunnel. ``mtu`` is
    the device's own, overhead already taken off. ``address`` is the overlay address with
    its prefix length ("10.244.3.0/32"). ``network`` is the overlay network of the same
    family: other IPv4 addresses inside it are removed from the device and those outside
    are left, while of IPv6 all others but link-local ones are removed (flannel's
    EnsureV4AddressOnLink and EnsureV6AddressOnLink).

    ``external`` is collect-metadata mode: a program says of each packet where it goes, and
    one device carries both families. ``vni``, ``lower`` and ``local`` are the program's then;
    the device is on no interface and takes the packets of all VNIs.
    """

    name: str
    vni: int
    lower: int
    local: str
    port: int
    mtu: int
    mac: str
    address: str
    network: str
    learning: bool = False
    gbp: bool = False
    external: bool = False

    @property
    def underlay_family(self) -> int:
        """4 or 6: the IP version that carries the tunnel."""
        return 6 if ":" in self.local else 4

    @property
    def family(self) -> int:
        """4 or 6: the IP version of the overlay address."""
        return 6 if ":" in self.address else 4


def overlay_mtu(underlay_mtu: int, family: int) -> int:
    """Return the MTU left inside the tunnel; ``family`` (4 or 6) is the underlay's.

    50 bytes less over IPv4: inner Ethernet 14 + VXLAN 8 + UDP 8 + IPv4 20. 70 less over
    IPv6, whose header has 40. This is vxlan_headroom() of include/net/vxlan.h; flannel
    takes 50 off for both, and the kernel then corrects its IPv6 device.
    """
    return underlay_mtu - (OVERHEAD_IPV6 if family == 6 else OVERHEAD_IPV4)


def stable_mac(*parts: str) -> str:
    """Return a MAC that depends on ``parts`` alone: locally administered and unicast."""
    import hashlib  # loads OpenSSL, and most runs find the device made

    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()
    return bytes([digest[0] & 0xFC | 0x02, *digest[1:6]]).hex(":")


def default_mac(device: str, public_ip: str) -> str:
    """Return the MAC of this machine's ``device``, the same after every reboot.

    Made from /etc/machine-id (machine-id(5): hash it, do not show it), the device name
    and the node's public IP, which alone tells nodes apart where an image was cloned
    with its machine-id, or where a container has none.
    """
    machine = ""
    with suppress(OSError), open(MACHINE_ID, encoding="ascii", errors="replace") as file:
        machine = file.read().strip()
    return stable_mac("flannel-dp", machine, device, public_ip)
