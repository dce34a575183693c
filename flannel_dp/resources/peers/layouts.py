"""What accepted leases mean as entries of the kernel's tables, in flannel's three layouts.

A peer with subnet 10.244.7.0/24, public address 192.0.2.7 and VTEP MAC m is

* through the tunnel: neighbour 10.244.7.0 has MAC m, fdb m is behind 192.0.2.7,
  and the route leads via 10.244.7.0 on the vxlan device, onlink, as flannel's
  pkg/backend/vxlan/vxlan_network.go writes them;
* through the tunnel, forwarded by a program: a map has 10.244.7.0/24 with m and
  192.0.2.7, and what all peers share is one route for the whole network, through a
  gateway that does not exist, and one neighbour for that (``trunk``);
* direct: the route leads via 192.0.2.7 on the external interface, as in
  pkg/backend/route_network.go.

host-gw is all direct, vxlan all tunnel, and with DirectRouting each peer has
its way (``ways``). For IPv4 a route hangs on a nexthop object that carries the
gateway, because IPv4 gateway routes of one device share a single hash bucket
in the kernel (fib_info_hashfn_1 in net/ipv4/fib_semantics.c leaves the gateway
out), so that installing N of them costs N squared. IPv6 has no such bucket and
carries its gateway itself. A peer keeps its nexthop's id whatever its way: one
replacement re-points it.
"""

from __future__ import annotations

from msgspec import Struct

from flannel_dp._core import Claims, Table, parse_prefix
from flannel_dp.tables import columns
from flannel_dp.tables.entries import BLACKHOLE, PROTOCOL, Neighbour, Route, Scope

TUNNEL, DIRECT = 0, 1

#: A tag that no peer has.
NOBODY = 0xFFFFFFFE

#: Behind the metric of any route that a pod's bridge makes: it only catches what no
#: pod has taken.
BLACKHOLE_METRIC = 0xFFFF0000

#: A nexthop object's id is this plus the low 28 bits of the peer's subnet:
#: a new process finds the objects of the old one without asking anybody, and
#: ``ip nexthop`` shows 10.244.7.0 as 0x5af40700.
NEXTHOP_BASE = 0x50000000

#: Whom the route of the whole network goes through where a program forwards: no address of
#: this or another node, link-local, and on the device by being onlink. The program puts the
#: peer's MAC in place of the gateway's.
GATEWAYS = {4: "169.254.138.1", 6: "fe80::8a"}
GATEWAY_MAC = "02:8a:00:00:00:01"

#: flanneld's routes carry the mark of ``ip route add`` (RTPROT_BOOT).
PROTOCOL_BOOT = 3


class Wanted(Struct, frozen=True):
    """One table as it should be, and the part of the kernel's that it is the whole of."""

    table: Table
    scopes: tuple[Scope, ...]


class Place(Struct, frozen=True):
    """Where one family's entries live.

    ``device`` is the vxlan device's ifindex (0: not made yet; None: host-gw has
    none), ``uplink`` the external interface's (0: unknown), ``network`` the pod
    network, ``leftovers`` other devices that entries of ours may be left on.
    ``nexthops`` is for IPv4: True uses nexthop objects, False does not and
    removes those there are, None is for kernels without them (before 5.3).
    ``take_boot`` counts flanneld's routes on the uplink as ours to remove.
    ``peers`` is the map (its descriptor) of the program that forwards, 0 where there is
    none yet, None where the kernel's own tables do it.
    """

    device: int | None
    uplink: int
    network: str
    nexthops: bool | None = True
    leftovers: tuple[int, ...] = ()
    take_boot: bool = False
    peers: int | None = None


def desired(peers: Claims, place: Place, ways: bytes | bytearray | None = None) -> list[Wanted]:
    """The tables of one family for ``peers``, in the order in which they are added.

    Entries of peer i are tagged i. ``ways`` has a byte per peer, TUNNEL or
    DIRECT; without it all go through the tunnel, or, in host-gw, all direct.
    A peer of host-gw whose way is not DIRECT gets no entry.
    """
    scopes = desired_scopes(place, peers.family, ways)
    return [Wanted(*pair) for pair in zip(desired_tables(peers, place, ways), scopes, strict=True)]


def desired_tables(
    peers: Claims, place: Place, ways: bytes | bytearray | None = None
) -> list[Table]:
    """The tables of ``desired`` alone, for those who know what they are the whole of."""
    made: list[Table] = []
    if place.peers is not None:
        table = Table("peer")
        table.extend_peers(place.peers, peers.subnets, peers.lengths, peers.macs, peers.endpoints)
        made.append(table)
        if ways is None:  # nobody needs a route of their own
            kinds = ("nexthop", "route") if _has_nexthops(place, peers.family) else ("route",)
            return [*made, *map(Table, kinds)]
    elif place.device is not None:
        made += _resolution(peers, place.device, ways)
    elif ways is None:
        ways = bytes([DIRECT]) * len(peers)
    if _has_nexthops(place, peers.family):
        made.append(_nexthops(peers, place, ways))
    return [*made, _routes(peers, place, ways)]


def desired_scopes(
    place: Place, family: int, ways: bytes | bytearray | None
) -> list[tuple[Scope, ...]]:
    """What each of ``desired_tables`` is the whole of."""
    scopes: list[tuple[Scope, ...]] = []
    if place.peers is not None:
        scopes.append((columns.peer_scope(place.peers, family),))
    elif place.device is not None:
        scopes.append((columns.fdb_scope(place.device),))
        scopes.append((columns.neighbour_scope(place.device, family),))
    elif ways is None:
        ways = b""  # all are direct
    if _has_nexthops(place, family):
        scopes.append(nexthop_scopes(place))
    return [*scopes, route_scopes(place, family, ways)]


