"""What a sync would change, peer by peer: the leases beside what the kernel holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp._core import ADD, REMOVE, Diff, Table, diff_tables
from flannel_dp.cluster.lease import printable
from flannel_dp.cluster.network import device_name
from flannel_dp.look.held import PeerView, by_subnet
from flannel_dp.resources.peers.state import State
from flannel_dp.tables.entries import Entry, Fdb, Neighbour, Nexthop, Peer

if TYPE_CHECKING:
    from flannel_dp.look.overlay import Overlay


def with_differences(
    held: Iterable[PeerView], state: State, diffs: Sequence[Diff] | None
) -> tuple[PeerView, ...]:
    """Return the peers that are held and those that leases want, each with its lease and with
    what a sync would change. ``diffs`` is None where there is no device yet."""
    if diffs is None:  # there is no device yet: everything is added
        diffs = [diff_tables(one.table, Table(one.table.kind)) for one in state.all_tables]
    changes = _changes(diffs)
    claims, unreachable = state.peers, {*state.unreachable}
    numbers = {claims.subnet(number): number for number in range(len(claims))}
    peers = []
    for peer in held:
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
                difference=f"host-gw cannot reach {claims.endpoint(number)}: it is not on-link"
                if number in unreachable
                else ", ".join(changes.get(number, ())),
            )
        )
    return tuple(sorted(peers, key=by_subnet))


def rule_of_paths(overlay: Overlay, state: State) -> str:
    """Return which peers take which path, in words: the rule, and the networks it finds. ""
    where all are reached the same way."""
    others = state.layout.others.format(device=device_name(overlay.config, state.number))
    return state.layout.paths.rule(overlay.host.kernel, state.family, others)


def _changes(diffs: Sequence[Diff]) -> dict[int, list[str]]:
    """Return what is to be written, by the number of the peer it is for."""
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
    mtu = f" mtu {entry.mtu}" if entry.mtu else ""
    by = f"nhid {entry.nexthop}" if entry.nexthop else f"via {entry.gateway}"
    return f"route {by}{mtu}"
