"""What a person should know although nothing went wrong: the warnings of a plan and a sync."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from flannel_dp.cluster.network import NetworkConfig

if TYPE_CHECKING:
    from flannel_dp._core import Diff
    from flannel_dp.node.view import Family, Resolved
    from flannel_dp.resources.device.plan import Step

#: More gateway routes than this are slow to write.
_MANY_GATEWAYS = 2000


def on_sync(resolved: Resolved, config: NetworkConfig, nexthops: bool) -> tuple[str, ...]:
    """About the node, its devices and the configuration."""
    found = list(resolved.warnings)
    for family in resolved.families:
        plain = family.number == 4 and not nexthops and family.maps is None
        if plain and len(family.peers) > _MANY_GATEWAYS:
            found.append(
                f"{len(family.peers)} IPv4 gateway routes without nexthop objects: the "
                "kernel's cost grows with the square of their number (Linux 5.3 and later "
                "have the objects)"
            )
        moved = [step.text for step in _steps(family) if step.op in ("lower", "local")]
        if family.device and moved:
            found.append(
                f"{family.device.device.name} moves on the underlay: {', '.join(moved)}: other "
                f"nodes see packets from {family.device.device.local} out of {family.iface} now"
            )
        if family.device and family.device.mtu < family.device.device.mtu:
            found.append(
                f"{family.device.device.name} gets MTU {family.device.mtu}, not "
                f"{family.device.device.mtu}: the external interface has no room for more"
            )
        if family.leftovers:
            found.append(
                f"vxlan devices of an earlier layout are still there (IPv{family.number}): "
                "'flannel-dp clean' with that network configuration removes them"
            )
    found += [f"net-conf: key {key} is not known" for key in config.unknown_keys]
    return tuple(found)


def _steps(family: Family) -> Sequence[Step]:
    return family.device.steps if family.device and family.device.action == "adopt" else ()


def on_neighbours(
    resolved: Resolved, looked: Iterable[tuple[Family, Sequence[Diff] | None]]
) -> tuple[str, ...]:
    """Whether neighbours other than ours still find room in the kernel."""
    found = []
    for family, diffs in looked:
        held = sum(diff.ours for diff in diffs or () if diff.kind == "neighbour")
        table = resolved.neighbours.get(family.number)
        if table and table.is_full(held):
            found.append(
                f"the kernel's IPv{family.number} neighbour table is at its limit of "
                f"{table.limit} (gc_thresh3): the overlay's permanent entries are exempt, "
                "neighbours that have to be resolved are not"
            )
    return tuple(found)
