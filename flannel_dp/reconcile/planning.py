"""What a sync would do, read and never written: ``DataPlane.plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flannel_dp._core import Diff
from flannel_dp.cluster.lease import Claims as LeaseList
from flannel_dp.node.view import Family, Leases, Resolved
from flannel_dp.reconcile import advice
from flannel_dp.reconcile.plan import Plan, TablePlan
from flannel_dp.resources.forwarding.resource import device_changes
from flannel_dp.resources.peers.stack import read_differences

if TYPE_CHECKING:
    from flannel_dp.dataplane import DataPlane


def plan(plane: DataPlane, leases: Leases) -> Plan:
    """See ``DataPlane.plan``; the caller holds the lock."""
    checked = plane.program.check()
    leases = leases if isinstance(leases, LeaseList) else [*leases]
    resolved = plane.resolver.resolve(leases, known=plane.known.values())
    tables = _differences(plane, resolved)
    held: tuple[str, ...] = ()
    if not plane.allow_shrink:
        looked = [(family, diffs if family.exists else None) for family, diffs in tables]
        kept = plane.brake.check(leases, looked)
        if kept:
            resolved = kept.resolved
            tables = _differences(plane, resolved)
            held = tuple(str(error) for error in [kept.refusal()] if error)
    rules, blockers = plane.plan_rules(resolved)
    return Plan(
        tuple(
            TablePlan(diff, wanted.scopes, plane.names_of(family))
            for family, diffs in tables
            for diff, wanted in zip(diffs, family.tables, strict=True)
        ),
        device_changes(resolved.families),
        resolved.rejections(),
        held + advice.on_sync(resolved, plane.config, bool(plane.nexthops)) + blockers,
        rules,
        checked,
    )


def _differences(plane: DataPlane, resolved: Resolved) -> list[tuple[Family, list[Diff]]]:
    found = []
    for family in resolved.families:
        family.lacking = plane.program.lacking(family)
        plane.want(family)
        found.append((family, read_differences(plane.kernel, family, foreign=True)))
    return found