def _has_nexthops(place: Place, family: int) -> bool:
    return family == 4 and place.nexthops is not None


def blackhole(subnet: str, network: str, family: int) -> Wanted:
    """flanneld's --ip-blackhole-route: a packet for a pod that is gone does not leave by the
    default route, to be sent here again. ``subnet`` is the own one, "" for no such route."""
    table = Table("route")
    if subnet:
        table.add(Route(subnet, metric=BLACKHOLE_METRIC, type=BLACKHOLE), NOBODY)
    scope = columns.route_scope(family, within=network)._replace(type=BLACKHOLE)
    return Wanted(table, (scope,))


def trunk(place: Place, family: int) -> list[Wanted]:
    """What leads to the program that forwards, whoever the peers are: a neighbour, a route."""
    assert place.device is not None
    gateway, device = GATEWAYS[family], place.device
    neighbours, routes = Table("neighbour"), Table("route")
    neighbours.add(Neighbour(device, gateway, GATEWAY_MAC), NOBODY)
    routes.add(Route(place.network, gateway=gateway, device=device, onlink=True), NOBODY)
    return [
        Wanted(neighbours, (columns.neighbour_scope(device, family),)),
        Wanted(routes, (columns.route_scope(family, device=device, exclusive=True),)),
    ]


def _resolution(peers: Claims, device: int, ways: bytes | bytearray | None) -> tuple[Table, Table]:
    neighbours, fdb = Table("neighbour"), Table("fdb")
    neighbours.extend_neighbours(device, peers.subnets, peers.macs, ways, TUNNEL)
    fdb.extend_fdb(device, peers.macs, peers.endpoints, ways, TUNNEL)
    # The FDB first: a peer with a new MAC is still reached by the old one, until the
    # neighbour names the new, which is known by then.
    return fdb, neighbours


def _nexthops(peers: Claims, place: Place, ways: bytes | bytearray | None) -> Table:
    objects = Table("nexthop")
    if not place.nexthops:
        return objects
    ids = peers.nexthop_ids(NEXTHOP_BASE)
    if place.device is not None and place.peers is None:
        objects.extend_nexthops(place.device, ids, peers.subnets, PROTOCOL, True, ways, TUNNEL)
    if ways is not None:
        objects.extend_nexthops(place.uplink, ids, peers.endpoints, PROTOCOL, False, ways, DIRECT)
    return objects


def _routes(peers: Claims, place: Place, ways: bytes | bytearray | None) -> Table:
    routes = Table("route")
    if peers.family == 4 and place.nexthops:
        ids = peers.nexthop_ids(NEXTHOP_BASE)
        if place.device is not None and ways is not None and place.peers is None:
            ways = None  # both ways hang on the nexthop of the same id
        routes.extend_routes(
            peers.subnets, peers.lengths, PROTOCOL, nexthops=ids, ways=ways, way=DIRECT
        )
        return routes
    if place.device is not None and place.peers is None:
        routes.extend_routes(
            peers.subnets,
            peers.lengths,
            PROTOCOL,
            gateways=peers.subnets,
            device=place.device,
            ways=ways,
            way=TUNNEL,
        )
    if ways is not None:
        routes.extend_routes(
            peers.subnets,
            peers.lengths,
            PROTOCOL,
            gateways=peers.endpoints,
            device=place.uplink,
            onlink=False,
            ways=ways,
            way=DIRECT,
        )
    return routes


def tunnel_scopes(place: Place, family: int) -> list[Scope]:
    """The scopes of ``desired`` where all peers are reached through the tunnel."""
    assert place.device is not None
    scopes = [columns.fdb_scope(place.device), columns.neighbour_scope(place.device, family)]
    if family == 4 and place.nexthops is not None:
        scopes += nexthop_scopes(place)
    return [*scopes, *route_scopes(place, family, None)]


def nexthop_ids(network: str) -> tuple[int, int]:
    """The range of ids that subnets of an IPv4 network can have."""
    _, raw, length = parse_prefix(network)
    first = int.from_bytes(raw, "big") & 0x0FFFFFFF
    last = first | ((1 << (32 - length)) - 1 & 0x0FFFFFFF)
    return NEXTHOP_BASE + first, NEXTHOP_BASE + last


def nexthop_scopes(place: Place) -> tuple[Scope, ...]:
    """Our nexthop objects: our protocol, an id from our range, on a device concerned."""
    ids = nexthop_ids(place.network)
    scopes = []
    if place.device is not None:
        # The device is ours alone: an id from another network's range is a leftover.
        every = (NEXTHOP_BASE, NEXTHOP_BASE + 0x0FFFFFFF)
        scopes.append(columns.nexthop_scope(place.device, ids=every))
    others = (place.uplink, *place.leftovers)
    scopes += [columns.nexthop_scope(device, ids=ids) for device in others if device]
    return tuple(scopes)


def route_scopes(place: Place, family: int, ways: bytes | bytearray | None) -> tuple[Scope, ...]:
    """Our routes: all on the vxlan device, and those of our protocol into the network.

    Where routes of ours go to the uplink, all routes there are read: one of
    flanneld's in our place is adopted (see converge).
    """
    scopes = []
    if place.device is not None and place.peers is None:
        scopes.append(columns.route_scope(family, device=place.device, exclusive=True))
    if place.uplink:
        scope = columns.route_scope(family, device=place.uplink, within=place.network)
        scopes.append(scope if ways is None else scope._replace(marked=False))
    scopes += [
        columns.route_scope(family, device=device, within=place.network)
        for device in place.leftovers
    ]
    if place.take_boot and place.uplink:
        scopes.append(
            columns.route_scope(
                family, device=place.uplink, within=place.network, protocol=PROTOCOL_BOOT
            )
        )
    return tuple(scopes)
