"""Arguments as callers have them, made into what the tables take.

A device is an ifindex or a name, an address a text, an ``ipaddress`` object or packed bytes, a MAC
a text in any of the usual spellings or six bytes. Loaded where a value is not in the tables' own
form yet: the way of a sync never comes here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
)
from socket import if_nametoindex
from typing import Any, TypeAlias

from flannel_dp.errors import ConfigError, NotYet, require, shown
from flannel_dp.tables.entries import Fdb, Neighbour, Nexthop, Peer, Route, Scope

Device: TypeAlias = int | str
Address: TypeAlias = str | bytes | IPv4Address | IPv6Address
Prefix: TypeAlias = str | IPv4Network | IPv6Network | IPv4Address | IPv6Address
Mac: TypeAlias = str | bytes

_DEVICE = "an ifindex or the name of a device"
_ADDRESS = "an IP address: a text, an ipaddress object, or 4 or 16 bytes"
_PREFIX = "a prefix such as 10.244.7.0/24, or an ipaddress network"
_MAC = "a MAC address: 02:00:00:00:00:07, 02-00-00-00-00-07, 0200.0000.0007, or 6 bytes"

_LENGTH = re.compile("/(0|[1-9][0-9]*)$")

#: The spellings of a MAC: with colons, dashes, dots between four digits, and nothing.
_MACS = tuple(
    re.compile(text)
    for text in (
        "[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}",
        "[0-9a-fA-F]{2}(-[0-9a-fA-F]{2}){5}",
        r"[0-9a-fA-F]{4}(\.[0-9a-fA-F]{4}){2}",
        "[0-9a-fA-F]{12}",
    )
)

#: Fields of fewer than 32 bits.
_BITS = {"tos": 8, "protocol": 8, "type": 8, "mtu": 16, "port": 16, "state": 16, "vlan": 12}

_FDB = {"device": "device", "mac": "mac", "endpoint": "address?", "via": "device"}
_FDB["master"] = "device"

#: The fields of each kind of entry that are no plain numbers.
_FIELDS: dict[str, tuple[type[Any], dict[str, str]]] = {
    "neighbour": (Neighbour, {"device": "device", "address": "address", "mac": "mac"}),
    **dict.fromkeys(("fdb", "fdb_any"), (Fdb, _FDB)),
    "nexthop": (Nexthop, {"gateway": "address?", "device": "device"}),
    "route": (Route, {"prefix": "prefix", "gateway": "address?", "device": "device"}),
    "peer": (Peer, {"prefix": "prefix", "endpoint": "address", "mac": "mac"}),
}


def index_of(parameter: str, device: object, look_up: Callable[[str], int] = if_nametoindex) -> int:
    """Return the ifindex of a device that is given by its ifindex or its name.

    Raises NotYet where there is no such device, ConfigError for what names none; both name the
    ``parameter``. ``ip link show dev NAME``.
    """
    if isinstance(device, int) and not isinstance(device, bool):
        require(0 <= device <= 0x7FFFFFFF, parameter, device, f"{_DEVICE}, 0 or more")
        return device
    require(isinstance(device, str) and bool(device), parameter, device, _DEVICE)
    try:
        return look_up(str(device))
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        if isinstance(error, ConfigError):
            raise  # the namespace
        raise NotYet(
            f"{parameter} is {shown(device)}, and there is no such device in the network namespace",
            hint="'ip link show' lists those that are; netns names another namespace",
        ) from error


def address_of(parameter: str, value: object) -> str:
    """Return an address as text. ConfigError, which names ``parameter``, for what is none."""
    try:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return str(ip_address(bytes(value)))
        if isinstance(value, (IPv4Interface, IPv6Interface)):
            value = value.ip
        if isinstance(value, (str, IPv4Address, IPv6Address)) and "%" not in str(value):
            return str(ip_address(str(value)))
    except ValueError:
        pass
    raise _wrong(parameter, value, "an IP address", _ADDRESS)


def prefix_of(parameter: str, value: object) -> str:
    """Return a prefix as ADDRESS/LENGTH. ConfigError, which names ``parameter``, for what is none.

    An ``ipaddress`` address stands for the prefix of full length; as text the length is required.
    """
    try:
        if isinstance(value, (IPv4Network, IPv6Network)):
            return str(value)
        if isinstance(value, (IPv4Interface, IPv6Interface)):
            return str(value.network)
        if isinstance(value, (IPv4Address, IPv6Address)) or (
            isinstance(value, str) and _LENGTH.search(value)
        ):
            return str(ip_network(str(value), strict=False))
    except ValueError:
        pass
    raise _wrong(parameter, value, "a prefix", _PREFIX)


def mac_of(parameter: str, value: object) -> str:
    """Return a MAC as 02:00:00:00:00:07. ConfigError, which names ``parameter``, for what is
    none."""
    if isinstance(value, (bytes, bytearray, memoryview)) and len(bytes(value)) == 6:
        return bytes(value).hex(":")
    if isinstance(value, str) and any(form.fullmatch(value.strip()) for form in _MACS):
        return bytes.fromhex(re.sub("[^0-9a-fA-F]", "", value)).hex(":")
    raise _wrong(parameter, value, "a MAC address", _MAC)


def number_of(parameter: str, value: object) -> int:
    """Return a number of as many bits as the kernel has for it. ConfigError, which names
    ``parameter``, for what is none."""
    most = (1 << _BITS.get(parameter, 32)) - 1
    fits = isinstance(value, int) and 0 <= value <= most
    require(fits, parameter, value, f"a number from 0 to {most}")
    assert isinstance(value, int)
    return value


def plain_entry(kind: str, entry: object) -> tuple[Any, ...]:
    """Return an entry, or a tuple like one, with its values in the tables' own form.

    Raises ConfigError, which names the field. Names of devices are those of the caller's namespace.
    """
    named, forms = _FIELDS[kind]
    require(isinstance(entry, tuple), f"the {kind} entry", entry, f"a {named.__name__}")
    assert isinstance(entry, tuple)
    try:
        whole = entry if isinstance(entry, named) else named(*entry)
    except TypeError as error:
        raise ConfigError(
            f"the {kind} entry is {shown(entry)}",
            hint=f"a {named.__name__} has these values: {', '.join(named._fields)}",
        ) from error
    values = {name: getattr(whole, name) for name in named._fields}
    made: tuple[Any, ...] = named(
        **{name: _plain(name, forms, value) for name, value in values.items()}
    )
    return made


def _plain(name: str, forms: dict[str, str], value: object) -> object:
    parameter, form = name, forms.get(name, "")
    if form == "address?" and not value:
        return ""
    if form.startswith("address"):
        return address_of(parameter, value)
    if form == "prefix":
        return prefix_of(parameter, value)
    if form == "mac":
        return mac_of(parameter, value)
    if form == "device":
        return index_of(parameter, value)
    if name in ("other", "flags"):
        return value
    return number_of(parameter, value)


def plain_scope(scope: Any) -> Scope:
    """Return a scope with its values in the kernel's own form: 4 and 6 for a family as well, a
    device by its name (in the caller's namespace), ``within`` as an ipaddress network.

    Raises ConfigError, which names the field.
    """
    require(isinstance(scope, tuple), "the scope", scope, "a Scope")
    family = scope.family
    if scope.kind not in ("fdb", "fdb_any"):
        family = {4: 2, 6: 10}.get(family, family)
    within = prefix_of("within", scope.within) if scope.within else ""
    made: Scope = scope._replace(
        family=family, device=index_of("device", scope.device), within=within
    )
    return made


def _wrong(parameter: str, value: object, what: str, takes: str) -> ConfigError:
    text = f"{parameter} is not {what}: {shown(value)}"
    return ConfigError(text, hint=f"{parameter} takes {takes}")
