"""A node of an etcd cluster: from nothing to a full table, one lease more, and renewals."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cluster, planes
from bench.agents import NO_AUDIT, Process
from bench.cluster import Case
from bench.lab import Quiet
from bench.store import Store, store
from flannel_dp import DataPlane
from flannel_dp.agent.agent import Agent
from flannel_dp.sources.etcd.source import EtcdSource

_COLD_TARGET = 2.0
_LATENCY_TARGET_MS = 20.0
_RENEWAL_TARGET_S = 1.0
_CHANGES = 40


def _cases(*sizes: int) -> list[Any]:
    return [
        pytest.param(Case(family, nodes), id=f"ipv{family}-{nodes}")
        for nodes in sizes
        for family in (4, 6)
    ]


def _filled(store: Store, case: Case) -> None:
    store.configure(case.config.to_json())
    store.publish(case.leases)


@pytest.mark.benchmark(group="etcd")
@pytest.mark.parametrize("case", _cases(1_000, 10_000))
def test_cold_start(
    benchmark: Any,
    case: Case,
    node: str,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """Leases listed from etcd, admitted and programmed, against the bare range request and
    a sync of leases in memory, side by side."""
    leases = case.leases
    ours: list[float] = []
    parts: list[tuple[float, float]] = []
    with store(tmp_path) as etcd:
        _filled(etcd, case)

        def setup() -> None:
            planes.empty(case, node)
            quiet()
            began = time.perf_counter()
            assert etcd.list_raw() == len(leases)
            listed = time.perf_counter() - began
            with planes.plane(case, node) as dp:
                began = time.perf_counter()
                dp.sync(leases)
                synced = time.perf_counter() - began
            parts.append((listed, synced))
            planes.empty(case, node)
            quiet()

        def start() -> None:
            source = EtcdSource(etcd.options)
            began = time.perf_counter()
            with planes.plane(case, node) as dp:
                report = dp.sync(source.snapshot().claims)
            ours.append(time.perf_counter() - began)
            assert report.tables["route"]["added"] == case.nodes

        benchmark.pedantic(start, setup=setup, rounds=5, warmup_rounds=1)
    ratios = [one / sum(pair) for one, pair in zip(ours, parts, strict=True)][1:]
    listed, synced = (statistics.median(part) * 1e3 for part in zip(*parts, strict=True))
    figure(
        f"cold start from etcd, {case}",
        statistics.median(ratios),
        "x range + sync",
        _COLD_TARGET if case.nodes == 10_000 else None,
        f"{statistics.median(ours) * 1e3:.1f} ms; range {listed:.1f}, sync {synced:.1f} ms",
    )


@pytest.mark.benchmark(group="etcd")
@pytest.mark.parametrize("case", _cases(10, 10_000))
def test_one_lease_more(
    benchmark: Any, case: Case, node: str, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """From just before another client's put to the route in the kernel, acknowledged."""
    taken: list[float] = []
    with store(tmp_path) as etcd, planes.plane(case, node) as dp:
        _filled(etcd, case)
        agent = Agent(dp, EtcdSource(etcd.options), audit=NO_AUDIT)
        chance = random.Random(case.nodes)
        with agent:
            assert agent.wait_ready(60)

            def put(number: int) -> None:
                generation = 1 + number // case.nodes
                lease = cluster.lease(case.family, 1 + number % case.nodes, generation)
                time.sleep(chance.uniform(0.0, 0.06))  # changes do not come in step
                seen = agent.status.updates
                began = time.perf_counter()
                etcd.publish([lease])
                while agent.status.updates == seen:
                    assert time.perf_counter() - began < 10, agent.status
                    time.sleep(0.0002)
                taken.append(time.perf_counter() - began)

            for number in range(_CHANGES):
                put(number)
            benchmark.pedantic(put, args=(_CHANGES,), rounds=1)
        _check(dp, case, [])
    ordered = sorted(taken)
    figure(
        f"a lease put into etcd, {case}",
        statistics.median(ordered) * 1e3,
        "ms",
        _LATENCY_TARGET_MS,
        f"best {ordered[0] * 1e3:.1f}, worst {ordered[-1] * 1e3:.1f} ms",
    )


def _check(dp: DataPlane, case: Case, failures: list[object]) -> None:
    report = dp.resync()
    assert report.writes == 0, report.tables
    assert report.failures == failures


@pytest.mark.benchmark(group="etcd")
@pytest.mark.parametrize("together", [1, 50], ids=["one by one", "in bursts"])
@pytest.mark.parametrize("case", _cases(10_000))
def test_renewals(
    benchmark: Any,
    case: Case,
    together: int,
    node: str,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """10,000 leases put again as they were: processor time of an agent's process, which
    writes nothing to the kernel for it."""
    others = [lease for lease in case.leases if lease.key != case.own.key]
    with store(tmp_path) as etcd, Member(case, etcd, tmp_path) as member:
        quiet()
        rest = member.used(1.0).cpu
        before, began = member.usage(), time.perf_counter()
        benchmark.pedantic(etcd.publish, args=(others, together), rounds=1)
        # One change after them: when that is in the kernel, all before it were looked at.
        etcd.publish([cluster.lease(case.family, 1, 1)])
        assert member.wait("flannel_dp_updates_total 1.0"), member.metrics()
        used = member.usage() - before
        written = member.metric("flannel_dp_kernel_writes_total")
        seconds = time.perf_counter() - began
    peers = member.first
    figure(
        f"10,000 renewals, {together} at once, {case}",
        used.cpu - rest * seconds,
        "s",
        _RENEWAL_TARGET_S,
        f"within {seconds:.1f} s; kernel writes {written - peers:.0f}, of which one change",
    )
    assert 0 < written - peers <= 4


class Member(Process):
    """``flannel-dp sync --watch`` with leases from an etcd, its metrics served."""

    _PORT = 10250

    def __init__(self, case: Case, etcd: Store, folder: Path) -> None:
        _filled(etcd, case)
        command = ["-m", "flannel_dp", "sync", "--watch", "--iface", "eth0", "--firewall", "none"]
        command += ["--etcd-endpoints", ",".join(etcd.options.endpoints)]
        command += ["--subnet-file", str(folder / "subnet.env"), "--audit-interval", "3600"]
        command += ["--healthz-ip", "127.0.0.1", "--healthz-port", str(self._PORT)]
        super().__init__(command)
        self.first = 0.0

    def __enter__(self) -> Member:
        if not self.wait("flannel_dp_ready 1.0", 60):
            words = self.said()
            self.__exit__()
            raise AssertionError(f"it did not become ready: {words}")
        self.first = self.metric("flannel_dp_kernel_writes_total")
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.close()

    def metrics(self) -> str:
        import urllib.request

        try:
            url = f"http://127.0.0.1:{self._PORT}/metrics"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def metric(self, name: str) -> float:
        line = next(one for one in self.metrics().splitlines() if one.startswith(f"{name} "))
        return float(line.split()[1])

    def wait(self, line: str, timeout: float = 20.0) -> bool:
        deadline = time.monotonic() + timeout
        while line not in self.metrics().splitlines():
            if time.monotonic() > deadline or self.process.poll() is not None:
                return False
            time.sleep(0.05)
        return True
