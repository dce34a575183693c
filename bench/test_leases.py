"""From the bytes of a lease file to the tables that are wanted: no kernel in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench import cluster
from bench.cluster import Case
from bench.figures import times
from flannel_dp.cluster import admission
from flannel_dp.cluster.admission import Node, OwnLease
from flannel_dp.cluster.network import network_of
from flannel_dp.node.evidence import claims_about
from flannel_dp.node.identity import Evidence, decide
from flannel_dp.resources.peers.layouts import VXLAN
from flannel_dp.resources.peers.place import KINDS, DesiredTable, Placement
from flannel_dp.sources.file import FileSource

_TARGET_US = 4.0
_DEVICE, _UPLINK = 7, 2


@pytest.mark.benchmark(group="lease file to tables")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case(family, nodes),
            id=f"ipv{family}-{nodes}",
            marks=[pytest.mark.smoke] if nodes == 1_000 else [],
        )
        for nodes in (1_000, 10_000, 50_000)
        for family in (4, 6)
    ],
)
def test_lease_file_to_tables(
    benchmark: Any, case: Case, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """Read, decode, validate, and build the tables."""
    source = FileSource(cluster.write_file(tmp_path / "leases.json", case.leases))

    wanted = benchmark.pedantic(_desired, args=(source, case.family), rounds=21, warmup_rounds=1)

    assert [len(one.table) for one in wanted] == [case.nodes] * len(wanted)
    per_lease = median(times(benchmark)) / case.nodes * 1e6
    target = _TARGET_US if case.nodes == 10_000 else None
    figure(f"lease file to tables, {case}", per_lease, "us/lease", target)


def _desired(source: FileSource, family: int) -> list[DesiredTable]:
    """What a sync does before it looks at the kernel."""
    config = cluster.config(family)
    claims, _ = source.snapshot().claims
    address, _, _ = cluster.public_address(family).partition("/")
    packed = admission.pack(claims, family, backend="vxlan", vni=1)
    node = Node(
        family,
        network_of(config, family),
        address,
        addresses=(address,),
        underlay=(cluster.public_address(family),),
    )
    about = claims_about(packed, node.network, [address], [])
    lease = decide(Evidence((address,)), about).own
    assert lease is not None
    packed.mark_own(lease.number)
    own = OwnLease(lease.name, lease.subnet, lease.mac)
    node = Node(family, node.network, address, node.addresses, node.underlay, own.subnet, own.mac)
    judged = admission.validate(packed, node, own=own)
    kinds = KINDS if node.family == 4 else KINDS - {"nexthop"}
    place = Placement(_DEVICE, _UPLINK, node.network, node.family == 4, kinds)
    return VXLAN.desired(judged.accepted, place)
