"""The overlay as the kernel holds it: devices, peers, and entries that nobody uses.

Everything is read back from the kernel, so ``show`` tells the truth also about
what another program did. With leases, each peer has the name of its lease and
what a sync would change about it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from flannel_dp._core import ADD, REMOVE, Diff, Table, diff_tables, parse_prefix
from flannel_dp.cluster.network import device_name, network_of
from flannel_dp.errors import FlannelDPError
from flannel_dp.look.terminal import Paint, columns, count, plain
from flannel_dp.resources.device.view import DeviceView, view_device
from flannel_dp.resources.forwarding.view import held_peers, program_problem
from flannel_dp.resources.peers.gateway import gateway_state
from flannel_dp.resources.peers.layouts import layout_of
from flannel_dp.resources.peers.nexthops import EVERY_ID, nexthop_ids
from flannel_dp.resources.peers.place import PathColumn
from flannel_dp.resources.peers.resource import PeersChange
from flannel_dp.resources.peers.state import State
from flannel_dp.tables.describe import describe, protocol_name
from flannel_dp.tables.entries import PROTOCOL, Entry, Fdb, Neighbour, Nexthop, Peer, Route, Scope
from flannel_dp.tables.scopes import (
    address_family,
    fdb_scope,
    neighbour_scope,
    nexthop_scope,
    route_scope,
)

if TYPE_CHECKING:
    from flannel_dp.cluster.admission import Rejection
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.node.family import Family
    from flannel_dp.node.view import Leases

log = logging.getLogger(__name__)

_OURS = 1

#: The resources whose differences are shown.
_OVERLAY = ("program", "device4", "device6", "peers4", "peers6")


class PeerView(Struct, frozen=True):
    """One route into the overlay and what it leads to.

    ``state`` is "ok", "no nexthop", "no gateway", "no neighbour", "no fdb",
    "foreign" (it works, and another program wrote it; ``detail`` says which),
    or "missing" (leases want it and the kernel does not have it). ``way`` is
    "tunnel" or "direct". ``lease`` and ``difference`` are filled in when leases
    are given: whose it is, and what a sync would change.
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


class FamilyView(Struct, frozen=True):
    """One family: ``device`` is None in host-gw; ``strays`` are entries on our device
    that no route uses, and routes with our mark that lead where none of ours should.
    ``ways`` says why some peers are reached directly and others not, ``error`` why
    leases were of no use."""

    family: int
    network: str
    device: DeviceView | None
    peers: tuple[PeerView, ...] = ()
    strays: tuple[Entry, ...] = ()
    ways: str = ""
    error: str = ""


