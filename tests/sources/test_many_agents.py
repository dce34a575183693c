"""Fifty nodes join one etcd at once, each with a kernel of its own, and all come to agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
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

    def routes(self) -> set[str]:
        """Of both families."""
        return {r["dst"] for r in self.host.ip_json("route show table all proto 138")}


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

    every = by_family[4] | by_family[6]

    def has_all(node: Node, gone: Lease | None) -> bool:
        away = (node.lease, gone) if gone else (node.lease,)
        return node.routes() == every - {s for one in away if one for s in _subnets(one)}

    def await_all(gone: Lease | None) -> None:
        for node in nodes:
            wait_until(partial(has_all, node, gone))
        assert all(has_all(node, gone) for node in nodes)

    await_all(None)

    first = leases[0]
    etcd.delete(f"subnets/{first.key}")
    nodes = nodes[1:]
    await_all(first)


def _subnets(lease: Lease) -> tuple[str, str]:
    return lease.subnet, lease.ipv6_subnet
