"""What is probed: peers, and where their probes leave this node and come back."""

from __future__ import annotations

import struct

from msgspec import Struct

from flannel_dp._core import (
    PROBE_FRAME,
    PROBE_LARGEST,
    PROBE_TUNNEL,
    ProbeOrigin,
    parse_address,
    parse_mac,
)

#: How the C unit takes one peer: MAC, padding, address.
_PACKED = struct.Struct("6s2x16s")


class Target(Struct, frozen=True):
    """One peer, in one address family.

    ``mac`` is where the frame goes: the peer's VTEP, or its interface on a direct path. ``vtep`` is
    the address of its vxlan device, "" where it has none. ``state`` says what is wrong with this
    node's own entries for it, "ok" for nothing.
    """

    subnet: str
    endpoint: str
    mac: str
    vtep: str = ""
    name: str = ""
    state: str = "ok"


class Place(Struct, frozen=True):
    """Where probes of one family and one path leave and come back.

    ``device`` with its ``ifindex``, ``mac`` and ``mtu`` is the vxlan device, or the external
    interface on a direct path; ``source`` is this node's address in the overlay, which peers have a
    route to, and ``local`` its address in the underlay. With a ``port``, that of VXLAN, probes are
    encapsulated here: a device in collect-metadata mode sends nothing without its program.
    ``external`` says of a vxlan device that it is one. ``lower`` is the ifindex of the device that
    tunnel packets leave by, 0 for unknown.
    """

    family: int
    device: str
    ifindex: int
    mac: str
    mtu: int
    source: str
    local: str
    vni: int = 0
    port: int = 0
    external: bool = False
    lower: int = 0

    @property
    def is_tunnel(self) -> bool:
        """Whether probes go through the tunnel; else over the underlay as they are."""
        return bool(self.port)

    @property
    def origin(self) -> ProbeOrigin:
        """The same for the C unit."""
        return ProbeOrigin(
            PROBE_TUNNEL if self.external else PROBE_FRAME,
            raw(self.source),
            ifindex=self.ifindex,
            mac=parse_mac(self.mac),
            local=raw(self.local) if self.external else b"",
            tunnel_port=self.port,
            vni=self.vni,
        )

    @property
    def largest(self) -> int:
        """The size of the largest probe: the device's MTU, or the most that a probe can have."""
        return min(self.mtu, PROBE_LARGEST)


def raw(address: str) -> bytes:
    """Return an address in network order: 4 or 16 bytes."""
    return parse_address(address)[1]


def packed(mac: str, address: str) -> bytes:
    """Return one peer as the C unit takes it."""
    return _PACKED.pack(parse_mac(mac or "00:00:00:00:00:00"), raw(address))
