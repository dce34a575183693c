"""An agent whose store came back empty or at an earlier state: known peers stay."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.agent.agent import Agent
from flannel_dp.agent.holding import Holding
from flannel_dp.cluster.lease import Lease, lease_attrs_json
from flannel_dp.sources.etcd.source import EtcdSource
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import ApiServer, Certificates
from tests.lib.etcd import QUICK, EtcdServer, free_ports
from tests.lib.kernel import expected, observed
from tests.lib.kube import kubeconfig
from tests.lib.kube_cluster import kube_node
from tests.lib.leases import lease_of, peer, peers, plane
from tests.lib.waiting import wait_until

WAIT = 60.0
FOREVER = 3600.0
NUMBERS = range(1, 5)


def holds(host: Any, *numbers: int) -> bool:
    return all(observed(host, f) == expected(peers(numbers), f) for f in (4, 6))


@contextmanager
def following(host: Any, source: Any, **seconds: float) -> Iterator[Agent]:
    """An agent of both families that follows ``source``, ready."""
    holding = Holding(time.monotonic, **({"confirm": FOREVER, "grace": FOREVER} | seconds))
    with plane(host) as dp, Agent(dp, source, audit=FOREVER, holding=holding) as agent:
        assert agent.wait_ready(WAIT)
        yield agent


def shrink(agent: Agent) -> str:
    return str(agent.status.problems.get("shrink", ""))


# ---- etcd


@pytest.fixture(name="etcd")
def etcd_fixture(tmp_path: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path, *free_ports(2))
    try:
        yield server.start().await_ready()
    finally:
        server.kill()


def publish(etcd: EtcdServer, *leases: Lease) -> None:
    for lease in leases:
        etcd.put(f"subnets/{lease.key}", lease_attrs_json(lease).decode())


def wipe(etcd: EtcdServer) -> None:
    """Start again with a new data directory."""
    etcd.kill()
    shutil.rmtree(etcd.directory / etcd.name)
    etcd.start().await_ready()


def source_of(etcd: EtcdServer, note: str = "") -> EtcdSource:
    return EtcdSource(etcd.options(), keepalive=QUICK, note=note)


def test_etcd_that_came_back_empty_removes_no_peer(host: Any, etcd: EtcdServer) -> None:
    publish(etcd, lease_of(host), *peers(NUMBERS))
    with following(host, source_of(etcd)) as agent:
        assert holds(host, *NUMBERS)

        wipe(etcd)
        publish(etcd, lease_of(host), peer(60))
        wait_until(lambda: holds(host, *NUMBERS, 60), WAIT)
        wait_until(lambda: "its revision is" in shrink(agent), WAIT)
        assert "no peer is removed before" in shrink(agent)

        publish(etcd, *peers(NUMBERS))
        wait_until(lambda: not agent.status.problems, WAIT)
        assert holds(host, *NUMBERS, 60)
        etcd.delete(f"subnets/{peer(60).key}")
        wait_until(lambda: holds(host, *NUMBERS), WAIT)


def test_a_new_process_knows_that_etcd_came_back_empty(
    host: Any, etcd: EtcdServer, tmp_path: Path
) -> None:
    """And so does the one after it: nodes publish their leases again one by one."""
    note = str(tmp_path / "note")
    publish(etcd, lease_of(host), *peers(NUMBERS))
    with following(host, source_of(etcd, note)):
        assert holds(host, *NUMBERS)
    wipe(etcd)
    publish(etcd, lease_of(host), peer(60))

    for _ in range(2):
        with following(host, source_of(etcd, note), confirm=0.0) as agent:
            assert "its revision is" in shrink(agent)
            syncs = agent.status.syncs
            agent.refresh()
            wait_until(lambda seen=syncs: agent.status.syncs > seen, WAIT)
            assert holds(host, *NUMBERS, 60)


def test_etcd_that_was_restored_to_an_earlier_state_removes_no_peer(
    host: Any, etcd: EtcdServer, tmp_path: Path
) -> None:
    """One peer of five is missing, which is not nearly all."""
    publish(etcd, lease_of(host), *peers(NUMBERS))
    backup = tmp_path / "backup"
    etcd.run("snapshot", "save", str(backup))
    publish(etcd, peer(60), *peers(NUMBERS))
    with following(host, source_of(etcd)) as agent:
        assert holds(host, *NUMBERS, 60)

        etcd.kill()
        shutil.rmtree(etcd.directory / etcd.name)
        etcd.run(
            *("snapshot", "restore", str(backup), f"--name={etcd.name}"),
            f"--data-dir={etcd.directory / etcd.name}",
            f"--initial-cluster={etcd.peer}",
            f"--initial-advertise-peer-urls={etcd.peer.partition('=')[2]}",
        )
        etcd.start().await_ready()

        wait_until(lambda: "its revision is" in shrink(agent), WAIT)
        assert "1 of 5 IPv4" in shrink(agent)
        assert holds(host, *NUMBERS, 60)


def test_another_cluster_removes_peers_after_the_grace_period(
    host: Any, etcd: EtcdServer, tmp_path: Path
) -> None:
    publish(etcd, lease_of(host), *peers(NUMBERS))
    (tmp_path / "other").mkdir()
    # The cluster's ID follows from the members' names and peer URLs.
    other = EtcdServer(tmp_path / "other", etcd.client_port, *free_ports(1))
    try:
        with following(host, source_of(etcd), grace=0.5, confirm=0.1) as agent:
            etcd.kill()
            other.start().await_ready()
            for _ in range(30):  # past the revision of the first one
                publish(other, lease_of(host), peer(60))
            wait_until(lambda: holds(host, 60), WAIT)
            wait_until(lambda: not agent.status.problems, WAIT)
    finally:
        other.kill()


# ---- Kubernetes


@pytest.fixture(name="certificates", scope="module")
def certificates_fixture(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("store-pki"))


@pytest.fixture(name="api")
def api_fixture(certificates: Certificates) -> Iterator[ApiServer]:
    server = ApiServer(certificates.issue("server", "127.0.0.1"))
    yield server
    server.close()


@pytest.fixture(name="nodes")
def nodes_fixture(
    api: ApiServer, certificates: Certificates, tmp_path: Path
) -> Callable[..., KubeSource]:
    def make(note: str = "", **how: Any) -> KubeSource:
        path = kubeconfig(tmp_path / "kubeconfig", api.url, certificates.ca)
        options = KubeOptions(kubeconfig=str(path), environ={}, retry_seconds=0.2, **how)
        return KubeSource(options, note=note)

    return make


def test_a_new_process_knows_that_an_api_server_is_at_an_earlier_state(
    host: Any, api: ApiServer, nodes: Callable[..., KubeSource], tmp_path: Path
) -> None:
    note = str(tmp_path / "note")
    own = kube_node(0, lease_of(host))
    for one in (own, *map(kube_node, NUMBERS)):
        api.put(one)
    with following(host, nodes(note)):
        assert holds(host, *NUMBERS)
    api.restore(50, own, kube_node(60))

    for _ in range(2):
        with following(host, nodes(note), confirm=0.0) as agent:
            assert "its resourceVersion is" in shrink(agent)
            syncs = agent.status.syncs
            agent.refresh()
            wait_until(lambda seen=syncs: agent.status.syncs > seen, WAIT)
            assert holds(host, *NUMBERS, 60)


@pytest.mark.parametrize("missing", [1, 4])
def test_an_api_server_at_an_earlier_state_is_listed_again(
    host: Any, api: ApiServer, nodes: Callable[..., KubeSource], missing: int
) -> None:
    """It accepts a watch from a version to come, and is silent."""
    own = kube_node(0, lease_of(host))
    for one in (own, *map(kube_node, NUMBERS)):
        api.put(one)
    with following(host, nodes()) as agent:
        wait_until(lambda: api.watching, WAIT)
        assert holds(host, *NUMBERS)

        api.restore(50, own, *map(kube_node, NUMBERS[missing:]), kube_node(60))
        wait_until(lambda: "its resourceVersion is" in shrink(agent), WAIT)
        assert f"{missing} of 4 IPv4" in shrink(agent)
        assert holds(host, *NUMBERS, 60)

        for number in NUMBERS[:missing]:
            api.put(kube_node(number))
        wait_until(lambda: not agent.status.problems, WAIT)
        assert holds(host, *NUMBERS, 60)


def test_a_silent_watch_is_checked_now_and_then(
    host: Any, api: ApiServer, nodes: Callable[..., KubeSource]
) -> None:
    """Nothing breaks the connection; the watch ends when its time is over."""
    own = kube_node(0, lease_of(host))
    for one in (own, *map(kube_node, NUMBERS)):
        api.put(one)
    with following(host, nodes(watch_seconds=1.0), grace=0.5, confirm=0.1):
        wait_until(lambda: api.watching, WAIT)

        api.restore(50, own, kube_node(60), cut=False)
        wait_until(lambda: holds(host, *NUMBERS, 60), WAIT)
        wait_until(lambda: holds(host, 60), WAIT)
        assert api.count("ask") >= 1
