"""Fixtures of the tests with a kernel: agents, clusters, and nodes with pods."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lib.agent_log import log_fixture
from tests.lib.agents import node_fixture
from tests.lib.forwarding import Nodes, PodNode, remove_pins
from tests.lib.hosts import Lab
from tests.lib.kernel_events import followed_fixture
from tests.lib.kube import certificates_fixture, server_certificate_fixture
from tests.lib.kube_cluster import cluster_fixture
from tests.lib.rival import rival_fixture
from tests.lib.service import service_fixture
from tests.lib.uplinks import routed_fixture, two_fixture

__all__ = [  # fixtures for the tests of this folder
    "certificates_fixture",
    "cluster_fixture",
    "followed_fixture",
    "log_fixture",
    "node_fixture",
    "rival_fixture",
    "routed_fixture",
    "server_certificate_fixture",
    "service_fixture",
    "two_fixture",
]


@pytest.fixture
def nodes(lab: Lab) -> Iterator[Nodes]:
    """``nodes(n)``: n nodes of one cluster, with a pod behind each."""
    made: list[PodNode] = []

    def make(count: int) -> list[PodNode]:
        made.extend(PodNode(lab, number) for number in range(1, count + 1))
        return made

    yield make
    for node in made:
        remove_pins(node.host)
