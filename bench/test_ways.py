"""Deciding for each peer whether it is reached directly, from the underlay's routes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from statistics import median
from typing import Any

import pytest

from bench.cluster import FAR, ROUTER, Case
from bench.figures import times
from flannel_dp._core import Table
from flannel_dp.cluster import admission
from flannel_dp.resources.peers.place import DIRECT
from flannel_dp.tables.entries import Route

_TARGET_NS = 1000.0
_PEERS = 10_000
_UPLINK = 2
_ON_LINK = {4: "172.16.0.0/12", 6: "2001:db8::/64"}
_ELSEWHERE = {4: ("192.168.0.0/16", 17), 6: ("2001:db8:ffff::/48", 49)}


def _underlay(family: int, routes: int) -> Table:
    """The uplink's network, the router's part of it, and routes of every length elsewhere."""
    table = Table("route")
    table.add(Route(_ON_LINK[family], device=_UPLINK, protocol=2))
    table.add(Route(FAR[family], gateway=ROUTER[family], device=_UPLINK, protocol=4))
    for prefix in _elsewhere(family):
        if len(table) == routes:
            return table
        table.add(Route(prefix, gateway=ROUTER[family], device=_UPLINK, protocol=186))
    raise AssertionError("the generator does not end")


def _elsewhere(family: int) -> Iterator[str]:
    rng = random.Random(family)
    text, shortest = _ELSEWHERE[family]
    space = ip_network(text)
    seen: set[str] = set()
    while True:
        length = rng.randint(shortest, space.max_prefixlen)
        address = space.network_address + rng.randrange(space.num_addresses)
        prefix = str(ip_network(f"{address}/{length}", strict=False))
        if prefix not in seen:
            seen.add(prefix)
            yield prefix


@pytest.mark.benchmark(group="deciding the way")
@pytest.mark.smoke
@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("routes", [50, 10_000])
def test_deciding_the_way(
    benchmark: Any, family: int, routes: int, figure: Callable[..., None]
) -> None:
    """``Claims.ways`` for 10,000 peers, half of them behind a router."""
    leases = Case(family, _PEERS, "direct").leases
    claims = admission.pack(leases, family, backend="vxlan", vni=1)
    underlay = _underlay(family, routes)

    ways = benchmark.pedantic(claims.ways, args=(underlay, _UPLINK), rounds=31, warmup_rounds=2)

    assert (len(ways), ways.count(DIRECT)) == (_PEERS + 1, _PEERS // 2 + 1)  # node 0 is near
    per_peer = median(times(benchmark)) / len(ways) * 1e9
    name = f"deciding the way, IPv{family}, {routes:,} routes"
    figure(name, per_peer, "ns/peer", _TARGET_NS)
