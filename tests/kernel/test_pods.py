"""Pods made by CNI plugins from subnet.env, on four nodes in two underlay networks: who reaches
whom, by which way, with how large a packet, and under which name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests.lib.cni_site import (
    DOCKER,
    INTERNET,
    NETWORK,
    NODES,
    SERVICES,
    WORDS,
    Pod,
    Site,
    SiteNode,
    full_datagram,
    gateway,
    lease,
    of_a_node,
    refused,
    segment,
    subnet,
    transfer,
    underlay,
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
    for one, other in world.pairs("none")[::3]:
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
        seen, _ = transfer(family, world.internet, pod, pod.address[family], 1 << 17)
    finally:
        world.router.ip(f"-{family} route del {via}")
    assert seen == outside


def test_nothing_is_left_to_do_but_what_cannot_be_done(world: World) -> None:
    for number, node in world.nodes.items():
        code, plan, said = node.flannel_dp("plan", "--ip-masq")
        assert code == 0, said
        assert plan["rules"]["changes"] == []
        assert {device["action"] for device in plan["devices"]} <= {"none"}
        assert plan["operations"] == []
        code, report, _ = node.flannel_dp("sync", "--ip-masq")
        before = world.reports[number]
        assert code == before[0]
        assert len(report["failures"]) == len(before[1]["failures"])
        assert not any(
            row["added"] + row["replaced"] + row["removed"] for row in table_rows(report)
        )


def table_rows(report: Any) -> list[dict[str, int]]:
    return list(report["tables"].values())


# ---- what people mended by hand --------------------------------------------------------

ENGINE = "iptables-nft"


def iptables(node: SiteNode, family: int, rule: str) -> None:
    words = rule.format(own=subnet(family, node.number), **WORDS[family]).split()
    node.exec("iptables-nft" if family == 4 else "ip6tables-nft", *words)


def foreign_rules(node: SiteNode, family: int) -> list[str]:
    """Every rule of iptables that is not ours, in order."""
    text = node.exec("iptables-nft-save" if family == 4 else "ip6tables-nft-save")
    return [line for line in text.splitlines() if line[0] == "-" and "FLANNEL-DP-" not in line]


@pytest.fixture(params=["host-gw", "vxlan"])
def tutorial(request: pytest.FixtureRequest, family: int, tmp_path: Path) -> Iterator[Site]:
    """Two nodes with Docker's bridge and rule, the rules of iptables-services, and a subnet.env
    written by hand; the only lease is the other node's."""
    with Site(tmp_path, (21, 22)) as site:
        site.configure(LAYOUTS[request.param], (family,))
        for node in site.nodes.values():
            by_hand(node, family)
        exchange_leases(site, family, str(LAYOUTS[request.param]["Type"]))
        yield site


def by_hand(node: SiteNode, family: int) -> None:
    own = subnet(family, node.number)
    first = own.replace("0/24", "1/24").replace("::/", "::1/")
    nodad = "nodad" if family == 6 else ""
    node.ip("link add docker0 type bridge mcast_snooping 0")
    node.ip(f"address add {first} dev docker0 {nodad}")
    node.ip("link set docker0 up")
    for rule in (DOCKER, *SERVICES):
        iptables(node, family, rule)
    key = "FLANNEL" if family == 4 else "FLANNEL_IPV6"
    node.subnet_file.write_text(
        f"{key}_NETWORK={NETWORK[family]}\n{key}_SUBNET={first}\n"
        "FLANNEL_MTU=1500\nFLANNEL_IPMASQ=false\n"
    )


def exchange_leases(site: Site, family: int, backend_type: str) -> None:
    """Start each node alone, and tell the other its subnet and the MAC of its device."""
    key = {4: "BackendData", 6: "BackendV6Data"}[family]
    leases = {number: lease(number, backend_type) for number in site.nodes}
    for number, node in site.nodes.items():
        node.write_leases([])
        code, _, said = node.flannel_dp("sync", "--firewall", "none")
        assert code == 0, said
        if key in leases[number]:
            device = node.ip_json(f"link show {DEVICE[family]}")[0]
            leases[number][key]["VtepMAC"] = device["address"]
    for number, node in site.nodes.items():
        node.write_leases(leases[other] for other in site.nodes if other != number)


