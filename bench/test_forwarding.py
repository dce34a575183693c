"""Forwarding by a program: its map against a bare batch update and against the kernel's own
tables, and what packets make of either."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pytest

from bench import cluster, floors, lab, planes, wire
from bench.cluster import Case
from bench.figures import Figures, median_ratio
from bench.floors import Taken
from bench.lab import Quiet, inside
from flannel_dp import DataPlane, Kernel
from flannel_dp._core import BpfMap, diff_tables
from flannel_dp.resources.forwarding.program import Forwarding
from flannel_dp.tables.columns import peer_table

_LPM_TRIE, _NO_PREALLOC = 11, 1
_RAW_TARGET, _KERNEL_LEAST, _UPDATE_TARGET, _LARGE_TARGET = 1.5, 5.0, 50.0, 0.5
_BACK_TARGET = 50.0
_ROUNDS = {1_000: 11, 10_000: 9, 100_000: 3}
_SECONDS = 2.0


def _cases(*sizes: int) -> list[Any]:
    return [
        pytest.param(
            Case(family, nodes, "ebpf"),
            id=f"ipv{family}-{nodes}",
            marks=[pytest.mark.smoke] if nodes == 1_000 else [],
        )
        for nodes in sizes
        for family in (4, 6)
    ]


@contextmanager
def _unpinned(case: Case, netns: str | None = None) -> Iterator[None]:
    """What is pinned outlives the benchmark's namespace."""
    try:
        yield
    finally:
        Forwarding("flannel.1" if case.family == 4 else "flannel-v6.1", netns).remove()


def _held(dp: DataPlane, family: int) -> tuple[bytes, bytes]:
    """Keys and values of the program's map as they are."""
    forwarding = dp.forwarder.forwarding
    assert forwarding is not None
    found = Forwarding(forwarding.device)
    assert found.open_pinned()
    _, keys, values = found._maps[f"peers{family}"].read()
    found.close()
    return keys, values


def _raw(family: int, keys: bytes, values: bytes) -> None:
    """What a program that knows its peers as keys and values would do."""
    made = BpfMap.create(_LPM_TRIE, 8 if family == 4 else 20, 24, 1 << 20, _NO_PREALLOC)
    made.update_many(keys, values)
    made.close()


