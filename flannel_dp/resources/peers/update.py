"""``DataPlane.update``: what changes when a few leases do.

The tables of the leases concerned are built as they were and as they will be,
by the same function that builds a whole cluster's, and the difference of the
two is applied. Nothing is dumped and nothing is looked at but those leases, as
long as no two claims meet. Where claims meet (a winner leaves, a newcomer
overlaps), all claims are judged again and the whole tables are compared in
memory: the outcome is always that of a ``sync`` with the resulting set.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec import Struct

from flannel_dp._core import Claims, Table, diff_tables, parse_address
from flannel_dp.cluster import admission
from flannel_dp.cluster.admission import Admission
from flannel_dp.cluster.lease import Lease
from flannel_dp.errors import KernelError, NotPermitted, SourceError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.tables import timed
from flannel_dp.node.view import Family, mac_table
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.peers.layouts import desired_tables
from flannel_dp.resources.peers.place import DIRECT, TUNNEL, Placement
from flannel_dp.resources.peers.stack import converge, decide_ways, scaffold, unreachable

if TYPE_CHECKING:
    from flannel_dp.dataplane import DataPlane


def update(plane: DataPlane, added: list[Lease], removed: list[Lease | str]) -> Report:
    """See ``DataPlane.update``; the caller holds the lock and has a state."""
    started = time.perf_counter()
    report = Report()
    orphans = [n for n, lease in enumerate(added) if not (lease.subnet or lease.ipv6_subnet)]
    report.rejected = admission.form_rejections([], added, orphans)
    for number, family in plane.state.items():
        try:
            _update_family(plane, family, added, removed, report)
        except NotPermitted:
            raise
        except KernelError as error:
            report.family_errors[number] = error
    report.seconds["total"] = time.perf_counter() - started
    return report


class _Change(Struct, frozen=True):
    """Peers before and after: ``old`` and ``new`` are packed, ``numbers`` are the places of
    the new ones, ``gone`` those of the old ones that have no successor."""

    old: Claims
    new: Claims
    numbers: list[int]
    gone: list[int]


def _update_family(
    plane: DataPlane,
    family: Family,
    added: list[Lease],
    removed: list[Lease | str],
    report: Report,
) -> None:
    with timed(report.seconds, "desired"):
        packed = plane.resolver.pack(added, family.number)
        _refuse_own(family, packed)
        removed = [*removed, *_withdrawn(family, added)]
        judged = admission.judge(packed, family.admission.node, need_mac=_has_tunnel(family))
        change = _independent(family, judged, added, removed)
    if change is None:
        _judge_all(plane, family, added, removed, report)
        return
    with timed(report.seconds, "desired"):
        old_ways = new_ways = None
        if family.ways is not None:
            places = [*(n for n in change.numbers if n < len(family.peers)), *change.gone]
            old_ways = bytearray(family.ways[place] for place in places)
            new_ways = _ways(plane, family, change.new)
        place = family.place(plane.nexthops)
        old = desired_tables(change.old, place, old_ways)
        new = desired_tables(change.new, place, new_ways)
        _store(family, change, old, new, new_ways, place)
    refused = judged.rejected
    if len(refused):
        held = family.admission.rejected.claims
        for number in range(len(refused)):
            known = held.find_name(refused.claims.name(number))
            if known < 0:
                held.take(refused.claims, number)
            else:
                held.replace(known, refused.claims, number)
        report.rejected = [*report.rejected, *refused]
    _write(plane, family, old, new, report)
    plane.follow(family, change.old, change.new, report)


def _has_tunnel(family: Family) -> bool:
    return family.device is not None


def _ways(plane: DataPlane, family: Family, peers: Claims) -> bytearray:
    """As ``decide_ways``, for so few peers that the kernel is asked for each."""
    ways = bytearray(len(peers))
    with LinkReader(plane.netns) as reader:
        for number in range(len(peers)):
            answer = reader.route_to(peers.endpoint(number))
            direct = answer and answer.gateway is None and answer.oif == family.uplink
            ways[number] = DIRECT if direct else TUNNEL
    return ways


def _refuse_own(family: Family, packed: Claims) -> None:
    """The own lease decides about everything else: a change of it takes a whole sync."""
    node = family.admission.node
    for number in packed.find_endpoint(parse_address(node.public_ip)[1]):
        same = packed.subnet(number) == node.subnet
        if same and packed.mac(number) in (node.mac, "00:00:00:00:00:00"):
            packed.mark_own(number)
        elif same:
            raise SourceError(
                f"the lease of this node, {packed.name(number)}, has changed",
                hint="call sync() with all leases",
            )


def _independent(
    family: Family, judged: Admission, added: list[Lease], removed: Iterable[Lease | str]
) -> _Change | None:
    """The change, if it can be made without asking what other claims make of it."""
    if not _has_tunnel(family) and family.ways and TUNNEL in family.ways:
        return None  # an accepted peer without a route: the tables do not know its subnet
    peers, refused = family.admission.accepted, family.admission.rejected.claims
    leaving: set[int] = set()
    for lease in removed:
        number = _find(family, lease)
        if number is None:
            if len(refused):
                return None  # it may be a refused one that has to be forgotten
            continue
        if peers.is_winner(number):
            return None
        leaving.add(number)
    bad = judged.rejected.claims
    if any(peers.find_name(bad.name(number)) >= 0 for number in range(len(bad))):
        return None  # a peer whose renewal is refused is a peer no more
    if len(refused) and _meets_refused(judged.accepted, refused):
        return None
    return _place(family, judged.accepted, added, leaving)


def _meets_refused(new: Claims, refused: Claims) -> bool:
    names = {new.name(number) for number in range(len(new))}
    return any(refused.find_name(name) >= 0 for name in names)


def _place(family: Family, new: Claims, added: list[Lease], leaving: set[int]) -> _Change | None:
    """Give every new claim its number: that of the lease it renews, or the next free one."""
    peers = family.admission.accepted
    lengths = bytes(family.lengths)
    old = Claims(family.number)
    numbers: list[int] = []
    free = len(peers)
    for number in range(len(new)):
        if new.is_winner(number):
            return None
        if family.maps is None:
            same, others = new.rivals(number, family.routes.table, lengths)
        else:
            same, others = new.rivals(number, family.roster.table, lengths, family.maps)
        if others:
            return None
        if same >= 0 and (same in leaving or peers.name(same) != new.name(number)):
            return None
        if same >= 0 and peers.is_winner(same):
            return None
        if same < 0 and _renamed(peers, added[new.origin(number)]):
            return None
        if _has_tunnel(family):
            place = family.find_mac(new.mac(number))
            if place >= 0 and place != same:
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
    return _Change(old, new, numbers, gone)


def _renamed(peers: Claims, lease: Lease) -> bool:
    """Whether a node that goes by its own name comes with another subnet than before."""
    return lease.name not in ("", lease.key) and peers.find_name(lease.name) >= 0


def _withdrawn(family: Family, added: list[Lease]) -> list[str]:
    """Known nodes that come back without a subnet of this family."""
    admitted = family.admission
    return [
        lease.name
        for lease in added
        if lease.name
        and not (lease.subnet if family.number == 4 else lease.ipv6_subnet)
        and (
            admitted.accepted.find_name(lease.name) >= 0
            or admitted.rejected.claims.find_name(lease.name) >= 0
        )
    ]


def _find(family: Family, lease: Lease | str) -> int | None:
    """The number of an accepted lease, by its subnet and name, or by its key or name."""
    peers = family.admission.accepted
    name = _label(lease)
    subnets = (
        name.replace("-", "/").split("&")
        if isinstance(lease, str)
        else [lease.subnet, lease.ipv6_subnet]
    )
    for subnet in subnets:
        try:
            number = family.find_subnet(subnet)
        except ValueError:
            continue  # a name and no key, or nothing for this family
        if number < 0:
            continue
        if peers.name(number) == name or (
            isinstance(lease, str) and not len(family.admission.rejected)
        ):
            return number  # by its key, whatever name it goes by
    number = peers.find_name(name)
    return None if number < 0 else number


def _store(
    family: Family,
    change: _Change,
    old: list[Table],
    new: list[Table],
    ways: bytearray | None,
    where: Placement,
) -> None:
    """Make the change part of what is known to be wanted."""
    peers = family.admission.accepted
    for number, place in enumerate(change.numbers):
        if place < len(peers):
            peers.replace(place, change.new, number)
        else:
            peers.take(change.new, number)
        if ways is not None and family.ways is not None:
            family.ways[place : place + 1] = ways[number : number + 1]
        family.lengths.add(peers.length(place))
    tables = [wanted.table for wanted in family.wanted]
    if family.macs is not None:
        tables = [*tables, family.macs]
        old, new = [*old, mac_table(change.old)], [*new, mac_table(change.new)]
    for known, before, after in zip(tables, old, new, strict=True):
        if len(before) or len(after):
            known.subtract(before)
            known.merge(after, array("I", change.numbers))
    for number in change.gone:
        peers.swap_remove(number)
        last = family.ways.pop() if family.ways else 0
        family.admission.rejected.claims.renumber_rival(len(peers), number)
        if number < len(peers):  # the last one took its number
            moved = Claims(family.number)
            moved.take(peers, number)
            if family.ways:
                family.ways[number] = last
            again = desired_tables(moved, where, bytearray([last]) if family.ways else None)
            again += [mac_table(moved)] if family.macs is not None else []
            for known, entry in zip(tables, again, strict=True):
                known.merge(entry, array("I", [number]))


def _judge_all(
    plane: DataPlane,
    family: Family,
    added: list[Lease],
    removed: list[Lease | str],
    report: Report,
) -> None:
    """Judge all claims anew, and compare whole tables in memory."""
    with timed(report.seconds, "desired"):
        node, before = family.admission.node, family.admission
        packed = plane.resolver.pack(added, family.number)
        _refuse_own(family, packed)
        out = _leaving(family, removed)
        out |= {packed.name(number) for number in range(len(packed))}
        claims = Claims(family.number)
        for known in (before.accepted, before.rejected.claims):
            for number in range(len(known)):
                if known.name(number) not in out:
                    claims.take(known, number)
        claims.reopen()
        for number in range(len(packed)):
            claims.take(packed, number)
        judged = admission.judge(claims, node, own=before.own, need_mac=_has_tunnel(family))
        old, family.admission = [wanted.table for wanted in family.wanted], judged
        family.macs = None
        if family.ways is not None:
            family.ways = decide_ways(plane.kernel, family)
        family.wanted = family.want(plane.nexthops)
        new = [wanted.table for wanted in family.wanted]
    family.lengths = judged.accepted.lengths_in_use()
    known_losers = {before.rejected.claims.name(n) for n in range(len(before.rejected))}
    report.rejected = [
        *report.rejected,
        *(r for r in judged.rejected if r.lease not in known_losers),
    ]
    _write(plane, family, old, new, report)
    plane.follow(family, before.accepted, judged.accepted, report)


def _leaving(family: Family, removed: list[Lease | str]) -> set[str]:
    """The names of all claims that ``removed`` means: its own, or, for a key that is
    nobody's name, those of the claims to its subnets."""
    known = (family.admission.accepted, family.admission.rejected.claims)
    out = {_label(lease) for lease in removed}
    keys = [lease for lease in removed if isinstance(lease, str)]
    keys = [key for key in keys if all(claims.find_name(key) < 0 for claims in known)]
    subnets = {part for key in keys for part in key.replace("-", "/").split("&")}
    if subnets:
        for claims in known:
            out |= {claims.name(n) for n in range(len(claims)) if claims.subnet(n) in subnets}
    return out


def _label(lease: Lease | str) -> str:
    return lease if isinstance(lease, str) else lease.name or lease.key


def _write(
    plane: DataPlane, family: Family, old: list[Table], new: list[Table], report: Report
) -> None:
    plane.program.follow(plane, plane.known.values())
    report.looked.add("program")
    if plane.program.crowded:
        report.problems["program"] = plane.program.crowded
    with timed(report.seconds, "diff"):
        diffs = [
            diff_tables(after, before)
            for before, after in zip(old, new, strict=True)
            if len(before) or len(after)
        ]
    with timed(report.seconds, "apply"):
        results = plane.kernel.apply(diffs, tags=max((len(one) for one in new), default=0))
    failed = False
    for result in results:
        counts = result.counts()
        failed = failed or counts.pop("failed") > 0
        for word, count in counts.items():
            report.tables[result.kind][word] += count
    if failed:  # the kernel is not as we remember it (what is to be added is there, say)
        scaffold(plane.kernel, results)
        converge(plane.kernel, family, report, None)
    if not _has_tunnel(family):
        report.failures += unreachable(family)
