"""The backend of a network: how packets get to peers, and what follows from that.

========  =============================================  ==================  =============
mode      a packet to a peer takes                       vxlan devices       VTEP MAC
========  =============================================  ==================  =============
vxlan     a route, a neighbour and an FDB entry of       one of each family  in each lease
          each peer
ebpf      one route for all, and a map of peers          one for both        in each lease
host-gw   a route to the peer's own address              none                none
========  =============================================  ==================  =============

``Backend.mode`` is the one place that tells them apart. The rest of the package takes values from
here, or has one object for each mode (node/placing.py, resources/peers/layouts.py,
composition.py) and asks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from msgspec import Struct, field
from msgspec.structs import replace

from flannel_dp._core import parse_mac
from flannel_dp.cluster.lease import BackendData
from flannel_dp.errors import ConfigError, require

BACKENDS = ("host-gw", "vxlan")
"""The backend types that exist here, sorted."""

FORWARDINGS = ("kernel", "ebpf")
"""Who forwards to peers of the vxlan backend: routes and entries of the kernel's own tables, or
a program on the device that looks them up in one map."""

DEFAULT_PORT = 8472
"""The UDP port the Linux vxlan driver takes when none is given (drivers/net/vxlan)."""

Mode: TypeAlias = Literal["vxlan", "ebpf", "host-gw"]


class Backend(Struct, frozen=True, kw_only=True):
    """The ``Backend`` object of the configuration.

    ``type`` is lower case. ``port`` and ``mtu`` are 0 when the kernel's port
    and the underlay's MTU are meant; ``mtu`` is the *underlay's* MTU in bytes,
    as flannel reads it, the overlay device gets less. ``forwarding`` is one of
    FORWARDINGS, and a key of our own that flanneld passes over. ``options`` holds keys
    of the object that none of our backends reads, as they were written.
    """

    type: str
    vni: int = 1
    port: int = 0
    mtu: int = 0
    learning: bool = False
    gbp: bool = False
    direct_routing: bool = False
    forwarding: str = "kernel"
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ConfigError, which names the parameter, for values that it does not take."""
        require(self.type in BACKENDS, "type", self.type, " or ".join(BACKENDS))
        for name, most in (("vni", 0xFFFFFF), ("port", 0xFFFF), ("mtu", 0xFFFF)):
            value = getattr(self, name)
            fits = isinstance(value, int) and 0 <= value <= most
            require(fits, name, value, f"a number up to {most}")

    def __hash__(self) -> int:  # options can be anything, a list for one
        return hash((self.type, self.vni, self.port, self.mtu, self.forwarding))

    @property
    def effective_port(self) -> int:
        """The UDP port in use: ``port``, or the kernel's default 8472 when it is 0."""
        return self.port or DEFAULT_PORT

    @property
    def mode(self) -> Mode:
        """How packets get to peers: "vxlan", "ebpf" or "host-gw"."""
        if self.type != "vxlan":
            return "host-gw"
        return "ebpf" if self.forwarding == "ebpf" else "vxlan"

    @property
    def uses_ebpf(self) -> bool:
        """Whether an eBPF program forwards to the peers."""
        return self.mode == "ebpf"

    # ---- what follows from the mode

    @property
    def needs_mac(self) -> bool:
        """Whether the lease of a peer has to name a VTEP MAC."""
        return self.mode != "host-gw"

    def takes_mac(self, text: str) -> bool:
        """Return whether a peer's lease may have this as its VTEP MAC."""
        if not self.needs_mac:
            return True
        try:
            parse_mac(text)
        except ValueError:
            return False
        return True

    @property
    def collect_metadata(self) -> bool:
        """Whether the vxlan devices are in collect-metadata mode (``ip link ... external``)."""
        return self.mode == "ebpf"

    @property
    def routes_directly(self) -> bool:
        """Whether each peer has a path of its own, as it may be reached on the underlay: those
        on-link with DirectRouting, all in host-gw."""
        return self.direct_routing or self.mode == "host-gw"

    def peers_by_path(self, count: int, direct: int) -> dict[str, int]:
        """Return how many of ``count`` peers are reached on which path, ``direct`` of them on the
        underlay with DirectRouting."""
        if self.mode == "host-gw":
            return {"host-gw": count}
        if self.mode == "vxlan":
            return {"tunnel": count - direct, "direct": direct}
        return dict([("ebpf", count - direct), *[("direct", direct)] * self.routes_directly])

    def devices(self, families: Sequence[int]) -> dict[int, str]:
        """Return the vxlan device that each family has, by number; empty in host-gw."""
        if self.mode == "host-gw":
            return {}
        shared = self.mode == "ebpf"
        return {n: self.device_of(families[0] if shared else n) for n in families}

    def device_of(self, family: int) -> str:
        """Return flannel's name for the device of one family: ``flannel.<VNI>``, or
        ``flannel-v6.<VNI>``."""
        return f"flannel.{self.vni}" if family == 4 else f"flannel-v6.{self.vni}"

    def carriers(self, device: Sequence[str], uplink: str) -> list[str]:
        """Return the devices that packets to peers leave by: the vxlan ``device`` of a family
        (none in host-gw), and the external interface where peers are reached on it."""
        return [*device, *[uplink] * self.routes_directly]

    def routed(self, network: str, subnet: str) -> str:
        """Return the prefix of the route that leads to a peer: with a program one for the whole
        ``network``, else one for the peer's ``subnet``."""
        return network if self.mode == "ebpf" else subnet

    def data(self, mac: str) -> BackendData | None:
        """Return what a lease carries for one family; None where that is nothing."""
        return BackendData(self.vni, mac) if self.needs_mac else None

    def in_other_mode(self) -> Backend:
        """Return the same network's other mode of forwarding, kernel or ebpf."""
        return replace(self, forwarding="kernel" if self.mode == "ebpf" else "ebpf")

    def need_tunnel(self, what: str, hint: str) -> None:
        """Raise ConfigError for an option that is about the tunnel where there is none."""
        if self.mode == "host-gw":
            raise ConfigError(f"{what}, and this network has none", hint=hint)

    def refusal(self) -> str:
        """Return why ``forwarding`` cannot go with the rest, "" where it can."""
        if self.forwarding not in FORWARDINGS:
            return f"{self.forwarding!r} is not one of {', '.join(FORWARDINGS)}"
        if self.forwarding == "ebpf" and self.type != "vxlan":
            return f"the {self.type} backend has no tunnel that a program could forward into"
        if self.forwarding == "ebpf" and (self.gbp or self.learning):
            key = "GBP" if self.gbp else "Learning"
            return f"{key} is not possible on a device in collect-metadata mode"
        return ""
