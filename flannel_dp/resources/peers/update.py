"""What changes in the peers' tables when a few leases do.

The tables of the leases concerned are made as they were and as they will be, by the same function
that makes a whole cluster's, and the difference of the two is written. Nothing is read, and
nothing but those leases is compared, as long as no two claims meet. Where claims meet (a winner
leaves, a newcomer overlaps) all claims are validated again and the whole tables are compared in
memory: the outcome is always that of a ``sync`` with the resulting set.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Claims, PeerChange, Roster, Table
from flannel_dp.cluster import admission
from flannel_dp.cluster.lease import Lease
from flannel_dp.kernel.host import Host
from flannel_dp.node.family import Family
from flannel_dp.reconcile.report import Report, Written
from flannel_dp.resources.peers.own_lease import check_own_lease, label_of, mark_own
from flannel_dp.resources.peers.place import NO_PEER
from flannel_dp.resources.peers.present import keep_entries
from flannel_dp.resources.peers.stack import add_helper_routes, converge, unreachable
from flannel_dp.resources.peers.state import State

if TYPE_CHECKING:
    from flannel_dp.cluster.rejections import Rejection

#: Returns leases' halves of one family, packed.
Pack: TypeAlias = Callable[[Iterable[Lease], int], Claims]


class Prepared(Struct, frozen=True):
    """A change of one family's peers that is part of the state and has yet to be written.

    ``old`` and ``new`` are the peers concerned, before and after, and the tables of both.
    ``rejected`` are leases that the change rejects, ``peers`` all peers after it, ``lengths`` those
    of their subnets (of some that left, too). ``unknown`` are names of leases to be removed that
    this family has none of.
    """

    family: Family
    old: Claims
    new: Claims
    before: list[Table]
    after: list[Table]
    rejected: list[Rejection]
    peers: Claims
    lengths: set[int]
    unknown: tuple[str, ...] = ()

    def write(self, host: Host, state: State) -> Report | Written:
        """Write the change; where the kernel is not as remembered, compare and write all."""
        started = perf_counter()
        # Entries are tagged by the number of their peer among the new ones.
        counts, failed = host.kernel.change(self.before, self.after, tags=len(self.new))
        seconds = perf_counter() - started
        if failed is None and not state.unreachable:
            return Written(counts, seconds)
        report = Report()
        report.tables |= counts
        report.seconds["apply"] = seconds
        if failed:  # what is to be added is there, say
            for row in counts.values():
                row["failed"] = 0
            add_helper_routes(host.kernel, failed)
            converge(host, state, report)
        report.failures += unreachable(state)
        return report


def read(
    state: State,
    added: list[Lease],
    removed: list[Lease | str],
    pack: Pack,
) -> Claims:
    """Return the added leases, packed. Raises SourceError where this node's own lease changes,
    and what ``pack`` raises for objects that no lease can be."""
    packed = pack(added, state.number)
    if state.peer_roster().concerns_own(packed, removed):
        check_own_lease(state.family, packed, removed)
    return packed


def prepare(
    state: State,
    packed: Claims,
    added: list[Lease],
    removed: list[Lease | str],
    *,
    pack: Pack,
    host: Host,
    released: Collection[str] = (),
) -> Prepared:
    """Make a change of leases part of the state, and return what has to be written.

    ``packed`` is what ``read`` made of ``added``. ``released`` are names of peers without a lease
    whose entries are kept no longer.
    """
    roster = state.peer_roster()
    if len(packed) < len(added):
        removed = [*removed, *_withdrawn(state, added)]
    left = _release(state, released) if released else []
    change = None if state.unreachable else _follow(state, roster, packed, added, removed)
    if change is None:
        return _validate_all(state, pack(added, state.number), removed, left, host)
    new_paths = state.layout.paths.ask(host, change.new, state.family.uplink)
    before, after = roster.store(change, state.paths.column, new_paths.column)
    if state.mtus is not None and after:
        for routes in (before[-1], after[-1], state.routes.table):
            routes.take_mtus(state.mtus)
    if left:
        before = before or [Table(one.kind) for one in left]
        after = after or [Table(one.kind) for one in left]
        _merge_each(before, left)
    return Prepared(
        state.family,
        change.old,
        change.new,
        before,
        after,
        _reject(state, change) if len(change.rejected) else [],
        state.peers,
        roster.lengths,
        _unknown(removed, change.old) if len(change.gone) < len(removed) else (),
    )


def _follow(
    state: State,
    roster: Roster,
    packed: Claims,
    added: list[Lease],
    removed: list[Lease | str],
) -> PeerChange | None:
    """Return the change, if it can be made without asking what other claims make of it."""
    node = state.family.admission.node
    ordinary = 0
    if len(packed) > 1 and not (node.subnet_len or node.ordinary):
        ordinary = admission.ordinary_length(packed)
    return roster.follow(packed, added, removed, not node.subnet_len, ordinary)


def _reject(state: State, change: PeerChange) -> list[Rejection]:
    """Remember the leases that a change rejects, and return why."""
    held, rejected = state.family.admission.rejected.claims, change.rejected
    for number in range(len(rejected)):
        known = held.find_name(rejected.name(number))
        if known < 0:
            held.take(rejected, number)
        else:
            held.replace(known, rejected, number)
    return [*admission.Rejections(state.family.admission.node, change.new, rejected)]


def _release(state: State, names: Collection[str]) -> list[Table]:
    """Want the entries of these incomplete peers no longer; return them, a table for each of the
    state's, none where there are no names."""
    if not names:
        return []
    left = [Table(wanted.table.kind) for wanted in state.tables]
    kept = state.family.kept
    for held in (table for name in names for table in kept.get(name, ())):
        for wanted, into in zip(state.tables, left, strict=True):
            for entry in held if held.kind == into.kind else ():
                place = wanted.table.find(entry)
                if place >= 0 and wanted.table.tag(place) == NO_PEER:
                    into.add(entry, NO_PEER)
                    wanted.table.discard(entry)
    rest = {name: tables for name, tables in kept.items() if name not in names}
    if len(rest) < len(kept):
        state.family = replace(state.family, kept=rest)
    return left


