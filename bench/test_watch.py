"""An agent that follows the kernel: how soon drift is repaired, and what waiting for it costs."""

from __future__ import annotations

import itertools
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cluster, floors, lab, planes
from bench.agents import Local, Remote, Service, Stranger
from bench.cluster import Case
from bench.floors import Taken
from bench.lab import Quiet
from flannel_dp._core import REMOVE, Table
from flannel_dp.cluster.lease import LeaseList
from flannel_dp.sources import Snapshot
from flannel_dp.tables.entries import Route

_SIZES = (1_000, 10_000)

_REPAIR_TARGET_MS = 5.0
#: Fewer than the hundred that an agent makes at once, before it slows down.
_REPAIRS = 60

_FLAP_TARGET = 1.5
_FLAPS = {1_000: 1, 10_000: 5}

_AUDIT_SECONDS = 60.0
_IDLE_TARGET = 0.1
_WAKE_TARGET = 0.0
_IDLE_SECONDS = {1_000: 0.5, 10_000: 3.0}
_AUDITS = {1_000: 4, 10_000: 20}

_FOREIGN_ROUTES = {1_000: 20_000, 10_000: 100_000}
_FOREIGN_ROUNDS = {1_000: 2, 10_000: 2}
_FOREIGN_TARGET = 1.0
_STATIC = 4  # RTPROT_STATIC
_ELSEWHERE = {4: ("198.18.0.1/15", "198.18.0.2"), 6: ("2001:db8:f::1/64", "2001:db8:f::2")}


def _cases(smoke: int | None = None) -> list[Any]:
    """All sizes and families; of the small ones, that of family ``smoke`` for every commit."""
    return [
        pytest.param(
            Case(family, nodes),
            id=f"ipv{family}-{nodes}",
            marks=[pytest.mark.smoke] if (family, nodes) == (smoke, 1_000) else [],
        )
        for nodes in _SIZES
        for family in (4, 6)
    ]


_ENTRIES = [
    pytest.param(*case.values, kind, id=f"{case.id}-{kind}", marks=case.marks)
    for kind, smoke in (("fdb", None), ("neighbour", None), ("nexthop", 4), ("route", 6))
    for case in _cases(smoke)
    if kind != "nexthop" or case.values[0].family == 4  # IPv6 routes carry their gateway
]


@pytest.mark.benchmark(group="repair of one entry")
@pytest.mark.parametrize(("case", "kind"), _ENTRIES)
def test_repair(
    benchmark: Any, case: Case, kind: str, node: str, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """Another program deletes an entry of ours: from before it asks the kernel to, until the
    write that puts the entry back is acknowledged. The deletion itself and the agent's way
    out of poll() are in it, and for a nexthop the IPv4 route that the kernel takes with it."""
    leases = case.leases
    taken: list[float] = []
    with planes.plane(case, node) as dp, Stranger() as stranger, Local(dp, _say(leases)) as local:
        table = _table(planes.state(dp, case).tables, kind)
        deletions = iter(_deletions(table))
        quiet()

        def delete() -> None:
            done, began = len(local.repairs), time.perf_counter()
            assert stranger.send(next(deletions)) == 0
            local.wait(done + 1)
            taken.append(local.repairs[-1][0] - began)

        benchmark.pedantic(delete, rounds=_REPAIRS, warmup_rounds=5)

        local.settle()
        expected = {(kind, "deleted"): 1} | ({("route", "deleted"): 1} if kind == "nexthop" else {})
        assert all(repair.counts == expected for _, repair in local.repairs)
    assert _written(case, node, leases) == 0
    taken = sorted(taken[-_REPAIRS:])
    target = _REPAIR_TARGET_MS if case.nodes == 10_000 else None
    detail = f"best {taken[0] * 1e3:.2f}, worst of {_REPAIRS} {taken[-1] * 1e3:.2f} ms"
    name = f"repair of one {kind}, {case}"
    figure(name, statistics.median(taken) * 1e3, "ms", target, detail)


@pytest.mark.benchmark(group="flap of the device")
@pytest.mark.parametrize("case", _cases(smoke=6))
def test_flap(
    benchmark: Any, case: Case, node: str, quiet: Quiet, figure: Callable[..., None]
) -> None:
    """``ip link set flannel.1 down``: the device loses all but its FDB. From the moment that
    the kernel has done so until the agent's last write is acknowledged, against
    ``DataPlane.sync`` of the same leases from empty, right before, in the same namespace."""
    leases = case.leases
    flaps: list[float] = []
    syncs: list[float] = []
    downs: list[float] = []
    repairs: list[int] = []

    def flap() -> None:
        planes.empty(case, node)
        quiet()
        with planes.plane(case, node) as dp:
            began = time.perf_counter()
            assert dp.sync(leases).ok
            syncs.append(time.perf_counter() - began)
            with Stranger() as stranger, Local(dp, _say(leases)) as local:
                quiet()
                began = time.perf_counter()
                stranger.set_down(planes.state(dp, case).index)
                done = time.perf_counter()
                local.wait(1)
                local.settle()
                downs.append(done - began)
                flaps.append(local.repairs[-1][0] - done)
                repairs.append(len(local.repairs))
        assert _written(case, node, leases) == 0

    benchmark.pedantic(flap, rounds=_FLAPS[case.nodes])

    ratios = sorted(a / b for a, b in zip(flaps, syncs, strict=True))
    detail = (
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}; {statistics.median(flaps) * 1e3:.0f} ms in "
        f"{statistics.median(repairs):.0f} repairs, sync {statistics.median(syncs) * 1e3:.0f}, "
        f"the kernel's own part before {statistics.median(downs) * 1e3:.0f}"
    )
    target = _FLAP_TARGET if case.nodes == 10_000 else None
    figure(f"flap, {case}", statistics.median(ratios), "x from empty", target, detail)


