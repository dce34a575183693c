"""flannel's network configuration (``net-conf.json``) as one checked value.

The keys, their defaults and the conditions under which they are rejected are
those of flannel's ``pkg/subnet/config.go`` and of its vxlan backend. Where
flannel lets the kernel reject a number later (VNI, port, MTU, the length of
a device name), it is rejected here, with the key's name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Generic, Literal, NoReturn, TypeVar, cast

from msgspec import Struct
from msgspec.structs import astuple, replace

from flannel_dp.cluster.backend import BACKENDS, Backend
from flannel_dp.errors import ConfigError, FlannelDPError, NotYet

_VNI_MAX = (1 << 24) - 1  # RFC 7348 section 5: 24 bits
_IFNAME_MAX = 15  # IFNAMSIZ less the final NUL
_MTU_MAX = 65535
# The overlay device gets the MTU less the encapsulation (50 bytes over IPv4, 70 over IPv6), and
# the kernel wants at least 68 for IPv4 (RFC 791) and 1280 for IPv6 (RFC 8200) to be left of it.
_MTU_MIN_V4 = 68 + 50
_MTU_MIN_V6 = 1280 + 70

_WINDOWS_KEYS = frozenset({"macprefix", "name"})

_Net = TypeVar("_Net", IPv4Network, IPv6Network)
_Addr = TypeVar("_Addr", IPv4Address, IPv6Address)


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
        return _build(_Section(document, origin, ""))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> NetworkConfig:
        """Read a configuration file, flanneld's ``--net-config-path``.

        Raises NotYet when there is no such file, or nothing in it, as while it is written;
        ConfigError when it cannot be read, and as ``from_json``.
        """
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
        return json.dumps(document)


def read_json(data: str | bytes, origin: str, error: type[FlannelDPError], *, hint: str) -> object:
    """Decode JSON text as strictly as Go's encoding/json does, and say where it is broken.

    The standard library's decoder is used and not a faster one because it
    hands over repeated keys (the last one must win, also among keys that
    differ in case only) and reports line and column. Objects come back as
    dicts ordered by the *last* occurrence of each key.

    Raises ``error`` (with ``hint``) naming ``origin``, line and column.
    """
    if not data.strip():
        raise error(f"{origin}: it is empty", hint=hint)
    try:
        text = data if isinstance(data, str) else data.decode()
        document: object = json.loads(
            text, object_pairs_hook=_last_wins, parse_constant=_no_constant
        )
        return _without_surrogates(document) if "\\ud" in text.lower() else document
    except json.JSONDecodeError as broken:
        place = f"line {broken.lineno}, column {broken.colno}"
        if broken.pos >= len(broken.doc.rstrip()):
            place += " (the end, so it is cut short)"
        raise error(f"{origin}: {place}: {broken.msg}", hint=hint) from broken
    except UnicodeDecodeError as broken:
        before = broken.object[: broken.start]
        line = before.count(b"\n") + 1
        column = broken.start - before.rfind(b"\n")
        message = f"{origin}: line {line}, column {column}: not UTF-8 text"
        raise error(message, hint=hint) from broken
    except RecursionError as broken:
        raise error(f"{origin}: its JSON is nested too deeply", hint=hint) from broken
    except ValueError as broken:  # NaN, Infinity, or a number of thousands of digits
        raise error(f"{origin}: {broken}", hint=hint) from broken


def _last_wins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            found.pop(key, None)
            found[key] = value
    return found


def _without_surrogates(value: object) -> object:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot, by U+FFFD, as Go does."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def fold_keys(document: Mapping[str, object]) -> dict[str, object]:
    """Return keys without case, ``null`` dropped: what Go's decoder would have stored.

    Later keys win over earlier ones that differ from them in case only; a
    ``null`` leaves what an earlier one said, as it does in Go.
    """
    return {key.casefold(): value for key, value in document.items() if value is not None}


class _Section:
    """One JSON object of the document: typed reads, and errors with the key's full name."""

    def __init__(self, document: object, origin: str, prefix: str) -> None:
        self.origin = origin
        self.prefix = prefix
        if not isinstance(document, dict):
            name = prefix.rstrip(".") or "the document"
            raise ConfigError(
                f"{origin}: {name}: expected an object, got {_shown(document)}",
                hint='write {"Key": value, ...}',
            )
        self.written: dict[str, object] = document
        self.values = fold_keys(document)
        self.read: set[str] = set()

    def get(self, key: str) -> object:
        """Return the value of ``key``, None when absent."""
        folded = key.casefold()
        self.read.add(folded)
        return self.values.get(folded)

    def fail(self, key: str, problem: str, hint: str) -> NoReturn:
        raise ConfigError(f"{self.origin}: {self.prefix}{key}: {problem}", hint=hint)

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        self.fail(key, f"expected a string, got {_shown(value)}", "put the value in quotes")

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        self.fail(
            key, f"expected true or false, got {_shown(value)}", "write true or false, unquoted"
        )

    def number(self, key: str, default: int, low: int, high: int) -> int:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            hint = "write the number without quotes, fraction and exponent"
            self.fail(key, f"expected a whole number, got {_shown(value)}", hint)
        if not low <= value <= high:
            hint = f"use a number from {low} to {high}"
            self.fail(key, f"{_shown(value)} is out of range", hint)
        return value

    def unknown(self, known: Iterable[str] = ()) -> list[str]:
        """Return the keys that were not read, in the order of the document."""
        seen = self.read.union(known)
        return [key for key in self.written if key.casefold() not in seen]


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _build(section: _Section) -> NetworkConfig:
    enable_ipv4 = section.flag("EnableIPv4", True)
    enable_ipv6 = section.flag("EnableIPv6", False)
    enable_nftables = section.flag("EnableNFTables", False)
    if not (enable_ipv4 or enable_ipv6):
        section.fail(
            "EnableIPv4",
            "both EnableIPv4 and EnableIPv6 are false, so there is nothing to do",
            "set at least one of them to true",
        )
    v4 = _read_range(section, _V4, enable_ipv4)
    v6 = _read_range(section, _V6, enable_ipv6)
    inner = section.get("Backend")
    backend_section = _Section({} if inner is None else inner, section.origin, "Backend.")
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
    section: _Section, enable_ipv4: bool, enable_ipv6: bool, outside: str | None
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
        section.fail("Type", f"backend {_shown(written)} is not supported", f"use {have}")
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


