"""What flannel's own tests expect of its etcd manager holds here, on a real etcd.

The facts are those of flannel's pkg/subnet/etcd/subnet_test.go and registry_test.go.
"""

from __future__ import annotations

import pytest

from flannel_dp.cluster.lease import Identity, Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError
from flannel_dp.sources.etcd.lease import EtcdLease
from flannel_dp.sources.etcd.source import EtcdSource
from tests.lib.etcd import EtcdServer
from tests.lib.follower import Follower
from tests.sources.conftest import etcd_fixture, etcds_fixture

__all__ = ["etcd_fixture", "etcds_fixture"]

RANGE = '{ "Network": "10.3.0.0/16", "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.25.0" %s}'
CONFIG = NetworkConfig.from_json(RANGE % ', "Backend": {"Type": "vxlan"}')
OTHER = NetworkConfig.from_json('{"Network": "10.4.0.0/16", "Backend": {"Type": "vxlan"}}')
#: The last one was made by hand outside of SubnetMin and SubnetMax.
TAKEN = ["10.3.1.0-24", "10.3.2.0-24", "10.3.4.0-24", "10.3.5.0-24", "10.3.31.0-24"]
ME = Identity({4: "1.2.3.4"}, {4: "02:00:00:00:00:01"}, "vxlan", 1)


@pytest.fixture(name="registry")
def registry_fixture(etcd: EtcdServer) -> EtcdServer:
    for name in TAKEN:
        etcd.put(f"subnets/{name}", '{"PublicIP":"1.1.1.1","PublicIPv6":null}')
    return etcd


def acquire(etcd: EtcdServer, config: NetworkConfig = CONFIG, previous: str = "") -> Lease:
    return EtcdLease(etcd.options()).acquire(ME, config, {4: previous} if previous else {})


def third(lease: Lease) -> int:
    return int(lease.subnet.split(".")[2])


def test_acquire_lease(registry: EtcdServer) -> None:
    lease = acquire(registry)

    assert 1 <= third(lease) <= 25
    assert lease.name not in TAKEN
    assert acquire(registry) == lease


def test_a_subnet_from_a_previous_run(registry: EtcdServer) -> None:
    assert acquire(registry, previous="10.3.6.0/24").subnet == "10.3.6.0/24"


def test_a_subnet_from_a_previous_run_of_another_network(registry: EtcdServer) -> None:
    assert acquire(registry, previous="10.4.1.0/24").subnet != "10.4.1.0/24"


def test_config_changed(registry: EtcdServer) -> None:
    before = acquire(registry)

    after = acquire(registry, OTHER)

    assert after.subnet.startswith("10.4.")
    assert sorted(registry.leases()) == sorted([*TAKEN, after.name])
    assert before.name not in registry.leases()


def test_watch_lease_added_and_removed(registry: EtcdServer) -> None:
    """TestWatchLeaseAdded and TestWatchLeaseRemoved, each event alone."""
    with Follower(EtcdSource(registry.options())) as follower:
        follower.until(lambda: len(follower.leases) == len(TAKEN))
        granted = registry.run("lease", "grant", "1").split()[1]
        value = '{"PublicIP":"1.1.1.1","PublicIPv6":null}'
        registry.put("subnets/10.3.30.0-24", value, f"--lease={granted}")
        follower.until(lambda: len(follower.changes) == 2)

    added, removed = follower.changes
    assert [lease.subnet for lease in added.added] == ["10.3.30.0/24"]
    assert (added.removed, removed.added) == ((), ())
    assert removed.removed == ("10.3.30.0-24",)


def test_the_registry_test_writes_a_config_without_backend(registry: EtcdServer) -> None:
    """flannel would take its udp backend then, which does not exist here."""
    registry.put("config", RANGE % "")

    with pytest.raises(ConfigError, match="no backend is named"):
        EtcdSource(registry.options()).network_config()
