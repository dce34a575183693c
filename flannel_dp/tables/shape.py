"""Entries as plain dicts, in the shape in which ``ip -j`` and ``bridge -j`` print them.

Keys and values are theirs, devices are names. What an entry of ours does not know is left out: of
a route by a nexthop object the gateway, which ``ip`` takes from the object, and of routes
``scope``, ``prefsrc`` and ``pref``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flannel_dp.tables.describe import protocol_name
from flannel_dp.tables.entries import (
    BLACKHOLE,
    TABLE_MAIN,
    UNICAST,
    Entry,
    Fdb,
    Neighbour,
    Nexthop,
    Peer,
    Route,
)

#: The states of neighbours and FDB entries (linux/neighbour.h), as ``ip neigh`` has them.
_STATES = (
    *("INCOMPLETE", "REACHABLE", "STALE", "DELAY"),
    *("PROBE", "FAILED", "NOARP", "PERMANENT"),
)
_PERMANENT, _NOARP, _REACHABLE, _STALE = 0x80, 0x40, 0x02, 0x04

#: Routes that do not forward (linux/rtnetlink.h), as ``ip route`` has them.
_TYPES = {
    **{2: "local", 3: "broadcast", 4: "anycast", 5: "multicast"},
    **{BLACKHOLE: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"},
}


def entry_dict(entry: Entry, names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return an entry as ``ip -j neigh``, ``bridge -j fdb``, ``ip -j nexthop`` or ``ip -j route``
    show it; ``names`` are the devices by ifindex (default: ``if7`` for the device 7).

    A peer in a BPF map, of which no tool of iproute2 knows, is a dict of its fields.
    """
    known = names or {}
    if isinstance(entry, Neighbour):
        return _without_empty(_neighbour(entry, known), "state")
    if isinstance(entry, Fdb):
        return _without_empty(_fdb(entry, known), "flags", "state")
    if isinstance(entry, Nexthop):
        return _without_empty(_nexthop(entry, known), "flags")
    if isinstance(entry, Peer):
        return dict(entry._asdict())
    # The flags of a route by a nexthop object are the object's.
    return _without_empty(_route(entry, known), *(() if entry.nexthop else ("flags",)))


def _without_empty(found: dict[str, Any], *kept: str) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value or key in kept}


def _device(index: int, names: Mapping[int, str]) -> str:
    return names.get(index, f"if{index}") if index else ""


def _words(other: str) -> list[str]:
    return other.split(", ") if other else []


def _neighbour(entry: Neighbour, names: Mapping[int, str]) -> dict[str, Any]:
    return {
        "dst": entry.address,
        "dev": _device(entry.device, names),
        "lladdr": entry.mac,
        "state": [word for bit, word in enumerate(_STATES) if entry.state >> bit & 1],
        # ip prints these flags as keys without a value
        **dict.fromkeys(_words(entry.other), True),
    }


def _fdb(entry: Fdb, names: Mapping[int, str]) -> dict[str, Any]:
    words = ((_PERMANENT, "permanent"), (_NOARP, "static"), (_STALE, "stale"), (_REACHABLE, ""))
    state = next((word for bit, word in words if entry.state & bit), f"state={entry.state:#x}")
    return {
        "mac": entry.mac,
        "ifname": _device(entry.device, names),
        "dst": entry.endpoint,
        "port": entry.port,
        "vni": entry.vni,
        "src_vni": entry.src_vni,
        "viaIf": _device(entry.via, names),
        "nhid": entry.nexthop,
        "vlan": entry.vlan,
        "flags": [
            *([] if entry.master else ["self"]),
            *(entry.flags.split(",") if entry.flags else ()),
            *_words(entry.other),
        ],
        "master": _device(entry.master, names),
        "state": state,
    }


def _nexthop(entry: Nexthop, names: Mapping[int, str]) -> dict[str, Any]:
    return {
        "id": entry.id,
        "gateway": entry.gateway,
        "dev": _device(entry.device, names),
        "protocol": protocol_name(entry.protocol),
        "flags": ["onlink"] if entry.onlink else [],
        **dict.fromkeys(_words(entry.other), True),
    }


def _route(entry: Route, names: Mapping[int, str]) -> dict[str, Any]:
    address, _, length = entry.prefix.partition("/")
    whole = length == ("128" if ":" in address else "32")
    return {
        "type": "" if entry.type == UNICAST else _TYPES.get(entry.type, str(entry.type)),
        "dst": "default" if length == "0" else address if whole else entry.prefix,
        "nhid": entry.nexthop,
        "gateway": entry.gateway,
        "dev": _device(entry.device, names),
        "table": "" if entry.table == TABLE_MAIN else str(entry.table),
        "protocol": protocol_name(entry.protocol),
        "metric": entry.metric,
        "tos": hex(entry.tos) if entry.tos else "",
        "flags": ["onlink"] if entry.onlink else [],
        **dict.fromkeys(_words(entry.other), True),
    }