def _merge_each(tables: list[Table], others: list[Table]) -> None:
    for table, other in zip(tables, others, strict=True) if others else ():
        table.merge(other)


def _withdrawn(state: State, added: list[Lease]) -> list[str]:
    """Known nodes that come back without a subnet of this family."""
    admitted = state.family.admission
    return [
        lease.name
        for lease in added
        if lease.name
        and not (lease.subnet if state.number == 4 else lease.ipv6_subnet)
        and (
            admitted.accepted.find_name(lease.name) >= 0
            or admitted.rejected.claims.find_name(lease.name) >= 0
        )
    ]


def _validate_all(
    state: State, packed: Claims, removed: list[Lease | str], left: list[Table], host: Host
) -> Prepared:
    """Validate all claims again, and make whole tables of what is accepted; entries that are
    ``left`` of peers without a lease go."""
    before = state.family.admission
    mark_own(packed, before)
    out = _leaving(state, removed)
    out |= {packed.name(number) for number in range(len(packed))}
    claims = Claims(state.number)
    for known in (before.accepted, before.rejected.claims):
        for number in range(len(known)):
            if known.name(number) not in out:
                claims.take(known, number)
    claims.reopen()
    for number in range(len(packed)):
        claims.take(packed, number)
    node = replace(before.node, ordinary=0)
    validated = admission.validate(claims, node, own=before.own, need_mac=state.layout.needs_mac)
    old = [wanted.table for wanted in state.tables]
    _merge_each(old, left)
    state.family = replace(state.family, admission=validated)
    state.roster = None
    state.paths = state.layout.paths.decide(host.kernel, state.family)
    state.tables = state.layout.desired(state.peers, state.place, state.paths.column)
    keep_entries(state.tables, state.family.kept.values(), state.place)
    if state.mtus is not None:
        state.routes.table.take_mtus(state.mtus)
    known_losers = {before.rejected.claims.name(n) for n in range(len(before.rejected))}
    return Prepared(
        state.family,
        before.accepted,
        validated.accepted,
        old,
        [wanted.table for wanted in state.tables],
        [r for r in validated.rejected if r.lease not in known_losers],
        validated.accepted,
        validated.accepted.lengths_in_use(),
        _unknown(removed, before.accepted, before.rejected.claims) if removed else (),
    )


def _unknown(removed: list[Lease | str], *known: Claims) -> tuple[str, ...]:
    """Return the names in ``removed`` that none of the known claims goes by."""
    names = {claims.name(number) for claims in known for number in range(len(claims))}
    subnets = {claims.subnet(number) for claims in known for number in range(len(claims))}

    def is_known(lease: Lease | str) -> bool:
        label = label_of(lease)
        by_key = isinstance(lease, str) and not subnets.isdisjoint(
            label.replace("-", "/").split("&")
        )
        return by_key or label in names

    return tuple(label_of(lease) for lease in removed if not is_known(lease))


def _leaving(state: State, removed: list[Lease | str]) -> set[str]:
    """Return the names of all claims that ``removed`` means: its own, or, for a key that is
    no claim's name, those of the claims to its subnets."""
    known = (state.family.admission.accepted, state.family.admission.rejected.claims)
    out = {label_of(lease) for lease in removed}
    keys = [lease for lease in removed if isinstance(lease, str)]
    keys = [key for key in keys if all(claims.find_name(key) < 0 for claims in known)]
    subnets = {part for key in keys for part in key.replace("-", "/").split("&")}
    if subnets:
        for claims in known:
            out |= {claims.name(n) for n in range(len(claims)) if claims.subnet(n) in subnets}
    return out
