"""What counting packets per peer costs: time in the kernel, throughput, latency, memory."""

from __future__ import annotations

import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import cluster, planes, wire
from bench.agents import Service
from bench.cluster import Case
from bench.lab import Quiet, inside
from bench.wire import Wire
from flannel_dp._core import BpfProgram, possible_cpus
from flannel_dp.bpf import attach, filters, pins
from flannel_dp.bpf.filters import COUNTERS_PRIORITY
from flannel_dp.resources.counters.device import FILTER, MAPS, DeviceCounters
from flannel_dp.resources.counters.reading import TRAFFIC

_CASES = [pytest.param(Case(family, 1), id=f"ipv{family}") for family in (4, 6)]
_MEMORY = [pytest.param(Case(4, nodes), id=f"ipv4-{nodes}") for nodes in (1_000, 10_000)]

_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_COST_TARGET_NS = 200.0
_GROWTH_TARGET_MB = 2.0

_FLOOD = "a flood of datagrams"

#: Of each load; what else the machine does only ever adds.
_ROUNDS = 3

#: Pairs of runs, one with and one without counters, in turn.
_PAIRS = 12
_SECONDS = 1.0
_READ_TARGET_MS = 100.0


@pytest.mark.benchmark(group="counters")
@pytest.mark.parametrize("case", _CASES)
def test_cost_of_a_packet(
    benchmark: Any, case: Case, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """Nanoseconds that the programs take, by the kernel's own account, which is about 90 of
    them itself: in a flood of small datagrams, in a TCP stream, and at a leisurely pace, where
    nothing is in a cache."""
    with _counted(case) as (net, counters, _), _bpf_stats():
        directory = pins.pin_directory(counters.device)
        programs = [BpfProgram.open(path) for path in directory.glob("count-[io]*")]
        loads = {
            _FLOOD: lambda: _flood(net),
            "a TCP stream": lambda: wire.gigabits(net, _SECONDS),
            "2,000 pings a second": lambda: wire.pings(net, lambda: time.sleep(_SECONDS)),
        }
        quiet()
        for what, load in loads.items():
            rounds = [_measure(programs, counters, load) for _ in range(_ROUNDS - 1)]
            measure = (programs, counters, load)
            rounds.append(
                benchmark.pedantic(_measure, measure) if what == _FLOOD else _measure(*measure)
            )
            packets, runs, spent = min(rounds, key=lambda found: found[2] / found[1])
            figure(
                f"counting a packet, {what}, IPv{case.family}",
                spent / packets,
                "ns",
                None if "pings" in what else _COST_TARGET_NS,
                f"{packets:,} packets in {runs:,} runs of {spent / runs:.0f} ns each, best of "
                f"{_ROUNDS}",
            )


def _measure(
    programs: list[BpfProgram], counters: DeviceCounters, load: Callable[[], object]
) -> tuple[int, int, int]:
    """Packets on the wire, runs of the programs, and nanoseconds spent in them."""
    before, passed = [_cost(program) for program in programs], _packets(counters)
    load()
    after, now = [_cost(program) for program in programs], _packets(counters)
    runs, spent = (
        sum(ends[field] - begins[field] for ends, begins in zip(after, before, strict=True))
        for field in (0, 1)
    )
    return now - passed, runs, spent


@pytest.mark.benchmark(group="counters")
@pytest.mark.parametrize("case", _CASES)
def test_what_traffic_notices(
    benchmark: Any, case: Case, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """Throughput and latency with and without counters, in turn; the noise is how far apart
    the quartiles of the runs without them lie."""
    gigabits: dict[bool, list[float]] = {True: [], False: []}
    trips: dict[bool, list[float]] = {True: [], False: []}
    with _counted(case) as (net, counters, index):
        quiet()

        def run() -> None:
            for turn in range(2 * _PAIRS):
                counting = bool(turn % 2) != bool(turn // 2 % 2)  # who is first takes turns
                _switch(counters, index, counting)
                gigabits[counting].append(wire.gigabits(net, _SECONDS))
                trips[counting].append(wire.pings(net, lambda: time.sleep(_SECONDS)).p50)

        benchmark.pedantic(run, rounds=1)
    for what, unit, found in (("throughput", "Gbit/s", gigabits), ("p50 of pings", "us", trips)):
        on, off = statistics.median(found[True]), statistics.median(found[False])
        low, _, high = statistics.quantiles(found[False], n=4)
        noise = (high - low) / off
        bounds = (
            {"target": None, "least": 1 - noise}
            if what == "throughput"
            else {"target": 1 + noise, "least": None}
        )
        figure(
            f"{what} with counters, IPv{case.family}",
            on / off,
            "x without",
            bounds["target"],
            f"{on:.4g} and {off:.4g} {unit}, noise {noise:.1%} of {_PAIRS} runs each",
            bounds["least"],
        )


@pytest.mark.benchmark(group="counters")
@pytest.mark.parametrize("case", _MEMORY)
def test_memory_of_an_agent(
    benchmark: Any, case: Case, node: str, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """``flannel-dp sync --watch`` with and without --counters, in turn, from nothing: at rest,
    and after ten scrapes of /metrics, which then has four samples for each peer."""
    leases = cluster.write_file(tmp_path / "leases.json", case.leases)
    found: dict[bool, list[float]] = {True: [], False: []}
    scraped: dict[bool, list[float]] = {True: [], False: []}

    def run() -> None:
        for turn in range(6):
            counting = bool(turn % 2)
            folder = tmp_path / str(turn)
            folder.mkdir()
            more = ("--counters",) if counting else ()
            with Service(case, leases, folder, *more) as service:
                found[counting].append(service.memory()["resident"])
                for _ in range(10):
                    with urllib.request.urlopen("http://127.0.0.1:10249/metrics") as answer:
                        answer.read()
                time.sleep(0.5)  # what an answer took is let go once it was sent
                scraped[counting].append(service.memory()["resident"])
            with planes.plane(case, node) as dp:
                dp.clean()

    benchmark.pedantic(run, rounds=1)

    for what, sizes in (("at rest", found), ("when scraped", scraped)):
        on, off = statistics.median(sizes[True]), statistics.median(sizes[False])
        figure(
            f"memory that counters take {what}, {case}",
            on - off,
            "MB",
            _GROWTH_TARGET_MB,
            f"{on:.1f} and {off:.1f} resident",
        )


@pytest.mark.benchmark(group="counters")
@pytest.mark.parametrize("case", _CASES)
def test_reading_ten_thousand_peers(
    benchmark: Any, case: Case, node: str, figure: Callable[..., None]
) -> None:
    """All counters of 10,000 peers in both directions, read and summed up."""
    counters = DeviceCounters("flannel.1")
    counters.prepare()
    held = counters.read()
    assert held is not None
    peers = pins.open_map(pins.pin_directory("flannel.1") / "peers", *MAPS["peers"])
    assert peers is not None
    value = bytes(TRAFFIC * possible_cpus())
    for number in range(10_000):
        for direction in (0, 1):
            mac = bytes((2, 0, 0, 0, number >> 8, number & 255))
            peers.update(mac + bytes((case.family, direction)), value)
    try:
        reading = benchmark(counters.read)
    finally:
        counters.remove()
    assert len(reading) == 20_000
    seconds = benchmark.stats.stats.median if benchmark.stats else 0.0
    figure(f"reading 10,000 peers, IPv{case.family}", 1000 * seconds, "ms", _READ_TARGET_MS)


# ---- the parts -------------------------------------------------------------------


@contextmanager
def _counted(case: Case) -> Iterator[tuple[Wire, DeviceCounters, int]]:
    """Two nodes; the near one, which this process is in, counts."""
    with wire.wire(case) as net, inside(net.near), planes.plane(case, net.near) as dp:
        report = dp.sync([cluster.lease(case.family, number) for number in (0, 1)])
        assert report.ok, report.to_json()
        counters = DeviceCounters(dp.resolver.device_name(case.family))
        index = dp.state[case.family].index
        counters.ensure(index)
        try:
            yield net, counters, index
        finally:
            counters.remove(index)


def _switch(counters: DeviceCounters, index: int, on: bool) -> None:
    if on:
        counters.ensure(index)
        return
    for parent in filters.PARENTS:
        attach.detach(index, parent, COUNTERS_PRIORITY, FILTER)


@contextmanager
def _bpf_stats() -> Iterator[None]:
    before = _STATS.read_text()
    _STATS.write_text("1")
    try:
        yield
    finally:
        _STATS.write_text(before)


def _cost(program: BpfProgram) -> tuple[int, int]:
    program.refresh()
    return program.cost


def _packets(counters: DeviceCounters) -> int:
    """As they are on the wire: one run of a program may see dozens of segments."""
    reading = counters.read()
    assert reading is not None
    return sum(traffic.packets for _, _, _, traffic in reading)


def _flood(net: Wire) -> None:
    """Datagrams of 64 bytes, as fast as one process sends and another receives them."""
    inside_ = ["ip", "netns", "exec"]
    with subprocess.Popen(
        [*inside_, net.far, "iperf3", "-s", "-1", "-B", net.target],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        wire.await_listener(net)
        flags = ["-u", "-l", "64", "-b", "0", "-t", str(_SECONDS)]
        subprocess.run(
            [*inside_, net.near, "iperf3", "-c", net.target, *flags],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        server.wait(10)
