"""The start of ``flannel-dp sync --watch`` in a Kubernetes cluster, and its memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.agents import Service
from bench.cluster import Case
from bench.kube_cluster import OWN, write_kubeconfig
from bench.lab import Quiet
from tests.lib.apiserver import Certificates

_ROOT = Path(__file__).parents[1]
_ROUNDS = 3
_READY_TARGET_S, _RESIDENT_TARGET_MIB = 2.5, 66.0
#: An agent is at rest when it takes less than a hundredth of a processor.
_REST_S, _REST_SHARE, _GIVE_UP_S = 0.5, 0.01, 30.0

_CASES = [
    pytest.param(
        Case(family, nodes),
        id=f"ipv{family}-{nodes}",
        marks=[pytest.mark.smoke] if (family, nodes) == (4, 1_000) else [],
    )
    for nodes in (1_000, 5_000)
    for family in (4, 6)
]


@contextmanager
def _cluster(case: Case, pki: Certificates) -> Iterator[int]:
    """The port of an API server in the caller's namespace."""
    certificate, key = pki.issue("server", "127.0.0.1")
    command = [sys.executable, "-m", "bench.kube_cluster", str(certificate), str(key)]
    command += [str(case.family), str(case.nodes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def _rest(service: Service) -> None:
    """Wait until a service does nothing more."""
    until = time.monotonic() + _GIVE_UP_S
    while service.used(_REST_S).cpu > _REST_S * _REST_SHARE:
        assert time.monotonic() < until, "the agent does not come to rest"


@pytest.mark.benchmark(group="kube start")
@pytest.mark.parametrize("case", _CASES)
def test_start(
    benchmark: Any,
    case: Case,
    node: str,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """From the start of the process until it is ready: nodes of 20 kB are listed over TLS, this
    node is annotated, all peers and firewall rules are written; first from empty, then again on a
    node that has all entries."""
    ready: dict[str, list[float]] = {"from empty": [], "again": []}
    used: dict[str, list[float]] = {"from empty": [], "again": []}
    resident, peak = list[float](), list[float]()
    pki = Certificates(tmp_path / "pki")
    with _cluster(case, pki) as port:
        path = write_kubeconfig(tmp_path / "kubeconfig", port, pki)
        source = ["--kube-subnet-mgr", "--kubeconfig-file", str(path), "--ip-masq"]
        source += ["--run-dir", str(tmp_path)]

        def start(how: str) -> None:
            folder = tmp_path / f"{how}-{len(ready[how])}"
            folder.mkdir()
            quiet()
            began = time.perf_counter()
            with Service(case, source, folder, NODE_NAME=OWN) as service:
                ready[how].append(time.perf_counter() - began)
                used[how].append(service.usage().cpu)
                _rest(service)
                memory = service.memory()
            resident.append(memory["resident"])
            peak.append(memory["peak"])

        def both() -> None:
            start("from empty")
            start("again")
            command = [sys.executable, "-m", "flannel_dp", "clean", "--run-dir", str(tmp_path)]
            command += ["--net-conf", str(tmp_path / "again-0" / "net-conf.json")]
            subprocess.run(command, check=True, capture_output=True, cwd=_ROOT)

        benchmark.pedantic(both, rounds=_ROUNDS)
    large = case.nodes == 5_000
    for how, seconds in ready.items():
        figure(
            f"Kubernetes, ready {how}, {case}",
            median(seconds),
            "s",
            _READY_TARGET_S if large else None,
            f"least {min(seconds):.2f}; CPU {min(used[how]):.2f} s",
        )
    figure(
        f"Kubernetes, memory at rest, {case}",
        median(resident),
        "MiB",
        _RESIDENT_TARGET_MIB if large else None,
        f"peak {max(peak):.1f}",
    )
