"""Pods made by CNI plugins from subnet.env, on four nodes in two underlay networks: who reaches
whom, by which way, with how large a packet, and under which name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.pods_lab import (
    INTERNET,
    NETWORK,
    NODES,
    Machine,
    Node,
    Pod,
    Site,
    full_datagram,
    gateway,
    lease,
    refused,
    segment,
    subnet,
    transfer,
    underlay,
    wait_until,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "host-gw": {"Type": "host-gw"},
    "vxlan": {"Type": "VxLAN"},
    "direct": {"Type": "VxLAN", "Directrouting": True},
}
DEVICE = {4: "flannel.1", 6: "flannel-v6.1"}


class World(Site):
    """The four nodes in one layout, synced, and a pod on each."""

    def __init__(self, folder: Path, layout: str) -> None:
        super().__init__(folder)
        self.layout = layout
        self.reports: dict[int, tuple[int, Any]] = {}

    def start(self) -> None:
        self.configure(LAYOUTS[self.layout])
        for number, node in self.nodes.items():
            code, report, said = node.flannel_dp("sync", "--ip-masq")
            assert report, said
            self.reports[number] = code, report
        for number in self.nodes:
            self.add_pod(number)
        self.settle()

    def way(self, one: int, other: int) -> str:
        """How node ``one`` should reach node ``other``: direct, tunnel, or none."""
        near = segment(one) == segment(other)
        if self.layout == "vxlan":
            return "tunnel"
        return "direct" if near else {"host-gw": "none", "direct": "tunnel"}[self.layout]

    def pairs(self, *ways: str) -> list[tuple[int, int]]:
        return [pair for pair in permutations(NODES, 2) if self.way(*pair) in ways]


@pytest.fixture(scope="module", params=LAYOUTS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with World(tmp_path_factory.mktemp("pods"), request.param) as made:
        made.start()
        yield made


def pod_address(site: Site, number: int, family: int) -> str:
    return site.pods[number].address[family]


# ---- every layout ---------------------------------------------------------------------


def test_peers_out_of_reach_are_named_and_stop_nothing(world: World) -> None:
    for number, (code, report) in world.reports.items():
        lost = {other for other in NODES if other != number and world.way(number, other) == "none"}
        assert code == (3 if lost else 0)
        failed = {f["entry"]["prefix"]: f["detail"] for f in report["failures"]}
        assert set(failed) == {subnet(family, other) for other in lost for family in (4, 6)}
        for other in lost:
            for family in (4, 6):
                said = failed[subnet(family, other)]
                assert f"{underlay(family, other)} is not on-link on eth0" in said


def test_subnet_env_becomes_the_pods_interface(world: World) -> None:
    mtu = 1500 if world.layout == "host-gw" else 1430
    for number, node in world.nodes.items():
        assert node.subnet_file.read_text() == (
            f"FLANNEL_NETWORK=172.7.0.0/16\nFLANNEL_SUBNET=172.7.{number}.1/24\n"
            f"FLANNEL_IPV6_NETWORK=fd00:172:7::/48\n"
            f"FLANNEL_IPV6_SUBNET=fd00:172:7:{number}::1/64\n"
            f"FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n"
        )
        pod = world.pods[number]
        assert pod.mtu == mtu
        assert pod.address == {4: f"172.7.{number}.2", 6: f"fd00:172:7:{number}::2"}


def test_each_peer_goes_its_way(world: World, family: int) -> None:
    for one, other in permutations(NODES, 2):
        to = pod_address(world, other, family)
        route = world.nodes[one].ip_json(f"-{family} route get {to}")[0]
        end = {
            "direct": (underlay(family, other), "eth0"),
            "tunnel": (subnet(family, other).partition("/")[0], DEVICE[family]),
            "none": (gateway(family, one), "eth0"),
        }[world.way(one, other)]
        assert (route["gateway"], route["dev"]) == end


def test_the_route_table_reads_as_the_manual_says(world: World) -> None:
    """``route -n`` reads /proc/net/route: ``172.7.22.0 10.4.7.22 255.255.255.0 UG eth0``."""
    table = world.nodes[21].exec("cat", "/proc/net/route").splitlines()[1:]
    routes = {
        tuple(words[n] for n in (1, 2, 7, 3, 0)) for words in (line.split() for line in table)
    }
    destination, mask, up_gateway = "001607AC", "00FFFFFF", "0003"
    end = ("001607AC", "flannel.1") if world.layout == "vxlan" else ("1607040A", "eth0")
    assert (destination, end[0], mask, up_gateway, end[1]) in routes


def test_every_pod_reaches_every_pod_and_only_by_a_way(world: World, family: int) -> None:
    for one, other in world.pairs("direct", "tunnel"):
        to = pod_address(world, other, family)
        assert world.pods[one].ping(to), (one, other)
        assert world.nodes[one].ping(to), (one, other)
    for one, other in world.pairs("none"):
        assert refused(family, world.pods[one], pod_address(world, other, family)), (one, other)


def test_full_packets_arrive_whole_under_the_senders_name(world: World, family: int) -> None:
    before = [node.fragments() for node in world.nodes.values()]
    for one, other in world.pairs("direct", "tunnel"):
        sender, receiver = world.pods[one], world.pods[other]
        to = receiver.address[family]
        assert transfer(family, sender, receiver, to) == (sender.address[family], sender.mtu)
        full_datagram(family, sender, receiver, to, sender.mtu)
    assert [node.fragments() for node in world.nodes.values()] == before


def test_the_outside_sees_nodes_and_pods_see_the_outside(world: World, family: int) -> None:
    outside, mtu = INTERNET[family], world.pods[21].mtu
    for number, pod in world.pods.items():
        seen, path = transfer(family, pod, world.internet, outside, 1 << 17)
        assert (seen, path) == (underlay(family, number), mtu)
    # A client that knows the way to node 21's pods, by the router, keeps its address.
    via = f"{subnet(family, 21)} via {underlay(family, 21)}"
    world.router.ip(f"-{family} route add {via}")
    try:
        pod = world.pods[21]
        seen, path = transfer(family, world.internet, pod, pod.address[family], 1 << 17)
    finally:
        world.router.ip(f"-{family} route del {via}")
    # What does not fit the pod is told to the client, by the node.
    assert (seen, path) == (outside, 1500 if family == 4 else path)


def test_a_second_sync_writes_nothing_with_pods_on_it(world: World) -> None:
    for node in world.nodes.values():
        code, plan, _ = node.flannel_dp("plan", "--ip-masq")
        assert (code, plan["rules"]["changes"], plan["devices_changed"]) == (0, [], [])
