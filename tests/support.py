"""What the tests of DataPlane share: leases, an expectation made from them without the
library's help, what iproute2 shows, what the kernel announces, and steady traffic."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from flannel_dp import BackendData, DataPlane, Lease, NetworkConfig, Route
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.tables.entries import Entry
from tests.limits import LIMIT, wait_until

NETWORK = {4: "10.240.0.0/12", 6: "fd00:10::/32"}
DEVICE = {4: "flannel.1", 6: "flannel-v6.1"}
PROTOCOL = "138"

State = dict[str, set[Any]]


# ---- leases ----------------------------------------------------------------


def network_config(*families: int, **backend: Any) -> NetworkConfig:
    """A vxlan network of these families (default: both)."""
    families = families or (4, 6)
    document: dict[str, Any] = {
        "Backend": {"Type": "vxlan", **backend},
        "EnableIPv4": 4 in families,
        "EnableIPv6": 6 in families,
    }
    if 4 in families:
        document |= {"Network": NETWORK[4], "SubnetLen": 24}
    if 6 in families:
        document |= {"IPv6Network": NETWORK[6], "IPv6SubnetLen": 64}
    return NetworkConfig.from_json(json.dumps(document))


def address(family: int, number: int) -> str:
    """The first address of node ``number``'s subnet."""
    if family == 4:
        return f"10.{240 + (number >> 8)}.{number & 255}.0"
    return f"fd00:10:{number:x}::" if number else "fd00:10::"


def subnet(family: int, number: int) -> str:
    return f"{address(family, number)}/{24 if family == 4 else 64}"


def endpoint(family: int, number: int) -> str:
    """An underlay address that nobody has."""
    if family == 4:
        return f"198.18.{number >> 8}.{number & 255}"
    return f"2001:db8:1::{number:x}"


def mac(family: int, number: int) -> str:
    return f"02:00:00:{family:02x}:{number >> 8:02x}:{number & 255:02x}"


def peer(number: int, **changes: Any) -> Lease:
    """Node ``number`` of the cluster, in both families."""
    fields: dict[str, Any] = {
        "subnet": subnet(4, number),
        "ipv6_subnet": subnet(6, number),
        "public_ip": endpoint(4, number),
        "public_ipv6": endpoint(6, number),
        "backend_type": "vxlan",
        "backend_data": BackendData(1, mac(4, number)),
        "backend_v6_data": BackendData(1, mac(6, number)),
    }
    return Lease(**(fields | changes))


def peers(numbers: Iterable[int]) -> list[Lease]:
    return [peer(number) for number in numbers]


def lease_of(host: Any, number: int = 0) -> Lease:
    """The lease of a host of the test's network, as node ``number``."""
    return peer(number, public_ip=host.ipv4, public_ipv6=host.ipv6)


def plane(host: Any, *families: int, **options: Any) -> DataPlane:
    """A DataPlane of ``host`` (default: both families)."""
    options = {"iface": host.iface, "netns": host.ns} | options
    return DataPlane(network_config(*families), **options)


# ---- what should be there, and what is ---------------------------------------


def half(lease: Lease, family: int) -> tuple[str, str, str]:
    """``(subnet, endpoint, MAC)`` of one family."""
    data = lease.backend_data if family == 4 else lease.backend_v6_data
    assert data is not None
    if family == 4:
        return lease.subnet, lease.public_ip, data.vtep_mac
    return lease.ipv6_subnet, lease.public_ipv6, data.vtep_mac


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
        assert "onlink" in route["flags"], route
        if "nhid" in route:
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
    """The prefixes of routes whose place somebody else holds, sorted."""
    return sorted(wanted.prefix for wanted, _ in conflicts if isinstance(wanted, Route))


def stranger(host: Any, name: str) -> None:
    """Make a device that has nothing to do with the overlay, up and with carrier."""
    host.ip(f"link add {name} type veth peer name {name}p")
    host.ip(f"link set {name} up")
    host.ip(f"link set {name}p up")


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

    def settled() -> bool:
        lines[:] = _everything(host)
        carrier = {match[1] for line in lines if (match := _CARRIER.search(line))}
        local = {(match[1], match[2]) for line in lines if (match := _LOCAL_ROUTE.search(line))}
        addresses = {(m[2], m[1]) for line in lines if (m := _IPV6_ADDRESS.search(line))}
        return all(one in local for one in addresses if one[1] in carrier)

    wait_until(settled)
    return sorted(
        line
        for line in lines
        if not any(word in but for word in _names(line)) and not _ASYNCHRONOUS.search(line)
    )


