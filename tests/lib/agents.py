"""Agents under test: a source that a test feeds, and an agent on a thread."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from flannel_dp.agent.agent import Agent
from flannel_dp.cluster.lease import BadClaim, Lease, LeaseList
from flannel_dp.dataplane import DataPlane
from flannel_dp.errors import SourceError
from flannel_dp.reconcile.drift import Repair
from flannel_dp.sources import Call, Change, Inbox, Snapshot
from tests.lib.kernel import expected, observed
from tests.lib.leases import lease_of, peers, plane
from tests.lib.waiting import LIMIT, wait_until


class Script:
    """A source that delivers the snapshots and changes that a test posts; a refresh delivers the
    current leases."""

    origin = "the test"

    def __init__(self, leases: Iterable[Lease] = ()) -> None:
        self.leases = {lease.label: lease for lease in leases}
        self.bad: dict[str, BadClaim] = {}
        self.refreshes = 0
        #: Of the snapshots that are delivered from now on.
        self.consistent, self.afresh = False, ""
        self._inbox: Inbox | None = None
        self._posted: list[Snapshot | Change | SourceError | None] = []
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def snapshot(self) -> Snapshot:
        claims = LeaseList([*self.leases.values()], [*self.bad.values()])
        afresh, self.afresh = self.afresh, ""
        return Snapshot(claims, self.origin, 0.0, consistent=self.consistent, afresh=afresh)

    def follow(self, inbox: Inbox) -> None:
        inbox.put(self.snapshot())
        while True:
            call = inbox.wait(fds=[self._bell])
            if call is Call.STOP:
                return
            if call is Call.REFRESH:
                self.refreshes += 1
                inbox.put(self.snapshot())
                continue
            os.eventfd_read(self._bell)
            while self._posted:
                news = self._posted.pop(0)
                if isinstance(news, SourceError):
                    inbox.trouble(news)
                elif news is None:
                    inbox.healthy()
                else:
                    inbox.put(news)

    def post(self, news: Snapshot | Change | SourceError | None) -> None:
        self._posted.append(news)
        os.eventfd_write(self._bell, 1)

    def replace(self, leases: Iterable[Lease]) -> None:
        """All leases are these now, as a snapshot."""
        self.leases = {lease.label: lease for lease in leases}
        self.post(self.snapshot())

    def change(
        self,
        added: Iterable[Lease] = (),
        removed: Iterable[str] = (),
        bad: Iterable[BadClaim] = (),
    ) -> None:
        """Some leases came or changed, and some, by name, went, or can be read no longer."""
        added, removed, bad = tuple(added), tuple(removed), tuple(bad)
        for name in (*removed, *(claim.name for claim in bad), *(one.label for one in added)):
            self.leases.pop(name, None)
            self.bad.pop(name, None)
        self.leases |= {lease.label: lease for lease in added}
        self.bad |= {claim.name: claim for claim in bad}
        self.post(Change(added, removed, bad))


class Watched:
    """An agent of a data plane on a thread; ``repairs`` are those it made."""

    def __init__(self, plane: DataPlane, script: Script, **options: Any) -> None:
        self.plane, self.script = plane, script
        self.repairs: list[Repair] = []
        options = {"audit": 3600.0, "on_drift": self.repairs.append} | options
        self.agent = Agent(plane, script, **options)

    def __enter__(self) -> Watched:
        self.agent.start()
        if not self.agent.wait_ready(LIMIT):
            self.agent.stop()
            self.agent.join(LIMIT)
            raise AssertionError(f"not ready: {self.agent.status}")
        return self

    def __exit__(self, *exc: object) -> None:
        self.agent.stop()
        self.agent.join(LIMIT)
        self.plane.close()

    @property
    def status(self) -> Any:
        return self.agent.status


NUMBERS = range(1, 31)


class AgentNode(Watched):
    """An agent on a host, its peers being those of its script."""

    def __init__(self, host: Any, *families: int, leases: Any = None, **options: Any) -> None:
        self.host = host
        given = [lease_of(host), *peers(NUMBERS)] if leases is None else leases
        planes = {key: options.pop(key) for key in ("nexthops", "allow_shrink") if key in options}
        options = {"random": random.Random(7)} | options
        super().__init__(plane(host, *families, **planes), Script(given), **options)

    def agrees(self) -> bool:
        own = lease_of(self.host).key
        others = [lease for lease in self.script.leases.values() if lease.key != own]
        return all(
            observed(self.host, family) == expected(others, family)
            for family in self.plane.families
        )

    def settled(self) -> bool:
        """In sync, and no work is under way."""
        return self.agrees() and not self.status.problems


@pytest.fixture(name="node")
def node_fixture(host: Any) -> Iterator[AgentNode]:
    """An agent of both families, ready and at rest."""
    with AgentNode(host) as made:
        rest(made)
        yield made


def rest(node: AgentNode) -> None:
    """Wait until the agent has read all events that its own writes have caused."""
    watch = node.agent._watch
    assert watch is not None

    def quiet() -> bool:
        if watch.read():
            node.agent._wake()  # the events that would have are taken
            return False
        return True

    wait_until(quiet)
