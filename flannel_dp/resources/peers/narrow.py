"""Routes with an MTU of their own: those of peers whose path takes less than the device's MTU.

``ip route replace 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink mtu 1350``: the kernel then
tells the sender ("fragmentation needed", "packet too big"), whose packets would be lost on the way
(RTAX_MTU in ip_forward and ip6_forward). It is not locked (``mtu lock``), which would have the
kernel send packets without "do not fragment". Where a program forwards, one route leads all
packets to it, and such a peer gets one beside it, by the same gateway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from flannel_dp._core import Table, parse_prefix
from flannel_dp.errors import require
from flannel_dp.kernel.host import Host
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.peers.place import NO_PEER, DesiredTable
from flannel_dp.resources.peers.state import State
from flannel_dp.tables.entries import Peer, Route

#: What the kernel makes no other number of (ip_metrics_convert), and IPv4 takes everywhere.
LEAST, MOST = 68, 65520

#: What IPv6 takes everywhere (RFC 8200): the kernel never tells a sender less.
IPV6_LEAST = 1280


def checked(mtus: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """Return MTUs by subnet for each family. Raises ConfigError for what is no subnet or MTU."""
    found: dict[int, dict[str, int]] = {4: {}, 6: {}}
    require(isinstance(mtus, Mapping), "mtus", mtus, "a dict of MTUs by subnet")
    for subnet, mtu in mtus.items():
        require(isinstance(mtu, int) and LEAST <= mtu <= MOST, "an MTU", mtu, "68 to 65520 bytes")
        try:
            parse_prefix(subnet)
        except (TypeError, ValueError):
            require(False, "a subnet", subnet, "a prefix, 10.244.7.0/24")
        found[6 if ":" in subnet else 4][subnet] = mtu
    return found


def table_of(mtus: Mapping[str, int]) -> Table:
    """Return MTUs by subnet as a table of routes that have nothing else."""
    table = Table("route")
    for subnet, mtu in written_as(mtus).items():
        table.add(Route(subnet, mtu=mtu), NO_PEER)
    return table


def written_as(mtus: Mapping[str, int]) -> dict[str, int]:
    """Return MTUs by subnet as routes get them."""
    return {net: max(mtu, IPV6_LEAST) if ":" in net else mtu for net, mtu in mtus.items()}


def mtus_in_kernel(host: Host, tables: Iterable[DesiredTable], network: str) -> Table:
    """Return the MTUs that routes of ours have, by subnet; the network's own route has none."""
    found = Table("route")
    for wanted in tables:
        scopes = [scope for scope in wanted.scopes if scope.device]
        if wanted.table.kind != "route" or not scopes:
            continue
        diff = host.kernel.diff(Table("route"), *scopes)
        for number in range(len(diff)):
            _, _, old = diff.operation(number)
            if isinstance(old, Route) and old.mtu and old.prefix != network:
                found.add(Route(old.prefix, mtu=old.mtu), NO_PEER)
    return found


def put_mtus(state: State) -> None:
    """Make the MTUs of a state part of its tables."""
    mtus = state.mtus
    if mtus is None:
        return
    state.routes.table.take_mtus(mtus)
    shared = _gateway_table(state)
    if shared is not None:
        shared.merge(_beside(state, mtus))


def set_mtus(host: Host, state: State, mtus: Mapping[str, int]) -> tuple[Report, bool]:
    """Give the routes of these peers MTUs of their own, and all others the device's. Returns what
    was written, and whether all of it was.

    Nothing is read. Equivalent: ``ip route replace PREFIX ... mtu N`` for each that differs.
    """
    new, report = table_of(mtus), Report()
    both = Table("route")
    for table, mtu in ((state.mtus, 0), (new, None)):
        for route in table if table is not None else ():
            both.add(Route(route.prefix, mtu=route.mtu if mtu is None else mtu), NO_PEER)
    routes, shared = state.routes.table, _gateway_table(state)
    before, after = [routes.matching(both)], [routes.matching(both)]
    after[0].take_mtus(both)
    if shared is not None:
        old = Table("route")
        for route in shared:
            if route.prefix != state.network:
                old.add(route, NO_PEER)
        before.append(old)
        after.append(_beside(state, new))
        shared.subtract(old)
        shared.merge(after[1])
    routes.take_mtus(both)
    state.mtus = new
    counts, failed = host.kernel.change(before, after, tags=len(state.peers))
    report.tables |= counts
    return report, failed is None


def _gateway_table(state: State) -> Table | None:
    """Return the table with the route that leads all packets to the program, None without one."""
    for wanted in state.shared:
        if wanted.table.kind == "route" and any(one.exclusive for one in wanted.scopes):
            return wanted.table
    return None


def _beside(state: State, mtus: Table) -> Table:
    """Return routes by the shared gateway, for peers that are reached by it."""
    found = Table("route")
    shared = _gateway_table(state)
    by = shared.find(Route(state.network)) if shared is not None else -1
    if shared is None or by < 0:
        return found
    gateway = shared[by]
    for route in _in_map(state, mtus):
        found.add(gateway._replace(prefix=route.prefix, mtu=route.mtu), NO_PEER)
    return found


def _in_map(state: State, mtus: Table) -> Iterator[Route]:
    """Yield the MTUs of peers that the program forwards to."""
    peers = state.tables[0].table
    for route in mtus:
        like = Peer(route.prefix, "::", "00:00:00:00:00:00", state.place.map)
        if peers.find(like) >= 0 and state.routes.table.find(route) < 0:
            yield route
