"""An API server on loopback, over TLS, with a cluster of nodes as kubelets report them.

The project's double of the API server, in a process of its own. The JSON of nodes is made
beforehand, so that what is measured of an agent's start is the agent's: the answer of a page of 500
nodes, 10 MB, is a join of bytes. Node 0 is the one that the agent is on, and has no annotations.

    python -m bench.kube_cluster CERTIFICATE KEY FAMILY NODES
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from bench import cluster, kube_server
from tests.lib.apiserver import ApiServer, Certificates

OWN = "node-00000"
_FLANNEL = "flannel.alpha.coreos.com/"


def node(family: int, number: int) -> dict[str, Any]:
    """Node ``number`` of ``bench.cluster``, 20 kB."""
    lease = cluster.lease(family, number)
    data = lease.backend_data if family == 4 else lease.backend_v6_data
    assert data is not None
    made = kube_server.node(f"node-{number:05}", number, 0)
    notes = made["metadata"]["annotations"]
    for key in [key for key in notes if key.startswith(_FLANNEL)]:
        del notes[key]
    cidr, said = lease.subnet or lease.ipv6_subnet, {"VNI": 1, "VtepMAC": data.vtep_mac}
    if number:
        address = "public-ip" if family == 4 else "public-ipv6"
        notes |= {
            f"{_FLANNEL}kube-subnet-manager": "true",
            f"{_FLANNEL}backend-type": "vxlan",
            f"{_FLANNEL}backend-{'' if family == 4 else 'v6-'}data": json.dumps(said),
            f"{_FLANNEL}{address}": lease.public_ip or lease.public_ipv6,
        }
    made["spec"] = {"podCIDR": cidr, "podCIDRs": [cidr]}
    return made


class Cluster(ApiServer):
    """Only the agent's own node changes; the others are in lists."""

    def __init__(self, certificate: tuple[Path, Path], family: int, nodes: int) -> None:
        super().__init__(certificate)
        self.put(node(family, 0))
        made = (node(family, number) for number in range(1, nodes + 1))
        self._others = [json.dumps(one, separators=(",", ":")).encode() for one in made]

    def list(self, query: dict[str, str]) -> tuple[int, Any]:
        with self.changed:
            own = json.dumps(self.nodes[OWN]).encode()
        every = [own, *self._others]
        start = int(base64.b64decode(query["continue"])) if "continue" in query else 0
        end = start + int(query.get("limit", len(every)))
        meta: dict[str, Any] = {"resourceVersion": str(self.version)}
        if end < len(every):
            meta["continue"] = base64.b64encode(b"%d" % end).decode()
            meta["remainingItemCount"] = len(every) - end
        head = b'{"kind":"NodeList","apiVersion":"v1","metadata":%s,"items":['
        return 200, head % json.dumps(meta).encode() + b",".join(every[start:end]) + b"]}"


def write_kubeconfig(path: Path, port: int, pki: Certificates) -> Path:
    """Write a kubeconfig that reaches the server at ``port``; JSON is YAML."""
    where = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(pki.ca)}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": where}],
        "contexts": [{"name": "x", "context": {"cluster": "c"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(document))
    return path


def main(arguments: list[str]) -> int:
    """Serve until the parent closes standard input; the first line printed is the port."""
    certificate, key, family, nodes = arguments
    server = Cluster((Path(certificate), Path(key)), int(family), int(nodes))
    print(server.port, flush=True)
    sys.stdin.read()
    server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
