"""A node whose public address changes keeps its lease, subnet and MAC, and its peers follow."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.cluster.lease import Identity, lease_attrs_json
from tests.lib import programs
from tests.lib.etcd import PREFIX, EtcdServer, value_of
from tests.lib.leases import DEVICE, NETWORK, address, endpoint, mac, subnet
from tests.lib.traffic import Pings, pod, pod_address
from tests.lib.waiting import LIMIT, wait_until

BACKENDS: tuple[dict[str, Any], ...] = ({"Type": "vxlan"}, {"Type": "host-gw"})
NAMES = {4: "", 6: "IPv6"}


@dataclass
class Node:
    """A host with a pod and an agent whose leases are in etcd."""

    number: int
    host: Any
    pod: str
    folder: Path
    process: Any = None
    addresses: dict[int, str] = field(default_factory=dict)

    def start(self, etcd: str, *more: str) -> None:
        command = [sys.executable, "-m", "flannel_dp", "sync", "--watch", "--netns", self.host.ns]
        command += ["--etcd-endpoints", etcd, "--etcd-prefix", PREFIX, "--iface", "eth0"]
        command += ["--firewall", "none", "--subnet-file", str(self.folder / "subnet.env")]
        command += more
        with (self.folder / "log").open("ab") as log:
            self.process = programs.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(LIMIT) == 0, self.said()
            self.process = None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def await_said(self, text: str, since: int) -> None:
        wait_until(lambda: text in self.said()[since:], describe=self.said)

    def lose_address(self, family: int) -> None:
        self.host.ip(f"address del {self.addresses[family]}/{_bits(family)} dev eth0")

    def get_address(self, family: int, new: str) -> None:
        self.host.ip(f"address add {new}/{_bits(family)} dev eth0{_nodad(family)}")
        self.addresses[family] = new

    def mac(self, family: int) -> str:
        return str(self.host.ip_json(f"link show {DEVICE[family]}")[0]["address"])


def _bits(family: int) -> int:
    return 24 if family == 4 else 64


def _single(family: int) -> int:
    return 32 if family == 4 else 128


def _nodad(family: int) -> str:
    return " nodad" if family == 6 else ""


class Cluster:
    """Nodes 1, 2 and 3, and an etcd that none of them runs."""

    def __init__(
        self, lab: Any, folder: Path, families: tuple[int, ...], backend: dict[str, Any]
    ) -> None:
        self.families, self.backend = families, backend
        there = lab.host()
        self.etcd = EtcdServer(folder, 2379, 2380, address=there.ipv4, netns=there.ns)
        self.nodes = [self._node(lab, folder, number) for number in (1, 2, 3)]

    def _node(self, lab: Any, folder: Path, number: int) -> Node:
        host = lab.host()
        home = folder / f"node{number}"
        home.mkdir()
        text = ""
        for family in self.families:
            name = f"FLANNEL_{NAMES[family].upper()}{'_' if family == 6 else ''}"
            gateway = pod_address(family, number)[:-1] + "1"
            text += f"{name}NETWORK={NETWORK[family]}\n{name}SUBNET={gateway}/{_bits(family)}\n"
        (home / "subnet.env").write_text(text + "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n")
        made = Node(number, host, pod(lab, host, number), home)
        made.addresses = {4: host.ipv4, 6: host.ipv6}
        return made

    def start(self) -> None:
        self.etcd.start().await_ready()
        document: dict[str, Any] = {"Backend": self.backend, "EnableIPv4": 4 in self.families}
        document["EnableIPv6"] = 6 in self.families
        for family in self.families:
            document[f"{NAMES[family]}Network"] = NETWORK[family]
        if 4 in self.families:
            document["SubnetLen"] = 24
        self.etcd.put("config", json.dumps(document))
        for node in self.nodes:
            node.start(self.etcd.url)

    def end(self) -> None:
        for node in self.nodes:
            node.kill()
        self.etcd.kill()

    def key(self, node: Node) -> str:
        return "&".join(subnet(f, node.number).replace("/", "-") for f in self.families)

    def reach(self) -> dict[tuple[int, int, int], str]:
        """How each node reaches each other one: the far end of the tunnel, or the gateway."""
        found = {}
        for family in self.families:
            for node in self.nodes:
                for other in self.nodes:
                    if node is not other:
                        way = (family, node.number, other.number)
                        found[way] = self._reach(family, node, other)
        return found

    def _reach(self, family: int, node: Node, other: Node) -> str:
        (route,) = node.host.ip_json(f"-{family} route show {subnet(family, other.number)}") or [{}]
        if self.backend["Type"] == "host-gw" or "gateway" not in route:
            return str(route.get("gateway"))
        gateway = address(family, other.number)
        neighbours = node.host.ip_json(f"-{family} neigh show dev {DEVICE[family]} nud permanent")
        macs = {one["dst"]: one["lladdr"] for one in neighbours}
        fdb = node.host.bridge_json(f"fdb show dev {DEVICE[family]}")
        ends = [one["dst"] for one in fdb if one["mac"] == macs.get(gateway) and "dst" in one]
        return ",".join(ends)

    def settled(self) -> bool:
        """Whether etcd has one lease of each node, with its address, and all tables and tunnels
        follow."""
        leases = self.etcd.leases()
        if sorted(leases) != sorted(self.key(node) for node in self.nodes):
            return False
        for node in self.nodes:
            said = json.loads(value_of(leases[self.key(node)]))
            for family in self.families:
                here = node.addresses[family]
                if said["PublicIP" if family == 4 else "PublicIPv6"] != here:
                    return False
                if self.backend["Type"] == "vxlan" and self.local(node, family) != here:
                    return False
        wanted = {
            (family, node.number, other.number): other.addresses[family]
            for family in self.families
            for node in self.nodes
            for other in self.nodes
            if node is not other
        }
        return self.reach() == wanted

    def state(self) -> str:
        logs = "\n".join(f"node {node.number}: {node.said()}" for node in self.nodes)
        return f"{self.etcd.leases().keys()}\n{self.reach()}\n{logs}"

    def await_settled(self) -> None:
        wait_until(self.settled, describe=self.state)

    def talk(self) -> None:
        """All pods reach each other."""
        for family in self.families:
            for node in self.nodes:
                for other in self.nodes:
                    if node is not other:
                        with Pings(node.pod, pod_address(family, other.number)) as pings:
                            pings.await_answers(1)

    def local(self, node: Node, family: int) -> str:
        """The address that the tunnel leaves from."""
        links = {link["ifname"]: link for link in node.host.ip_json("link show")}
        if DEVICE[family] not in links:
            return ""
        link = links[DEVICE[family]]
        data = link["linkinfo"]["info_data"]
        return str(data["local" if family == 4 else "local6"])


@pytest.fixture(params=[(4,), (6,), (4, 6)], ids=["ipv4", "ipv6", "dual"])
def families(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return tuple(request.param)


@pytest.fixture(params=BACKENDS, ids=["vxlan", "host-gw"])
def cluster(
    request: pytest.FixtureRequest,
    lab: Any,
    tmp_path: Path,
    families: tuple[int, ...],
) -> Iterator[Cluster]:
    made = Cluster(lab, tmp_path, families, request.param)
    try:
        made.start()
        made.await_settled()
        yield made
    finally:
        made.end()


def moved(family: int) -> str:
    return {4: "192.0.2.77", 6: "2001:db8::77"}[family]


def facts(cluster: Cluster) -> dict[str, tuple[int, int]]:
    """What of each lease stays: its key, when that was made, and its etcd lease."""
    return {
        name: (kv["create_revision"], kv["lease"]) for name, kv in cluster.etcd.leases().items()
    }


def macs(cluster: Cluster) -> list[str]:
    if cluster.backend["Type"] == "host-gw":
        return []
    return [node.mac(family) for node in cluster.nodes for family in cluster.families]


def test_a_new_address_is_published_in_the_lease_that_the_node_has(cluster: Cluster) -> None:
    """While the agent runs, and while it does not. In dual stack one family changes. Nodes 2 and 3,
    which do not change, lose nothing."""
    family = cluster.families[0]
    first, second, third = cluster.nodes
    leases, devices = facts(cluster), macs(cluster)
    inodes = [os.stat(node.folder / "subnet.env").st_ino for node in cluster.nodes]
    original = first.addresses[family]
    with Pings(second.pod, pod_address(family, third.number)) as pings:
        for running, following in ((True, moved(family)), (False, original)):
            if not running:
                first.stop()
            first.lose_address(family)
            first.get_address(family, following)
            if not running:
                first.start(cluster.etcd.url)
            cluster.await_settled()
            assert facts(cluster) == leases
            assert macs(cluster) == devices
            if running:
                found = [os.stat(node.folder / "subnet.env").st_ino for node in cluster.nodes]
                assert found == inodes
            cluster.talk()
        pings.await_answers(10)
    assert pings.lost == 0


@pytest.mark.parametrize("families", [(4,), (6,)], ids=["ipv4", "ipv6"], indirect=True)
def test_fr27_a_virtual_address_that_is_left_is_not_published(cluster: Cluster) -> None:
    """keepalived's stays on the interface when a DHCP lease ends, with the agent running, and
    without one; the next address is published."""
    family = cluster.families[0]
    first = cluster.nodes[0]
    leases, devices = facts(cluster), macs(cluster)
    virtual = {4: "192.0.2.99", 6: "2001:db8::99"}[family]
    first.host.ip(f"address add {virtual}/{_single(family)} dev eth0{_nodad(family)}")
    first.host.ip(f"route add {cluster.etcd.address} dev eth0")  # so that etcd can be reached
    original = first.addresses[family]
    for running, following in ((True, moved(family)), (False, original)):
        revision = cluster.etcd.leases()[cluster.key(first)]["mod_revision"]
        if not running:
            first.stop()
        before = len(first.said())
        first.lose_address(family)
        if not running:
            first.start(cluster.etcd.url)
        said = f"{first.addresses[family]}, which this node was reached at, is gone, and {virtual}"
        first.await_said(said, before)
        assert cluster.etcd.leases()[cluster.key(first)]["mod_revision"] == revision

        first.get_address(family, following)
        cluster.await_settled()
        assert facts(cluster) == leases
        assert macs(cluster) == devices
    assert f"-> {virtual}" not in first.said()
    cluster.talk()


@pytest.mark.parametrize("families", [(4,), (6,)], ids=["ipv4", "ipv6"], indirect=True)
@pytest.mark.parametrize("cluster", BACKENDS[:1], ids=["vxlan"], indirect=True)
def test_a_single_address_that_changes_is_published(cluster: Cluster) -> None:
    """A cloud's machine has a /32, and a route that says what is on the link."""
    family = cluster.families[0]
    first = cluster.nodes[0]
    leases = facts(cluster)
    near = {4: "192.0.2.0/24", 6: "2001:db8::/64"}[family]
    old, new = first.addresses[family], moved(family)
    first.stop()
    first.lose_address(family)
    first.host.ip(f"address add {old}/{_single(family)} dev eth0{_nodad(family)}")
    first.host.ip(f"-{family} route add {near} dev eth0")
    first.start(cluster.etcd.url)
    cluster.await_settled()

    for running, lost, following in ((True, old, new), (False, new, old)):
        if not running:
            first.stop()
        first.host.ip(f"address add {following}/{_single(family)} dev eth0{_nodad(family)}")
        first.host.ip(f"address del {lost}/{_single(family)} dev eth0")
        first.addresses[family] = following
        if not running:
            first.start(cluster.etcd.url)
        cluster.await_settled()
        assert facts(cluster) == leases


