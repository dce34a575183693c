"""A change of a few peers, in every family and every resource that it concerns.

The one pass that reads nothing where that is enough (resources/peers/update.py). The caller holds
the lock of the data plane.
"""

from __future__ import annotations

from time import perf_counter

from flannel_dp.cluster import admission
from flannel_dp.cluster.lease import Lease, Listed, split_leases
from flannel_dp.composition import Parts
from flannel_dp.errors import SourceError
from flannel_dp.reconcile.reconciler import Reconciler
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.peers.brake import Brake
from flannel_dp.resources.peers.update import prepare, read


def update(
    parts: Parts,
    reconciler: Reconciler,
    brake: Brake,
    leases: Listed,
    removed: list[Lease | str],
) -> Report:
    """See ``DataPlane.update``."""
    added, bad = split_leases(leases)
    started, report = perf_counter(), Report()
    states = [one.state for one in parts.peers.values() if one.in_sync and one.state]
    if not states:
        raise SourceError(
            "update() needs a state to change", hint="call sync() with all leases first"
        )
    released: list[str] = []
    if any(brake.held.values()):
        yields = brake.yields(added, removed)
        removed, released = [*removed, *yields.leases], yields.incomplete
    orphans = [n for n, lease in enumerate(added) if not (lease.subnet or lease.ipv6_subnet)]
    report.rejected = admission.form_rejections(bad, added, orphans)
    pack, seconds = parts.resolver.pack, report.seconds
    unknown: set[str] | None = None
    begun = perf_counter()
    # Of all families, before the first one is changed: a lease may be malformed in one of them.
    packed = [read(one, added, removed, pack) for one in states]
    seconds["desired"] += perf_counter() - begun
    for one, claims in zip(states, packed, strict=True):
        begun = perf_counter()
        change = prepare(one, claims, added, removed, pack=pack, host=parts.host, released=released)
        seconds["desired"] += perf_counter() - begun
        report.rejected += change.rejected
        unknown = {*change.unknown} if unknown is None else unknown & {*change.unknown}
        report.changed[one.number] = (change.old, change.new)
        for name, outcome in reconciler.update(change).items():
            reconciler[name].record(report, None, outcome)
    if unknown:
        report.unknown = tuple(sorted(unknown))
    seconds["total"] = perf_counter() - started
    return report
