"""Three nodes whose first one probes the others, for tests of ``flannel-dp probe``."""

from __future__ import annotations

from typing import Any

from flannel_dp.cluster.lease import Lease
from flannel_dp.look.probing import probe
from flannel_dp.look.proof import PeerProof, Proof
from flannel_dp.probe.oneshot import Effort
from tests.lib.forwarding import PodNode
from tests.lib.leases import half, replaced

#: An answer takes microseconds; this is for a machine that does other work for a second.
EFFORT = Effort(timeout=3.0)


class Probed:
    """Nodes of one family; the first one probes, and faults are made at the others."""

    def __init__(self, nodes: list[PodNode], family: int, forwarding: str, **backend: Any) -> None:
        self.family, self.nodes = family, nodes
        self.first, self.second = nodes[0], nodes[1]
        self.leases: list[Lease] = [one.lease for one in nodes]
        if backend.get("Type") == "host-gw":
            self.leases = [replaced(one, backend_type="host-gw") for one in self.leases]
        self.planes = [one.plane(family, forwarding=forwarding, backend=backend) for one in nodes]
        self.sync()

    def close(self) -> None:
        for plane in self.planes:
            plane.close()

    def sync(self, *numbers: int) -> None:
        for number in numbers or range(len(self.planes)):
            report = self.planes[number].sync(self.leases)
            assert report.ok, report

    @property
    def device(self) -> str:
        return "flannel.1" if self.family == 4 else "flannel-v6.1"

    def subnet(self, node: PodNode) -> str:
        return half(node.lease, self.family)[0]

    def at(self, node: PodNode, *commands: str) -> None:
        """Run ``ip -FAMILY COMMAND`` on a node."""
        for command in commands:
            node.host.ip(f"-{self.family} {command}")

    def drop(self, node: PodNode, rule: str, hook: str = "output") -> None:
        """Have a node's firewall drop packets."""
        chain = f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; }}"
        for command in ("add table inet cut", chain, f"add rule inet cut {hook} {rule} drop"):
            node.host.exec("nft", command)

    def forward_by_program(self, node: PodNode, leases: list[Lease]) -> None:
        """Have a node forward by its eBPF program, with these leases."""
        number = self.nodes.index(node)
        self._hand_back(number)
        self.planes[number] = node.plane(self.family, forwarding="ebpf")
        report = self.planes[number].sync(leases)
        assert report.ok, report

    def lay_out_as_flanneld(self, node: PodNode) -> None:
        """Have a node forward as flanneld leaves it, with nothing of ours: one ARP or ND, FDB and
        route entry for each other node, by ``ip`` and ``bridge``."""
        self._hand_back(self.nodes.index(node))
        subnet, end, mac = half(node.lease, self.family)
        base, bits = subnet.partition("/")[0], {4: 32, 6: 128}[self.family]
        nodad = {4: "", 6: "nodad"}[self.family]
        lines = [
            f"link add {self.device} address {mac} type vxlan id 1 dstport 8472 local {end} "
            f"dev {node.host.iface} nolearning",
            f"address add {base}/{bits} dev {self.device} {nodad}",
            f"link set {self.device} up",
        ]
        others = [half(one.lease, self.family) for one in self.nodes if one is not node]
        for other, _, other_mac in others:
            via = other.partition("/")[0]
            lines += [
                f"neigh replace {via} lladdr {other_mac} dev {self.device} nud permanent",
                f"route replace {other} via {via} dev {self.device} onlink",
            ]
        node.host.ip_batch(f"-{self.family}", *lines)
        for _, other_end, other_mac in others:
            node.host.bridge(f"fdb replace {other_mac} dev {self.device} dst {other_end}")

    def _hand_back(self, number: int) -> None:
        self.planes[number].clean()
        self.planes[number].close()

    def prove(self, *chosen: str, effort: Effort = EFFORT) -> Proof:
        return probe(self.planes[0], self.leases, chosen, effort)

    def of(self, node: PodNode, effort: Effort = EFFORT) -> PeerProof:
        """What is proven of one node; all others are alive, whatever it loses."""
        proof = self.prove(effort=effort)
        by_subnet = {peer.subnet: peer for peer in proof.peers}
        found = by_subnet.pop(self.subnet(node))
        assert [one.code for one in by_subnet.values()] == ["alive"] * len(by_subnet), str(proof)
        return found
