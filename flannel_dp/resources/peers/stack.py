"""Bring one family's tables in sync with the kernel: diff, apply, again if that helps."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable

from flannel_dp._core import UNKNOWN, UNSENT, Diff, Pages, Table, diff_tables
from flannel_dp.errors import DeviceGone
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.tables import GONE, Fetched, Kernel, is_unfinished, timed
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.peers.nexthops import EVERY_ID
from flannel_dp.resources.peers.paths import whole_main_table
from flannel_dp.resources.peers.routes import PROTOCOL_BOOT
from flannel_dp.resources.peers.state import State
from flannel_dp.tables.entries import Entry, Fdb, Neighbour, Nexthop, Route, Scope
from flannel_dp.tables.results import Outcome, TableResult
from flannel_dp.tables.scopes import nexthop_scope

#: Applications of one sync: the first, and two to finish what was left.
_ROUNDS = 3

#: An FDB of more entries is looked up and not dumped, where its whole was read before.
LOOK_UP = 65536


def read_differences(
    kernel: Kernel,
    state: State,
    *,
    foreign: bool = False,
    loses_neighbours: bool = False,
    fetched: Fetched | None = None,
    whole: Pages | None = None,
    sure: bool = False,
    known: bool = False,
) -> list[Diff]:
    """Compare every table of a family with the kernel.

    With ``foreign``, what only happens later is told now: routes whose place
    a foreign entry has are found by reading the rest of the main table, and
    become conflicts (without, the kernel rejects them when they are written),
    and neighbours that vanish when the device changes count as missing.
    ``fetched`` has dumps that are read ahead, from the first table on; here the last
    is the first. ``whole`` is the main table where it was received before. With ``sure``, FDB
    entries that seem to be missing are asked for one by one: a dump may overlook some. ``known``
    is for tables that this process has read in whole before: then a large FDB is not dumped,
    which would cost the square of its size. What is wanted is asked for, and what neighbours that
    have to go lead to.
    """
    diffs: list[Diff] = []
    for wanted in reversed(state.all_tables):
        # A device that is not there yet has nothing on it.
        scopes = [scope for scope in wanted.scopes if scope.device or scope.type]
        kind = wanted.table.kind
        if kind == "fdb" and known and len(wanted.table) > LOOK_UP:
            (scope,) = scopes
            stale = _stale_macs(diffs[-1], wanted.table)
            diffs.append(kernel.channel.look_up(wanted.table, scope, stale))
            continue
        if foreign and kind == "neighbour" and loses_neighbours:
            scopes = []
        read = whole if kind == "route" else None
        diff = kernel.diff(wanted.table, *scopes, fetched=fetched, whole=read)
        if foreign and kind == "route" and diff.added:
            scopes.append(whole_main_table(state.number))
            diff = kernel.diff(wanted.table, *scopes, whole=read)
        if sure and kind == "fdb":
            kernel.channel.confirm(diff, scopes)
        if wanted is state.routes and state.layout.direct:
            adopt_flanneld(diff, state)
        diffs.append(diff)
    return diffs[::-1]


def to_dump(scopes: Iterable[Scope], entries: int, *, known: bool) -> list[Scope]:
    """Return those of ``scopes`` that ``read_differences`` will dump for so many entries."""
    return [
        s
        for s in scopes
        if s.kind != "peer" and not (s.kind == "fdb" and known and entries > LOOK_UP)
    ]


def _stale_macs(neighbours: Diff, fdb: Table) -> Table:
    """FDB keys of what the neighbours were that have to go: their peers' entries, too."""
    stale = Table("fdb")
    for number in range(len(neighbours)):
        _, _, old = neighbours.operation(number)
        if isinstance(old, Neighbour):
            entry = Fdb(old.device, old.mac, "")
            if fdb.find(entry) < 0:
                stale.add(entry)
    return stale


def adopt_flanneld(diff: Diff, state: State) -> int:
    """Take over flanneld's direct routes: to our peer's subnet, via that very peer.

    They carry the mark of any ``ip route add``, so only the same gateway on the
    same interface makes one ours; replaced in place, no packet notices.
    """
    peers, uplink = state.peers, state.family.uplink

    def same(tag: int, foreign: Entry) -> bool:
        return (
            isinstance(foreign, Route)
            and foreign.protocol == PROTOCOL_BOOT
            and foreign.device == uplink
            and foreign.gateway == peers.endpoint(tag)
        )

    return diff.adopt(same)


def unreachable(state: State) -> list[Outcome]:
    """Return peers of host-gw that are not on the external interface's network: no route can be."""
    family, peers = state.family, state.peers
    return [
        Outcome(
            "add",
            "route",
            Route(peers.subnet(number), gateway=peers.endpoint(number), device=family.uplink),
            errno.ENETUNREACH,
            f"{peers.endpoint(number)} is not on-link on {family.iface}: host-gw needs all nodes "
            "in one layer 2 network, vxlan does not",
        )
        for number in state.unreachable
    ]


