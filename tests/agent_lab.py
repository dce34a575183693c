"""An agent on a host."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.agents import Script, Watched
from tests.limits import wait_until
from tests.support import (
    expected,
    lease_of,
    observed,
    peers,
    plane,
)

NUMBERS = range(1, 31)


class Node(Watched):
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
        """In line, and nothing of it still under way."""
        return self.agrees() and not self.status.problems


@pytest.fixture(name="node")
def node_fixture(host: Any) -> Iterator[Node]:
    """An agent of both families, ready and at rest."""
    with Node(host) as made:
        rest(made)
        yield made


def rest(node: Node) -> None:
    """Wait until the agent has taken in what its own making of devices has stirred up."""
    watch = node.agent._watch
    assert watch is not None

    def quiet() -> bool:
        if watch.read():
            node.agent._wake()  # the events that would have are taken
            return False
        return True

    wait_until(quiet)
