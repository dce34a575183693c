"""The vxlan device that flannel's ``Backend`` object asks for, and its MTU."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from flannel_dp.cluster.network import NetworkConfig, devices_of, network_of

# What one inner packet grows by on the underlay, less the outer Ethernet header, which is
# not counted in the underlay's MTU either (RFC 7348 section 5).
INNER_ETHERNET: Final = 14
VXLAN_HEADER: Final = 8
UDP_HEADER: Final = 8
IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
OVERHEAD_IPV4: Final = IPV4_HEADER + UDP_HEADER + VXLAN_HEADER + INNER_ETHERNET
OVERHEAD_IPV6: Final = IPV6_HEADER + UDP_HEADER + VXLAN_HEADER + INNER_ETHERNET


class VxlanDevice(Struct, frozen=True):
    """The desired vxlan device.

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

    ``limit`` is the route on the path to the peers that the MTU comes of, "" where it comes of the
    interface or of the configuration.
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
    limit: str = ""

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


def device(
    config: NetworkConfig,
    family: int,
    *,
    lower: int,
    lower_mtu: int,
    local: str,
    subnet: str,
    mac: str,
    limit: str = "",
) -> VxlanDevice:
    """Return the vxlan device of one family, on the external interface ``lower`` (ifindex).

    Where a program forwards, both families have the same one, with an MTU that suits both.

    ``local`` is the node's public address, ``subnet`` its subnet, whose first
    address the device gets as /32 or /128 (no broadcast, no connected route).
    """
    backend, devices = config.backend, devices_of(config)
    name = devices[family]
    # An MTU that suits the tunnels of all families that share the device.
    under = max(number for number, one in devices.items() if one == name)
    return VxlanDevice(
        name=name,
        vni=backend.vni,
        lower=lower,
        local=local,
        port=backend.effective_port,
        mtu=overlay_mtu(backend.mtu or lower_mtu, under),
        mac=mac,
        address=f"{subnet.partition('/')[0]}/{32 if family == 4 else 128}",
        network=network_of(config, family),
        learning=backend.learning,
        gbp=backend.gbp,
        external=backend.collect_metadata,
        limit="" if backend.mtu else limit,
    )
