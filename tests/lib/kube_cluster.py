"""A node of a Kubernetes cluster: an API server in its namespace, and the agent as a process."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flannel_dp.cluster.lease import Lease
from flannel_dp.kernel.netns import call_in_netns
from tests.lib import programs
from tests.lib.apiserver import JSON, ApiServer, Certificates
from tests.lib.kernel import State, expected, observed
from tests.lib.kube import PREFIX, kubeconfig, node
from tests.lib.leases import DEVICE, NETWORK, peer, subnet
from tests.lib.monitor import Monitor
from tests.lib.service import fetch, free_port
from tests.lib.waiting import LIMIT

OWN = "node-00000"
TOKEN = "secret"
ELSEWHERE = "203.0.113.9"
FAMILIES = (4, 6)


class Patched(NamedTuple):
    """A patch that the server has got, and what the kernel held at that moment."""

    patch: JSON
    kernel: dict[int, State]

    @property
    def annotations(self) -> dict[str, str]:
        found = self.patch.get("metadata", {}).get("annotations", {})
        return {key.removeprefix(PREFIX): value for key, value in found.items()}

    @property
    def conditions(self) -> list[tuple[str, str]]:
        found = self.patch.get("status", {}).get("conditions", [])
        return [(condition["type"], condition["status"]) for condition in found]


class Server(ApiServer):
    """An API server that looks into a host's kernel before it takes a patch."""

    def __init__(self, host: Any, certificate: tuple[Path, Path], **how: Any) -> None:
        self.patches: list[Patched] = []
        self._host = host
        super().__init__(certificate, **how)

    def patch(self, name: str, patch: JSON) -> tuple[int, JSON]:
        self.patches.append(Patched(patch, {f: observed(self._host, f) for f in FAMILIES}))
        return super().patch(name, patch)

    def go_on_as(self, other: Server) -> None:
        """Have what another server had, which is what a restart with the same etcd does."""
        with self.changed:
            self.nodes, self.version, self.oldest = other.nodes, other.version, other.oldest
            self._history = other._history


def kube_node(number: int, lease: Lease | None = None, **notes: object) -> JSON:
    """Node ``number`` as flannel has annotated it; what ``tests.lib.leases.peer`` is elsewhere."""
    lease = lease or peer(number)
    data, v6 = lease.backend_data, lease.backend_v6_data
    assert data is not None
    assert v6 is not None
    said = {
        "cidrs": [lease.subnet, lease.ipv6_subnet],
        "public_ip": lease.public_ip,
        "public_ipv6": lease.public_ipv6,
        "backend_data": json.dumps({"VNI": data.vni, "VtepMAC": data.vtep_mac}),
        "backend_v6_data": json.dumps({"VNI": v6.vni, "VtepMAC": v6.vtep_mac}),
    }
    return node(number, **(said | notes))


def bare_node(number: int = 0, **notes: object) -> JSON:
    """A node that the kubelet has registered and no flannel has seen yet."""
    silent = ("kube_subnet_manager", "backend_type", "backend_data", "public_ip")
    said: dict[str, object] = dict.fromkeys(silent)
    said["cidrs"] = [subnet(family, number) for family in FAMILIES]
    return node(number, **(said | notes))


