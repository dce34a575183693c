"""The overlay as the kernel holds it: devices, peers, and entries that nobody uses.

Everything is read back from the kernel, so ``show`` tells the truth also about
what another program did. With leases, each peer has the name of its lease and
what a sync would change about it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from flannel_dp._core import ADD, REMOVE, Diff, parse_prefix
from flannel_dp.backends import vxlan
from flannel_dp.deviceview import DeviceView, view_device
from flannel_dp.entries import PROTOCOL, Entry, Fdb, Neighbour, Nexthop, Route, Scope
from flannel_dp.output import Paint, columns, count, plain
from flannel_dp.plan import describe, protocol_name
from flannel_dp.tables import fdb_scope, neighbour_scope, nexthop_scope, route_scope

if TYPE_CHECKING:
    from flannel_dp.admission import Rejection
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.resolve import Family, Leases

_OURS = 1


@dataclass(frozen=True, slots=True)
class PeerView:
    """One route into the overlay and what it leads to.

    ``state`` is "ok", "no nexthop", "no gateway", "no neighbour", "no fdb",
    "foreign" (it works, and another program wrote it; ``detail`` says which),
    or "missing" (leases want it and the kernel does not have it). ``lease`` and
    ``difference`` are filled in when leases are given: whose it is, and what a
    sync would change.
    """

    subnet: str
    via: str = ""
    mac: str = ""
    endpoint: str = ""
    state: str = "ok"
    detail: str = ""
    lease: str = ""
    difference: str = ""


@dataclass(frozen=True, slots=True)
class FamilyView:
    """One family: ``strays`` are entries on our device that no route uses, and routes
    with our mark that lead elsewhere. ``error`` says why leases were of no use."""

    family: int
    network: str
    device: DeviceView
    peers: tuple[PeerView, ...] = ()
    strays: tuple[Entry, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Overview:
    """What :func:`show` found. ``str()`` of it is what the command prints."""

    families: tuple[FamilyView, ...]
    rejected: Sequence[Rejection] = ()
    with_leases: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``"schema": 1``; keys are only ever added."""
        return {
            "schema": 1,
            "families": [
                {
                    **asdict(replace(view, peers=(), strays=())),
                    "peers": [self._peer(peer) for peer in view.peers],
                    "strays": [
                        {"table": type(entry).__name__.lower(), "entry": entry._asdict()}
                        for entry in view.strays
                    ],
                }
                for view in self.families
            ],
            "rejected": [rejection.to_json() for rejection in self.rejected],
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
            from flannel_dp.render import rejected_lines

            yield ""
            yield from rejected_lines(self.rejected, paint)

    def __str__(self) -> str:
        return "\n".join(self.lines())


_PEER_KEYS = PeerView.__match_args__


def show(dataplane: DataPlane, leases: Leases | None = None) -> Overview:
    """Read the overlay of ``dataplane``'s configuration; write nothing.

    With ``leases``, peers get names and differences, and refused claims are
    listed. Equivalent: ``ip -d link show``, ``ip route show``, ``ip nexthop show``,
    ``ip neigh show`` and ``bridge fdb show``, each with ``dev flannel.VNI``, joined
    by hand. Raises KernelError when they cannot be read, and as
    :meth:`DataPlane.plan` for leases.
    """
    if leases is None:
        return Overview(tuple(_look(dataplane, number) for number in dataplane.families))
    resolved = dataplane.resolver.resolve(leases)
    known = {family.number: family for family in resolved.families}
    views = []
    for number in dataplane.families:
        view = _look(dataplane, number)
        if number in known:
            view = _compare(dataplane, view, known[number])
        elif number in resolved.errors:
            view = replace(view, error=str(resolved.errors[number]))
        views.append(view)
    return Overview(tuple(views), resolved.rejections(), with_leases=True)


def _look(dataplane: DataPlane, number: int) -> FamilyView:
    """One family, from the kernel alone."""
    device = view_device(dataplane, number)
    network = vxlan.network_of(dataplane.config, number)
    if not device.index:
        return FamilyView(number, network, device)
    index = device.index
    neighbours: dict[str, Neighbour] = {
        entry.address: entry
        for entry, ours in _read(dataplane, neighbour_scope(index, number))
        if ours
    }
    fdb: dict[str, list[Fdb]] = defaultdict(list)
    for entry, ours in _read(dataplane, fdb_scope(index)):
        if ours:
            fdb[entry.mac].append(entry)
    nexthops: dict[int, tuple[Nexthop, bool]] = {}
    if number == 4 and dataplane.nexthops is not None:
        found = _read(dataplane, nexthop_scope(index))
        nexthops = {entry.id: (entry, ours) for entry, ours in found}
    scope = route_scope(number, device=index, exclusive=True)
    routes: list[Route] = [entry for entry, ours in _read(dataplane, scope) if ours]
    peers = [_peer(route, nexthops, neighbours, fdb) for route in routes]
    peers.sort(key=lambda peer: _order(peer.subnet))
    strays: list[Entry] = [*_unused(peers, routes, nexthops, neighbours, fdb)]
    strays += _elsewhere(dataplane, number, index, nexthops)
    return FamilyView(number, network, device, tuple(peers), tuple(strays))


def _read(dataplane: DataPlane, scope: Scope) -> Iterator[tuple[Any, bool]]:
    """Entries in ``scope``, each with whether it would be ours to remove; the kernel's
    own (connected routes, multicast neighbours) are not."""
    table = dataplane.kernel.read(scope.kind, scope)
    for number, entry in enumerate(table):
        yield entry, table.tag(number) == _OURS


def _order(subnet: str) -> tuple[bytes, int]:
    _, raw, length = parse_prefix(subnet)
    return raw, length


def _peer(
    route: Route,
    nexthops: Mapping[int, tuple[Nexthop, bool]],
    neighbours: Mapping[str, Neighbour],
    fdb: Mapping[str, list[Fdb]],
) -> PeerView:
    """Follow one route as a packet would: gateway, MAC, endpoint."""
    gateway, mac, endpoint, state = route.gateway, "", "", "ok"
    if route.nexthop:
        found = nexthops.get(route.nexthop)
        gateway = found[0].gateway if found else ""
        state = state if found else "no nexthop"
    if state == "ok" and not gateway:
        state = "no gateway"
    elif gateway and gateway not in neighbours:
        state = "no neighbour"
    elif gateway:
        mac = neighbours[gateway].mac
        endpoint = ",".join(_endpoint(entry) for entry in fdb.get(mac, ()))
        state = "ok" if endpoint else "no fdb"
    detail = "" if route.protocol == PROTOCOL else f"proto {protocol_name(route.protocol)}"
    if detail and state == "ok":
        state = "foreign"
    return PeerView(route.prefix, gateway, mac, endpoint, state, detail)


def _endpoint(entry: Fdb) -> str:
    words = [entry.endpoint or f"nhid {entry.nexthop}"]
    for name, value in (("port", entry.port), ("vni", entry.vni), ("via", entry.via)):
        words += [f"{name} {value}"] if value else []
    return " ".join(words)


def _unused(
    peers: list[PeerView],
    routes: list[Route],
    nexthops: Mapping[int, tuple[Nexthop, bool]],
    neighbours: Mapping[str, Neighbour],
    fdb: Mapping[str, list[Fdb]],
) -> Iterator[Entry]:
    """Nexthops, neighbours and FDB entries on our device that no route leads to."""
    used = {route.nexthop for route in routes}
    yield from (one for number, (one, ours) in nexthops.items() if ours and number not in used)
    gateways = {peer.via for peer in peers}
    yield from (one for address, one in neighbours.items() if address not in gateways)
    macs = {peer.mac for peer in peers}
    yield from (one for mac, entries in fdb.items() if mac not in macs for one in entries)


def _elsewhere(
    dataplane: DataPlane, number: int, index: int, nexthops: Container[int]
) -> Iterator[Route]:
    """Routes into the network that carry our mark and do not lead into our device."""
    network = vxlan.network_of(dataplane.config, number)
    for entry, ours in _read(dataplane, route_scope(number, within=network)):
        if ours and entry.device != index and entry.nexthop not in nexthops:
            yield entry


def _compare(dataplane: DataPlane, view: FamilyView, family: Family) -> FamilyView:
    """Add to each peer its lease, and what a sync would change."""
    from flannel_dp.converge import read_differences
    from flannel_dp.lease import printable

    family.wanted = family.want(dataplane.nexthops)
    changes = _changes(read_differences(dataplane.kernel, family))
    claims = family.peers
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
                difference=", ".join(changes.get(number, ())),
            )
        )
    peers.sort(key=lambda peer: _order(peer.subnet))
    return replace(view, peers=tuple(peers))


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
    return f"route nhid {entry.nexthop}" if entry.nexthop else f"route via {entry.gateway}"


