"""What changes in the peers' tables when a few leases do.

The tables of the leases concerned are made as they were and as they will be, by the same function
that makes a whole cluster's, and the difference of the two is written. Nothing is read, and
nothing but those leases is compared, as long as no two claims meet. Where claims meet (a winner
leaves, a newcomer overlaps) all claims are validated again and the whole tables are compared in
memory: the outcome is always that of a ``sync`` with the resulting set.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable
from time import perf_counter
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Claims, Table, diff_tables
from flannel_dp.cluster import admission
from flannel_dp.cluster.admission import Admission
from flannel_dp.cluster.lease import Lease
from flannel_dp.kernel.host import Host
from flannel_dp.node.family import Family
from flannel_dp.reconcile.report import Report, no_counts
from flannel_dp.resources.peers.own_lease import check_own_lease, label_of, mark_own
from flannel_dp.resources.peers.paths import Paths
from flannel_dp.resources.peers.place import NO_PEER
from flannel_dp.resources.peers.present import keep_entries
from flannel_dp.resources.peers.stack import add_helper_routes, converge, unreachable
from flannel_dp.resources.peers.state import State, mac_table

if TYPE_CHECKING:
    from flannel_dp.cluster.rejections import Rejection


class _PeerChange(Struct, frozen=True):
    """Peers before and after: ``old`` and ``new`` are packed, ``numbers`` are the places of
    the new ones, ``gone`` those of the old ones that have no successor."""

    old: Claims
    new: Claims
    numbers: list[int]
    gone: list[int]


class Prepared(Struct, frozen=True):
    """A change of one family's peers that is part of the state and has yet to be written.

    ``old`` and ``new`` are the peers concerned, before and after, and the tables of both.
    ``rejected`` are leases that the change rejects, ``peers`` all peers after it, ``lengths`` those
    of their subnets (of some that left, too).
    """

    family: Family
    old: Claims
    new: Claims
    before: list[Table]
    after: list[Table]
    rejected: list[Rejection]
    peers: Claims
    lengths: set[int]

    def __len__(self) -> int:
        return max((len(one) for one in self.after), default=0)


def prepare(
    state: State,
    added: list[Lease],
    removed: list[Lease | str],
    *,
    pack: Callable[[Iterable[Lease], int], Claims],
    host: Host,
    released: Collection[str] = (),
) -> Prepared:
    """Make a change of leases part of the state, and return what has to be written.

    ``released`` are names of peers without a lease whose entries are kept no longer. Raises
    SourceError where this node's own lease changes.
    """
    packed = pack(added, state.number)
    check_own_lease(state.family, packed, removed)
    removed = [*removed, *_withdrawn(state, added)]
    left = _release(state, released)
    validated = admission.validate(
        packed, state.family.admission.node, need_mac=state.layout.needs_mac
    )
    change = _independent(state, validated, added, removed)
    if change is None:
        return _validate_all(state, pack(added, state.number), removed, left, host)
    places = [*(n for n in change.numbers if n < len(state.peers)), *change.gone]
    old_paths = state.paths.of(places)
    new_paths = state.layout.paths.ask(host, change.new, state.family.uplink)
    before = state.layout.rows(change.old, state.place, old_paths.column)
    after = state.layout.rows(change.new, state.place, new_paths.column)
    _store(state, change, before, after, new_paths)
    _merge_each(before, left)
    rejected = validated.rejected
    if len(rejected):
        held = state.family.admission.rejected.claims
        for number in range(len(rejected)):
            known = held.find_name(rejected.claims.name(number))
            if known < 0:
                held.take(rejected.claims, number)
            else:
                held.replace(known, rejected.claims, number)
    return Prepared(
        state.family,
        change.old,
        change.new,
        before,
        after,
        [*rejected] if len(rejected) else [],
        state.peers,
        state.lengths,
    )


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


def _independent(
    state: State, validated: Admission, added: list[Lease], removed: Iterable[Lease | str]
) -> _PeerChange | None:
    """Return the change, if it can be made without asking what other claims make of it."""
    if state.unreachable:
        return None  # an accepted peer without a route: the tables do not know its subnet
    peers, refused = state.family.admission.accepted, state.family.admission.rejected.claims
    leaving: set[int] = set()
    for lease in removed:
        number = _find(state, lease)
        if number is None:
            if len(refused):
                return None  # it may be a refused one that has to be forgotten
            continue
        if peers.is_winner(number):
            return None
        leaving.add(number)
    bad = validated.rejected.claims
    if any(peers.find_name(bad.name(number)) >= 0 for number in range(len(bad))):
        return None  # a peer whose renewal is rejected is a peer no more
    if len(refused) and _meets_refused(validated.accepted, refused):
        return None
    known = state.family.admission.node.subnet_len
    if len(refused) and not known and len(_lengths(state, validated.accepted)) > 1:
        return None  # another length may be the ordinary one now, which decides between claims
    return _place(state, validated.accepted, added, leaving)


def _lengths(state: State, new: Claims) -> set[int]:
    """Return the lengths of all subnets that are claimed."""
    refused = state.family.admission.rejected.claims
    return state.lengths | new.lengths_in_use() | refused.lengths_in_use()


def _meets_refused(new: Claims, refused: Claims) -> bool:
    names = {new.name(number) for number in range(len(new))}
    return any(refused.find_name(name) >= 0 for name in names)


def _place(state: State, new: Claims, added: list[Lease], leaving: set[int]) -> _PeerChange | None:
    """Give every new claim its number: that of the lease it renews, or the next free one."""
    peers = state.family.admission.accepted
    lengths = bytes(state.lengths)
    old = Claims(state.number)
    numbers: list[int] = []
    free, macs = len(peers), bytes(new.macs)
    for number in range(len(new)):
        if new.is_winner(number):
            return None
        same, others = state.rivals(new, number, lengths)
        if others:
            return None
        if same >= 0 and (same in leaving or peers.name(same) != new.name(number)):
            return None
        if same >= 0 and peers.is_winner(same):
            return None
        if same < 0 and _renamed(peers, added[new.origin(number)]):
            return None
        if state.find_mac(macs[6 * number : 6 * number + 6].hex(":")) not in (-1, same):
            return None
        if same >= 0:
            old.take(peers, same)
            numbers.append(same)
        else:
            numbers.append(free)
            free += 1
    gone = sorted(leaving, reverse=True)
    for number in gone:
        old.take(peers, number)
    return _PeerChange(old, new, numbers, gone)


def _renamed(peers: Claims, lease: Lease) -> bool:
    """Return whether a node that goes by its own name comes with another subnet than before."""
    return lease.name not in ("", lease.key) and peers.find_name(lease.name) >= 0


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


def _find(state: State, lease: Lease | str) -> int | None:
    """Return the number of an accepted lease, by its subnet and name, or by its key or name."""
    peers = state.family.admission.accepted
    name = label_of(lease)
    subnets = (
        name.replace("-", "/").split("&")
        if isinstance(lease, str)
        else [lease.subnet if state.number == 4 else lease.ipv6_subnet]
    )
    for subnet in subnets:
        try:
            number = state.find_subnet(subnet)
        except ValueError:
            continue  # a name and no key, or nothing for this family
        if number < 0:
            continue
        if peers.name(number) == name or (
            isinstance(lease, str) and not len(state.family.admission.rejected)
        ):
            return number  # by its key, whatever name it goes by
    number = peers.find_name(name)
    return None if number < 0 else number


def _store(
    state: State,
    change: _PeerChange,
    old: list[Table],
    new: list[Table],
    paths: Paths,
) -> None:
    """Make the change part of what is known to be wanted."""
    peers = state.family.admission.accepted
    for number, place in enumerate(change.numbers):
        if place < len(peers):
            peers.replace(place, change.new, number)
        else:
            peers.take(change.new, number)
        state.paths.put(place, paths, number)
        state.lengths.add(peers.length(place))
    tables = [wanted.table for wanted in state.tables]
    if state.macs is not None:
        tables = [*tables, state.macs]
        old, new = [*old, mac_table(change.old)], [*new, mac_table(change.new)]
    for known, before, after in zip(tables, old, new, strict=True):
        if len(before) or len(after):
            known.subtract(before)
            known.merge(after, array("I", change.numbers))
    for number in change.gone:
        peers.swap_remove(number)
        state.paths.move_last(number)
        state.family.admission.rejected.claims.renumber_rival(len(peers), number)
        if number < len(peers):  # the last one took its number
            moved = Claims(state.number)
            moved.take(peers, number)
            again = state.layout.rows(moved, state.place, state.paths.of([number]).column)
            again += [mac_table(moved)] if state.macs is not None else []
            for known, entry in zip(tables, again, strict=True):
                known.merge(entry, array("I", [number]))


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
    state.macs = None
    state.paths = state.layout.paths.decide(host.kernel, state.family)
    state.tables = state.layout.desired(state.peers, state.place, state.paths.column)
    keep_entries(state.tables, state.family.kept.values(), state.place)
    state.lengths = validated.accepted.lengths_in_use()
    known_losers = {before.rejected.claims.name(n) for n in range(len(before.rejected))}
    return Prepared(
        state.family,
        before.accepted,
        validated.accepted,
        old,
        [wanted.table for wanted in state.tables],
        [r for r in validated.rejected if r.lease not in known_losers],
        validated.accepted,
        state.lengths,
    )


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


def write(host: Host, state: State, change: Prepared, report: Report) -> None:
    """Write a prepared change; where the kernel is not as remembered, compare and write all."""
    started = perf_counter()
    diffs = [
        diff_tables(after, before)
        for before, after in zip(change.before, change.after, strict=True)
        if len(before) or len(after)
    ]
    compared = perf_counter()
    results = host.kernel.apply(diffs, tags=len(change))
    report.seconds["diff"] += compared - started
    report.seconds["apply"] += perf_counter() - compared
    failed = False
    for result in results:
        counts = result.counts()
        if counts["failed"]:
            failed, counts["failed"] = True, 0
        report.tables[result.diff.kind] = counts
    if failed:  # the kernel is not as we remember it (what is to be added is there, say)
        report.tables = no_counts() | report.tables
        add_helper_routes(host.kernel, results)
        converge(host.kernel, state, report, None)
    if state.unreachable:
        report.failures += unreachable(state)