class Cluster:
    """One host, its API server, and what is run on it. ``peers`` are the other nodes."""

    def __init__(self, host: Any, folder: Path, pki: Certificates, wait: Callable[..., None]):
        self.host, self.folder, self.wait = host, folder, wait
        self.net_conf, self.log = folder / "net-conf.json", folder / "log"
        self.subnet_file = folder / "subnet.env"
        self.process: Any = None
        self.families: tuple[int, ...] = FAMILIES
        self.peers: dict[int, Lease] = {}
        self._certificate = pki.directory / "server.crt", pki.directory / "server.key"
        self.server = self._serve(0)
        self.kubeconfig = kubeconfig(
            folder / "kubeconfig", self.server.url, pki.ca, {"token": TOKEN}
        )
        self.configure()
        self.server.put(bare_node())
        self.join(*range(1, 6))

    def _serve(self, port: int) -> Server:
        where = ("127.0.0.1", port)
        return call_in_netns(
            self.host.ns,
            lambda: Server(self.host, self._certificate, tokens={TOKEN}, address=where),
        )

    def configure(self, *families: int, **backend: Any) -> None:
        """The ConfigMap: these families (default: both)."""
        self.families = families or FAMILIES
        document: JSON = {"Backend": {"Type": "vxlan", **backend}}
        for family, name in ((4, "IPv4"), (6, "IPv6")):
            document[f"Enable{name}"] = family in self.families
            if family in self.families:
                document["Network" if family == 4 else "IPv6Network"] = NETWORK[family]
        self.net_conf.write_text(json.dumps(document))

    # ---- the cluster

    def join(self, *numbers: int) -> None:
        """Nodes that flannel runs on."""
        for number in numbers:
            self.change(peer(number), number)

    def change(self, lease: Lease, number: int) -> None:
        """Node ``number`` publishes this lease from now on."""
        self.peers[number] = lease
        self.server.put(kube_node(number, lease))

    def leave(self, number: int, *, silently: bool = False) -> None:
        """The node is deleted."""
        del self.peers[number]
        self.server.delete(f"node-{number:05}", silently=silently)

    def server_down(self) -> None:
        """The API server ends, and its port does not answer."""
        self.server.close()

    def server_up(self) -> None:
        """It is back, with what it had."""
        before = self.server
        self.server = self._serve(before.port)
        self.server.go_on_as(before)

    @property
    def notes(self) -> dict[str, str]:
        """flannel's annotations of the own node."""
        found = self.server.nodes[OWN]["metadata"].get("annotations", {})
        return {k.removeprefix(PREFIX): v for k, v in found.items() if k.startswith(PREFIX)}

    @property
    def condition(self) -> str:
        """The status of the own node's condition NetworkUnavailable, "" without one."""
        conditions = self.server.nodes[OWN]["status"]["conditions"]
        return next((str(c["status"]) for c in conditions if c["type"] == "NetworkUnavailable"), "")

    # ---- the program

    def command(self, *words: str) -> list[str]:
        return [
            *("ip", "netns", "exec", self.host.ns, sys.executable, "-m", "flannel_dp"),
            *(words[0], "--kube-subnet-mgr", "--kubeconfig-file", str(self.kubeconfig)),
            *("--net-conf", str(self.net_conf), "--iface", "eth0", "--firewall", "none"),
            *("--subnet-file", str(self.subnet_file), *words[1:]),
        ]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process on this node; a pod's names only where given."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NODE_", "POD_", "FLAN"))}
        return kept | ({"NODE_NAME": OWN} | more if "POD_NAME" not in more else more)

    def start(self, *more: str, **environment: str) -> Cluster:
        """``sync --watch``."""
        return self.spawn(self.command("sync", "--watch", *more), **environment)

    def spawn(self, command: list[str], **environment: str) -> Cluster:
        with self.log.open("wb") as log:
            self.process = programs.Popen(
                command, stdout=log, stderr=log, env=self.environment(**environment)
            )
        return self

    def run(self, *words: str, **environment: str) -> tuple[int, Any, str]:
        """Run a command to its end: exit code, its JSON document, standard error."""
        done = programs.run(
            self.command(*words, "--output", "json"),
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
            env=self.environment(**environment),
        )
        return done.returncode, json.loads(done.stdout or "null"), done.stderr

    def refused(self, *more: str, **environment: str) -> tuple[int, str]:
        """``sync --watch`` where it cannot start: exit code and what it says."""
        done = programs.run(
            self.command("sync", "--watch", *more),
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
            env=self.environment(**environment),
        )
        return done.returncode, done.stderr

    def waiting(self, reason: str, *more: str, **environment: str) -> str:
        """``sync --watch`` where it cannot start yet: what /healthz says once it waits for
        ``reason``."""
        self.health = free_port(self.host)
        self.start("--healthz-port", str(self.health), *more, **environment)
        self.until(lambda: reason in fetch(self.host, self.health, "/healthz")[1])
        status, text = fetch(self.host, self.health, "/healthz")
        assert (status, text.split()[:2]) == (200, ["degraded", "start:"]), text
        assert fetch(self.host, self.health, "/readyz")[0] == 503
        return text

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop the agent; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(LIMIT)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.server.close()

    def said(self) -> str:
        return self.log.read_text()

    # ---- the kernel

    def kernel(self) -> dict[int, State]:
        return {family: observed(self.host, family) for family in FAMILIES}

    def wanted(self) -> dict[int, State]:
        """What should be there for the peers: nothing of a family that is off."""
        return {
            family: expected(self.peers.values() if family in self.families else (), family)
            for family in FAMILIES
        }

    def await_clean(self) -> None:
        """Wait until the kernel is exactly as the nodes say."""
        self.until(lambda: self.kernel() == self.wanted())

    def until(self, predicate: Callable[[], object]) -> None:
        """Wait for something while the agent runs."""
        assert self.process is not None
        running = self.process
        try:
            self.wait(lambda: running.poll() is not None or predicate())
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}\n{self.kernel()}") from error
        assert running.poll() is None, self.said()


@pytest.fixture(name="cluster")
def cluster_fixture(
    host: Any,
    tmp_path: Path,
    certificates: Certificates,
    server_certificate: tuple[Path, Path],
    wait_until: Callable[..., None],
) -> Iterator[Cluster]:
    """Five peers of both families; no agent runs yet."""
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        host.sysctl(name, 1)
    made = Cluster(host, tmp_path, certificates, wait_until)
    yield made
    made.close()


def device_mac(cluster: Cluster, family: int) -> str:
    return str(cluster.host.ip_json(f"link show {DEVICE[family]}")[0]["address"])


def published(cluster: Cluster) -> dict[str, Any]:
    """The own node's annotations, those of JSON decoded."""
    return {k: json.loads(v) if "data" in k else v for k, v in cluster.notes.items()}


def told(monitor: Monitor) -> list[str]:
    """What has changed since the last time, less what the kernel does some time after a link
    went up: link-local and multicast state."""
    late = ("fe80:", "ff0", "33:33:", "01:00:5e:", "224.")
    return [event.key for event in monitor.events() if not event.key.startswith(late)]