@pytest.mark.parametrize("families", [(4,), (6,)], ids=["ipv4", "ipv6"], indirect=True)
@pytest.mark.parametrize("cluster", BACKENDS[:1], ids=["vxlan"], indirect=True)
def test_fr13_a_newcomer_leaves_the_lease_of_a_living_node_with_its_address(
    cluster: Cluster, lab: Any, tmp_path: Path
) -> None:
    """As on Vagrant, where all machines have 10.0.2.15. Restarted it does the same. Its device has
    a MAC of its own, which all nodes of a test would make of one machine-id and the address."""
    family, first = cluster.families[0], cluster.nodes[0]
    leases, devices = facts(cluster), macs(cluster)
    newcomer = Node(9, lab.host(), "", tmp_path)
    (tmp_path / "log").touch()
    local = newcomer.host.underlay(family)
    newcomer.host.ip(
        f"link add {DEVICE[family]} address {mac(family, 9)} type vxlan id 1 dstport 8472 "
        f"nolearning local {local} dev eth0"
    )
    flag = {4: "--public-ip", 6: "--public-ipv6"}[family]
    try:
        for _ in range(2):
            before = len(newcomer.said())
            newcomer.start(cluster.etcd.url, flag, first.addresses[family], "--behind-nat")
            newcomer.await_said(f"is alive has {first.addresses[family]}, too", before)
            newcomer.stop()
            cluster.await_settled()
    finally:
        newcomer.kill()
    assert "--iface, --public-ip or --public-ipv6" in newcomer.said()
    assert facts(cluster) == leases
    assert macs(cluster) == devices
    assert first.mac(family) in cluster.etcd.value(cluster.key(first))
    cluster.talk()


