"""A Kubernetes API server, nodes as a kubelet reports them, and followers of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import SourceError
from flannel_dp.sources import Snapshot
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import ApiServer, Certificates
from tests.lib.follower import Follower

PREFIX = "flannel.alpha.coreos.com/"

Follow = Callable[..., Follower]
Options = Callable[..., KubeOptions]


@pytest.fixture(name="certificates", scope="session")
def certificates_fixture(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture(name="server_certificate", scope="session")
def server_certificate_fixture(certificates: Certificates) -> tuple[Path, Path]:
    return certificates.issue("server", "127.0.0.1")


@pytest.fixture(name="make_server")
def make_server_fixture(
    server_certificate: tuple[Path, Path],
) -> Iterator[Callable[..., ApiServer]]:
    """``make_server(tokens=...)``: API servers that end with the test."""
    made: list[ApiServer] = []

    def make(certificate: tuple[Path, Path] = server_certificate, **how: Any) -> ApiServer:
        made.append(ApiServer(certificate, **how))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture(name="server")
def server_fixture(make_server: Callable[..., ApiServer]) -> ApiServer:
    """One that takes the token "secret" and nothing else."""
    return make_server(tokens={"secret"})


def kubeconfig(
    path: Path,
    server: str,
    ca: Path | None,
    user: dict[str, object] | None = None,
    **cluster: object,
) -> Path:
    """Write a kubeconfig; JSON is YAML."""
    where: dict[str, object] = {"server": server, **cluster}
    if ca is not None:
        where["certificate-authority"] = str(ca)
    context: dict[str, object] = {"cluster": "c"}
    if user is not None:
        context["user"] = "u"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": where}],
        "users": [] if user is None else [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": context}],
        "current-context": "x",
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(name="options")
def options_fixture(
    server: ApiServer, certificates: Certificates, tmp_path: Path
) -> Callable[..., KubeOptions]:
    """``options(retry_seconds=...)``: options that reach ``server`` with its token."""
    path = kubeconfig(tmp_path / "kubeconfig", server.url, certificates.ca, {"token": "secret"})

    def make(**how: Any) -> KubeOptions:
        return KubeOptions(**({"kubeconfig": str(path), "environ": {}, "retry_seconds": 0.2} | how))

    return make


def node(number: int, *, mac: str = "", prefix: str = PREFIX, **notes: object) -> dict[str, Any]:
    """A node with flannel's annotations as a kubelet reports it, some 12 kB of JSON; a
    note's value None leaves that annotation out, ``cidrs`` gives other pod CIDRs."""
    cidrs = notes.pop("cidrs", [f"10.{100 + number // 256}.{number % 256}.0/24"])
    assert isinstance(cidrs, list)
    mac = mac or f"02:00:00:00:{number // 256:02x}:{number % 256:02x}"
    annotations = {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": f'{{"VNI":1,"VtepMAC":"{mac}"}}',
        "public-ip": f"192.0.{2 + number // 200}.{number % 200 + 1}",
    } | {key.replace("_", "-"): value for key, value in notes.items()}
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": f"node-{number:05}",
            "uid": f"00000000-0000-4000-8000-{number:012}",
            "labels": {f"topology.example/{label}": "value" for label in range(10)},
            "annotations": {prefix + k: v for k, v in annotations.items() if v is not None}
            | {"node.alpha.kubernetes.io/ttl": "0"},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:x": {}}}] * 10,
        },
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs} if cidrs else {},
        "status": {
            "capacity": {"cpu": "8", "memory": "32Gi", "pods": "110"},
            "conditions": [
                {
                    "type": kind,
                    "status": "False",
                    "lastHeartbeatTime": "2026-01-01T00:00:00Z",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                    "reason": f"Kubelet{kind}",
                    "message": f"kubelet says {kind}",
                }
                for kind in ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")
            ],
            "images": [
                {
                    "names": [f"registry.example/image-{image}@sha256:{'0' * 64}", f"i:{image}"],
                    "sizeBytes": 123456789,
                }
                for image in range(50)
            ],
        },
    }


def beating(of: dict[str, Any], beat: int) -> dict[str, Any]:
    """The same node after another heartbeat."""
    conditions = [{**c, "lastHeartbeatTime": str(beat)} for c in of["status"]["conditions"]]
    return {**of, "status": {**of["status"], "conditions": conditions}}


def b64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(name="follow")
def follow_fixture(options: Callable[..., KubeOptions]) -> Iterator[Callable[..., Follower]]:
    """``follow(**options)``: a follower, ended with the test."""
    made: list[Follower] = []

    def make(given: KubeOptions | None = None, **how: Any) -> Follower:
        made.append(Follower(KubeSource(given or options(**how))).start())
        return made[-1]

    yield make
    for follower in made:
        if follower.inbox.stopping:
            continue
        follower.stop()
        follower.source.close()


def started(follower: Follower, server: ApiServer) -> Follower:
    follower.until(lambda: follower.snapshots and server.watching)
    return follower


def hold(handler: Any) -> None:
    """Say nothing until the other side goes away."""
    try:
        while handler.connection.recv(1):
            pass
    except OSError:
        pass


def listed(options: KubeOptions) -> Snapshot:
    source = KubeSource(options)
    try:
        return source.snapshot()
    finally:
        source.close()


def names(options: KubeOptions) -> list[str]:
    return [lease.name for lease in listed(options).claims.leases]


def refused(options: KubeOptions) -> SourceError:
    with pytest.raises(SourceError) as caught:
        listed(options)

    assert caught.value.hint
    return caught.value