class Overview(Struct, frozen=True):
    """What :func:`show` found; ``blockers`` are firewall rules of others that stop pods or
    the tunnel, asked for with leases only. ``str()`` of it is what the command prints."""

    families: tuple[FamilyView, ...]
    rejected: Sequence[Rejection] = ()
    with_leases: bool = False
    blockers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``"schema": 1``; keys are only ever added."""
        return {
            "schema": 1,
            "families": [
                {
                    **to_builtins(replace(view, peers=(), strays=())),
                    "peers": [self._peer(peer) for peer in view.peers],
                    "strays": [
                        {"table": type(entry).__name__.lower(), "entry": entry._asdict()}
                        for entry in view.strays
                    ],
                }
                for view in self.families
            ],
            "rejected": [rejection.to_json() for rejection in self.rejected],
            "blockers": list(self.blockers),
        }

    def _peer(self, peer: PeerView) -> dict[str, str]:
        shown: dict[str, str] = {name: getattr(peer, name) for name in _PEER_KEYS}
        if not self.with_leases:
            del shown["lease"], shown["difference"]
        return shown

    def lines(self, paint: Paint = plain) -> Iterator[str]:
        """The overview line by line."""
        for number, view in enumerate(self.families):
            if number:
                yield ""
            yield from _family_lines(view, self.with_leases, paint)
        if self.rejected:
            from flannel_dp.look.text import rejected_lines

            yield ""
            yield from rejected_lines(self.rejected, paint)
        if self.blockers:
            from flannel_dp.look.explanation import blocked_lines

            yield ""
            yield from blocked_lines(self.blockers, paint)

    def __str__(self) -> str:
        return "\n".join(self.lines())


_PEER_KEYS = PeerView.__match_args__


def show(overlay: Overlay, leases: Leases | None = None) -> Overview:
    """Read the overlay of ``overlay``'s configuration; write nothing.

    With ``leases``, peers get names and differences, and refused claims are
    listed. Equivalent: ``ip -d link show``, ``ip route show``, ``ip nexthop show``,
    ``ip neigh show`` and ``bridge fdb show``, each with ``dev flannel.VNI``, joined
    by hand. Raises KernelError when they cannot be read, and as
    :meth:`DataPlane.plan` for leases.
    """
    if leases is None:
        return Overview(tuple(_read_family(overlay, number) for number in overlay.families))
    view = overlay.resolver.resolve(leases)
    found = overlay.reconciler.compare(view, _OVERLAY)
    shown = []
    for number in overlay.families:
        seen = _read_family(overlay, number)
        change = found.changes.get(f"peers{number}")
        if isinstance(change, PeersChange) and change.state is not None:
            seen = _compare(overlay, seen, change.state, change.diffs)
        elif f"peers{number}" in found.done:
            seen = replace(seen, error=str(found.done[f"peers{number}"].error))
        shown.append(seen)
    return Overview(
        tuple(shown),
        view.rejections(),
        with_leases=True,
        blockers=find_blockers(overlay, view.families),
    )


def find_blockers(overlay: Overlay, families: Sequence[Family]) -> tuple[str, ...]:
    """Foreign firewall rules that stop pods or the tunnel; none, and a log line, where
    nobody lets us read them."""
    try:
        return overlay.blockers_of(families)
    except FlannelDPError as error:
        log.warning("firewall rules cannot be read: %s", error)
        return ()


def read_peers(overlay: Overlay, number: int) -> tuple[PeerView, ...]:
    """Return the peers of one family as the kernel holds them. Raises KernelError."""
    return _read_family(overlay, number).peers


def _read_family(overlay: Overlay, number: int) -> FamilyView:
    """One family, from the kernel alone."""
    network = network_of(overlay.config, number)
    tunnel = overlay.config.backend.type == "vxlan"
    device = device_view(overlay, number) if tunnel else None
    index = device.index if device else 0
    held = _FamilyEntries(index)
    by_program = overlay.config.backend.by_program
    if number == 4 and overlay.host.nexthops is not None:
        held.nexthops = {
            entry.id: (entry, ours)
            for entry, ours in _read(overlay, *_nexthop_scopes(network, index))
        }
    routes: list[Route] = []
    if index:
        held.neighbours = {
            entry.address: entry
            for entry, ours in _read(overlay, neighbour_scope(index, number))
            if ours
        }
        for entry, ours in _read(overlay, fdb_scope(index)):
            if ours:
                held.fdb[entry.mac].append(entry)
        scope = route_scope(number, device=index, exclusive=True)
        routes = [entry for entry, ours in _read(overlay, scope) if ours and not by_program]
        if by_program:
            held.neighbours = {}
    others = [
        entry
        for entry, ours in _read(overlay, route_scope(number, within=network))
        if ours and held.device_of(entry) != index
    ]
    strays: list[Entry] = []
    if not tunnel or overlay.config.backend.direct_routing:
        routes += others
    else:
        strays += others
    peers = [held.peer(route) for route in routes]
    if by_program and device:
        peers = _mapped(overlay, device, number, peers)
    peers.sort(key=_order)
    strays[:0] = held.unused(peers, {route.nexthop for route in routes + others})
    return FamilyView(number, network, device, tuple(peers), tuple(strays))


def _mapped(
    overlay: Overlay, device: DeviceView, number: int, direct: list[PeerView]
) -> list[PeerView]:
    """The peers in the program's map, and of those that are reached directly, how."""
    state = _gateway_state(overlay, number, device)
    found = {peer.subnet: peer for peer in direct}
    for entry in held_peers(overlay.host, overlay.forwarder, number):
        view = PeerView(entry.prefix, "", entry.mac, entry.endpoint, state)
        found.setdefault(entry.prefix, view)
    return [*found.values()]


def _gateway_state(overlay: Overlay, number: int, device: DeviceView) -> str:
    """What is missing on the path of all peers: "ok", or the state that they are in."""
    if not device.index:
        return "no device"
    if device.problem:
        return "no program" if "program" in device.problem else "no device"
    return gateway_state(overlay.host, network_of(overlay.config, number), number, device.index)


