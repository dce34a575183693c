"""Fixtures of the tests that look at packets: nodes of one cluster, with pods."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lib.forwarding import Node, Nodes, remove_pins
from tests.lib.hosts import Lab


@pytest.fixture
def nodes(lab: Lab) -> Iterator[Nodes]:
    """``nodes(n)``: n nodes of one cluster, with a pod behind each."""
    made: list[Node] = []

    def make(count: int) -> list[Node]:
        made.extend(Node(lab, number) for number in range(1, count + 1))
        return made

    yield make
    for node in made:
        remove_pins(node.host)
