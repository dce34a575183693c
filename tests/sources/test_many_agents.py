"""Fifty nodes join one etcd at once, each with a kernel of its own, and all come to agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from flannel_dp.agent.agent import Agent
from flannel_dp.cluster.lease import Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.dataplane import DataPlane
from flannel_dp.sources.etcd.lease import EtcdLease
from flannel_dp.sources.etcd.source import EtcdSource
from tests.lib.etcd import EtcdServer
from tests.lib.waiting import LIMIT

NODES = 50
CONFIG = (
    '{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:5::/48", '
    '"Backend": {"Type": "vxlan"}}'
)


class Node:
    """One host's data plane, lease and agent."""

    def __init__(self, host: Any, etcd: EtcdServer) -> None:
        self.host = host
        self.config = NetworkConfig.from_json(CONFIG)
        self.membership = EtcdLease(etcd.options(), timeout=LIMIT)
        self.lease: Lease | None = None
        self._etcd = etcd

    def join(self) -> Agent:
        """Take a subnet and begin to follow the others."""
        options = {"iface": self.host.iface, "netns": self.host.ns}
        with DataPlane(self.config, **options) as plane:
            self.lease = self.membership.acquire(plane.identity(), self.config, {})
        subnets = f"{self.lease.subnet},{self.lease.ipv6_subnet}"
        self.plane = DataPlane(self.config, subnet=subnets, **options)
        return Agent(self.plane, EtcdSource(self._etcd.options()), audit=3600.0)

    def routes(self, family: int) -> set[str]:
        return {r["dst"] for r in self.host.ip_json(f"-{family} route show proto 138")}


@pytest.fixture
def nodes(lab: Any, etcd: EtcdServer) -> Iterator[list[Node]]:
    """Fifty hosts on one network, whose agents follow one etcd."""
    etcd.put("config", CONFIG)
    made = [Node(lab.host(), etcd) for _ in range(NODES)]
    with ExitStack() as stack:
        with ThreadPoolExecutor(16) as pool:
            agents = list(pool.map(Node.join, made))
        for node, agent in zip(made, agents, strict=True):
            stack.callback(node.plane.close)
            stack.enter_context(agent)
        yield made


def test_fifty_agents_agree(
    nodes: list[Node], etcd: EtcdServer, wait_until: Callable[..., None]
) -> None:
    leases = [node.lease for node in nodes if node.lease]
    by_family = {4: {one.subnet for one in leases}, 6: {one.ipv6_subnet for one in leases}}
    assert {family: len(subnets) for family, subnets in by_family.items()} == {4: 50, 6: 50}

    def converged(gone: Lease | None) -> bool:
        own = {id(node): node.lease for node in nodes}
        for node in nodes:
            for family, subnets in by_family.items():
                mine = own[id(node)]
                assert mine is not None
                away = (mine, gone) if gone else (mine,)
                left = {one.subnet if family == 4 else one.ipv6_subnet for one in away}
                if node.routes(family) != subnets - left:
                    return False
        return True

    wait_until(lambda: converged(None))

    first = leases[0]
    etcd.delete(f"subnets/{first.key}")
    nodes = nodes[1:]
    wait_until(lambda: converged(first))
