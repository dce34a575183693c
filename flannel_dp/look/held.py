"""What the kernel holds of one family: its tables read once, and joined per peer.

``show``, ``show --watch``, ``stats`` and the brake take whole tables (``held``), ``explain``
asks for one entry at a time (``get``); both by way of a :class:`FamilyReader`, which alone knows
where entries are. Everything is read back from the kernel, so it is right also about what
another program did. Nothing is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from flannel_dp._core import Table, parse_prefix
from flannel_dp.cluster.network import NetworkConfig, network_of
from flannel_dp.kernel.host import Host
from flannel_dp.resources.device.view import DeviceView, view_device
from flannel_dp.resources.forwarding.forwarder import Forwarder
from flannel_dp.resources.forwarding.view import held_map, program_problem
from flannel_dp.resources.peers.blackhole import is_blackhole
from flannel_dp.resources.peers.gateway import GATEWAYS, gateway_state, is_shared_gateway
from flannel_dp.resources.peers.layouts import layout_of
from flannel_dp.resources.peers.ours import every_scope
from flannel_dp.tables.describe import protocol_name
from flannel_dp.tables.entries import (
    PROTOCOL,
    UNICAST,
    Entry,
    Fdb,
    Neighbour,
    Nexthop,
    Peer,
    Route,
    Scope,
)

if TYPE_CHECKING:
    from flannel_dp.look.overlay import Overlay

#: How ``Channel.read`` tags what a scope says is ours.
_OURS = 1

_KINDS: dict[type, str] = {
    Fdb: "fdb",
    Neighbour: "neighbour",
    Nexthop: "nexthop",
    Peer: "peer",
    Route: "route",
}


class PeerView(Struct, frozen=True):
    """One route into the overlay and what it leads to.

    ``state`` is "ok", "no nexthop", "no gateway", "no neighbour", "no fdb",
    "foreign" (it works, and another program wrote it; ``detail`` says which),
    or "missing" (leases want it and the kernel does not have it). ``way`` is
    "tunnel" or "direct", ``mtu`` that of the route itself in bytes, 0 for the device's. ``lease``
    and ``difference`` are filled in when leases are given: whose it is, and what a sync would
    change.
    """

    subnet: str
    via: str = ""
    mac: str = ""
    endpoint: str = ""
    state: str = "ok"
    detail: str = ""
    way: str = "tunnel"
    lease: str = ""
    difference: str = ""
    mtu: int = 0

    @property
    def is_reached(self) -> bool:
        """Whether packets get to one node by it."""
        one = " " not in self.endpoint and "," not in self.endpoint
        return one and self.state in ("ok", "foreign")


def by_subnet(peer: PeerView) -> tuple[bytes, int]:
    """Sort peers by address."""
    _, raw, length = parse_prefix(peer.subnet)
    return raw, length


class HeldTable(Struct, frozen=True):
    """One table as the kernel had it, and the part of the kernel's that it is."""

    table: Table
    scopes: tuple[Scope, ...]

    @property
    def has_events(self) -> bool:
        """Whether the kernel announces changes; it does not for a map."""
        return bool(self.table.kind != "peer")

    def entries(self) -> Iterator[tuple[Any, bool]]:
        """Yield each entry, with whether it would be ours to remove; the kernel's own (connected
        routes, multicast neighbours) are not."""
        for number, entry in enumerate(self.table):
            yield entry, self.table.tag(number) == _OURS


