"""The entries that belong in the kernel, made without the library's help, and those that
iproute2 shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from flannel_dp import Lease, Route
from flannel_dp.tables.entries import Entry
from tests.lib.leases import DEVICE, PROTOCOL, half
from tests.lib.waiting import wait_until

State = dict[str, set[Any]]


def expected(leases: Iterable[Lease], family: int, *, nexthops: bool = True) -> State:
    """The end state flannel would leave for these peers: one route via the subnet's first
    address, one permanent neighbour and one FDB entry each; IPv4 with nexthop objects."""
    state: State = {"route": set(), "neighbour": set(), "fdb": set(), "nexthop": set()}
    objects = nexthops and family == 4
    for lease in leases:
        net, underlay, lladdr = half(lease, family)
        gateway = net.partition("/")[0]
        state["route"].add((net, gateway, PROTOCOL, "object" if objects else "gateway"))
        state["neighbour"].add((gateway, lladdr))
        state["fdb"].add((lladdr, underlay))
        if objects:
            state["nexthop"].add((gateway, PROTOCOL, True))
    return state


def observed(host: Any, family: int) -> State:
    """What iproute2 shows on the vxlan device of a family; the kernel's own left out."""
    device = DEVICE[family]
    shown = host.ip_lists(
        family,
        f"link show {device}",
        f"nexthop show dev {device}",
        f"route show dev {device}",
        f"neigh show dev {device} nud permanent",
    )
    there, nexthops, shown_routes, neighbours = shown
    if not there:
        return {"route": set(), "neighbour": set(), "fdb": set(), "nexthop": set()}
    objects = {n["id"]: n for n in nexthops}
    routes = set()
    for route in shown_routes:
        if route["protocol"] == "kernel":
            continue
        if "onlink" not in route["flags"]:
            # A route to the gateway of one that the kernel would else reject, for a moment.
            via = ("not onlink", route["protocol"], str(route.get("gateway")))
        elif "nhid" in route:
            gateway = objects.get(route["nhid"], {}).get("gateway", "an object that came meanwhile")
            via = (gateway, route["protocol"], "object")
        else:
            via = (route["gateway"], route["protocol"], "gateway")
        routes.add((_with_length(route["dst"]), *via))
    return {
        "route": routes,
        "neighbour": {(n["dst"], n["lladdr"]) for n in neighbours},
        "fdb": {
            (f["mac"], f["dst"]) for f in host.bridge_json(f"fdb show dev {device}") if "dst" in f
        },
        "nexthop": {
            (n["gateway"], n["protocol"], "onlink" in n["flags"])
            for n in objects.values()
            if (":" in n["gateway"]) == (family == 6)
        },
    }


def places(conflicts: Iterable[tuple[Entry, Entry]]) -> list[str]:
    """The prefixes that conflict with routes of other programs, sorted."""
    return sorted(wanted.prefix for wanted, _ in conflicts if isinstance(wanted, Route))


def stranger(host: Any, name: str) -> None:
    """Make a device that has nothing to do with the overlay, up and with carrier, at rest: the
    kernel tells of carrier and link-local address some time after the device is up."""
    both = {name, f"{name}p"}
    host.ip(f"link add {name} type veth peer name {name}p")
    host.without_dad(*both)
    host.ip_batch("", *(f"link set {device} up" for device in sorted(both)))

    def at_rest() -> bool:
        found = [link for link in host.ip_json("address show") if link["ifname"] in both]
        return all(
            link["operstate"] == "UP" and any(a.get("scope") == "link" for a in link["addr_info"])
            for link in found
        )

    wait_until(at_rest)


def has_device(host: Any, family: int) -> bool:
    return any(link["ifname"] == DEVICE[family] for link in host.ip_json("link show"))


def ifindex(host: Any, device: str) -> int:
    return int(host.ip_json(f"link show {device}")[0]["ifindex"])


def _with_length(prefix: str) -> str:
    if prefix == "default" or "/" in prefix:
        return prefix
    return f"{prefix}/{128 if ':' in prefix else 32}"


def everything(host: Any, *but: str) -> list[str]:
    """All state of a host's namespace as sorted lines of text; lines that name one of the
    devices ``but`` are left out, and so are counters and ages.

    The kernel makes the local route to an IPv6 address some time after its device came up, when
    duplicate address detection ends or is found to be off; that is waited for.
    """
    lines: list[str] = []
    left_out = {*but}

    def settled() -> bool:
        lines[:] = _everything(host)
        carrier = {match[1] for line in lines if (match := _CARRIER.match(line))}
        local = {(match[1], match[2]) for line in lines if (match := _LOCAL_ROUTE.match(line))}
        addresses = {(m[2], m[1]) for line in lines if (m := _IPV6_ADDRESS.match(line))}
        return all(one in local for one in addresses if one[1] in carrier)

    wait_until(settled)
    return sorted(
        line
        for line in lines
        if not _ASYNCHRONOUS.search(line) and (not but or left_out.isdisjoint(_names(line)))
    )


def _everything(host: Any) -> list[str]:
    shown = (
        host.ip("-6 -d rule show"),
        host.ip_batch(  # rules of IPv4, all else of both families
            "-d -o",
            *("route show table all", "rule show", "nexthop show", "link show", "address show"),
            *("neigh show nud permanent", "neigh show nud noarp", "neigh show proxy"),
        ),
        host.bridge("-d fdb show"),
    )
    return [line.strip() for text in shown for line in text.splitlines()]


_CARRIER = re.compile(r"^\d+: ([^:@]+)[@:].*\bLOWER_UP\b")
_LOCAL_ROUTE = re.compile(r"^local (\S+) dev (\S+) table local")
_IPV6_ADDRESS = re.compile(r"^\d+: (\S+) +inet6 (?!fe80:)([0-9a-f:]+)/\d+ (?!.*dadfailed)")

#: What the kernel adds some time after a link went up: link-local and multicast state.
_ASYNCHRONOUS = re.compile(r"\b(fe80:|ff[0-9a-f]{2}:|224\.0\.0\.|33:33:|01:00:5e:)")


def _names(line: str) -> list[str]:
    return [word.rstrip(":").partition("@")[0] for word in line.split()]