def test_two_nodes_that_swapped_their_addresses_keep_their_own_leases(cluster: Cluster) -> None:
    """While their agents run, and while they do not."""
    family = cluster.families[0]
    first, second, _ = cluster.nodes
    leases, devices = facts(cluster), macs(cluster)
    for running in (True, False):
        if not running:
            first.stop()
            second.stop()
        one, other = first.addresses[family], second.addresses[family]
        first.lose_address(family)
        second.lose_address(family)
        first.get_address(family, other)
        second.get_address(family, one)
        for node in cluster.nodes:  # as the nodes' announcements would do
            node.host.ip("neigh flush dev eth0")
        if not running:
            first.start(cluster.etcd.url)
            second.start(cluster.etcd.url)
        cluster.await_settled()
        assert facts(cluster) == leases
        assert macs(cluster) == devices
        cluster.talk()


@pytest.mark.parametrize("cluster", BACKENDS[:1], ids=["vxlan"], indirect=True)
def test_a_node_that_lives_keeps_its_mac_against_a_newer_lease(cluster: Cluster) -> None:
    """A lease with the MAC of node 1 appears, as if that had come to another address: node 1 writes
    its lease once more, and the peers stay with it. A node that does not, is left behind."""
    first, second, _ = cluster.nodes
    before = cluster.etcd.leases()[cluster.key(first)]["mod_revision"]
    macs_of_first = {family: first.mac(family) for family in cluster.families}

    put_lease(cluster, 30, macs_of_first)
    wait_until(
        lambda: cluster.etcd.leases()[cluster.key(first)]["mod_revision"] > before,
        describe=cluster.state,
    )
    cluster.etcd.delete(f"subnets/{name_of(cluster, 30)}")
    cluster.await_settled()

    left = {family: mac(family, 40) for family in cluster.families}
    put_lease(cluster, 40, left)
    put_lease(cluster, 41, left)
    for family in cluster.families:
        wait_until(
            lambda family=family: ends_of(second, family, left[family]) == [endpoint(family, 41)],
            describe=cluster.state,
        )
        routes = second.host.ip_json(f"-{family} route show {subnet(family, 40)}")
        assert routes == []


def ends_of(node: Node, family: int, lladdr: str) -> list[str]:
    fdb = node.host.bridge_json(f"fdb show dev {DEVICE[family]}")
    return [one["dst"] for one in fdb if one["mac"] == lladdr and "dst" in one]


def name_of(cluster: Cluster, number: int) -> str:
    return "&".join(subnet(f, number).replace("/", "-") for f in cluster.families)


def put_lease(cluster: Cluster, number: int, lladdrs: dict[int, str]) -> None:
    """What flanneld would publish as node ``number`` of the test's network."""
    said = Identity({f: endpoint(f, number) for f in cluster.families}, lladdrs, vni=1)
    subnets = {f: subnet(f, number) for f in cluster.families}
    value = lease_attrs_json(said.lease(subnets)).decode()
    cluster.etcd.put(f"subnets/{name_of(cluster, number)}", value)
