"""What a cluster of any size costs a node and its store, from coefficients that were measured.

    python -m bench.model                       # the tables of docs/scaling.md
    python -m bench.model --nodes 5000 65000 --family 6
    python -m bench.model --measure             # the kernel's and the decoder's coefficients, here

The model is a straight line through what was measured up to 50,000 nodes, and arithmetic
for what N nodes ask of one server. Everything above MEASURED nodes is extrapolated, and
marked with a star. docs/scaling.md says where each coefficient is from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flannel_dp.errors import SourceError

#: The largest cluster that the real pipeline was run with.
MEASURED = 50_000
SIZES = (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Coefficient:
    """A number, its unit, and where it is from: "measured", "published" or "deduced"."""

    value: float
    unit: str
    origin: str
    source: str


def _measured(value: float, unit: str, command: str) -> Coefficient:
    return Coefficient(value, unit, "measured", command)


_HERE = "python -m bench.model --measure"
_MEMORY = "pytest bench/test_memory.py bench/test_agent_memory.py --benchmark-only"
_ETCD = "pytest bench/test_etcd.py --benchmark-only -k renewals"
_KUBE = "pytest bench/test_kube_events.py --benchmark-only"
_SIMULATE = "python -m bench.simulate --nodes 1000 10000 50000"

#: By name, those of the kernel by family ("install4").
COEFFICIENTS: dict[str, Coefficient] = {
    "install4": _measured(12.0, "us a peer", _HERE),
    "install6": _measured(10.2, "us a peer", _HERE),
    "audit4": _measured(3.9, "us a peer", _HERE),
    "audit6": _measured(4.9, "us a peer", _HERE),
    "slab4": _measured(1375.0, "bytes a peer", _HERE),
    "slab6": _measured(1510.0, "bytes a peer", _HERE),
    "agent": _measured(43e6, "bytes, with 1,000 peers or fewer", _MEMORY),
    "peer": _measured(460.0, "bytes a peer, after several syncs", _MEMORY),
    "change": _measured(210e-6, "CPU s a change that comes alone", _SIMULATE),
    "renewal": _measured(48e-6, "CPU s a renewal that comes alone", _ETCD),
    "heartbeat": _measured(73e-6, "CPU s a node's event, TLS and HTTP included", _KUBE),
    "lease": Coefficient(
        41 + 121 + 40, "bytes a lease listed", "deduced", "key, value, and protobuf around them"
    ),
    "event": Coefficient(
        41 + 121 + 60 + 95, "bytes an event", "deduced", "the same, HTTP/2 and TLS frames, TCP/IP"
    ),
    "period": Coefficient(
        23 * 3600.0, "s between renewals of a lease", "published", "flannel: TTL 24 h, margin 1 h"
    ),
    "metadata": _measured(2_341.0, "bytes of that event, the metadata of a made-up node", _KUBE),
    "node": _measured(10_000.0, "bytes of a made-up node with 50 images, listed", _HERE),
    "status": Coefficient(
        300.0,
        "s between status updates of a node that does not change",
        "published",
        "https://kubernetes.io/docs/reference/node/node-status/#heartbeats",
    ),
    "link": Coefficient(1.25e9, "bytes/s of a server's link", "deduced", "10 Gbit/s"),
}


def _of(name: str) -> float:
    return COEFFICIENTS[name].value


@dataclass(frozen=True)
class Node:
    """What one node holds and does: bytes and seconds. An audit is once a minute."""

    nodes: int
    entries: int
    kernel_bytes: float
    agent_bytes: float
    install: float
    audit: float

    @classmethod
    def of(cls, nodes: int, family: int) -> Node:
        few = min(nodes, 1_000)
        return cls(
            nodes,
            (4 if family == 4 else 3) * nodes,
            _of(f"slab{family}") * nodes,
            _of("agent") + _of("peer") * (nodes - few),
            _of(f"install{family}") * 1e-6 * nodes,
            _of(f"audit{family}") * 1e-6 * nodes,
        )


@dataclass(frozen=True)
class Store:
    """N nodes of which each publishes itself every ``period`` seconds, before ``watchers``
    who all watch everybody. Rates are a second; a storm is when all of them list at once."""

    nodes: int
    watchers: int
    a_node: float
    cpu: float
    a_node_bytes: float
    server: float
    server_bytes: float
    storm_bytes: float

    @property
    def storm(self) -> float:
        """Seconds that the storm's bytes fill the server's link."""
        return self.storm_bytes / _of("link")

    @classmethod
    def etcd(cls, nodes: int, watchers: int) -> Store:
        """flannel's leases in etcd."""
        return cls._of(nodes, watchers, "period", "renewal", "event", "lease")

    @classmethod
    def kubernetes(cls, nodes: int, watchers: int) -> Store:
        """Node objects, which kubelets write for reasons of their own."""
        return cls._of(nodes, watchers, "status", "heartbeat", "metadata", "node")

    @classmethod
    def _of(
        cls, nodes: int, watchers: int, period: str, cpu: str, event: str, listed: str
    ) -> Store:
        rate = nodes / _of(period)
        return cls(
            nodes,
            watchers,
            rate,
            rate * _of(cpu),
            rate * _of(event),
            rate * watchers,
            rate * watchers * _of(event),
            watchers * nodes * _of(listed),
        )


