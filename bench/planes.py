"""Data planes in a benchmark's namespace, and how to get back to an empty kernel."""

from __future__ import annotations

from bench.cluster import Case
from flannel_dp import DataPlane
from flannel_dp.node.family import Family


def plane(
    case: Case, node: str, *, allow_shrink: bool = False, hand_back: bool = False
) -> DataPlane:
    """A data plane of node 0, which is ``node``, the namespace that the test is in; it has no lock,
    as there may be several."""
    return DataPlane(
        case.config, iface="eth0", allow_shrink=allow_shrink, hand_back=hand_back, lock=False
    )


def empty(case: Case, node: str) -> None:
    """Leave the vxlan device and nothing on it: the state before the first peer."""
    with plane(case, node, allow_shrink=True) as dp:
        report = dp.sync([case.own])
    assert report.ok, report.to_json()


def state(dp: DataPlane, case: Case) -> Family:
    """What the data plane took from its last sync; all peers of the case must be in it."""
    found = dp.state[case.family]
    assert len(found.peers) == case.nodes
    return found
