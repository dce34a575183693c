"""An entry, a conflict and counts as text, in the words of ``ip`` and ``bridge``."""

from __future__ import annotations

from typing import Any

from flannel_dp.tables.entries import (
    BLACKHOLE,
    PROTOCOL,
    UNICAST,
    Entry,
    Fdb,
    Neighbour,
    Nexthop,
    Peer,
    Route,
)


def was(old: Entry | None, new: Entry, names: dict[int, str]) -> str:
    """Return the entry that is replaced; where it looks like the new one, the fields that
    differ."""
    if old is None:
        return ""
    text = describe(old, names)
    if text == describe(new, names):
        values = zip(old._fields, old, new, strict=True)
        text += "".join(f" {name} {_value(name, was)}" for name, was, now in values if was != now)
    return f"  (was {text})"


#: The states of neighbours and FDB entries (linux/neighbour.h), as ``ip neigh`` has them.
_STATES = ("incomplete", "reachable", "stale", "delay", "probe", "failed", "noarp", "permanent")


def _value(name: str, value: object) -> str:
    if name == "state" and isinstance(value, int):
        words = [word for bit, word in enumerate(_STATES) if value >> bit & 1]
        return ",".join(words) or "none"
    return str(value).lower() or "none"


def _device(index: int, names: dict[int, str]) -> str:
    return names.get(index, f"if{index}")


def device_of(entry: Entry, names: dict[int, str]) -> str:
    """Return the name of the device that an entry is on; "" where it is on none: a route by a
    nexthop object, a blackhole, a peer in a map. Ifindex 0 is a device that has yet to be made."""
    if isinstance(entry, Peer):
        return ""
    if isinstance(entry, Route) and not entry.device:
        on_device = not entry.nexthop and entry.type == UNICAST and entry.is_plain
        return _device(0, names) if on_device else ""
    return _device(entry.device, names)


def describe(entry: Entry, names: dict[int, str]) -> str:
    """Return one entry as ``ip`` or ``bridge`` would put it."""
    if isinstance(entry, Neighbour):
        extra = f" {entry.other}" if entry.other else ""
        device = _device(entry.device, names)
        return f"neighbour {entry.address} lladdr {entry.mac} dev {device}{extra}"
    if isinstance(entry, Fdb):
        where = f"nhid {entry.nexthop}" if not entry.endpoint and not entry.master else ""
        where = f"dst {entry.endpoint}" if entry.endpoint else where
        extra = "".join(
            f" {word} {value}"
            for word, value in (
                ("port", entry.port),
                ("vni", entry.vni),
                ("src_vni", entry.src_vni),
                ("via", entry.via),
                ("vlan", entry.vlan),
            )
            if value
        )
        bridge = f" master {_device(entry.master, names)}" if entry.master else ""
        flags = "".join(f" {one}" for one in (entry.flags.replace(",", " "), entry.other) if one)
        device = f"dev {_device(entry.device, names)}{bridge}"
        return " ".join(filter(None, ("fdb", entry.mac, where))) + f"{extra} {device}{flags}"
    if isinstance(entry, Nexthop):
        if entry.other:
            return f"nexthop {entry.id} {entry.other}"
        return f"nexthop {entry.id} via {entry.gateway} dev {_device(entry.device, names)}"
    if isinstance(entry, Peer):
        return f"peer {entry.prefix} behind {entry.endpoint} lladdr {entry.mac}"
    return f"route {entry.prefix} {_leads_to(entry, names)}"


def _leads_to(route: Route, names: dict[int, str]) -> str:
    device = "" if route.nexthop else device_of(route, names)
    words = (
        _TYPES.get(route.type, f"type {route.type}"),
        f"via {route.gateway}" if route.gateway else "",
        f"nhid {route.nexthop}" if route.nexthop else "",
        f"dev {device}" if device else "",
        "" if route.is_plain else route.other,
        f"mtu {route.mtu}" if route.mtu else "",
        f"metric {route.metric}" if route.metric not in (0, 1024) else "",
        f"proto {protocol_name(route.protocol)}" if route.protocol != PROTOCOL else "",
    )
    return " ".join(filter(None, words))


#: What a route does with packets (linux/rtnetlink.h), where it does not forward them.
_TYPES = {
    UNICAST: "",
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
    BLACKHOLE: "blackhole",
    7: "unreachable",
    8: "prohibit",
    9: "throw",
}


_PROTOCOLS = {2: "kernel", 3: "boot", 4: "static", 9: "ra", 12: "bird", 16: "dhcp", 186: "bgp"}


def protocol_name(number: int) -> str:
    """Return a route protocol as /etc/iproute2/rt_protos calls it."""
    return _PROTOCOLS.get(number, str(number))


def conflict_json(wanted: Entry, foreign: Entry, names: dict[int, str]) -> dict[str, Any]:
    """Return a conflict as plain values; ``wanted_dev`` and ``foreign_dev`` are the devices'
    names."""
    return {
        "table": type(wanted).__name__.lower(),
        "wanted": wanted._asdict(),
        "wanted_dev": device_of(wanted, names),
        "foreign": foreign._asdict(),
        "foreign_dev": device_of(foreign, names),
    }


def counts_text(counts: dict[str, dict[str, int]]) -> str:
    """Return counts per table, aligned, one line each; tables that hold nothing are left out."""
    shown = {kind: row for kind, row in counts.items() if any(row.values())}
    if not shown:
        return "nothing is there, nothing is wanted"
    words = list(next(iter(shown.values())))
    widths = {word: max(len(str(row[word])) for row in shown.values()) for word in words}
    return "\n".join(
        f"{kind + 's' if kind != 'fdb' else kind:<11}"
        + "  ".join(f"{row[word]:>{widths[word]}} {word}" for word in words)
        for kind, row in shown.items()
    )