@pytest.mark.benchmark(group="idle agent")
@pytest.mark.parametrize("case", _cases(smoke=4))
def test_idle(
    benchmark: Any, case: Case, node: str, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """``flannel-dp sync --watch`` with nothing to do: what it takes of a core with an audit a
    minute, put together from seconds without one and from an agent's audits in quick
    succession; and how often it is woken between audits."""
    leases = cluster.write_file(tmp_path / "leases.json", case.leases)

    with Service(case, leases, tmp_path) as service:
        _settled_addresses()
        time.sleep(0.3)  # what came last has been read by then
        resting = benchmark.pedantic(service.used, args=(_IDLE_SECONDS[case.nodes],))
    with Remote(case, leases, audit=0.1) as remote:
        audit = _audit_seconds(remote, _AUDITS[case.nodes])

    share = 100 * (resting.cpu / resting.wall + audit / _AUDIT_SECONDS)
    targets = (_IDLE_TARGET, _WAKE_TARGET) if case.nodes == 10_000 else (None, None)
    detail = (
        f"an audit {audit * 1e3:.1f} ms, the mean of {_AUDITS[case.nodes]}; "
        f"{resting.cpu * 1e6:.0f} us in {resting.wall:.1f} s without"
    )
    figure(f"idle agent, {case}", share, "% of a core", targets[0], detail)
    wakes = resting.voluntary / resting.wall
    detail = f"{resting.switches} context switches in {resting.wall:.1f} s"
    figure(f"idle agent, {case}", wakes, "wake-ups/s", targets[1], detail)


@pytest.mark.benchmark(group="foreign routes")
@pytest.mark.parametrize("case", _cases())
def test_foreign_routes(
    benchmark: Any,
    case: Case,
    node: str,
    tmp_path: Path,
    quiet: Quiet,
    figure: Callable[..., None],
) -> None:
    """A routing daemon writes routes on a device of its own, as fast as it can, with an agent
    beside it and without: our share of a core meanwhile, and what we cost the daemon."""
    leases = cluster.write_file(tmp_path / "leases.json", case.leases)
    count = _FOREIGN_ROUTES[case.nodes]
    address, gateway = _ELSEWHERE[case.family]
    lab.ip("link", "add", "other0", "type", "veth", "peer", "name", "other1")
    lab.ip("link", "set", "other1", "up")
    lab.ip("addr", "add", address, "dev", "other0", *(["nodad"] if case.family == 6 else []))
    lab.ip("link", "set", "other0", "up")
    routes = _foreign_routes(case.family, count, gateway)
    adding = floors.write(tmp_path / "adding", floors.batches([routes]))
    removing = floors.write(tmp_path / "removing", floors.batches([routes], REMOVE))
    alone: list[Taken] = []
    beside: list[Taken] = []
    cpu: list[float] = []
    wakes: list[int] = []

    def write() -> Taken:
        taken = floors.run("send", adding, node)
        assert _count_routes(case.family) == count
        return taken

    def with_us() -> None:
        with Remote(case, leases) as remote:
            _settled_addresses()
            quiet()
            events, began = remote.ask()["events"], remote.usage()
            beside.append(write())
            used = remote.usage() - began
            floors.run("send", removing, node)
            assert remote.ask()["events"] == events
        cpu.append(100 * used.cpu / beside[-1].wall)
        wakes.append(used.voluntary)

    def without() -> None:
        quiet()
        alone.append(write())
        floors.run("send", removing, node)

    turns = itertools.cycle([(with_us, without), (without, with_us)])

    def pair() -> None:
        for turn in next(turns):
            turn()

    benchmark.pedantic(pair, rounds=_FOREIGN_ROUNDS[case.nodes])

    target = _FOREIGN_TARGET if case.nodes == 10_000 else None
    slower = statistics.median(a.cpu / b.cpu for a, b in zip(beside, alone, strict=True))
    took = statistics.median(taken.wall for taken in beside)
    detail = (
        f"no event read, {statistics.median(wakes):.0f} wake-ups; the writer took "
        f"{took * 1e3:.0f} ms, and {slower:.2f} x the processor time that it takes without us"
    )
    name = f"{count:,} foreign routes, {case}"
    figure(name, statistics.median(cpu), "% of a core", target, detail)


def _settled_addresses() -> None:
    """Wait until the kernel has given every new device its link-local address."""
    deadline = time.monotonic() + 10
    while subprocess.run(
        ["ip", "-6", "addr", "show", "tentative"], capture_output=True, check=True
    ).stdout:
        assert time.monotonic() < deadline, "an address stays tentative"
        time.sleep(0.05)


def _audit_seconds(remote: Remote, count: int) -> float:
    """Processor time of one audit: of ``count`` that follow each other, none with a write."""
    first, began = remote.ask(), remote.usage()
    deadline = time.monotonic() + 60
    while (last := remote.ask())["audits"] < first["audits"] + count:
        assert time.monotonic() < deadline, last
        time.sleep(0.2)
    used = remote.usage() - began
    assert last["writes"] == first["writes"]
    return used.cpu / (int(last["audits"]) - int(first["audits"]))


def _say(leases: list[Any]) -> Callable[[], Snapshot]:
    return lambda: Snapshot(LeaseList(leases, []), "the benchmark", 0.0)


def _table(wanted: list[Any], kind: str) -> Table:
    found: Table = next(one.table for one in wanted if one.table.kind == kind)
    return found


def _deletions(table: Table) -> list[bytes]:
    """Messages that each delete one entry, from all over the table."""
    step = max(1, len(table) // 100)
    chosen = Table(table.kind)
    for number in range(0, len(table), step):
        chosen.add(table[number])
    singles = []
    for entry in chosen:
        single = Table(table.kind)
        single.add(entry)
        singles.append(single)
    return [batch for single in singles for batch in floors.batches([single], REMOVE)]


def _foreign_routes(family: int, count: int, gateway: str) -> Table:
    table, device = Table("route"), socket.if_nametoindex("other0")
    for number in range(count):
        low = f"{number >> 16:x}:{number & 0xFFFF:x}"
        prefix = (
            f"100.{64 + (number >> 16)}.{number >> 8 & 0xFF}.{number & 0xFF}/32"
            if family == 4
            else f"2001:db8:e::{low}/128"
        )
        table.add(Route(prefix, gateway=gateway, device=device, protocol=_STATIC))
    return table


def _count_routes(family: int) -> int:
    """How many routes there are on the other device, that with the address not counted."""
    done = subprocess.run(
        ["ip", f"-{family}", "route", "show", "dev", "other0", "proto", "static"],
        capture_output=True,
        check=True,
    )
    return done.stdout.count(b"\n")


def _written(case: Case, node: str, leases: list[Any]) -> int:
    """How much a sync still has to write: nothing, when all is right."""
    with planes.plane(case, node) as dp:
        return dp.sync(leases).writes