def _check_device(section: _Section, backend: Backend, family: int) -> None:
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


class _FamilyNetwork(Struct, Generic[_Net, _Addr], frozen=True):
    """What differs between the two families' keys."""

    version: Literal[4, 6]
    network_key: str
    other_key: str
    prefix: str
    parse_network: Callable[[str], _Net]
    parse_address: Callable[[str | int], _Addr]
    bits: int
    default_len: int


class _ConfiguredRange(Struct, Generic[_Net, _Addr], frozen=True):
    network: _Net | None = None
    length: int = 0
    first: _Addr | None = None
    last: _Addr | None = None


def _masked_v4(text: str) -> IPv4Network:
    return IPv4Network(text, strict=False)


def _masked_v6(text: str) -> IPv6Network:
    return IPv6Network(text, strict=False)


_V4 = _FamilyNetwork(4, "Network", "IPv6Network", "", _masked_v4, IPv4Address, 32, 24)
_V6 = _FamilyNetwork(6, "IPv6Network", "Network", "IPv6", _masked_v6, IPv6Address, 128, 64)


def _read_range(
    section: _Section, family: _FamilyNetwork[_Net, _Addr], on: bool
) -> _ConfiguredRange[_Net, _Addr]:
    """Return network, subnet length, first and last subnet of one family (CheckNetworkConfig)."""
    keys = [family.prefix + name for name in ("SubnetLen", "SubnetMin", "SubnetMax")]
    network = _read_network(section, family)
    written_len = section.number(keys[0], 0, 0, family.bits)
    first, last = (_read_address(section, key, family) for key in keys[1:])
    if not on:
        return _ConfiguredRange()
    if network is None or network.prefixlen == 0:
        section.fail(
            family.network_key,
            f"is required while EnableIPv{family.version} is true",
            f'write "{family.network_key}": "{_example(family)}"',
        )
    length = _subnet_length(section, keys[0], family, network.prefixlen, written_len)
    size = 1 << (family.bits - length)
    base = int(network.network_address)
    # The first subnet is left out: its network address would be an address of the overlay device
    # and the network's own at once.
    first = first or family.parse_address(base + size)
    last = last or family.parse_address(int(network.broadcast_address) + 1 - size)
    for key, address in zip(keys[1:], (first, last), strict=True):
        if address not in cast(Any, network):
            section.fail(key, f"{address} is not in {network}", f"choose a subnet of {network}")
        if int(address) % size:
            below = family.parse_address(int(address) - int(address) % size)
            problem = f"{address} is not on a /{length} boundary"
            section.fail(key, problem, f"use {below}, the start of the /{length} it is in")
    return _ConfiguredRange(network, length, first, last)


def _subnet_length(
    section: _Section, key: str, family: _FamilyNetwork[_Net, _Addr], prefix: int, written: int
) -> int:
    most = family.bits - 2
    if written == 0:
        if prefix > most - 2:
            problem = f"a /{prefix} is too small to give four nodes a subnet each"
            section.fail(family.network_key, problem, f"use a /{most - 2} or a shorter prefix")
        return family.default_len if prefix <= family.default_len - 2 else prefix + 2
    if written > most:
        problem = f"/{written} leaves no room for pods"
        section.fail(key, problem, f"use at most {most}")
    if written < prefix + 2:
        problem = f"a /{prefix} holds fewer than four subnets of /{written}"
        section.fail(key, problem, f"use at least {prefix + 2}, or a larger {family.network_key}")
    return written


def _read_network(section: _Section, family: _FamilyNetwork[_Net, _Addr]) -> _Net | None:
    """Return a CIDR as Go's net.ParseCIDR takes it: a prefix length is a must, host bits are
    dropped."""
    key = family.network_key
    text = section.text(key)
    if text is None:
        return None
    address, slash, length = text.partition("/")
    if (":" in address) == (family.version == 4) and slash:
        hint = f"it belongs under {family.other_key}"
        section.fail(key, f"{_shown(text)} is not an IPv{family.version} network", hint)
    try:
        if not (slash and length.isascii() and length.isdigit()) or "%" in text:
            raise ValueError(text)
        return family.parse_network(text)
    except ValueError:
        hint = f"write it like {_example(family)}"
        section.fail(key, f"{_shown(text)} is not an IPv{family.version} network", hint)


def _read_address(section: _Section, key: str, family: _FamilyNetwork[_Net, _Addr]) -> _Addr | None:
    text = section.text(key)
    if text is None:
        return None
    try:
        if "%" in text:
            raise ValueError(text)
        address = family.parse_address(text)
    except ValueError:
        hint = "write the first address of a subnet, without a prefix length"
        section.fail(key, f"{_shown(text)} is not an IPv{family.version} address", hint)
    return address if int(address) else None


def _example(family: _FamilyNetwork[_Net, _Addr]) -> str:
    return "10.244.0.0/16" if family.version == 4 else "fd00:10:244::/48"


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