def start_pods(site: Site, engine: str) -> list[tuple[Pod, Pod]]:
    """Sync with an engine; pods are made when there are none. (sender, receiver) pairs."""
    for node in site.nodes.values():
        code, _, said = node.flannel_dp("sync", "--firewall", engine)
        assert code == 0, said
    if not site.pods:
        for number in site.nodes:
            site.add_pod(number, "docker0")
        site.settle()
    one, other = site.pods.values()
    return [(one, other), (other, one)]


def test_without_our_rules_the_foreign_ones_stop_pods(tutorial: Site, family: int) -> None:
    for sender, receiver in start_pods(tutorial, "none"):
        assert refused(family, sender, receiver.address[family])


def test_nothing_is_left_to_mend_by_hand(tutorial: Site, family: int) -> None:
    rules = {number: foreign_rules(node, family) for number, node in tutorial.nodes.items()}

    pairs = start_pods(tutorial, ENGINE)

    for number, node in tutorial.nodes.items():
        # The plugin "bridge" masquerades its own pods, because FLANNEL_IPMASQ says false.
        found = foreign_rules(node, family)
        assert [rule for rule in found if "CNI-" not in rule] == rules[number]
        assert any("CNI-" in rule and "MASQUERADE" in rule for rule in found)
        code, plan, _ = node.flannel_dp("plan", "--firewall", ENGINE)
        assert (code, plan["operations"], plan["rules"]["changes"]) == (0, [], [])
        assert of_a_node(plan["warnings"]) == []
    check_subnet_files(tutorial, family)
    for sender, receiver in pairs:
        to, own = receiver.address[family], sender.address[family]
        assert own.startswith(("172.7.2", "fd00:172:7:2"))
        assert transfer(family, sender, receiver, to) == (own, sender.mtu)
        full_datagram(family, sender, receiver, to, sender.mtu)
    for number, node in tutorial.nodes.items():
        other = next(pod for there, pod in tutorial.pods.items() if there != number)
        assert node.ping(other.address[family])
        seen, _ = transfer(
            family, tutorial.pods[number], tutorial.internet, INTERNET[family], 1 << 16
        )
        assert seen == underlay(family, number)


def check_subnet_files(tutorial: Site, family: int) -> None:
    """The subnet written by hand is kept, and the MTU is now right."""
    key = "FLANNEL" if family == 4 else "FLANNEL_IPV6"
    for number, node in tutorial.nodes.items():
        env = node.env()
        first = "172.7.{}.1/24" if family == 4 else "fd00:172:7:{}::1/64"
        assert env[f"{key}_SUBNET"] == first.format(number)
        assert env[f"{key}_NETWORK"] == NETWORK[family]
        has_device = DEVICE[family] in node.ip("link show")
        small = 1450 if family == 4 else 1430
        assert int(env["FLANNEL_MTU"]) == (small if has_device else 1500)
        assert env["FLANNEL_IPMASQ"] == "false"


def test_a_table_of_our_own_cannot_and_says_who_can(tutorial: Site, family: int) -> None:
    node = tutorial.nodes[21]
    vxlan = DEVICE[family] in node.ip("link show")
    blocked = ["FORWARD", "INPUT"] if vxlan else ["FORWARD"]
    wanted = [
        f"-A {chain} -j REJECT --reject-with {WORDS[family]['prohibited']}" for chain in blocked
    ]

    _, plan, _ = node.flannel_dp("plan", "--firewall", "nft")
    code, report, _ = node.flannel_dp("sync", "--firewall", "nft")

    assert code == 0
    for warnings in (plan["warnings"], report["warnings"]):
        for rule in wanted:
            (said,) = (text for text in warnings if rule in text)
            assert 'engine "iptables-nft"' in said
    for command in ("plan", "show"):
        _, text, _ = node.flannel_dp(command, "--firewall", "nft", output="text")
        assert all(rule in text for rule in wanted), text
    to = subnet(family, 22).replace("0/24", "2").replace("::/64", "::2")
    _, text, said = node.flannel_dp("explain", to, "--firewall", "nft", output="text")
    assert wanted[0] in text, text + said

    for sender, receiver in start_pods(tutorial, "nft"):
        assert refused(family, sender, receiver.address[family])
    for sender, receiver in start_pods(tutorial, ENGINE):
        to, own = receiver.address[family], sender.address[family]
        sender.await_ping(to)
        assert transfer(family, sender, receiver, to, 1 << 16)[0] == own
