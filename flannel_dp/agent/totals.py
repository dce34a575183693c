"""The numbers of a Status: what reports, repairs and families add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flannel_dp.agent.status import Status

if TYPE_CHECKING:
    from flannel_dp.reconcile.drift import Repair
    from flannel_dp.reconcile.report import Report
    from flannel_dp.resources.peers.state import State


def of_families(known: Mapping[int, State], broken: Mapping[str, int]) -> dict[str, Any]:
    """Return the Status fields that count peers, entries and rejected leases.

    ``broken`` is the number of leases that cannot be read, by reason.
    """
    entries: Counter[str] = Counter()
    rejected = Counter(broken)
    for state in known.values():
        for wanted in state.all_tables:
            entries[wanted.table.kind] += len(wanted.table)
        rejected.update(state.family.admission.rejected.reasons())
    peers = {number: len(state.peers) for number, state in known.items()}
    return {
        "peers": peers,
        "direct": {n: one.paths.direct for n, one in known.items()},
        "accepted": max(peers.values(), default=0),
        "entries": dict(entries),
        "rejected": dict(rejected),
    }


def of_report(status: Status, report: Report) -> dict[str, Any]:
    """Return the Status fields that count writes and failures, with those of ``report``."""
    failures = len(report.failures) + len(report.family_errors)
    took = status.apply.with_one(report.seconds["apply"]) if report.writes else status.apply
    return {
        "writes": status.writes + report.writes,
        "failures": status.failures + failures,
        "apply": took,
        "diversions": {**status.diversions, **report.diversions},
    }


def with_repair(drift: Mapping[str, int], repair: Repair) -> dict[str, int]:
    """Return ``Status.drift`` with what ``repair`` undid."""
    total = Counter(drift)
    total.update({f"{table}-{change}": count for (table, change), count in repair.counts.items()})
    return dict(total)


def with_audit(drift: Mapping[str, int], report: Report) -> dict[str, int]:
    """Return ``Status.drift`` with what an audit had to write."""
    total = Counter(drift)
    for table, row in report.tables.items():
        if found := row["added"] + row["replaced"] + row["removed"]:
            total[f"{table}-audit"] += found
    return dict(total)