@pytest.mark.benchmark(group="sync from empty, forwarding by eBPF")
@pytest.mark.parametrize("case", _cases(1_000, 10_000, 100_000))
def test_sync_into_the_map(
    benchmark: Any,
    case: Case,
    node: str,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """Leases in memory, program and device there, no peer: until the map has them all. In turn
    with a bare BPF_MAP_UPDATE_BATCH of the same entries into a new trie, and, up to 10,000,
    with the kernel's own tables in another namespace."""
    leases = case.leases
    kernel_case = Case(case.family, case.nodes)
    ours: list[Taken] = []
    raw: list[Taken] = []
    kernel: list[Taken] = []
    opened: list[DataPlane] = []
    rounds = _ROUNDS[case.nodes]
    with _unpinned(case), lab.namespace(case.family) as other:
        with planes.plane(case, node) as dp:
            assert dp.sync(leases).ok
            keys, values = _held(dp, case.family)

        def setup() -> tuple[tuple[DataPlane], dict[str, Any]]:
            while opened:
                opened.pop().close()
            if case.nodes <= 10_000:
                with inside(other):
                    planes.empty(kernel_case, other)
                    with planes.plane(kernel_case, other) as plain:
                        quiet()
                        floors.timed(kernel, lambda: plain.sync(leases))
                    planes.empty(kernel_case, other)
            planes.empty(case, node)
            quiet()
            floors.timed(raw, lambda: _raw(case.family, keys, values))
            opened.append(planes.plane(case, node))
            return (opened[-1],), {}

        report = benchmark.pedantic(
            lambda dp: floors.timed(ours, lambda: dp.sync(leases)),
            setup=setup,
            rounds=rounds,
            warmup_rounds=1,
        )
        assert report.ok
        assert report.tables["peer"]["added"] == case.nodes
        assert opened[-1].sync(leases).writes == 0
        while opened:
            opened.pop().close()
    pairs = [one.wall for one in ours][-rounds:], [one.wall for one in raw][-rounds:]
    figure(
        f"eBPF sync from empty, {case}",
        median_ratio(*pairs),
        "x batch into a trie",
        _RAW_TARGET,
        f"medians {median(pairs[0]) * 1e3:.1f} ms, {median(pairs[1]) * 1e3:.1f} ms",
    )
    if kernel:
        figure(
            f"kernel tables from empty against eBPF, {case}",
            median_ratio([one.wall for one in kernel][-rounds:], pairs[0]),
            "x eBPF",
            least=_KERNEL_LEAST,
        )
    if case.nodes == 100_000:
        figure(f"eBPF sync from empty, {case}", median(pairs[0]), "s", _LARGE_TARGET)


@pytest.mark.benchmark(group="update of one peer, forwarding by eBPF")
@pytest.mark.parametrize("case", _cases(1_000, 10_000))
def test_update_one_in_the_map(
    benchmark: Any, case: Case, node: str, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """One peer moves: by ``DataPlane.update``, and by the tables below it alone, for those who
    know their peers without leases."""
    moves = [cluster.lease(case.family, 5, 1), cluster.lease(case.family, 5)]
    turns = iter(range(1 << 30))
    with _unpinned(case), planes.plane(case, node) as dp:
        dp.sync(case.leases)
        quiet()
        report = benchmark.pedantic(
            lambda: dp.update(added=[moves[next(turns) % 2]]), rounds=400, warmup_rounds=20
        )
        assert report.tables["peer"]["replaced"] == 1
        taken = benchmark.stats.stats.median * 1e6
        figure(f"eBPF update of one peer, {case}", taken, "us", _UPDATE_TARGET)
        below = []
        with Kernel() as kernel:
            held = dp.forwarder.maps(case.family)
            assert held
            tables = [_one(case.family, held, move) for move in moves]
            for turn in range(400):
                began = time.perf_counter()
                kernel.apply(diff_tables(tables[turn % 2], tables[1 - turn % 2]))
                below.append(time.perf_counter() - began)
        figure(f"the same, tables alone, {case}", median(below) * 1e6, "us", _UPDATE_TARGET)


def _one(family: int, held: int, lease: Any) -> Any:
    data = lease.backend_data if family == 4 else lease.backend_v6_data
    subnet = lease.subnet if family == 4 else lease.ipv6_subnet
    endpoint = lease.public_ip if family == 4 else lease.public_ipv6
    return peer_table(held, [(subnet, endpoint, data.vtep_mac)])


@pytest.mark.benchmark(group="changing over")
@pytest.mark.parametrize("case", _cases(1_000, 10_000))
def test_changing_over(
    benchmark: Any, case: Case, quiet: Quiet, figures: Figures, figure: Callable[..., None]
) -> None:
    """A node at work goes from the kernel's own tables to the program and back, to a form of ours
    and to flanneld's: how long its traffic stands still, by the pings of one peer that get no
    answer."""
    plain = Case(case.family, case.nodes)
    gaps: dict[str, list[float]] = {"to eBPF": [], "back": [], "to flanneld's form": []}
    with wire.wire(plain) as net, inside(net.near), _unpinned(case):
        everyone = [cluster.lease(case.family, number) for number in range(case.nodes + 1)]
        with planes.plane(plain, net.near) as dp:
            dp.sync(everyone)

        def over(to: Case, *, hand_back: bool) -> Callable[[], None]:
            def change() -> None:
                with planes.plane(to, net.near, hand_back=hand_back) as dp:
                    assert dp.sync(everyone).ok

            return change

        def both() -> None:
            for what, to in (
                ("to eBPF", case),
                ("back", plain),
                ("", case),
                ("to flanneld's form", plain),
            ):
                quiet()
                seen = wire.pings(net, over(to, hand_back="flanneld" in what))
                if what:
                    gaps[what].append(seen.lost * wire.PACE / 1e3)

        benchmark.pedantic(both, rounds=3)
    for what, found in gaps.items():
        target = _BACK_TARGET if what != "to eBPF" else None
        figure(f"traffic stands still {what}, {case}", median(found), "ms", target, f"of {found}")


@pytest.mark.benchmark(group="traffic, forwarding by eBPF")
@pytest.mark.parametrize("case", _cases(10_000))
def test_packets_by_either(
    benchmark: Any, case: Case, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """One TCP stream, and 2,000 pings a second, with 10,000 peers: by the program and by the
    kernel's own tables, in turn."""
    plain = Case(case.family, case.nodes)
    everyone = [cluster.lease(case.family, number) for number in range(case.nodes + 1)]
    speed: dict[str, list[float]] = {"ebpf": [], "kernel": []}
    trips: dict[str, list[wire.Pings]] = {"ebpf": [], "kernel": []}
    with wire.wire(plain) as net, inside(net.near), _unpinned(case):

        def turn() -> None:
            for name, chosen in (("kernel", plain), ("ebpf", case)):
                with planes.plane(chosen, net.near) as dp:
                    assert dp.sync(everyone).ok
                quiet()
                speed[name].append(wire.gigabits(net, _SECONDS))
                trips[name].append(wire.pings(net, lambda: time.sleep(_SECONDS)))

        benchmark.pedantic(turn, rounds=5)
    assert all(one.lost == 0 for found in trips.values() for one in found)
    figure(
        f"throughput by eBPF, {case}",
        median_ratio(speed["ebpf"], speed["kernel"]),
        "x the kernel's tables",
        least=1.0,
        detail=f"medians {median(speed['ebpf']):.1f}, {median(speed['kernel']):.1f} Gbit/s",
    )
    for name in ("p50", "p99"):
        values = {who: [float(getattr(one, name)) for one in trips[who]] for who in trips}
        figure(
            f"{name} of pings by eBPF, {case}",
            median_ratio(values["ebpf"], values["kernel"]),
            "x the kernel's tables",
            1.0,
            f"medians {median(values['ebpf']):.0f}, {median(values['kernel']):.0f} us",
        )