def _everything(host: Any) -> list[str]:
    shown = (
        host.ip_batch("-4 -d", "route show table all", "rule show"),
        host.ip_batch("-6 -d", "route show table all", "rule show"),
        host.ip_batch(
            "-d -o",
            *("nexthop show", "link show", "address show", "neigh show nud permanent"),
            *("neigh show nud noarp", "neigh show proxy"),
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


# ---- what the kernel announces -------------------------------------------------


class Event(NamedTuple):
    """One notification. ``key`` is a prefix, an address, a MAC, an id or a device's name."""

    table: str
    deleted: bool
    device: int
    key: str


_TABLES = {16: "link", 20: "address", 24: "route", 28: "neighbour", 104: "nexthop"}
_AF_BRIDGE = 7
_GROUPS = (1, 3, 5, 7, 9, 11, 32)  # link, neighbour, addresses, routes, nexthops
_HEADS = {"link": 16, "address": 8, "route": 12, "neighbour": 12, "nexthop": 8}


class Monitor:
    """Everything that changes in a namespace while this is open, in order, like
    ``ip monitor`` and ``bridge monitor fdb``.

    The kernel queues a notification before the change returns to its author, so reading
    after the fact misses nothing; losing one (ENOBUFS) fails the test.

    One thing is left out. The kernel announces an IPv6 address, and the local route to it, from
    a work queue when duplicate address detection ends, which it also does where detection is off
    (``addrconf_dad_completed``): for an address that was there when this was opened, and was not
    written since, that is no change.
    """

    def __init__(self, host: Any) -> None:
        self._socket: socket.socket = call_in_netns(host.ns, self._listen)
        self._settled = call_in_netns(host.ns, _ipv6_addresses)

    @staticmethod
    def _listen() -> socket.socket:
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        so_rcvbufforce = 33
        listener.setsockopt(socket.SOL_SOCKET, so_rcvbufforce, 64 << 20)
        listener.bind((0, sum(1 << (group - 1) for group in _GROUPS)))
        listener.setblocking(False)
        return listener

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def events(self) -> list[Event]:
        """What happened since the last call."""
        found: list[Event] = []
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found
            while data:
                size, kind = struct.unpack_from("=IH", data)
                if not self._is_late(kind, data[16:size]):
                    found.append(_event(kind, data[16:size]))
                data = data[(size + 3) & ~3 :]

    def _is_late(self, kind: int, body: bytes) -> bool:
        """Tell whether this is the late word on an address that was there before."""
        if body[0] != socket.AF_INET6:
            return False
        if kind == _NEWADDR:
            address, written = _ipv6_address(body)
            return self._settled.get(address) == written
        if kind == _NEWROUTE and body[7] == _RTN_LOCAL:
            attrs = _attributes(body[_HEADS["route"] :])
            (oif,) = struct.unpack("=I", attrs[4])
            return (oif, attrs[1]) in self._settled
        return False

    def deleted(self, *tables: str) -> set[str]:
        """The keys of all deletions in ``tables`` since the last call."""
        return {e.key for e in self.events() if e.deleted and e.table in tables}


_NEWADDR, _GETADDR, _NEWROUTE, _RTN_LOCAL, _DUMP = 20, 22, 24, 2, 0x301


def _ipv6_address(body: bytes) -> tuple[tuple[int, bytes], int]:
    """Device and address of a message, and when it was last written, in 1/100 s since boot."""
    attrs = _attributes(body[_HEADS["address"] :])
    (index,) = struct.unpack_from("=I", body, 4)
    _, _, _, written = struct.unpack("=IIII", attrs[6])
    return (index, attrs[1]), written


def _ipv6_addresses() -> dict[tuple[int, bytes], int]:
    """All of this namespace, each with the time at which it was written."""
    found: dict[tuple[int, bytes], int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asking:
        asking.sendall(struct.pack("=IHHIIBxxxI", 24, _GETADDR, _DUMP, 1, 0, socket.AF_INET6, 0))
        while True:
            data = asking.recv(1 << 16)
            while data:
                size, kind = struct.unpack_from("=IH", data)
                if kind != _NEWADDR:  # NLMSG_DONE
                    return found
                address, written = _ipv6_address(data[16:size])
                found[address] = written
                data = data[(size + 3) & ~3 :]


def _event(kind: int, body: bytes) -> Event:
    table = _TABLES.get(kind & ~1 if kind < 100 else 104, str(kind))
    deleted = bool(kind & 1)
    attrs = _attributes(body[_HEADS.get(table, len(body)) :])
    if table == "route":
        family, length = body[0], body[1]
        dst = attrs.get(1, bytes(4 if family == socket.AF_INET else 16))
        (oif,) = struct.unpack("=I", attrs.get(4, bytes(4)))
        return Event(table, deleted, oif, f"{socket.inet_ntop(family, dst)}/{length}")
    if table == "neighbour":
        family, device = struct.unpack_from("=BxxxI", body)
        if family == _AF_BRIDGE:
            return Event("fdb", deleted, device, attrs[2].hex(":"))
        return Event(table, deleted, device, socket.inet_ntop(family, attrs[1]))
    if table == "nexthop":
        (number,) = struct.unpack("=I", attrs[1])
        (oif,) = struct.unpack("=I", attrs.get(5, bytes(4)))
        return Event(table, deleted, oif, str(number))
    if table == "link":
        (device,) = struct.unpack_from("=i", body, 4)
        return Event(table, deleted, device, attrs.get(3, b"").rstrip(b"\0").decode())
    if table == "address":
        (device,) = struct.unpack_from("=I", body, 4)
        raw = attrs.get(1, b"")
        family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
        return Event(table, deleted, device, socket.inet_ntop(family, raw))
    return Event(table, deleted, 0, "")


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        found[kind & 0x3FFF] = data[4:size]
        data = data[(size + 3) & ~3 :]
    return found


# ---- traffic ---------------------------------------------------------------------


class Pings:
    """ICMP echo requests from a namespace every ``interval`` seconds, on a thread, while
    this is open; ``lost`` is known afterwards."""

    _serial = iter(range(1, 1 << 16))

    def __init__(self, ns: str, target: str, interval: float = 0.01) -> None:
        self._v6 = ":" in target
        self._target, self._interval = target, interval
        self._mark = struct.pack(">HH", os.getpid() & 0xFFFF, next(self._serial))
        self._socket: socket.socket = call_in_netns(ns, self._open)
        self._stop = threading.Event()
        self._waiting: set[int] = set()
        self._errors: list[OSError] = []
        self.sent = self.answered = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def lost(self) -> int:
        """Requests that were refused or never answered."""
        return len(self._waiting) + len(self._errors)

    def _open(self) -> socket.socket:
        family = socket.AF_INET6 if self._v6 else socket.AF_INET
        protocol = socket.IPPROTO_ICMPV6 if self._v6 else socket.IPPROTO_ICMP
        return socket.socket(family, socket.SOCK_RAW, protocol)

    def __enter__(self) -> Pings:
        self._thread.start()
        self.await_answers(3)
        # What went before the way was found (neighbour discovery at either end) is no loss.
        self._waiting.clear()
        self._errors.clear()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        # Answers come in the order of the requests: with the last one's, all that came are in.
        deadline = time.monotonic() + LIMIT
        last = self.sent - 1
        while exc[0] is None and self._waiting and time.monotonic() < deadline:
            if last not in self._waiting:
                break
            self._receive(0.05)
        self._socket.close()

    def await_answers(self, count: int) -> None:
        """Return when ``count`` more requests were answered."""
        goal, deadline = self.answered + count, time.monotonic() + LIMIT
        while self.answered < goal:
            assert time.monotonic() < deadline, f"no answer from {self._target}: {self._errors}"
            time.sleep(0.002)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            self._send()
            due += self._interval
            while (left := due - time.monotonic()) > 0:
                self._receive(left)

    def _send(self) -> None:
        body = self._mark + struct.pack(">I", self.sent)
        kind = 128 if self._v6 else 8
        total = sum(struct.unpack(f">{len(body) // 2}H", body)) + (kind << 8)
        total = (total & 0xFFFF) + (total >> 16)
        check = 0 if self._v6 else ~(total + (total >> 16)) & 0xFFFF
        # The mark is the identifier and sequence number, the count is the payload.
        self._waiting.add(self.sent)
        self.sent += 1
        try:
            self._socket.sendto(struct.pack(">BBH", kind, 0, check) + body, (self._target, 0))
        except OSError as error:
            self._waiting.discard(self.sent - 1)
            self._errors.append(error)

    def _receive(self, timeout: float) -> None:
        if not select.select([self._socket], [], [], timeout)[0]:
            return
        data = self._socket.recv(4096)
        data = data if self._v6 else data[4 * (data[0] & 15) :]
        if data[0] == (129 if self._v6 else 0) and data[4:8] == self._mark:
            self._waiting.discard(struct.unpack(">I", data[8:12])[0])
            self.answered += 1


def pod(lab: Any, host: Any, number: int) -> str:
    """A namespace behind ``host`` with address 2 of node ``number``'s subnets; its name."""
    ns = str(lab.namespace())
    name = f"pod{number}"
    host.ip(f"link add {name} type veth peer name eth0 netns {ns}")
    for family in (4, 6):
        base, bits = address(family, number), 24 if family == 4 else 64
        base = base.rpartition(".")[0] + "." if family == 4 else base
        nodad = "nodad" if family == 6 else ""
        host.ip(f"address add {base}1/{bits} dev {name} {nodad}")
        inside = type(host)(ns, "eth0", f"{base}2", f"{base}2", 0)
        inside.ip(f"address add {base}2/{bits} dev eth0 {nodad}")
    host.ip(f"link set {name} up")
    inside.ip("link set eth0 up")
    for family in (4, 6):
        base = address(family, number)
        base = base.rpartition(".")[0] + "." if family == 4 else base
        inside.ip(f"-{family} route add default via {base}1")
    host.sysctl("ipv4/ip_forward", 1)
    host.sysctl("ipv6/conf/all/forwarding", 1)
    return ns


def pod_address(family: int, number: int) -> str:
    """The address of the pod that ``pod(..., number)`` makes."""
    base = address(family, number)
    return f"{base.rpartition('.')[0]}.2" if family == 4 else f"{base}2"


def on_threads(*functions: Callable[[], object]) -> None:
    """Run functions at the same time; raise the first failure."""
    failures: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a thread did not come to its end"
    if failures:
        raise failures[0]
