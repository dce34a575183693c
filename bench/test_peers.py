"""The library against other ways to do the same work, in one run and one namespace.

In each round every peer does the job once, in a kernel that was emptied and left in
peace before, and then the library does. The first time, the kernel's state is compared:
it is the same after each, and the one that the leases say.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench import agreement, floors, lab, linear, peers, planes
from bench.cluster import Case
from bench.figures import times
from bench.job import NETWORK, Job, device
from bench.lab import Quiet
from bench.peers import Peer
from flannel_dp import DataPlane

_SIZES = (100, 300, 1_000, 3_000, 10_000)
_LAST = _SIZES[-1]
_FULL = 50_000
_ROUNDS = {100: 3, 300: 3, 1_000: 4, 3_000: 3, 10_000: 3, _FULL: 3}

#: Seconds. A peer that kept us longer than this at a size, over all rounds and with its
#: start, has no further round there.
_ENOUGH = 2.0

#: Sizes whose ratios are printed; those between are for the exponents.
_PRINTED = (100, 1_000, _LAST, _FULL)

#: Of how many nodes a size is, at least, that the exponent is fitted to.
_GROWTH_FROM = 1_000

#: How many times faster the library should be, at 10,000 nodes and IPv4, and at 50,000.
_LEAST = {peers.FLANNEL: 15.0, peers.IP_BATCH: 15.0, peers.PYROUTE2: 150.0}
_LEAST_BEYOND = {peers.FLANNEL: 100.0}
_LEAST_READING = {peers.PYROUTE2: 60.0}

#: From this size on what a peer left behind keeps kernel workers busy for a while.
_LEAVES_WORK = 3_000

_OURS = "flannel_dp"
_RTPROT_ZEBRA = "11"  # its nexthop objects; by number, as names are the distribution's

Points = defaultdict[tuple[str, str, int, str], list[linear.Point]]


def _cases(layouts: tuple[str, ...], everybody: tuple[Peer, ...]) -> list[Any]:
    """Cases with who takes part: the short run's, then what the full run adds."""
    sizes = {False: _SIZES, True: (*_SIZES, _FULL)}
    found = []
    for full in (False, True):
        for layout in layouts:
            for family in (4, 6):
                for nodes in sizes[full]:
                    chosen = tuple(
                        peer
                        for peer in everybody
                        if peer.takes(layout, family, nodes, full=full)
                        and not (
                            full
                            and nodes <= _LAST
                            and peer.takes(layout, family, nodes, full=False)
                        )
                    )
                    if chosen:
                        found.append(_param(Case(family, nodes, layout), chosen, full=full))
    return found


def _param(case: Case, chosen: tuple[Peer, ...], *, full: bool) -> Any:
    marks = [pytest.mark.full] if full else []
    if case.nodes == 100:
        marks.append(pytest.mark.smoke)
    name = f"{case.layout}-ipv{case.family}-{case.nodes}" + ("-full" if full else "")
    return pytest.param(case, chosen, id=name, marks=marks)


@pytest.fixture(scope="module")
def points() -> Points:
    """Every time of this run, by work, layout, family and who it was."""
    return defaultdict(list)


@pytest.fixture
def job(case: Case, node: str, tmp_path: Path) -> Job:
    return Job(case, node, tmp_path, device(case), tmp_path / "messages")


class Race:
    """The peers of one case, and what they took."""

    def __init__(self, job: Job, entered: Sequence[Peer], quiet: Quiet) -> None:
        self._job = job
        self._entered = peers.installed(tuple(entered))
        self._quiet = quiet
        self._spent = dict.fromkeys((peer.name for peer in self._entered), 0.0)
        self.seconds: dict[str, list[float]] = {peer.name: [] for peer in self._entered}

    def round(self, before: Callable[[], None], after: Callable[[str], None]) -> None:
        """Everybody once; ``after`` is called with the name of a peer that ran the first time."""
        self._quiet()
        for peer in self._entered:
            taken = self.seconds[peer.name]
            if self._spent[peer.name] > _ENOUGH:
                continue
            before()
            with peer.ready(self._job) as run:
                if self._job.case.nodes >= _LEAVES_WORK:
                    self._quiet()
                started = time.perf_counter()
                taken.append(run())
                self._spent[peer.name] += time.perf_counter() - started
                if len(taken) == 1:
                    after(peer.name)

    @property
    def extra(self) -> dict[str, dict[str, Any]]:
        """For pytest-benchmark's JSON."""
        return {
            peer.name: {"version": peer.version(), "seconds": self.seconds[peer.name]}
            for peer in self._entered
        }


def _clear(job: Job) -> None:
    """The state before the first peer, whoever wrote what is there."""
    planes.empty(job.case, job.netns)
    if not job.tunnelled:
        family = f"-{job.case.family}"
        lab.ip(family, "route", "flush", "root", NETWORK[job.case.family], "dev", job.device)
        lab.ip("nexthop", "flush", "protocol", _RTPROT_ZEBRA)
    left = agreement.read(job).difference(agreement.NOTHING)
    assert not left, f"the kernel was not emptied: {left}"


@contextmanager
def _installed(job: Job, leases: list[Any]) -> Iterator[DataPlane]:
    """A kernel that has everything, and the floor's messages for it in a file."""
    with planes.plane(job.case, job.netns, allow_shrink=True) as dp:
        assert dp.sync(leases).ok
        yield dp


