"""A day in the life of a large cluster, replayed into one node's real pipeline.

    python -m bench.simulate --nodes 10000 --hours 24
    python -m bench.simulate --nodes 50000 --events zone-failure

The clock is made up, so that a day takes seconds; the changes go through the same code as
an agent's (what came together is gathered, then ``DataPlane.update``), into a real kernel
in a namespace of its own. Counted are the changes, the entries written, and the
processor's time, which is what a node pays for being part of such a cluster.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from bench import cluster, lab, planes
from bench.cluster import Case
from flannel_dp import DataPlane
from flannel_dp.agent.backlog import Backlog
from flannel_dp.cluster.lease import Lease
from flannel_dp.sources import Change, Delivery

HOUR = 3600.0

#: What arrives within so many seconds is taken together: the way through a store's watch.
TOGETHER = 0.05


@dataclass(frozen=True, order=True)
class Event:
    """At ``at`` seconds, node ``number`` has a lease of ``generation``, or none (-1)."""

    at: float
    number: int
    generation: int


Scenario = Callable[[int, float, random.Random], Iterator[Event]]


def renewals(nodes: int, hours: float, chance: random.Random) -> Iterator[Event]:
    """Every lease is renewed every 23 hours, at a time of its own, and says what it said."""
    period = 23 * HOUR
    for number in range(1, nodes + 1):
        at = chance.random() * period
        while at < hours * HOUR:
            yield Event(at, number, 0)
            at += period


def joins(nodes: int, hours: float, chance: random.Random) -> Iterator[Event]:
    """A tenth of the cluster leaves and comes back as new machines, evenly over the time."""
    for number in chance.sample(range(1, nodes + 1), nodes // 10):
        at = chance.random() * hours * HOUR
        yield Event(at, number, -1)
        yield Event(at + 90.0, number, 1)


def rolling_restart(nodes: int, hours: float, chance: random.Random) -> Iterator[Event]:
    """Every node is replaced by one with another address and MAC, a hundred at a time."""
    groups = max(1, nodes // 100)
    for group in range(groups):
        start = group * hours * HOUR / groups
        for number in range(1 + group, nodes + 1, groups):
            at = start + chance.random() * 30.0
            yield Event(at, number, -1)
            yield Event(at + 60.0, number, 1)


def zone_failure(nodes: int, hours: float, chance: random.Random) -> Iterator[Event]:
    """A third of the nodes goes within a minute, and comes back within ten, as it was."""
    zone = [number for number in range(1, nodes + 1) if number % 3 == 0]
    for number in zone:
        yield Event(HOUR + chance.random() * 60.0, number, -1)
        yield Event(1.5 * HOUR + chance.random() * 600.0, number, 0)


SCENARIOS: dict[str, Scenario] = {
    "renewals": renewals,
    "joins": joins,
    "rolling-restart": rolling_restart,
    "zone-failure": zone_failure,
}


@dataclass(frozen=True)
class Outcome:
    """What one scenario cost one node. ``worst`` is the longest update, in seconds."""

    scenario: str
    family: int
    nodes: int
    hours: float
    changes: int
    updates: int
    writes: int
    cpu: float
    worst: float

    @property
    def share(self) -> float:
        """Of one processor, over the time that was replayed."""
        return self.cpu / (self.hours * HOUR)


def replay(case: Case, scenario: str, hours: float, seed: int = 1) -> Outcome:
    """Run one scenario on a node of that case; checked to end as a sync with the survivors."""
    events = list(SCENARIOS[scenario](case.nodes, hours, random.Random(seed)))
    heapq.heapify(events)
    with (
        lab.namespace(case.family) as node,
        lab.inside(node),
        planes.plane(case, node, allow_shrink=True) as dp,
    ):
        known = dict.fromkeys(range(case.nodes + 1), 0)
        dp.sync(_leases(case, known))
        began, changes, updates, writes, worst = time.process_time(), 0, 0, 0, 0.0
        backlog = Backlog()
        while events:
            together = list(_together(events))
            changes += len(together)
            _deliver(backlog, case, known, together)
            if not backlog.changed:
                continue
            took = time.perf_counter()
            taken = backlog.changes()
            report = dp.update(taken.added, taken.removed)
            worst = max(worst, time.perf_counter() - took)
            assert report.ok, report.to_json()
            updates, writes = updates + 1, writes + report.writes
        cpu = time.process_time() - began
        _check(dp, case, known)
    return Outcome(scenario, case.family, case.nodes, hours, changes, updates, writes, cpu, worst)


def _leases(case: Case, known: dict[int, int]) -> list[Lease]:
    return [cluster.lease(case.family, n, g) for n, g in known.items() if g >= 0]


def _together(events: list[Event]) -> Iterator[Event]:
    """The next event and those that come with it."""
    until = events[0].at + TOGETHER
    while events and events[0].at <= until:
        yield heapq.heappop(events)


def _deliver(backlog: Backlog, case: Case, known: dict[int, int], events: list[Event]) -> None:
    """As a source does: a renewal that changes nothing is no news."""
    for event in events:
        if known[event.number] == event.generation:
            continue
        was = known[event.number]
        known[event.number] = event.generation
        if event.generation < 0:
            gone = cluster.lease(case.family, event.number, was)
            change = Change(removed=(gone.label,))
        else:
            change = Change(added=(cluster.lease(case.family, event.number, event.generation),))
        backlog.add(Delivery(changes=[change]))


def _check(dp: DataPlane, case: Case, known: dict[int, int]) -> None:
    report = dp.sync(_leases(case, known))
    assert report.writes == 0, report.tables


def main(arguments: list[str]) -> int:
    """Replay what is asked for and print a table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate",
        description="Replay a large cluster's changes into one node's real pipeline.",
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--family", type=int, choices=(4, 6), default=4)
    parser.add_argument("--events", choices=sorted(SCENARIOS), nargs="+", default=[*SCENARIOS])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    given = parser.parse_args(arguments)
    if not given.json:
        print(
            f"{'scenario':16} {'nodes':>7} {'changes':>8} {'updates':>8} {'writes':>8} "
            f"{'cpu s':>8} {'of a core':>10} {'longest ms':>10}"
        )
    for nodes in given.nodes:
        for scenario in given.events:
            found = replay(Case(given.family, nodes), scenario, given.hours, given.seed)
            if given.json:
                print(json.dumps(asdict(found)))
                continue
            print(
                f"{scenario:16} {nodes:7,} {found.changes:8,} {found.updates:8,} "
                f"{found.writes:8,} {found.cpu:8.2f} {found.share:10.5%} {found.worst * 1e3:10.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
