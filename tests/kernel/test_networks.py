"""Several networks on one node, each with an instance of its own: nothing of one is the other's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp import DataPlane, NetworkConfig
from flannel_dp.errors import Busy
from flannel_dp.resources.firewall.options import RulesOptions
from flannel_dp.resources.peers.kept import overlap
from tests.lib.kernel import observed
from tests.lib.leases import NETWORK, lease_of, near_peer, network_config
from tests.lib.networks import BACKENDS, SECOND, second_document, second_leases


class Networks:
    """Two data planes on one host, each of its own network, with their leases."""

    def __init__(self, host: Any, backend: dict[str, Any], engine: str) -> None:
        self.host, self.backend = host, backend
        self.rules = RulesOptions(ip_masq=True, engine=engine, required=True)
        self.planes = [
            self.plane(network_config()),
            self.plane(NetworkConfig.from_json(second_document(backend))),
        ]
        self.leases = [
            [lease_of(host), *(near_peer(number) for number in (1, 2, 3))],
            second_leases(host, backend),
        ]

    def plane(self, config: NetworkConfig) -> DataPlane:
        host = self.host
        return DataPlane(config, iface=host.iface, netns=host.ns, rules=self.rules)

    def sync(self, which: int) -> int:
        report = self.planes[which].sync(self.leases[which])
        assert report.ok, report.to_json()
        assert not [one for one in report.warnings if "earlier layout" in one]
        return report.writes

    def in_sync(self, which: int) -> bool:
        plan = self.planes[which].plan(self.leases[which])
        assert plan.is_empty, str(plan)
        assert plan.ok
        return True


@pytest.fixture(name="networks")
def networks_fixture(host: Any) -> Iterator[Callable[..., Networks]]:
    made: list[Networks] = []

    def make(backend: str, engine: str = "nft") -> Networks:
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            host.sysctl(name, 1)
        made.append(Networks(host, BACKENDS[backend], engine))
        return made[-1]

    yield make
    for each in made:
        for plane in each.planes:
            plane.close()


def routes(host: Any, family: int, network: str) -> set[str]:
    """Destinations of our routes into a network."""
    found = {one["dst"] for one in host.ip_json(f"-{family} route show proto 138")}
    return {one for one in found if overlap(one, network)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_networks_do_not_touch_each_other(
    networks: Callable[..., Networks], backend: str
) -> None:
    both = networks(backend)
    host = both.host
    for which in (0, 1):
        both.sync(which)
    for which in (0, 1):
        assert both.in_sync(which)
        assert both.sync(which) == 0
    first = {family: observed(host, family) for family in (4, 6)}
    for family in (4, 6):
        assert len(routes(host, family, SECOND[family])) == 3
        table = f"list table {'ip' if family == 4 else 'ip6'} flannel-dp"
        assert NETWORK[family] in host.exec("nft", *table.split())
        assert SECOND[family] not in host.exec("nft", *table.split())
        assert SECOND[family] in host.exec("nft", "list", "ruleset")

    assert both.planes[1].clean().ok
    assert both.in_sync(0)
    assert {family: observed(host, family) for family in (4, 6)} == first
    assert all(not routes(host, family, SECOND[family]) for family in (4, 6))
    assert SECOND[4] not in host.exec("nft", "list", "ruleset")

    both.sync(1)
    assert both.planes[0].clean().ok
    assert both.in_sync(1)
    assert NETWORK[4] not in host.exec("nft", "list", "ruleset")


def test_chains_of_iptables_stand_side_by_side(networks: Callable[..., Networks]) -> None:
    """Each jump is before all rules of other programs, and none is before the other."""
    both = networks("another VNI", "iptables-nft")
    host = both.host
    host.exec("iptables-nft", "-A", "FORWARD", "-j", "REJECT")
    for which in (0, 1, 0, 1):
        both.sync(which)
    for which in (0, 1):
        assert both.in_sync(which)
    listed = host.exec("iptables-nft", "-S", "FORWARD").splitlines()
    jumps = [line.split()[-1] for line in listed if line.startswith("-A")]
    assert sorted(jumps[:2]) == ["FLANNEL-DP-FWD", "FLANNEL-DP-FWD-9999"]
    assert jumps[2] == "REJECT" or "REJECT" in listed[-1]

    host.exec("iptables-nft", "-I", "FORWARD", "-s", "203.0.113.1", "-j", "DROP")
    assert both.sync(0) + both.sync(1) >= 0
    assert both.in_sync(0)
    assert both.in_sync(1)
    assert both.planes[0].clean().ok
    assert both.in_sync(1)
    assert "-A FORWARD -j FLANNEL-DP-FWD\n" not in host.exec("iptables-nft", "-S", "FORWARD")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_network_has_one_instance(networks: Callable[..., Networks], backend: str) -> None:
    both = networks(backend)
    for which in (0, 1):
        both.sync(which)
    for which, config in enumerate(
        (network_config(), NetworkConfig.from_json(second_document(both.backend)))
    ):
        with both.plane(config) as another, pytest.raises(Busy, match="held by process"):
            another.sync(both.leases[which])


def test_host_gw_waits_for_the_tunnel_of_the_same_network(
    networks: Callable[..., Networks], host: Any
) -> None:
    """As while the mode of a network is changed."""
    both = networks("host-gw")
    both.sync(0)
    with both.plane(network_config(Type="host-gw")) as other, pytest.raises(Busy, match="flannel"):
        other.sync(both.leases[0])