@pytest.mark.benchmark(group="peers: installing")
@pytest.mark.parametrize(("case", "entered"), _cases(("vxlan", "host-gw"), peers.INSTALLING))
def test_installing(
    benchmark: Any,
    case: Case,
    entered: tuple[Peer, ...],
    node: str,
    job: Job,
    quiet: Quiet,
    points: Points,
    figure: Callable[..., None],
) -> None:
    """From nothing to all peers; the benchmark's own times are the library's."""
    leases = case.leases
    wanted = agreement.wanted(job)
    with _installed(job, leases) as dp:
        tables = [one.table for one in planes.state(dp, case).tables]
        floors.write(job.messages, floors.batches(tables))
        _check(job, wanted, _OURS)
    race = Race(job, entered, quiet)
    open_planes: list[DataPlane] = []

    def close() -> None:
        while open_planes:
            open_planes.pop().close()

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        close()
        race.round(lambda: _clear(job), lambda name: _check(job, wanted, name))
        _clear(job)
        open_planes.append(planes.plane(case, node))
        if case.nodes >= _LEAVES_WORK:
            quiet()
        return (leases,), {}

    def sync(leases: list[Any]) -> Any:
        return open_planes[-1].sync(leases)

    report = benchmark.pedantic(sync, setup=setup, rounds=_ROUNDS[case.nodes])
    close()

    assert report.ok
    assert report.tables["route"]["added"] == case.nodes
    _check(job, wanted, _OURS)
    aims = {_LAST: _LEAST, _FULL: _LEAST_BEYOND}
    least = aims.get(case.nodes, {}) if (case.family, case.layout) == (4, "vxlan") else {}
    _note(benchmark, figure, "installing", case, race, points, least)
    if case.nodes >= _LAST:
        _growth(figure, "installing", case, points)


@pytest.mark.benchmark(group="peers: reading")
@pytest.mark.parametrize(("case", "entered"), _cases(("vxlan",), peers.READING))
def test_reading(
    benchmark: Any,
    case: Case,
    entered: tuple[Peer, ...],
    job: Job,
    quiet: Quiet,
    points: Points,
    figure: Callable[..., None],
) -> None:
    """Everything is right already: the library finds that out, the others only read it."""
    leases = case.leases
    with _installed(job, leases) as dp:
        wanted = agreement.wanted(job)
        scopes = floors.scopes_of(planes.state(dp, case).tables)
        floors.write(job.messages, floors.dumps(scopes))
        race = Race(job, entered, quiet)
        dp.sync(leases)

        def setup() -> None:
            race.round(lambda: None, lambda name: None)

        rounds = _ROUNDS[case.nodes] + 2
        report = benchmark.pedantic(lambda: dp.sync(leases), setup=setup, rounds=rounds)

        assert report.ok
        assert report.writes == 0
        _check(job, wanted, "reading")
    least = _LEAST_READING if (case.family, case.nodes) == (4, _LAST) else {}
    _note(benchmark, figure, "reading", case, race, points, least)
    if case.nodes >= _LAST:
        _growth(figure, "reading", case, points)


def _check(job: Job, wanted: agreement.State, who: str) -> None:
    wrong = agreement.read(job).difference(wanted)
    assert not wrong, f"after {who} the kernel (here) is not as the leases say (there): {wrong}"


def _note(
    benchmark: Any,
    figure: Callable[..., None],
    work: str,
    case: Case,
    race: Race,
    points: Points,
    least: dict[str, float],
) -> None:
    """Keep the times, and print how many times as long as the library each peer took."""
    ours = times(benchmark)
    benchmark.extra_info.update(
        work=work, layout=case.layout, family=case.family, nodes=case.nodes, peers=race.extra
    )
    for name, seconds in {_OURS: ours, **race.seconds}.items():
        points[work, case.layout, case.family, name] += [(case.nodes, one) for one in seconds]
    for name, seconds in race.seconds.items() if case.nodes in _PRINTED else ():
        figure(
            f"{work}: {name} {race.extra[name]['version']}, {case}",
            median(seconds) / median(ours),
            "x ours",
            least=least.get(name),
            detail=f"medians {_milliseconds(seconds)}, ours {_milliseconds(ours)}",
        )


def _growth(figure: Callable[..., None], work: str, case: Case, points: Points) -> None:
    """How the cost of each grows, and what lies beyond the sizes that were measured."""
    known = {
        name: linear.relevant(found, _GROWTH_FROM)
        for (what, layout, family, name), found in points.items()
        if (what, layout, family) == (work, case.layout, case.family)
        and len({nodes for nodes, _ in found}) >= linear.LEAST_SIZES
    }
    for name, found in known.items():
        fit = linear.power(found)
        title = f"{work}: exponent, {name}, {case.layout}, IPv{case.family}"
        figure(title, fit.exponent, "of nodes", detail=str(fit))
    if _OURS not in known or work != "installing":
        return
    for name, found in known.items():
        measured = max(nodes for nodes, _ in found)
        for nodes in (_LAST, _FULL):
            if nodes > max(measured, case.nodes - 1) and name != _OURS:
                _beyond(figure, work, case, name, nodes, found, known[_OURS])


def _beyond(
    figure: Callable[..., None],
    work: str,
    case: Case,
    name: str,
    nodes: int,
    theirs: list[linear.Point],
    ours: list[linear.Point],
) -> None:
    """A ratio at a size that was not measured, from two fitted curves; so it is called a fit.

    It has no target: for what is quadratic in the kernel it is far too low, because the
    one list that is walked outgrows the caches. The full run measures.
    """
    their, our = linear.curve(theirs).at(nodes), linear.curve(ours).at(nodes)
    figure(
        f"{work}: {name}, {Case(case.family, nodes, case.layout)}, FIT",
        their / our,
        "x ours",
        detail=f"fitted curves, not measured: {their:.3g} s, ours {our:.3g} s",
    )


def _milliseconds(seconds: list[float]) -> str:
    return f"{median(seconds) * 1e3:.1f} ms"