class FamilyReader:
    """Reads one family's entries: ``device`` is its vxlan device as it is, None in host-gw.

    Raises KernelError, as all of its methods do.
    """

    def __init__(
        self, host: Host, config: NetworkConfig, forwarder: Forwarder, number: int
    ) -> None:
        self._host, self._direct = host, layout_of(config.backend).direct
        self.number, self.network = number, network_of(config, number)
        self.device = view_device(
            host, config, number, lambda index: program_problem(forwarder, index)
        )
        self.index = self.device.index if self.device else 0
        scopes = every_scope(
            host, number, self.network, device=self.index, map=held_map(forwarder, number)
        )
        #: Where this family's entries are, by the kind of table.
        self.scopes = {found[0].kind: found for found in scopes}

    @classmethod
    def of(cls, overlay: Overlay, number: int) -> FamilyReader:
        """Return the reader of one family of a data plane."""
        return cls(overlay.host, overlay.config, overlay.forwarder, number)

    def held(self) -> HeldFamily:
        """Read all tables, and join them per peer.

        Equivalent: ``ip route show``, ``ip nexthop show``, ``ip neigh show`` and ``bridge fdb
        show``, each with ``dev flannel.VNI``, joined by hand.
        """
        readings = [self.read(kind) for kind in self.scopes]
        joined = _Join(self.index, {one.table.kind: one for one in readings})
        peers, strays = joined.join(self.number, self.network, self.device, self._direct)
        return HeldFamily(
            self.number,
            self.network,
            self.device,
            tuple(readings),
            tuple(sorted(peers, key=by_subnet)),
            tuple(strays),
            tuple(joined.mapped),
            self._names(strays),
        )

    def _names(self, strays: Iterable[Entry]) -> dict[int, str]:
        """Return the devices that strays are on, by ifindex."""
        names = {self.index: self.device.name} if self.device else {}
        if {getattr(one, "device", 0) for one in strays} - {0, *names}:
            with self._host.links() as reader:
                names |= {link.index: link.name for link in reader.links()}
        return names

    def read(self, kind: str, *, on_device: bool = False) -> HeldTable:
        """Return the whole of one table, or what of it is ``on_device``; an empty one where the
        kernel has none of that kind."""
        scopes = self.scopes.get(kind, ())[-1 if on_device else 0 :]
        return HeldTable(self._host.kernel.read(kind, *scopes) if scopes else Table(kind), scopes)

    def get(self, entry: Entry) -> Any:
        """Return the kernel's neighbour, FDB entry or nexthop with ``entry``'s key, or None.

        ``ip neigh get``, ``bridge fdb get``, ``ip nexthop get``.
        """
        if not self.index:
            return None
        return self._host.kernel.get(self.scopes[_KINDS[type(entry)]][-1], entry)


class HeldFamily(Struct, frozen=True):
    """One family as it was read: ``tables`` are those that were read, ``peers`` and ``strays`` what
    these say joined, ``map_entries`` the peers in the map of the program that forwards,
    ``device_names`` the devices that strays are on."""

    number: int
    network: str
    device: DeviceView | None
    tables: tuple[HeldTable, ...]
    peers: tuple[PeerView, ...]
    strays: tuple[Entry, ...]
    map_entries: tuple[Peer, ...]
    device_names: dict[int, str]

    def reached(self) -> Iterator[tuple[str, str, str]]:
        """Subnet, endpoint and MAC ("" for a direct route) of each peer that packets reach, or
        would if the route of all peers was there. With a map a peer is in it, whatever its path:
        the program drops packets from all others."""
        if any(one.table.kind == "peer" for one in self.tables):
            for entry in self.map_entries:
                yield entry.prefix, entry.endpoint, entry.mac
            return
        for peer in self.peers:
            if peer.is_reached:
                yield peer.subnet, peer.endpoint, peer.mac