# ---- as text --------------------------------------------------------------------


def amount(value: float, unit: str) -> str:
    """A number of three digits with the unit's prefix: ``1.4 GB``, ``12 ms``."""
    if value == 0:
        return f"0 {unit}"
    small = ((1e-3, "m"), (1e-6, "u"))
    large = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    if unit == "s" and value >= 100:
        long = ((86400, "d"), (3600, "h"), (60, "min"))
        factor, name = next(one for one in long if value >= 3 * one[0] or one[0] == 60)
        return f"{value / factor:.3g} {name}"
    for factor, prefix in large if unit != "s" else ():
        if value >= factor * 0.9995:
            return f"{value / factor:.3g} {prefix}{unit}"
    if value < 1:
        for factor, prefix in small if unit == "s" else ():
            if value >= factor:
                return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


Row = tuple[str, Callable[[int], str]]


def node_rows(family: int) -> list[Row]:
    """The first table: what a node pays."""

    def of(nodes: int) -> Node:
        return Node.of(nodes, family)

    return [
        ("entries in the kernel", lambda n: f"{of(n).entries:,}"),
        ("kernel memory", lambda n: amount(of(n).kernel_bytes, "B")),
        ("agent's memory", lambda n: amount(of(n).agent_bytes, "B")),
        ("sync from empty", lambda n: amount(of(n).install, "s")),
        ("one audit", lambda n: amount(of(n).audit, "s")),
        ("audits, of a core", lambda n: f"{of(n).audit / 60:.2%}"),
        ("1 % of the nodes replaced", lambda n: amount(0.02 * n * _of("change"), "s")),
    ]


def store_rows(make: Callable[[int, int], Store], watchers: int | None) -> list[Row]:
    """A store's table: ``watchers`` instead of all nodes, where relays are between."""

    def of(nodes: int) -> Store:
        return make(nodes, nodes if watchers is None else min(watchers, nodes))

    return [
        ("events a node sees", lambda n: amount(of(n).a_node, "/s")),
        ("bytes a node reads", lambda n: amount(of(n).a_node_bytes, "B/s")),
        ("of a node's core", lambda n: f"{of(n).cpu:.3%}"),
        ("events a server sends", lambda n: amount(of(n).server, "/s")),
        ("bytes a server sends", lambda n: amount(of(n).server_bytes, "B/s")),
        ("all list at once", lambda n: amount(of(n).storm_bytes, "B")),
        ("at 10 Gbit/s", lambda n: amount(of(n).storm, "s")),
    ]


def flanneld_rows() -> list[Row]:
    """What flanneld asks besides: the time to live of each lease, listed or seen to change."""
    return [
        ("requests when all list", lambda n: amount(float(n) * n, "")),
        ("requests for renewals", lambda n: amount(Store.etcd(n, n).server, "/s")),
    ]


