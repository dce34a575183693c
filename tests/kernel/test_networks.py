"""Several networks on one node, each with an instance of its own: nothing of one is the other's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp import DataPlane, NetworkConfig
from flannel_dp.cluster.lease import BackendData, Lease
from flannel_dp.errors import Busy
from flannel_dp.resources.firewall.options import RulesOptions
from flannel_dp.resources.peers.kept import overlap
from tests.lib.kernel import observed
from tests.lib.leases import NETWORK, lease_of, near_peer, network_config

SECOND = {4: "10.11.0.0/16", 6: "fd00:11::/48"}

#: The backends of two networks on one node; that of the first one is vxlan with VNI 1.
BACKENDS: dict[str, dict[str, Any]] = {
    "host-gw": {"Type": "host-gw"},
    "another VNI": {"Type": "vxlan", "VNI": 9_999},
    "another port": {"Type": "vxlan", "VNI": 2, "Port": 8473},
    "direct": {"Type": "vxlan", "VNI": 2, "DirectRouting": True},
}


def second_config(backend: dict[str, Any]) -> NetworkConfig:
    document = {
        "Network": SECOND[4],
        "EnableIPv6": True,
        "IPv6Network": SECOND[6],
        "Backend": backend,
    }
    return NetworkConfig.from_json(json.dumps(document))


def second_leases(host: Any, backend: dict[str, Any]) -> list[Lease]:
    """This node's lease in the second network, and those of three others."""

    def lease(number: int, v4: str, v6: str) -> Lease:
        data = [
            BackendData(backend.get("VNI", 1), f"02:00:00:{family:02x}:99:{number:02x}")
            if backend["Type"] == "vxlan"
            else None
            for family in (4, 6)
        ]
        return Lease(
            subnet=f"10.11.{number}.0/24",
            ipv6_subnet=f"fd00:11:0:{number:x}::/64",
            public_ip=v4,
            public_ipv6=v6,
            backend_type=backend["Type"],
            backend_data=data[0],
            backend_v6_data=data[1],
        )

    others = [lease(n, f"192.0.2.{200 + n}", f"2001:db8::{200 + n:x}") for n in (1, 2, 3)]
    return [lease(9, host.ipv4, host.ipv6), *others]


class Networks:
    """Two data planes on one host, each of its own network, with their leases."""

    def __init__(self, host: Any, backend: dict[str, Any], engine: str) -> None:
        self.host, self.backend = host, backend
        self.rules = RulesOptions(ip_masq=True, engine=engine, required=True)
        self.planes = [self.plane(network_config()), self.plane(second_config(backend))]
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
    for which, config in enumerate((network_config(), second_config(both.backend))):
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