# ---- text ----------------------------------------------------------------------

_COLOURS = {"ok": "green", "foreign": "yellow", "missing": "yellow"}


def _family_lines(view: FamilyView, with_leases: bool, paint: Paint) -> Iterator[str]:
    broken = bool(view.device.problem)
    yield paint(str(view.device), "red" if broken else "bold")
    if view.error:
        yield paint(f"  leases: {view.error}", "red")
    if view.peers:
        yield from _peer_lines(view.peers, with_leases, paint)
    names = {view.device.index: view.device.name}
    if view.strays:
        yield paint(f"  {len(view.strays)} that no route of a peer uses:", "yellow")
        yield from (f"    {describe(entry, names)}" for entry in view.strays)
    if not view.device.index and not view.peers:
        return
    bad = sum(peer.state not in ("ok", "foreign") for peer in view.peers)
    yield f"  {count(len(view.peers), 'peer')}, {bad} not in order"


def _peer_lines(peers: Sequence[PeerView], with_leases: bool, paint: Paint) -> Iterator[str]:
    title = ["SUBNET", "VIA", "MAC", "ENDPOINT", "STATE"]
    rows = [title + ["LEASE", "DIFFERENCE"] * with_leases]
    for peer in peers:
        state = f"{peer.state} ({peer.detail})" if peer.detail else peer.state
        row = [peer.subnet, peer.via or "-", peer.mac or "-", peer.endpoint or "-", state]
        rows.append(row + [peer.lease or "-", peer.difference] * with_leases)
    lines = columns(rows, indent="  ")
    yield next(lines)
    for peer, line in zip(peers, lines, strict=True):
        colour = _COLOURS.get(peer.state, "red")
        if with_leases and peer.difference and colour == "green":
            colour = "yellow"
        yield line if colour == "green" else paint(line, colour)
