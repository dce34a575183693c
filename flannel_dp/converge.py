"""Bring one family's tables in line with the kernel: diff, apply, again if that helps."""

from __future__ import annotations

import errno

from flannel_dp._core import Diff
from flannel_dp.entries import Scope
from flannel_dp.errors import DeviceGone, ShrinkRefused
from flannel_dp.kernel.tables import GONE, Kernel, Progress, is_unfinished, timed
from flannel_dp.report import Outcome, Report, TableResult
from flannel_dp.resolve import Family
from flannel_dp.tables import address_family

#: Applications of one sync: the first, and two to finish what was left.
_ROUNDS = 3

#: No daemon has this protocol number: in a scope with it, everything is foreign.
_NOBODY = 255


def everybody(family: int) -> Scope:
    """The whole main table, read as somebody else's: to find what is in our way."""
    return Scope("route", address_family(family), protocol=_NOBODY)


def read_differences(kernel: Kernel, family: Family, *, foreign: bool = False) -> list[Diff]:
    """Compare every table of a family with the kernel.

    With ``foreign``, additions of routes whose place somebody else holds are
    found now, by reading the rest of the main table, and become conflicts;
    without, the kernel refuses them when they are written.
    """
    diffs = []
    for wanted in family.wanted:
        routes = wanted.table.kind == "route"
        if not family.index:  # nothing is on a device that is not there
            scopes = (everybody(family.number),) if routes else ()
            diffs.append(kernel.diff(wanted.table, *scopes))
            continue
        diff = kernel.diff(wanted.table, *wanted.scopes)
        if foreign and routes and diff.added:
            diff = kernel.diff(wanted.table, *wanted.scopes, everybody(family.number))
        diffs.append(diff)
    return diffs


def check_shrink(family: Family, routes: Diff) -> None:
    """Raise ShrinkRefused when over half of the peers, and over ten, would be removed."""
    if routes.removed > 10 and routes.removed > routes.ours - routes.removed:
        raise ShrinkRefused(
            f"{routes.removed} of {routes.ours} IPv{family.number} peers are not in this list "
            "of leases any more",
            hint="check the source; if they are really gone, pass --allow-shrink",
        )


def converge(
    kernel: Kernel,
    family: Family,
    report: Report,
    progress: Progress | None,
    diffs: list[Diff] | None = None,
) -> None:
    """Diff and apply until nothing is left that another pass could mend, three times at most.

    ``diffs`` are the first pass's, where they were read already. Adds to
    ``report``. Raises DeviceGone when the device vanished meanwhile.
    """
    total: dict[str, dict[str, int]] = {}
    results: list[TableResult] = []
    for _ in range(_ROUNDS):
        diffs = diffs or read_differences(kernel, family)
        report.seconds["snapshot"] += sum(diff.snapshot_seconds for diff in diffs)
        report.seconds["diff"] += sum(diff.diff_seconds for diff in diffs)
        with timed(report.seconds, "apply"):
            results = kernel.apply(diffs, tags=len(family.peers), progress=progress)
        for result in results:
            add_counts(total.setdefault(result.kind, {}), result.counts())
        if not is_unfinished(results):
            break
        diffs = None
    settle(kernel, family, results, report)
    for kind, counts in total.items():
        for word, count in counts.items():
            report.tables[kind][word] += count


def settle(kernel: Kernel, family: Family, results: list[TableResult], report: Report) -> None:
    """Sort what the last pass left into conflicts and failures, into ``report``."""
    failures = [outcome for result in results for outcome in result.failures()]
    if any(outcome.error in GONE for outcome in failures):
        name = family.device.device.name
        raise DeviceGone(errno.ENODEV, f"write to {name}", hint="sync again")
    places = {outcome.entry for outcome in failures if _may_be_taken(outcome)}
    if places:
        diff = kernel.diff(family.routes.table, *family.routes.scopes, everybody(family.number))
        found = [pair for pair in diff.conflicts() if pair[0] in places]
        report.conflicts += found
        places = {wanted for wanted, _ in found}
    report.failures += [outcome for outcome in failures if outcome.entry not in places]
    report.conflicts += [pair for result in results for pair in result.diff.conflicts()]


def _may_be_taken(outcome: Outcome) -> bool:
    """IPv4 says EEXIST; IPv6 says EINVAL where a foreign route covers the onlink gateway
    (ip6_route_check_nh_onlink), which one in our very place does."""
    return outcome.table == "route" and outcome.error in (errno.EEXIST, errno.EINVAL)


def add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    """Sum what was written over passes; what is unchanged or failed is the last pass's."""
    for word, count in counts.items():
        if word in ("unchanged", "failed"):
            total[word] = count
        else:
            total[word] = total.get(word, 0) + count