def table(title: str, rows: Sequence[Row], sizes: Sequence[int]) -> list[str]:
    """Lines of Markdown; sizes above MEASURED have a star."""
    heads = [f"{size:,}{' *' if size > MEASURED else ''}" for size in sizes]
    lines = [f"| {title} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(sizes)]
    lines += [f"| {name} | " + " | ".join(cell(n).strip() for n in sizes) + " |"
              for name, cell in rows]  # fmt: skip
    return lines


def tables(sizes: Sequence[int], family: int, watchers: int | None = None) -> str:
    """All tables, as docs/scaling.md has them."""
    parts = [
        table(f"a node, IPv{family}", node_rows(family), sizes),
        table("etcd", store_rows(Store.etcd, watchers), sizes),
        table("flanneld, besides", flanneld_rows(), sizes),
        table("Kubernetes", store_rows(Store.kubernetes, watchers), sizes),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def coefficients() -> str:
    """The coefficients as a table of Markdown."""
    lines = ["| coefficient | value | origin | from |", "|---|---:|---|---|"]
    for name, one in COEFFICIENTS.items():
        lines.append(f"| {name} | {one.value:g} {one.unit} | {one.origin} | {one.source} |")
    return "\n".join(lines) + "\n"


# ---- measuring --------------------------------------------------------------------


def measure_kernel(family: int, nodes: int, rounds: int = 3) -> dict[str, float]:
    """The best of some syncs from empty and of as many that find nothing to do, and what the
    kernel's slab allocator had to give for the entries (/proc/meminfo, Slab)."""
    from bench import lab, planes
    from bench.cluster import Case

    case = Case(family, nodes)
    leases = case.leases
    install, audit, slab = [], [], []
    with lab.namespace(family) as node, lab.inside(node):
        for _ in range(rounds):
            planes.empty(case, node)
            lab.quiet()
            with planes.plane(case, node, allow_shrink=True) as dp:
                before = _slab()
                began = time.perf_counter()
                assert dp.sync(leases).tables["route"]["added"] == nodes
                install.append(time.perf_counter() - began)
                slab.append(_slab() - before)
                began = time.perf_counter()
                assert dp.sync(leases).writes == 0
                audit.append(time.perf_counter() - began)
    return {
        f"install{family}": min(install) / nodes * 1e6,
        f"audit{family}": min(audit) / nodes * 1e6,
        f"slab{family}": sorted(slab)[rounds // 2] / nodes,
    }


def _slab() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Slab:"))


class _Sender:
    """What events come from that are no errors."""

    origin = "made-up nodes"

    def refusal(self, status: object, what: str, rule: str) -> SourceError:
        raise AssertionError(f"no event is an error: {status}")


def measure_heartbeat(events: int = 5_000) -> dict[str, float]:
    """Processor time to find that a Kubernetes node's event, whole, says nothing new, once it has
    been read; bench/test_kube_events.py has all of it."""
    from flannel_dp.cluster.lease import ANNOTATION_PREFIX
    from flannel_dp.sources.kube.events import Changes
    from flannel_dp.sources.kube.nodes import NodeListing, NodeReader

    line = kube_event()
    changes = Changes(NodeListing(), NodeReader(ANNOTATION_PREFIX))
    sender = _Sender()
    changes.see(sender, line)
    assert changes.take() is not None
    began = time.process_time()
    for _ in range(events):
        changes.see(sender, line)
    used = time.process_time() - began
    assert changes.take() is None
    return {"look": used / events, "node": float(len(line))}


def kube_event() -> bytes:
    """A watch's line for a node as a kubelet reports it, with flannel's annotations."""
    from flannel_dp.cluster.lease import ANNOTATION_PREFIX

    data = '{"VNI":1,"VtepMAC":"02:00:00:00:00:07"}'
    said = {"kube-subnet-manager": "true", "backend-type": "vxlan", "backend-data": data,
            "public-ip": "192.0.2.7"}  # fmt: skip
    kinds = ("MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable", "Ready")
    then = "2026-01-01T00:00:00Z"
    node = {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": "node-00007",
            "labels": {f"topology.example/{number}": "value" for number in range(12)},
            "annotations": {f"{ANNOTATION_PREFIX}/{key}": text for key, text in said.items()},
            "resourceVersion": "1",
        },
        "spec": {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]},
        "status": {
            "conditions": [
                {"type": kind, "status": "False", "lastHeartbeatTime": then,
                 "lastTransitionTime": then, "reason": f"Kubelet{kind}",
                 "message": f"kubelet has {kind}"}
                for kind in kinds
            ],
            "images": [
                {"names": [f"registry.example/image-{number}@sha256:{'0' * 64}",
                           f"registry.example/image-{number}:1"], "sizeBytes": 123456789}
                for number in range(50)
            ],
        },
    }  # fmt: skip
    return json.dumps({"type": "MODIFIED", "object": node}, separators=(",", ":")).encode()


def main(arguments: list[str]) -> int:
    """Print the tables, or measure."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.model",
        description="What a cluster of any size costs a node and its store.",
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--family", type=int, choices=(4, 6), default=4)
    parser.add_argument("--watchers", type=int, help="of the store, where relays are between")
    parser.add_argument("--coefficients", action="store_true", help="print what all is made of")
    parser.add_argument("--measure", action="store_true", help="measure here (root)")
    given = parser.parse_args(arguments)
    if given.measure:
        for family in (4, 6):
            for nodes in (10_000, MEASURED):
                print(json.dumps({"nodes": nodes, **measure_kernel(family, nodes)}), flush=True)
        print(json.dumps(measure_heartbeat()))
    elif given.coefficients:
        print(coefficients(), end="")
    else:
        print(tables(given.nodes, given.family, given.watchers), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