def device_view(overlay: Overlay, number: int) -> DeviceView:
    """The vxlan device of a family, found by its name."""

    def problem(index: int) -> str:
        return program_problem(overlay.forwarder, index)

    return view_device(overlay.host, overlay.config, number, problem)


def complete_peers(overlay: Overlay, number: int) -> Iterator[tuple[str, str, str]]:
    """Subnet, endpoint and MAC ("" for a direct route) of each peer that packets reach.

    Raises KernelError.
    """
    if overlay.config.backend.by_program:
        for entry in held_peers(overlay.host, overlay.forwarder, number):
            yield entry.prefix, entry.endpoint, entry.mac
        return
    for peer in read_peers(overlay, number):
        single = " " not in peer.endpoint and "," not in peer.endpoint
        if peer.state in ("ok", "foreign") and single:
            yield peer.subnet, peer.endpoint, peer.mac


def _nexthop_scopes(network: str, index: int) -> list[Scope]:
    """Ours on any device, and on our own device those of another network's range, too."""
    scopes = [nexthop_scope(0, ids=nexthop_ids(network))]
    if index:
        scopes.append(nexthop_scope(index, ids=EVERY_ID))
    return scopes


def _read(overlay: Overlay, *scopes: Scope) -> Iterator[tuple[Any, bool]]:
    """Entries in ``scopes``, each with whether it would be ours to remove; the kernel's
    own (connected routes, multicast neighbours) are not."""
    table = overlay.host.kernel.read(scopes[0].kind, *scopes)
    for number, entry in enumerate(table):
        yield entry, table.tag(number) == _OURS


def _order(peer: PeerView) -> tuple[bytes, int]:
    _, raw, length = parse_prefix(peer.subnet)
    return raw, length


class _FamilyEntries(Struct):
    """What the kernel holds for one family, by key; ``index`` is our device's."""

    index: int
    nexthops: dict[int, tuple[Nexthop, bool]] = field(default_factory=dict)
    neighbours: dict[str, Neighbour] = field(default_factory=dict)
    fdb: dict[str, list[Fdb]] = field(default_factory=lambda: defaultdict(list))

    def device_of(self, route: Route) -> int:
        """The ifindex a route leads to; 0 where its nexthop is not known."""
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
        return PeerView(route.prefix, gateway, mac, endpoint, state, detail, way)

    def unused(self, peers: Sequence[PeerView], nexthops: Container[int]) -> Iterator[Entry]:
        """Nexthops, neighbours and FDB entries of ours that no route leads to."""
        for number, (nexthop, ours) in self.nexthops.items():
            if ours and number not in nexthops:
                yield nexthop
        gateways, macs = {peer.via for peer in peers}, {peer.mac for peer in peers}
        yield from (one for address, one in self.neighbours.items() if address not in gateways)
        yield from (one for mac, found in self.fdb.items() if mac not in macs for one in found)


def _endpoint(entry: Fdb) -> str:
    words = [entry.endpoint or f"nhid {entry.nexthop}"]
    fields = ("port", "vni", "src_vni", "via")
    for name, value in ((name, getattr(entry, name)) for name in fields):
        words += [f"{name} {value}"] if value else []
    return " ".join(words)


def _compare(
    overlay: Overlay, view: FamilyView, state: State, diffs: Sequence[Diff] | None
) -> FamilyView:
    """Add to each peer its lease, and what a sync would change."""
    from flannel_dp.cluster.lease import printable

    if diffs is None:  # there is no device yet: everything is added
        diffs = [diff_tables(one.table, Table(one.table.kind)) for one in state.all_tables]
    changes = _changes(diffs)
    claims = state.peers
    numbers = {claims.subnet(number): number for number in range(len(claims))}
    peers = []
    for peer in view.peers:
        number = numbers.pop(peer.subnet, -1)
        if number < 0:
            peers.append(replace(peer, difference="no lease: sync removes it"))
            continue
        difference = ", ".join(changes.get(number, ()))
        peers.append(replace(peer, lease=printable(claims.name(number)), difference=difference))
    for subnet, number in numbers.items():
        peers.append(
            PeerView(
                subnet,
                state="missing",
                lease=printable(claims.name(number)),
                difference=_missing(state, number, changes),
            )
        )
    peers.sort(key=_order)
    return replace(view, peers=tuple(peers), ways=_why(overlay, state))


