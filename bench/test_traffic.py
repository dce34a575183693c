"""What packets of an unchanged peer notice of the work on ten thousand others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import pytest

from bench import cluster, planes, wire
from bench.cluster import Case
from bench.lab import Quiet, inside
from flannel_dp import DataPlane, Kernel, Lease
from flannel_dp.resources.peers.routes import PROTOCOL_BOOT
from flannel_dp.tables.columns import route_table

_CASES = [pytest.param(Case(family, 10_000), id=f"ipv{family}-10000") for family in (4, 6)] + [
    pytest.param(Case(4, 1_000), id="ipv4-1000", marks=[pytest.mark.smoke])
]

_SECONDS = 1.0
_TURNS = 3
_STREAM = 2.0
_P99_TARGET = 2.0
_SHOWN = ("p50", "p99", "most")


@pytest.mark.benchmark(group="traffic")
@pytest.mark.parametrize("case", _CASES)
def test_pings_during_work(
    benchmark: Any, case: Case, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """2,000 pings a second to one peer, in turn at rest and during work: while an unchanged list
    is synced again and again, while 1 % of the peers move, while all others are installed and
    removed, and while flanneld's entries are taken over.

    A thread that only computes is there to compare with: with two processors a p99 is above
    that at rest as soon as one of them is taken, whatever by.
    """
    with (
        wire.wire(case) as net,
        inside(net.near),
        planes.plane(case, net.near) as dp,
        planes.plane(case, net.near, allow_shrink=True) as large,
    ):
        everyone = [cluster.lease(case.family, number) for number in range(case.nodes + 1)]
        moved = [_moved(everyone, case), everyone]
        few = [everyone[:2], everyone]
        dp.sync(everyone)
        quiet()

        def take_over() -> None:
            with planes.plane(case, net.near) as fresh:
                report = fresh.sync(everyone)
            assert report.ok
            assert report.tables["route"]["replaced"] == case.nodes

        work = {
            "a busy processor": lambda: _repeat(_compute),
            "unchanged sync": lambda: _repeat(lambda n: dp.sync(everyone)),
            "1 % churn": lambda: _repeat(lambda n: dp.sync(moved[n % 2])),
            "install and remove": lambda: _repeat(lambda n: large.sync(few[n % 2])),
        }
        found = {what: _in_turn(net, do) for what, do in work.items()}
        found["take-over"] = benchmark.pedantic(
            _in_turn, args=(net, take_over, lambda: _as_flanneld(dp, case)), rounds=1
        )
    for what, turns in found.items():
        rests, seen = zip(*turns, strict=True)
        benchmark.extra_info[what] = [vars(one) for one in seen]
        benchmark.extra_info[f"at rest beside {what}"] = [vars(one) for one in rests]
        assert not any(rest.lost for rest in rests), rests
        lost, sent = sum(one.lost for one in seen), sum(one.sent for one in seen)
        figure(f"pings lost, {what}, {case}", lost, f"of {sent}", 0.0)
        figure(
            f"p99 of pings, {what}, {case}",
            median(one.p99 for one in seen) / median(one.p99 for one in rests),
            "x at rest",
            None if what == "a busy processor" else _P99_TARGET,
            f"p50, p99, most us: {_medians(seen)}; at rest {_medians(rests)}",
        )


def _in_turn(
    net: wire.Wire, work: Callable[[], None], prepare: Callable[[], None] = lambda: None
) -> list[tuple[wire.Pings, wire.Pings]]:
    """Pings at rest and during ``work``, in turn, so that what drifts drifts for both."""
    turns = []
    for _ in range(_TURNS):
        prepare()
        rest = wire.pings(net, lambda: time.sleep(_SECONDS))
        turns.append((rest, wire.pings(net, work)))
    return turns


def _medians(seen: Sequence[wire.Pings]) -> str:
    return ", ".join(f"{median(getattr(one, name) for one in seen):.0f}" for name in _SHOWN)


@pytest.mark.benchmark(group="traffic")
@pytest.mark.parametrize("case", _CASES[:2])
def test_throughput_during_work(
    benchmark: Any, case: Case, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """One TCP stream: at rest with 10,000 peers, and while they are synced and churned."""
    with wire.wire(case) as net, inside(net.near), planes.plane(case, net.near) as dp:
        everyone = [cluster.lease(case.family, number) for number in range(case.nodes + 1)]
        dp.sync(everyone[:2])
        alone = wire.gigabits(net, _STREAM)
        dp.sync(everyone)
        quiet()
        rest = wire.gigabits(net, _STREAM)
        moved = [_moved(everyone, case), everyone]
        busy = benchmark.pedantic(
            wire.gigabits,
            args=(net, _STREAM, lambda: _repeat(lambda n: dp.sync(moved[n % 2]), _STREAM)),
            rounds=1,
        )
    figure(f"throughput with the peers, {case}", rest / alone, "x one peer", None, _gbit(rest))
    figure(f"throughput during 1 % churn, {case}", busy / rest, "x at rest", None, _gbit(busy))


def _gbit(value: float) -> str:
    return f"{value:.1f} Gbit/s"


def _repeat(work: Callable[[int], object], seconds: float = _SECONDS) -> None:
    """An even number of times, so that what is changed is changed back."""
    end, turns = time.monotonic() + seconds, 0
    while time.monotonic() < end or turns % 2:
        work(turns)
        turns += 1


def _compute(turn: int) -> int:
    return sum(range(100_000))


def _moved(everyone: list[Lease], case: Case) -> list[Lease]:
    """Every hundredth peer at another address; nodes 0 and 1 stay."""
    return [
        cluster.lease(case.family, number, 1) if number % 100 == 50 else lease
        for number, lease in enumerate(everyone)
    ]


def _as_flanneld(dp: DataPlane, case: Case) -> None:
    """Leave the peers as flanneld writes them: gateway routes with the mark of ``ip route``."""
    family = planes.state(dp, case)
    device = family.index
    prefixes = [family.peers.subnet(number) for number in range(len(family.peers))]
    gateways = {prefix: prefix.partition("/")[0] for prefix in prefixes}
    plain = route_table(gateways, device=device, protocol=PROTOCOL_BOOT)
    with Kernel() as kernel:
        for result in kernel.apply(kernel.diff(plain, *family.routes.scopes)):
            assert result.counts()["failed"] == 0
