"""flannel's network configuration (``net-conf.json``) as one checked value.

The keys, their defaults and the conditions under which they are rejected are
those of flannel's ``pkg/subnet/config.go`` and of its vxlan backend. Where
flannel lets the kernel reject a number later (VNI, port, MTU, the length of
a device name), it is rejected here, with the key's name.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from msgspec import Struct
from msgspec.structs import astuple, replace

from flannel_dp.cluster.backend import BACKENDS, Backend
from flannel_dp.cluster.json_text import Section, read_json, shown
from flannel_dp.cluster.ranges import V4, V6, read_range
from flannel_dp.errors import ConfigError, NotYet, require

_VNI_MAX = (1 << 24) - 1  # RFC 7348 section 5: 24 bits
_IFNAME_MAX = 15  # IFNAMSIZ less the final NUL
_MTU_MAX = 65535
# The overlay device gets the MTU less the encapsulation (50 bytes over IPv4, 70 over IPv6), and
# the kernel wants at least 68 for IPv4 (RFC 791) and 1280 for IPv6 (RFC 8200) to be left of it.
_MTU_MIN_V4 = 68 + 50
_MTU_MIN_V6 = 1280 + 70

_WINDOWS_KEYS = frozenset({"macprefix", "name"})


class NetworkConfig(Struct, frozen=True, kw_only=True):
    """One cluster's network, checked and with flannel's defaults filled in.

    The fields of a family that is switched off are ``None`` (networks and
    addresses) or 0 (lengths), whatever the document says about it.
    ``unknown_keys`` names keys that are not read, most often
    a typo (``"Backend.DirectRoutng"``), ``names_forwarding`` whether the mode of
    forwarding was written or given and is not the default; both are no part of equality.
    """

    network: IPv4Network | None
    ipv6_network: IPv6Network | None
    enable_ipv4: bool
    enable_ipv6: bool
    enable_nftables: bool
    subnet_len: int
    subnet_min: IPv4Address | None
    subnet_max: IPv4Address | None
    ipv6_subnet_len: int
    ipv6_subnet_min: IPv6Address | None
    ipv6_subnet_max: IPv6Address | None
    backend: Backend
    unknown_keys: tuple[str, ...] = ()
    names_forwarding: bool = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NetworkConfig):
            return NotImplemented
        return self._known() == other._known()

    def __hash__(self) -> int:
        return hash(self._known())

    def _known(self) -> tuple[object, ...]:
        return astuple(replace(self, unknown_keys=(), names_forwarding=False))

    @property
    def device_v4(self) -> str:
        """Name of the IPv4 overlay device, ``flannel.<VNI>`` (flannel's vxlan backend)."""
        return self.backend.device_of(4)

    @property
    def device_v6(self) -> str:
        """Name of the IPv6 overlay device, ``flannel-v6.<VNI>`` (flannel's vxlan backend)."""
        return self.backend.device_of(6)

    def with_forwarding(self, forwarding: str | None) -> NetworkConfig:
        """Return the same network, forwarded by ``forwarding`` (one of FORWARDINGS; None: as it
        is).

        Raises ConfigError where that cannot go with the rest.
        """
        if forwarding is None:
            return self
        backend = replace(self.backend, forwarding=forwarding)
        if backend.refusal():
            raise ConfigError(
                f"--forwarding {forwarding}: {backend.refusal()}",
                hint="leave it out, or change the network configuration",
            )
        return replace(self, backend=backend, names_forwarding=True)

    @classmethod
    def from_json(cls, data: str | bytes, *, origin: str = "net-conf.json") -> NetworkConfig:
        """Read the JSON text of a configuration.

        Keys match without case and the last of several wins, as in Go's
        encoding/json; ``null`` means absent. ``origin`` names the text in
        errors.

        Raises ConfigError, which names ``origin``, the key (or line and
        column) and the remedy.
        """
        document = read_json(data, origin, ConfigError, hint="correct the JSON text at this place")
        return _build(Section(document, origin, ""))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> NetworkConfig:
        """Read a configuration file, flanneld's ``--net-config-path``.

        Raises NotYet when there is no such file, or nothing in it, as while it is written;
        ConfigError when it cannot be read, and as ``from_json``.
        """
        require(isinstance(path, (str, os.PathLike)), "path", path, "a file's path")
        origin = os.fspath(path)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else str(error)
            kind = NotYet if isinstance(error, FileNotFoundError) else ConfigError
            raise kind(
                f"{origin!r}: cannot read the network configuration: {reason}",
                hint="give the path of flannel's net-conf.json",
            ) from error
        if not data.strip():
            raise NotYet(
                f"{origin!r}: the network configuration is empty",
                hint="write flannel's net-conf.json there",
            )
        return cls.from_json(data, origin=origin)

    def to_json(self) -> str:
        """Return the configuration in flannel's spelling; ``from_json`` reads it back as an equal
        value.

        Every default is written out; the keys of a family that is off are left out.
        """
        document: dict[str, object] = {
            "EnableIPv4": self.enable_ipv4,
            "EnableIPv6": self.enable_ipv6,
            "EnableNFTables": self.enable_nftables,
        }
        if self.enable_ipv4:
            document |= {
                "Network": str(self.network),
                "SubnetLen": self.subnet_len,
                "SubnetMin": str(self.subnet_min),
                "SubnetMax": str(self.subnet_max),
            }
        if self.enable_ipv6:
            document |= {
                "IPv6Network": str(self.ipv6_network),
                "IPv6SubnetLen": self.ipv6_subnet_len,
                "IPv6SubnetMin": str(self.ipv6_subnet_min),
                "IPv6SubnetMax": str(self.ipv6_subnet_max),
            }
        backend = self.backend
        document["Backend"] = {
            **backend.options,
            "Type": backend.type,
            "VNI": backend.vni,
            "Port": backend.port,
            "MTU": backend.mtu,
            "Learning": backend.learning,
            "GBP": backend.gbp,
            "DirectRouting": backend.direct_routing,
            "Forwarding": backend.forwarding,
        }
        import json

        return json.dumps(document)


def _build(section: Section) -> NetworkConfig:
    enable_ipv4 = section.flag("EnableIPv4", True)
    enable_ipv6 = section.flag("EnableIPv6", False)
    enable_nftables = section.flag("EnableNFTables", False)
    if not (enable_ipv4 or enable_ipv6):
        section.fail(
            "EnableIPv4",
            "both EnableIPv4 and EnableIPv6 are false, so there is nothing to do",
            "set at least one of them to true",
        )
    v4 = read_range(section, V4, enable_ipv4)
    v6 = read_range(section, V6, enable_ipv6)
    inner = section.get("Backend")
    backend_section = Section({} if inner is None else inner, section.origin, "Backend.")
    outside = section.text("Forwarding")
    backend = _read_backend(backend_section, enable_ipv4, enable_ipv6, outside)
    named = bool(outside or backend_section.text("Forwarding"))
    unknown = section.unknown()
    unknown += [f"Backend.{key}" for key in backend_section.unknown(_WINDOWS_KEYS)]
    return NetworkConfig(
        network=v4.network,
        ipv6_network=v6.network,
        enable_ipv4=enable_ipv4,
        enable_ipv6=enable_ipv6,
        enable_nftables=enable_nftables,
        subnet_len=v4.length,
        subnet_min=v4.first,
        subnet_max=v4.last,
        ipv6_subnet_len=v6.length,
        ipv6_subnet_min=v6.first,
        ipv6_subnet_max=v6.last,
        backend=backend,
        unknown_keys=tuple(unknown),
        names_forwarding=named,
    )


def _read_backend(
    section: Section, enable_ipv4: bool, enable_ipv6: bool, outside: str | None
) -> Backend:
    """Read the Backend object; ``outside`` is a Forwarding beside it instead of in it."""
    written = section.text("Type")
    have = " or ".join(f'{{"Type": "{name}"}}' for name in reversed(BACKENDS))
    if not written:
        # flannel takes "udp" when Backend is absent, although its manual says vxlan.
        section.fail(
            "Type",
            "no backend is named (flannel would take its udp backend, which does not exist here)",
            f'write "Backend": {have}',
        )
    kind = written.lower()
    if kind not in BACKENDS:
        section.fail("Type", f"backend {shown(written)} is not supported", f"use {have}")
    vni = section.number("VNI", 1, 0, _VNI_MAX)
    port = section.number("Port", 0, 0, 65535)
    mtu = section.number("MTU", 0, 0, _MTU_MAX)
    learning = section.flag("Learning", False)
    gbp = section.flag("GBP", False)
    direct_routing = section.flag("DirectRouting", False)
    forwarding = (section.text("Forwarding") or outside or "kernel").lower()
    backend = Backend(
        type=kind,
        vni=vni,
        port=port,
        mtu=mtu,
        learning=learning,
        gbp=gbp,
        direct_routing=direct_routing,
        forwarding=forwarding,
        options={key: section.written[key] for key in section.unknown()},
    )
    families = (4,) * enable_ipv4 + (6,) * enable_ipv6
    for family in [*backend.devices(families)][-1:]:  # the longer name, and the larger minimum
        _check_device(section, backend, family)
    if backend.refusal():
        section.fail("Forwarding", backend.refusal(), 'write "kernel", or leave it out')
    return backend


def _check_device(section: Section, backend: Backend, family: int) -> None:
    """Fail for a device name or an MTU that the kernel would reject."""
    name = backend.device_of(family)
    if len(name) > _IFNAME_MAX:
        most = 9999 if family == 6 else 9_999_999
        section.fail(
            "VNI",
            f"{backend.vni} makes the device name {name!r}, longer than the {_IFNAME_MAX}"
            " characters the kernel allows",
            f"use a VNI of at most {most}",
        )
    least = _MTU_MIN_V6 if family == 6 else _MTU_MIN_V4
    if 0 < backend.mtu < least:
        hint = f"use 0 for the underlay's own MTU, or at least {least}"
        section.fail("MTU", f"{backend.mtu} leaves too little for IPv{family} in the tunnel", hint)


def devices_of(config: NetworkConfig) -> dict[int, str]:
    """Return the vxlan device of each family by number: ``flannel.<VNI>``, ``flannel-v6.<VNI>``.

    Where an eBPF program forwards, that of the first family is for both; in host-gw there is
    none.
    """
    return config.backend.devices(families_of(config))


def device_name(config: NetworkConfig, family: int) -> str:
    """Return the name of one family's vxlan device, the one that it would have included."""
    return devices_of(config).get(family, config.backend.device_of(family))


def other_devices(config: NetworkConfig) -> tuple[str, ...]:
    """Return the devices that this node has, or would have in another mode: each would block ours,
    and all are locked."""
    return tuple(config.backend.device_of(family) for family in families_of(config))


def network_of(config: NetworkConfig, family: int) -> str:
    """Return the pod network of one family as text."""
    return str(config.network if family == 4 else config.ipv6_network)


def families_of(config: NetworkConfig) -> tuple[int, ...]:
    """Return the families that are switched on, 4 before 6."""
    return (4,) * config.enable_ipv4 + (6,) * config.enable_ipv6
