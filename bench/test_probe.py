"""Probes: many peers once and again and again, when a death is known, a join to its first packet.

One peer answers for all of them (reflector.py), so it is as busy as all peers of a cluster.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import cluster, peers, planes, wire
from bench.agents import NO_AUDIT
from bench.cluster import Case
from bench.lab import Quiet, inside, ip
from bench.reflector import Reflector, reflector
from bench.store import Store, store
from flannel_dp import LifeChange, LinkReader, Prober
from flannel_dp._core import ProbeSocket
from flannel_dp.agent.agent import Agent
from flannel_dp.cluster.lease import Lease
from flannel_dp.probe.oneshot import Effort, Result, probe_place
from flannel_dp.probe.target import Place, Target, packed
from flannel_dp.probe.volleys import SMALLEST
from flannel_dp.probe.wanted import tunnel_place
from flannel_dp.sources import Inbox
from flannel_dp.sources.etcd.source import EtcdSource

_ONESHOT_TARGET_S = 3.0
_CORE_TARGET = 1.0
_DETECTION_TARGET = 3.0
_REST_SECONDS = float(os.environ.get("FLANNEL_DP_BENCH_REST", "20"))
_DEATHS = int(os.environ.get("FLANNEL_DP_BENCH_DEATHS", "20"))
_TURNS = 3
_JOINS = int(os.environ.get("FLANNEL_DP_BENCH_JOINS", "10"))


def _cases(*sizes: int, families: Sequence[int] = (4, 6)) -> list[Any]:
    return [
        pytest.param(Case(family, nodes), id=f"ipv{family}-{nodes}")
        for nodes in sizes
        for family in families
    ]


@contextmanager
def _reflecting(case: Case, node: str) -> Iterator[Reflector]:
    """A node that knows of one peer, which answers for all."""
    planes.empty(case, node)
    with reflector(case.family, node, case.nodes + 1) as far:
        with planes.plane(case, node) as dp:
            assert dp.sync([case.own, far.lease]).ok
        yield far


def _place(case: Case, far: Reflector) -> Place:
    own = case.own.subnet if case.family == 4 else case.own.ipv6_subnet
    with LinkReader() as reader:
        place = tunnel_place(reader, far.device, case.family, own.partition("/")[0])
    assert place is not None
    return place


def _peers(case: Case, far: Reflector) -> list[tuple[str, str, str]]:
    """As many peers as the case has, each with an address of its own, all with one MAC."""
    leases = [cluster.lease(case.family, number + 1) for number in range(case.nodes)]
    subnets = [one.subnet if case.family == 4 else one.ipv6_subnet for one in leases]
    return [(subnet.partition("/")[0], far.mac, far.device) for subnet in subnets]


@pytest.mark.benchmark(group="probe")
@pytest.mark.parametrize("case", _cases(1_000, 10_000))
def test_once(
    benchmark: Any, case: Case, node: str, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """``flannel-dp probe`` of all peers: eight probes each, and the largest packet."""
    with _reflecting(case, node) as far:
        place = _place(case, far)
        targets = [
            Target(f"{address}/128", address, mac, far.vtep)
            for address, mac, _ in _peers(case, far)
        ]
        found: list[Result] = benchmark.pedantic(
            lambda: probe_place(place, targets, Effort()), setup=lambda: quiet(), rounds=3
        )
    answered = sum(len(one.trips) == 8 for one in found)
    figure(
        f"one-shot probe, {case}",
        benchmark.stats["median"],
        "s",
        _ONESHOT_TARGET_S if case.nodes == 10_000 else None,
        f"{answered:,} of {case.nodes:,} peers answered all 8 probes",
    )


@pytest.mark.benchmark(group="probe")
@pytest.mark.parametrize("case", _cases(1_000, 10_000))
def test_command(
    benchmark: Any, case: Case, node: str, tmp_path: Path, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """The whole of ``flannel-dp probe``: its start, reading of the kernel, proof, and the table."""
    members = [
        cluster.lease(case.family, number, min(number, 1)) for number in range(case.nodes + 1)
    ]
    conf = tmp_path / "net-conf.json"
    conf.write_text(case.config.to_json())
    run = [sys.executable, "-m", "flannel_dp", "probe", "--net-conf", str(conf), "--iface", "eth0"]
    ip(
        f"-{case.family}",
        "route",
        "add",
        cluster.FAR[case.family],
        "via",
        cluster.ROUTER[case.family],
    )
    with _reflecting(case, node) as far:
        far.stand_for_all()
        with planes.plane(case, node, allow_shrink=True) as dp:
            assert dp.sync(members).ok
        used: list[float] = []

        def whole() -> str:
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
            used.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
            return done.stdout.splitlines()[-1]

        said = benchmark.pedantic(whole, setup=lambda: quiet(), rounds=3)
    assert said == f"{case.nodes} of {case.nodes} peers alive"
    figure(
        f"flannel-dp probe, {case}",
        benchmark.stats["median"],
        "s",
        _ONESHOT_TARGET_S if case.nodes == 10_000 else None,
        f"{statistics.median(used):.2f} s of a processor outside of the kernel",
    )


@pytest.mark.benchmark(group="probe")
@pytest.mark.parametrize("case", _cases(1_000))
def test_cost_of_a_probe(
    benchmark: Any, case: Case, node: str, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """Processor time of this node alone: sending, where the peer's end drops what comes, and
    reading and matching of answers that wait. What the kernel does when an answer arrives is in
    neither; on this machine it is done together with the peer's work."""
    rounds = 50
    with _reflecting(case, node) as far:
        place = _place(case, far)
        peers = packed(far.mac, "0.0.0.0") * case.nodes
        which, size = array("I", range(case.nodes)), SMALLEST[case.family]
        made = ProbeSocket(place.origin, peers, 2 * rounds, key=os.urandom(16))
        quiet()
        reading = 0.0
        for number in range(rounds):
            sent = 0
            while sent < case.nodes:
                sent += made.send(which[sent : sent + 128], number, size)
            before = time.thread_time()
            made.receive(0)
            reading += time.thread_time() - before
        came = made.answered
        far.drop_all()

        def send() -> None:
            for number in range(rounds, 2 * rounds):
                sent = 0
                while sent < case.nodes:
                    sent += made.send(which[sent : sent + 128], number, size)

        before = time.thread_time()
        benchmark.pedantic(send, rounds=1)
        sending = time.thread_time() - before
        made.close()
    each = sending / rounds / case.nodes * 1e6, reading / max(1, came) * 1e6
    figure(
        f"a probe, IPv{case.family}",
        sum(each),
        "us",
        None,
        f"sending {each[0]:.2f} us, reading its answer {each[1]:.2f} us: "
        f"{sum(each) / 10:.2f} % of a core at 1,000 a second",
    )


