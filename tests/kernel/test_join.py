"""What a node checks of its own lease before it publishes it, with a real etcd and real devices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import DataPlane, NetworkConfig, NotYet
from flannel_dp.sources.etcd.lease import EtcdLease
from tests.lib.etcd import EtcdServer, free_ports


@pytest.fixture(scope="module", name="etcd")
def etcd_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path_factory.mktemp("etcd"), *free_ports(2))
    try:
        yield server.start().await_ready()
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def _empty(etcd: EtcdServer) -> None:
    for key in etcd.leases():
        etcd.delete(f"subnets/{key}")


def network(family: int, v4: str, v6: str, **more: Any) -> NetworkConfig:
    prefix = "" if family == 4 else "IPv6"
    document = {
        "EnableIPv4": family == 4,
        "EnableIPv6": family == 6,
        f"{prefix}Network": v4 if family == 4 else v6,
        "Backend": {"Type": "vxlan"},
        **{f"{prefix}{key}": value for key, value in more.items()},
    }
    return NetworkConfig.from_json(json.dumps(document))


def join(host: Any, etcd: EtcdServer, config: NetworkConfig, **previous: str) -> dict[int, str]:
    """What ``sync --watch`` does before it reads the leases."""
    with DataPlane(config, iface="eth0", netns=host.ns) as plane:
        resolver = plane.resolver
        lease = EtcdLease(etcd.options())
        taken = lease.acquire(
            plane.identity(),
            config,
            {int(key[2:]): subnet for key, subnet in previous.items()},
            lambda subnets, fresh: resolver.collisions(subnets, fresh=fresh),
        )
    found = {4: taken.subnet, 6: taken.ipv6_subnet}
    return {family: subnet for family, subnet in found.items() if subnet}


def add_device(host: Any, name: str, *addresses: str) -> None:
    host.ip(f"link add {name} type veth peer name {name}p")
    host.ip(f"link set {name} up")
    for address in addresses:
        host.ip(f"address add {address} dev {name}")


def test_fr15_a_node_inside_the_pods_range_publishes_nothing(
    host: Any, family: int, etcd: EtcdServer
) -> None:
    config = network(family, "192.0.0.0/16", "2001:db8::/32")

    with pytest.raises(NotYet, match="cannot be published with") as caught:
        join(host, etcd, config)

    assert host.underlay(family) in caught.value.message
    assert "SubnetMin and SubnetMax" in caught.value.hint
    assert etcd.leases() == {}


def test_fr15_a_node_outside_of_the_pods_range_publishes(
    host: Any, family: int, etcd: EtcdServer
) -> None:
    more = {4: {"SubnetMin": "192.0.16.0", "SubnetMax": "192.0.99.0"}}.get(
        family, {"SubnetMin": "2001:db8:10::", "SubnetMax": "2001:db8:99::"}
    )

    subnet = join(host, etcd, network(family, "192.0.0.0/16", "2001:db8::/32", **more))[family]

    [key] = etcd.leases()
    assert key.lstrip("&") == subnet.replace("/", "-")


@pytest.mark.parametrize("attempt", range(3))
def test_a_fresh_subnet_is_beside_what_is_connected(
    host: Any, family: int, etcd: EtcdServer, attempt: int
) -> None:
    """Of the three subnets the network of eth1 takes one."""
    config = network(family, "10.9.0.0/22", "fd00:9::/62", SubnetLen=24 if family == 4 else 64)
    first, left = {4: ("10.9.2.9/24", "10.9.1.0/24"), 6: ("fd00:9:0:2::9/64", "fd00:9:0:1::/64")}[
        family
    ]
    add_device(host, "eth1", first)
    route = {4: "10.9.3.0/25", 6: "fd00:9:0:3::/65"}[family]
    host.ip(f"-{family} route add {route} dev eth1")

    found = join(host, etcd, config)[family]

    # A route inside of a subnet goes first in the kernel, and is nobody's network.
    beside = {4: {left, "10.9.3.0/24"}, 6: {left, "fd00:9:0:3::/64"}}[family]
    assert found in beside


def test_a_former_subnet_that_eth1_has_by_now_is_not_published_again(
    host: Any, family: int, etcd: EtcdServer
) -> None:
    config = network(family, "10.9.0.0/16", "fd00:9::/48")
    before = join(host, etcd, config)
    text = etcd.leases()
    base = before[family].partition("/")[0]
    wide = {4: f"{base.rpartition('.')[0]}.9/16", 6: f"{base}9/48"}[family]
    add_device(host, "eth1", wide)

    for known in ({}, {f"v_{family}": before[family]}):
        with pytest.raises(NotYet, match="overlaps the network of eth1") as caught:
            join(host, etcd, config, **known)
        assert before[family] in caught.value.message
        assert "dev eth1" in caught.value.hint
    assert etcd.leases() == text


def test_this_nodes_own_pods_are_no_obstacle(host: Any, family: int, etcd: EtcdServer) -> None:
    config = network(family, "10.9.0.0/16", "fd00:9::/48")
    before = join(host, etcd, config)
    base, length = before[family].split("/")
    address = f"{base.rpartition('.')[0]}.1" if family == 4 else f"{base}1"
    host.ip("link add cni0 type bridge")
    host.ip(f"address add {address}/{length} dev cni0")

    assert join(host, etcd, config) == before
    assert join(host, etcd, config, **{f"v_{family}": before[family]}) == before
