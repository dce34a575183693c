"""What an event of a watched Kubernetes node costs, from the socket to "nothing has changed"."""

from __future__ import annotations

import http.client
import json
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.kube_server import LAST, lines
from flannel_dp.sources import Inbox, Snapshot
from flannel_dp.sources.kube import source as kube_source
from flannel_dp.sources.kube.api import KubeApi
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.events import METADATA_ONLY
from flannel_dp.sources.kube.nodes import PATH
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import Certificates

_ROOT = Path(__file__).parents[1]

_NODES, _EVENTS, _PAUSE_S = 100, 2_000, 0.001
_ROUNDS = 5
_GIVE_UP_S = 120.0
_TARGET_US = 100.0
_LIBRARY_TARGET = 1.0


@contextmanager
def _server(pki: Certificates) -> Iterator[int]:
    certificate, key = pki.issue("server", "127.0.0.1")
    numbers = (str(_NODES), str(_EVENTS), str(_PAUSE_S))
    command = [sys.executable, "-m", "bench.kube_server", str(certificate), str(key), *numbers]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def _options(folder: Path, port: int, pki: Certificates) -> KubeOptions:
    cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(pki.ca)}
    path = folder / "kubeconfig"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": cluster}],
        "contexts": [{"name": "x", "context": {"cluster": "c"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(document))
    return KubeOptions(kubeconfig=str(path), environ={})


def _followed(options: KubeOptions) -> float:
    """Processor time of this process for an event, from the snapshot to the last one."""
    news = threading.Semaphore(0)
    source, inbox = KubeSource(options), Inbox(news.release)
    thread = threading.Thread(target=source.follow, args=(inbox,))
    began, addresses = 0.0, set[str]()
    thread.start()
    try:
        while LAST not in addresses:
            assert news.acquire(timeout=_GIVE_UP_S)
            found = inbox.take()
            assert found.error is None, found.error
            if isinstance(found.snapshot, Snapshot):
                began = time.process_time()
                assert len(found.snapshot.claims.leases) == _NODES
            added = (lease for change in found.changes for lease in change.added)
            addresses |= {lease.public_ip for lease in added}
        return (time.process_time() - began) / _EVENTS
    finally:
        inbox.stop()
        thread.join()
        inbox.close()
        source.close()


def _read_by_library(port: int, pki: Certificates, accept: str) -> float:
    """The same for http.client, which takes the chunks apart and looks at nothing."""
    context = ssl.create_default_context(cafile=str(pki.ca))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context)
    connection.request("GET", "/api/v1/nodes?watch=true", headers={"Accept": accept})
    answer = connection.getresponse()
    whole = accept != METADATA_ONLY
    left = sum(map(len, lines(_NODES, _EVENTS, whole=whole)))
    began = time.process_time()
    while left > 0:
        left -= len(answer.read1(1 << 16))
    used = time.process_time() - began
    connection.close()
    return used / _EVENTS


def _read_by_us(options: KubeOptions, accept: str) -> float:
    """The same for our reader alone."""
    api = KubeApi(options)
    left = sum(map(len, lines(_NODES, _EVENTS, whole=accept != METADATA_ONLY)))
    with api.watch(PATH, {"watch": "true"}, rule="", accept=accept) as body:
        began = time.process_time()
        for chunk in body.chunks():
            left -= len(chunk)
            if left <= 0:
                break
        used = time.process_time() - began
    api.close()
    return used / _EVENTS


@pytest.mark.benchmark(group="kube")
@pytest.mark.parametrize("form", ["metadata", "whole"])
def test_an_event(
    benchmark: Any,
    form: str,
    tmp_path: Path,
    figure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A heartbeat over TLS, of a node of 20 kB: as metadata, and whole as old servers send it."""
    accept = METADATA_ONLY if form == "metadata" else "application/json"
    monkeypatch.setattr(kube_source, "METADATA_ONLY", accept)
    pki = Certificates(tmp_path / "pki")
    whole, ours, theirs = [], [], []
    with _server(pki) as port:
        options = _options(tmp_path, port, pki)

        def all_three() -> None:
            whole.append(_followed(options))
            ours.append(_read_by_us(options, accept))
            theirs.append(_read_by_library(port, pki, accept))

        benchmark.pedantic(all_three, rounds=_ROUNDS)
    size = len(lines(_NODES, 1, whole=form == "whole")[0])
    wanted = form == "metadata"
    wanted = form == "metadata"
    figure(
        f"a node's event, {form}",
        min(whole) * 1e6,
        "us CPU",
        _TARGET_US if wanted else None,
        f"{size:,} bytes; median {statistics.median(whole) * 1e6:.0f} us",
    )
    figure(
        f"reading it, {form}",
        statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "x http.client",
        _LIBRARY_TARGET if wanted else None,
        f"{min(ours) * 1e6:.0f} us; http.client {min(theirs) * 1e6:.0f} us",
    )