class _Join:
    """The entries of one family by key; ``index`` is our device's."""

    def __init__(self, index: int, readings: Mapping[str, HeldTable]) -> None:
        self.index = index
        empty = HeldTable(Table("route"), ())

        def ours(kind: str) -> Iterator[Any]:
            found = readings.get(kind, empty).entries()
            return (entry for entry, is_ours in found if is_ours)

        every = readings.get("nexthop", empty).entries()
        self.nexthops: dict[int, tuple[Nexthop, bool]] = {one.id: (one, own) for one, own in every}
        self.neighbours: dict[str, Neighbour] = {one.address: one for one in ours("neighbour")}
        self.fdb: dict[str, list[Fdb]] = defaultdict(list)
        for one in ours("fdb"):
            self.fdb[one.mac].append(one)
        self.routes: list[Route] = [one for one in ours("route") if not is_blackhole(one)]
        self.mapped: list[Peer] = [*ours("peer")]

    def join(
        self, number: int, network: str, device: DeviceView | None, direct: bool
    ) -> tuple[list[PeerView], list[Entry]]:
        """Return the peers, and the entries that no route of a peer uses. Where peers may be
        reached ``direct``, without the tunnel, routes of ours that do not lead into it are peers,
        and strays elsewhere."""
        shared: list[Route] = []
        into: list[Route] = []
        others: list[Route] = []
        mapped = {one.prefix for one in self.mapped}
        narrow: dict[str, int] = {}
        for route in self.routes:
            if route.gateway == GATEWAYS[number] and route.prefix in mapped:
                narrow[route.prefix] = route.mtu
            elif is_shared_gateway(route, network, number):
                shared.append(route)
            else:
                (into if self._leads_into_device(route) else others).append(route)
        found = {one.prefix: self.peer(one) for one in (into + others if direct else into)}
        if self.mapped and device:
            state = self._shared_state(number, device, shared)
            for entry in self.mapped:
                mtu = narrow.get(entry.prefix, 0)
                view = PeerView(entry.prefix, "", entry.mac, entry.endpoint, state, mtu=mtu)
                found.setdefault(entry.prefix, view)
        peers = [*found.values()]
        used = {route.nexthop for route in into + others}
        via = {peer.via for peer in peers} | {one.gateway for one in shared}
        return peers, [*self._unused(peers, via, used), *([] if direct else others)]

    def _leads_into_device(self, route: Route) -> bool:
        """Return whether a route leads into the device. One over several paths (device 0) does: the
        kernel sent it for this device."""
        return (
            bool(self.index) and route.type == UNICAST and self.device_of(route) in (0, self.index)
        )

    def device_of(self, route: Route) -> int:
        """Return the ifindex a route leads to; 0 where its nexthop is not known."""
        if not route.nexthop:
            return route.device
        found = self.nexthops.get(route.nexthop)
        return found[0].device if found else 0

    def peer(self, route: Route) -> PeerView:
        """Follow one route as a packet would: gateway, MAC, endpoint."""
        gateway, mac, endpoint, state = route.gateway, "", "", "ok"
        detail = "" if route.protocol == PROTOCOL else f"proto {protocol_name(route.protocol)}"
        if route.nexthop:
            found = self.nexthops.get(route.nexthop)
            gateway = found[0].gateway if found else ""
            state = state if found else "no nexthop"
        direct = state == "ok" and self.device_of(route) != self.index
        if not route.is_plain:
            state, detail = "foreign", route.other
        elif state == "ok" and not gateway:
            state = "no gateway"
        elif direct:
            endpoint = gateway
        elif gateway and gateway not in self.neighbours:
            state = "no neighbour"
        elif gateway:
            mac = self.neighbours[gateway].mac
            endpoint = ",".join(_endpoint(entry) for entry in self.fdb.get(mac, ()))
            state = "ok" if endpoint else "no fdb"
        if detail and state == "ok":
            state = "foreign"
        way = "direct" if direct else "tunnel"
        return PeerView(route.prefix, gateway, mac, endpoint, state, detail, way, mtu=route.mtu)

    def _shared_state(self, number: int, device: DeviceView, routes: Iterable[Route]) -> str:
        """Return what is missing on the path of all peers in the map: "ok", or the state they are
        in."""
        if not device.index:
            return "no device"
        if device.problem:
            return "no program" if "program" in device.problem else "no device"
        return gateway_state(next(iter(routes), None), self.neighbours, number)

    def _unused(self, peers: Iterable[PeerView], via: set[str], used: set[int]) -> Iterator[Entry]:
        """Nexthops, neighbours and FDB entries of ours that no route leads to."""
        for number, (nexthop, ours) in self.nexthops.items():
            if ours and number not in used:
                yield nexthop
        macs = {peer.mac for peer in peers}
        yield from (one for address, one in self.neighbours.items() if address not in via)
        yield from (one for mac, found in self.fdb.items() if mac not in macs for one in found)


def _endpoint(entry: Fdb) -> str:
    words = [entry.endpoint or f"nhid {entry.nexthop}"]
    fields = ("port", "vni", "src_vni", "via")
    for name, value in ((name, getattr(entry, name)) for name in fields):
        words += [f"{name} {value}"] if value else []
    return " ".join(words)