def converge(host: Host, state: State, report: Report, diffs: list[Diff] | None = None) -> None:
    """Diff and apply until nothing is left that another pass could repair, three times at most.

    ``diffs`` are the first pass's, where they were read already. Adds to
    ``report``. Raises DeviceGone when the device vanished meanwhile.
    """
    if diffs and not any(len(diff) or diff.conflicting for diff in diffs):
        _add_seconds(report, diffs)  # the usual case: all is as it should be
        for diff in diffs:
            report.tables[diff.kind]["unchanged"] += diff.unchanged
        return
    totals: list[dict[str, int]] = [{} for _ in state.all_tables]
    results: list[TableResult] = []
    kernel, helpers = host.kernel, Table("route")
    for _ in range(_ROUNDS):
        diffs = diffs or read_differences(kernel, state)
        _add_seconds(report, diffs)
        with timed(report.seconds, "apply"):
            results = kernel.apply(diffs, tags=len(state.peers), progress=host.progress)
        for total, result in zip(totals, results, strict=True):
            add_counts(total, result.counts())
            if host.applied is not None:
                host.applied(state.number, _without(result, helpers))
        diffs = None
        if len(helpers):  # what still fails has another reason
            break
        helpers = add_helper_routes(kernel, results)
        taken_back = take_back_nexthops(kernel, results)
        if not len(helpers) and not taken_back and not is_unfinished(results):
            break
    if len(helpers):
        totals[-1]["removed"] -= min(len(helpers), totals[-1]["removed"])
    classify_failures(kernel, state, results, report)
    for total, result in zip(totals, results, strict=True):
        for word, count in total.items():
            report.tables[result.kind][word] += count


def _add_seconds(report: Report, diffs: Iterable[Diff]) -> None:
    for diff in diffs:
        report.seconds["snapshot"] += diff.snapshot_seconds
        report.seconds["diff"] += diff.diff_seconds


def take_back_nexthops(kernel: Kernel, results: list[TableResult]) -> int:
    """Take back nexthop objects of ours that another program pointed elsewhere; how many.

    An object with an id and the mark of ours is found on its device only; one that was
    re-pointed to another device, or to a blackhole, is met when ours cannot be added.
    """
    wanted = Table("nexthop")
    for result in results:
        for outcome in result.failures():
            if outcome.error == errno.EEXIST and isinstance(outcome.entry, Nexthop):
                wanted.add(outcome.entry)
    if not len(wanted):
        return 0
    scope = nexthop_scope(0, ids=EVERY_ID)
    return kernel.apply(kernel.channel.look_up(wanted, scope))[0].counts()["replaced"]


def _without(result: TableResult, helpers: Table) -> TableResult:
    """Return what was applied without the removals of helper routes, which this pass has added."""
    if not len(helpers) or result.kind != "route":
        return result
    numbers = array("i", result.results)
    for number in range(result.diff.writes, len(result.diff)):
        if helpers.find(result.diff.operation(number)[2]) >= 0:
            numbers[number] = UNSENT
    return TableResult(result.diff, numbers, result.complaints)


def add_helper_routes(kernel: Kernel, results: list[TableResult]) -> Table:
    """Help IPv6 gateway routes that the kernel would not accept; return the routes that do.

    An onlink gateway is rejected (EINVAL) while another route covers it that leads
    elsewhere: our own direct route that is to become a tunnel's, or a foreign one
    for a wider prefix (ip6_route_check_nh_onlink). A host route to the gateway on
    our device settles that. It is one of ours that is not desired, so the next pass
    removes it, after it has written the routes that it is for.
    """
    hosts = Table("route")
    for result in results:
        for outcome in result.failures():
            entry = outcome.entry
            if outcome.error != errno.EINVAL or not isinstance(entry, Route):
                continue
            if entry.onlink and ":" in entry.gateway:
                hosts.add(Route(f"{entry.gateway}/128", device=entry.device))
    if len(hosts):
        (result,) = kernel.apply(diff_tables(hosts, Table("route")))
        for outcome in result.failures():
            hosts.discard(outcome.entry)
    return hosts


def classify_failures(
    kernel: Kernel, state: State, results: list[TableResult], report: Report
) -> None:
    """Sort what the last pass left into conflicts and failures, into ``report``."""
    failures = [outcome for result in results for outcome in result.failures()]
    if any(outcome.error in GONE for outcome in failures):
        name = state.layout.carrier.format(iface=state.family.iface)
        raise DeviceGone(errno.ENODEV, f"write to {name}", hint="sync again")
    tried = {outcome.entry for outcome in failures if _may_be_taken(outcome)}
    places: set[Entry] = set()
    for wanted in state.all_tables if tried else ():
        if wanted.table.kind == "route":
            diff = kernel.diff(wanted.table, *wanted.scopes, whole_main_table(state.number))
            found = [pair for pair in diff.conflicts() if pair[0] in tried]
            report.conflicts += found
            places |= {one for one, _ in found}
    report.failures += [outcome for outcome in failures if outcome.entry not in places]
    report.conflicts += [pair for result in results for pair in result.diff.conflicts()]


def _may_be_taken(outcome: Outcome) -> bool:
    return outcome.table == "route" and outcome.error in (errno.EEXIST, UNKNOWN)


def add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    """Sum what was written over passes. What is unchanged is the first's, as later passes
    find the entries of the first unchanged, too; what failed is the last pass's."""
    for word, count in counts.items():
        if word == "failed":
            total[word] = count
        elif word == "unchanged":
            total.setdefault(word, count)
        else:
            total[word] = total.get(word, 0) + count
