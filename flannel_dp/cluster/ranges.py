"""One family's keys of flannel's network configuration: network, subnet length, first and last
subnet.

Defaults and conditions are those of CheckNetworkConfig in flannel's ``pkg/subnet/config.go``.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Generic, Literal, TypeVar, cast

from msgspec import Struct

from flannel_dp.cluster.json_text import Section, shown

_Net = TypeVar("_Net", IPv4Network, IPv6Network)
_Addr = TypeVar("_Addr", IPv4Address, IPv6Address)


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


V4 = _FamilyNetwork(4, "Network", "IPv6Network", "", _masked_v4, IPv4Address, 32, 24)


V6 = _FamilyNetwork(6, "IPv6Network", "Network", "IPv6", _masked_v6, IPv6Address, 128, 64)


def read_range(
    section: Section, family: _FamilyNetwork[_Net, _Addr], on: bool
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
    section: Section, key: str, family: _FamilyNetwork[_Net, _Addr], prefix: int, written: int
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


def _read_network(section: Section, family: _FamilyNetwork[_Net, _Addr]) -> _Net | None:
    """Return a CIDR as Go's net.ParseCIDR takes it: a prefix length is a must, host bits are
    dropped."""
    key = family.network_key
    text = section.text(key)
    if text is None:
        return None
    address, slash, length = text.partition("/")
    if (":" in address) == (family.version == 4) and slash:
        hint = f"it belongs under {family.other_key}"
        section.fail(key, f"{shown(text)} is not an IPv{family.version} network", hint)
    try:
        if not (slash and length.isascii() and length.isdigit()) or "%" in text:
            raise ValueError(text)
        return family.parse_network(text)
    except ValueError:
        hint = f"write it like {_example(family)}"
        section.fail(key, f"{shown(text)} is not an IPv{family.version} network", hint)


def _read_address(section: Section, key: str, family: _FamilyNetwork[_Net, _Addr]) -> _Addr | None:
    text = section.text(key)
    if text is None:
        return None
    try:
        if "%" in text:
            raise ValueError(text)
        address = family.parse_address(text)
    except ValueError:
        hint = "write the first address of a subnet, without a prefix length"
        section.fail(key, f"{shown(text)} is not an IPv{family.version} address", hint)
    return address if int(address) else None


def _example(family: _FamilyNetwork[_Net, _Addr]) -> str:
    return "10.244.0.0/16" if family.version == 4 else "fd00:10:244::/48"
