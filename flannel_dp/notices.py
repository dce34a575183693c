"""What a person should know although nothing went wrong: about the node and its configuration.

What a resource has to say of itself it says in its part of the report.
"""

from __future__ import annotations

from flannel_dp.cluster.admission import Node
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import NotPermitted
from flannel_dp.node.family import View
from flannel_dp.reconcile.reconciler import Pass
from flannel_dp.resources.peers.resource import PeersChange


def about_node(view: View, config: NetworkConfig) -> tuple[str, ...]:
    """Return warnings about the node and the network configuration."""
    found = list(view.warnings)
    for family in view.families:
        node = family.admission.node
        found += [
            f"{_pods(node)} of pods is a part of {one.what}: hosts there that have "
            "addresses of pods' subnets are not reachable from this node"
            for one in node.around
        ]
        if family.leftovers:
            found.append(
                f"vxlan devices of an earlier layout are still there (IPv{family.number}): "
                "'flannel-dp clean' with that network configuration removes them"
            )
    if config.unknown_keys:
        from flannel_dp.cluster.suggest import about_key

        found += map(about_key, config.unknown_keys)
    return tuple(found)


def _pods(node: Node) -> str:
    if node.pods:
        return f"the range {node.pods[0]} to {node.pods[1]}"
    return f"the network {node.network}"


def not_permitted() -> dict[str, Exception]:
    """Return the error that a write would end with, where the process has no CAP_NET_ADMIN."""
    import errno

    from flannel_dp.kernel.capabilities import effective

    if "CAP_NET_ADMIN" in effective():
        return {}
    hint = "run as root or grant CAP_NET_ADMIN"
    return {"permission": NotPermitted(errno.EPERM, "write to the kernel", hint=hint)}


def full_neighbours(view: View, found: Pass) -> tuple[str, ...]:
    """Return a warning where neighbours other than ours find no room in the kernel."""
    warnings = []
    for family in view.families:
        change = found.changes.get(f"peers{family.number}")
        diffs = change.diffs if isinstance(change, PeersChange) else None
        held = sum(diff.ours for diff in diffs or () if diff.kind == "neighbour")
        table = view.neighbours.get(family.number)
        if table and table.is_full(held):
            name = f"net.ipv{family.number}.neigh.default.gc_thresh3"
            warnings.append(
                f"the kernel's IPv{family.number} neighbour table, one for all namespaces of this "
                f"host, is at its limit of {table.limit} and has rejected {table.rejected} "
                "neighbours since the boot: other hosts may be unreachable, peers of the overlay "
                f"are exempt; raise it on the host with 'sysctl -w {name}={4 * table.limit}'"
            )
    return tuple(warnings)