@pytest.mark.benchmark(group="probe")
@pytest.mark.parametrize("case", _cases(1_000))
def test_latency(
    benchmark: Any, case: Case, node: str, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """2,000 pings a second to a pod of one peer, in turn at rest and beside 1,000 probes a
    second."""
    members = [cluster.lease(case.family, number) for number in (0, 1)]
    data = members[1].backend_data or members[1].backend_v6_data
    device = "flannel.1" if case.family == 4 else "flannel-v6.1"
    turns = []
    with wire.wire(case) as net, inside(net.near), planes.plane(case, net.near) as dp:
        assert dp.sync(members).ok
        leases = [cluster.lease(case.family, number + 2) for number in range(case.nodes)]
        subnets = [one.subnet if case.family == 4 else one.ipv6_subnet for one in leases]
        given = [(one.partition("/")[0], data.vtep_mac if data else "", device) for one in subnets]
        quiet()
        for _ in range(_TURNS):
            rest = wire.pings(net, lambda: time.sleep(_REST_SECONDS / _TURNS))
            with Prober(given) as prober:
                assert prober.wait_known(60)
                seen = wire.pings(net, lambda: time.sleep(_REST_SECONDS / _TURNS))
                alive = prober.totals.count("alive")
            turns.append((rest, seen))
        benchmark.pedantic(lambda: None, rounds=1)
    ratio = statistics.median(seen.p50 / rest.p50 for rest, seen in turns)
    figure(
        f"p50 of pings beside probes, {case}",
        ratio,
        "x at rest",
        None,
        f"{alive} alive; p50, p99 us beside probes and at rest: "
        + "; ".join(f"{seen.p50}, {seen.p99} and {rest.p50}, {rest.p99}" for rest, seen in turns),
    )


@pytest.mark.benchmark(group="probe")
@pytest.mark.parametrize("case", _cases(100, 1_000, 10_000))
@pytest.mark.parametrize("interval", [None, 1.0], ids=["ordinary", "each second"])
def test_rest(
    benchmark: Any,
    case: Case,
    node: str,
    interval: float | None,
    quiet: Quiet,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
) -> None:
    """Peers that all answer: processor time of the prober's process, memory, and loss. ``each
    second`` is without the limits of bandwidth and of processor time."""
    if interval:
        monkeypatch.setattr("flannel_dp.probe.lines.MOST_BITS", 1e12)
        monkeypatch.setattr("flannel_dp.probe.lines.MOST_USED", 0.0)
    with _reflecting(case, node) as far:
        given = _peers(case, far)
        quiet()
        before = _resident()
        with Prober(given) as prober:
            assert prober.wait_known(120)
            time.sleep(1.0)  # then as many are on their way at the beginning as at the end

            def rest() -> tuple[float, int, int]:
                old, cpu = prober.totals, time.process_time()
                time.sleep(_REST_SECONDS)
                new = prober.totals
                return (
                    time.process_time() - cpu,
                    new.sent - old.sent,
                    new.answered - old.answered,
                )

            used, sent, came = benchmark.pedantic(rest, rounds=1)
            stretched, memory = prober.totals.interval, _resident() - before
            dead = prober.totals.count("dead")
    name = f"probing {case}{', each second' if interval else ''}"
    figure(
        name,
        100 * used / _REST_SECONDS,
        "% of a core",
        _CORE_TARGET if interval is None else None,
        f"{sent / _REST_SECONDS:,.0f} probes a second, each peer every {stretched:.2f} s; "
        f"{max(0, sent - came)} of {sent:,} lost, {dead} dead; {memory / 1024:.1f} MB more",
    )


def _resident() -> float:
    """KiB that this process has in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1])
    raise AssertionError("no VmRSS")


@pytest.mark.benchmark(group="probe")
@pytest.mark.parametrize("case", _cases(100, 1_000, 10_000))
def test_detection(
    benchmark: Any, case: Case, node: str, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """From a firewall's rule that drops the probes of some peers to the change of their lives."""
    died: dict[str, float] = {}
    told = threading.Event()

    def on_change(changes: Sequence[LifeChange]) -> None:
        now = time.perf_counter()
        died.update({one.peer.subnet: now for one in changes if one.peer.life == "dead"})
        if len(died) >= _DEATHS:
            told.set()

    with _reflecting(case, node) as far:
        quiet()
        with Prober(_peers(case, far), on_change=on_change) as prober:
            assert prober.wait_known(120)
            time.sleep(1.0)

            def kill() -> list[float]:
                chosen = random.Random(case.nodes).sample(range(case.nodes), _DEATHS)
                far.kill(chosen)
                began = time.perf_counter()
                assert told.wait(120), f"{len(died)} deaths are known"
                return sorted(at - began for at in died.values())

            taken = benchmark.pedantic(kill, rounds=1)
            interval = prober.totals.interval
            others = prober.totals.count("dead") - _DEATHS
    figure(
        f"death known, {case}",
        taken[-1] / interval,
        "intervals (p99)",
        _DETECTION_TARGET,
        f"p50 {statistics.median(taken):.2f} s, p99 {taken[-1]:.2f} s, {_DEATHS} peers at once; "
        f"interval {interval:.2f} s; {others} others called dead",
    )


# ---- join to first packet


class _Probing:
    """Probes to one MAC, two a millisecond, whether there is a peer or not."""

    def __init__(self, place: Place, mac: str) -> None:
        self._socket = ProbeSocket(place.origin, packed(mac, "0.0.0.0"), 60_000, key=os.urandom(16))
        self._size = SMALLEST[place.family]

    def first_answer(self) -> float:
        """Return when the first answer came (``time.perf_counter``)."""
        which = array("I", [0])
        for number in range(60_000):
            self._socket.send(which, number, self._size)
            if self._socket.receive(0):
                return time.perf_counter()
            time.sleep(0.0005)
        raise AssertionError("no answer came in half a minute")

    def close(self) -> None:
        self._socket.close()


@contextmanager
def _flannel_writer(options: Any, far: Reflector, folder: Path) -> Iterator[None]:
    """Follow etcd, and have plain C write ARP, FDB and route of each lease that comes, as flanneld
    asks for them (peers/flannel.c)."""
    program = peers.build()
    inbox = Inbox(lambda: changed.set())
    changed, ended, ready = threading.Event(), threading.Event(), threading.Event()
    source = EtcdSource(options)

    def write() -> None:
        while not ended.is_set():
            changed.wait()
            changed.clear()
            delivery = inbox.take()
            if delivery.snapshot is not None:
                ready.set()
            for change in delivery.changes:
                for lease in change.added:
                    write_one(lease)

    def write_one(lease: Lease) -> None:
        data = lease.backend_data or lease.backend_v6_data
        subnet = lease.subnet or lease.ipv6_subnet
        end = lease.public_ip or lease.public_ipv6
        file = folder / "peer"
        mac = data.vtep_mac if data else ""
        file.write_text(f"{subnet} {subnet.partition('/')[0]} {mac} {end}\n")
        command = [str(program), "vxlan", str(file), far.device]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    threads = [
        threading.Thread(target=source.follow, args=(inbox,), daemon=True),
        threading.Thread(target=write, daemon=True),
    ]
    for thread in threads:
        thread.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        ended.set()
        inbox.stop()
        changed.set()
        for thread in threads:
            thread.join(10)


@pytest.mark.benchmark(group="probe")
@pytest.mark.parametrize("case", _cases(10, 1_000, 10_000))
@pytest.mark.parametrize("writer", ["ours", "flannel-style"])
def test_join_to_first_packet(
    benchmark: Any,
    case: Case,
    node: str,
    writer: str,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """From just before a lease is put into etcd until the first probe comes back from that peer,
    which is ready for this node already."""
    taken: list[float] = []
    planes.empty(case, node)
    with store(tmp_path) as etcd, reflector(case.family, node, case.nodes + 1) as far:
        etcd.configure(case.config.to_json())
        etcd.publish(case.leases)
        place = _place(case, far)
        for _ in range(_JOINS):
            with planes.plane(case, node) as dp:
                assert dp.sync(case.leases).ok
            quiet()
            with _written_by(writer, case, node, etcd, far, tmp_path):
                probing = _Probing(place, far.mac)
                began: list[float] = []

                def put(began: list[float] = began) -> None:
                    time.sleep(0.05)
                    began.append(time.perf_counter())
                    etcd.publish([far.lease])

                putting = threading.Thread(target=put)
                putting.start()
                came = probing.first_answer()
                putting.join()
                probing.close()
                taken.append(came - began[0])
            etcd.delete(far.lease)
        benchmark.pedantic(lambda: None, rounds=1)
    figure(
        f"join to first packet, {case}, {writer}",
        statistics.median(taken) * 1e3,
        "ms",
        None,
        f"least {min(taken) * 1e3:.1f}, most {max(taken) * 1e3:.1f} ms of {_JOINS}",
    )


@contextmanager
def _written_by(
    writer: str, case: Case, node: str, etcd: Store, far: Reflector, folder: Path
) -> Iterator[None]:
    if writer == "flannel-style":
        with _flannel_writer(etcd.options, far, folder):
            yield
        return
    with planes.plane(case, node) as dp:
        agent = Agent(dp, EtcdSource(etcd.options), audit=NO_AUDIT)
        with agent:
            assert agent.wait_ready(60)
            yield