def _missing(state: State, number: int, changes: dict[int, list[str]]) -> str:
    if number in state.unreachable:
        return f"host-gw cannot reach {state.peers.endpoint(number)}: it is not on-link"
    return ", ".join(changes.get(number, ()))


def _why(overlay: Overlay, state: State) -> str:
    """Which peers take which path, in words: the rule, and the networks it finds."""
    if state.paths.column is None:
        return ""
    family = state.family
    here = Scope("route", address_family(family.number), family.uplink, protocol=255)
    networks = [
        route.prefix
        for route in overlay.host.kernel.read("route", here)
        if route.is_plain
        and not (route.gateway or route.nexthop or route.prefix.startswith("fe80:"))
    ]
    device = device_name(overlay.config, family.number)
    others = f"through {device}" if family.has_tunnel else "not at all"
    return (
        f"public addresses on-link on {family.iface} ({', '.join(networks) or 'none'}) are reached "
        f"directly, the others {others}"
    )


def find_paths(overlay: Overlay, family: Family) -> PathColumn:
    """How each peer is reached, where peers differ in that; None where they do not."""
    paths = layout_of(overlay.config.backend).paths.decide(overlay.host.kernel, family)
    return paths.column


def _changes(diffs: Sequence[Diff]) -> dict[int, list[str]]:
    """What is to be written, by the number of the peer it is for."""
    found: dict[int, list[str]] = defaultdict(list)
    for diff in diffs:
        for number in range(diff.writes):
            op, new, _ = diff.operation(number)
            if op != REMOVE:
                verb = "add" if op == ADD else "change"
                found[diff.tag(number)].append(f"{verb} {_value(new)}")
    return found


def _value(entry: Entry) -> str:
    if isinstance(entry, Neighbour):
        return f"neighbour lladdr {entry.mac}"
    if isinstance(entry, Fdb):
        return f"fdb dst {entry.endpoint}"
    if isinstance(entry, Nexthop):
        return f"nexthop {entry.id} via {entry.gateway}"
    if isinstance(entry, Peer):
        return f"peer behind {entry.endpoint} lladdr {entry.mac}"
    return f"route nhid {entry.nexthop}" if entry.nexthop else f"route via {entry.gateway}"


# ---- text ----------------------------------------------------------------------

_COLOURS = {"ok": "green", "foreign": "yellow", "missing": "yellow"}


def _family_lines(view: FamilyView, with_leases: bool, paint: Paint) -> Iterator[str]:
    device = view.device
    title = str(device) if device else f"host-gw: direct IPv{view.family} routes, no device"
    yield paint(title, "red" if device and device.problem else "bold")
    if view.error:
        yield paint(f"  leases: {view.error}", "red")
    if view.ways:
        yield f"  {view.ways}"
    if view.peers:
        yield from _peer_lines(view.peers, with_leases, paint)
    names = {device.index: device.name} if device else {}
    if view.strays:
        yield paint(f"  {len(view.strays)} that no route of a peer uses:", "yellow")
        yield from (f"    {describe(entry, names)}" for entry in view.strays)
    if device and not device.index and not view.peers:
        return
    bad = sum(peer.state not in ("ok", "foreign") for peer in view.peers)
    yield f"  {count(len(view.peers), 'peer')}, {bad} out of sync"


def _peer_lines(peers: Sequence[PeerView], with_leases: bool, paint: Paint) -> Iterator[str]:
    title = ["SUBNET", "VIA", "MAC", "ENDPOINT", "STATE"]
    rows = [title + ["LEASE", "DIFFERENCE"] * with_leases]
    for peer in peers:
        details = [peer.detail] * bool(peer.detail) + ["direct"] * (peer.way == "direct")
        state = f"{peer.state} ({', '.join(details)})" if details else peer.state
        row = [peer.subnet, peer.via or "-", peer.mac or "-", peer.endpoint or "-", state]
        rows.append(row + [peer.lease or "-", peer.difference] * with_leases)
    lines = columns(rows, indent="  ")
    yield next(lines)
    for peer, line in zip(peers, lines, strict=True):
        colour = _COLOURS.get(peer.state, "red")
        if with_leases and peer.difference and colour == "green":
            colour = "yellow"
        yield line if colour == "green" else paint(line, colour)
