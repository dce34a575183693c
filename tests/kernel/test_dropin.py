"""flanneld's place taken by a change of its name: a tutorial's cluster, with the start script,
the supervisor section, the certificates and the subnet.env that a person wrote for flanneld."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest

from tests.lib.cni_site import INTERNET, transfer, underlay
from tests.lib.traffic import Pings
from tests.lib.tutorial_cluster import HOSTS, MEMBERS, START, VARIANTS, DropIn, Host
from tests.lib.waiting import LIMIT, wait_until


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DropIn]:
    with DropIn(tmp_path_factory.mktemp("dropin")) as made:
        yield made


@pytest.fixture(scope="module", params=VARIANTS)
def cluster(request: pytest.FixtureRequest, machines: DropIn) -> DropIn:
    """The same machines, one network configuration after the other."""
    machines.use(request.param)
    for one, other in machines.pairs("direct", "tunnel"):
        machines.pods[one].await_ping(machines.pods[other].address[4])
    return machines


def flannel_dp(host: Host, command: str, *more: str) -> tuple[int, Any, str]:
    """One-shot commands on a host with the flags of its start script; exit code, document,
    standard error."""
    flags = START.format(net=host.net, n=host.number).replace("\\\n", "").split()[2:]
    of_sync = ("--healthz-port",)
    return host.run(
        *(sys.executable, "-m", "flannel_dp", command, *more, "--output", "json"),
        *(flag for flag in flags if not flag.startswith(of_sync)),
    )


def test_the_members_are_those_that_the_start_script_names(machines: DropIn) -> None:
    for member in machines.members:
        assert member.url in START
    assert len(machines.members) == len(MEMBERS) == START.count("https://")


def test_the_subnet_written_by_hand_is_taken(cluster: DropIn) -> None:
    mtu = 1500 if cluster.variant == "host-gw" else 1450
    for number, host in cluster.hosts.items():
        text = (host.folder / "subnet.env").read_text()
        assert text == host.subnet_env.replace("MTU=1500", f"MTU={mtu}")
        assert f"FLANNEL_SUBNET=172.7.{number}.1/24\n" in text
    assert cluster.keys() == [f"172.7.{number}.0-24" for number in HOSTS]


def test_leases_are_flannels_to_the_byte(cluster: DropIn) -> None:
    for number, host in cluster.hosts.items():
        rest = '"BackendType":"host-gw"'
        if cluster.variant != "host-gw":
            mac = host.node.ip_json("link show flannel.1")[0]["address"]
            rest = f'"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}'
        value, left = cluster.lease(number)
        assert value == f'{{"PublicIP":"{underlay(4, number)}","PublicIPv6":null,{rest}}}'
        assert 86_400 - 120 < left <= 86_400


def test_each_peer_goes_its_way(cluster: DropIn) -> None:
    for number, host in cluster.hosts.items():
        assert cluster.routes(number) == cluster.wanted_routes(number)
        devices = [link["ifname"] for link in host.node.ip_json("link show type vxlan")]
        assert devices == ([] if cluster.variant == "host-gw" else ["flannel.1"])


def test_the_route_table_reads_as_the_tutorial_shows_it(cluster: DropIn) -> None:
    """``route -n`` reads /proc/net/route: ``172.7.22.0 10.4.7.22 255.255.255.0 UG eth0``."""
    table = cluster.hosts[21].node.exec("cat", "/proc/net/route").splitlines()[1:]
    routes = {
        tuple(words[n] for n in (1, 2, 7, 3, 0)) for words in (line.split() for line in table)
    }
    destination, mask, up_gateway = "001607AC", "00FFFFFF", "0003"
    end = ("001607AC", "flannel.1") if cluster.variant == "vxlan" else ("1607040A", "eth0")
    assert (destination, end[0], mask, up_gateway, end[1]) in routes


def test_pods_and_hosts_reach_each_other(cluster: DropIn) -> None:
    for one, other in permutations(HOSTS, 2):
        to, reached = cluster.pods[other].address[4], cluster.way(one, other) != "none"
        patience = LIMIT if reached else 0.2
        assert cluster.pods[one].ping(to, patience) == reached, (one, other)
        assert cluster.hosts[one].node.ping(to, patience) == reached, (one, other)


def test_pods_see_who_calls_and_the_outside_sees_the_host(cluster: DropIn) -> None:
    """Docker's own rule masquerades all that leaves docker0, and is still there."""
    for one, other in cluster.pairs("direct", "tunnel"):
        client, server = cluster.pods[one], cluster.pods[other]
        seen, _ = transfer(4, client, server, server.address[4], 1 << 16)
        assert seen == client.address[4]
    for number, pod in cluster.pods.items():
        rules = cluster.hosts[number].node.exec("iptables", "-t", "nat", "-S", "POSTROUTING")
        assert f"-A POSTROUTING -s 172.7.{number}.0/24 ! -o docker0 -j MASQUERADE" in rules
        seen, _ = transfer(4, pod, cluster.internet, INTERNET[4], 1 << 16)
        assert seen == underlay(4, number)


def test_health_and_who_is_out_of_reach(cluster: DropIn) -> None:
    for number, host in cluster.hosts.items():
        lost = [other for one, other in cluster.pairs("none") if one == number]
        status, text = host.get("healthz")
        assert (status, text.partition("\n")[0]) == (200, "degraded" if lost else "ok")
        assert host.get("readyz") == (200, "ready\n")
        code, overview, said = flannel_dp(host, "show")
        assert code == 0, said
        (view,) = overview["families"]
        assert {peer["subnet"]: peer["difference"] for peer in view["peers"]} == {
            f"172.7.{other}.0/24": (
                f"host-gw cannot reach {underlay(4, other)}: it is not on-link"
                if other in lost
                else ""
            )
            for other in HOSTS
            if other != number
        }
        if lost:
            assert any(f"{underlay(4, other)} is not on-link on eth0" in text for other in lost)


def test_one_shot_commands_find_nothing_to_do(cluster: DropIn) -> None:
    for host in cluster.hosts.values():
        code, plan, said = flannel_dp(host, "plan")
        assert (code, plan and plan["operations"]) == (0, []), said
        assert plan["rejected"] == []
        assert {device["action"] for device in plan["devices"]} <= {"none"}


def test_stopping_and_starting_is_not_noticed_by_traffic(cluster: DropIn) -> None:
    host, there = cluster.hosts[21], cluster.pods[21].address[4]
    before, lease = host.agents(), cluster.lease(21)[0]
    with Pings(cluster.pods[22].ns, there) as pings:
        host.stop()
        assert host.agents() == []
        pings.await_answers(20)
        assert host.get("healthz") == (0, "")
        host.start()
        host.await_ready()
        pings.await_answers(20)
    assert pings.lost == 0
    assert len(host.agents()) == len(before) == 1
    assert host.agents() != before
    assert cluster.lease(21)[0] == lease
    cluster.settle()


def test_a_start_script_that_is_killed_takes_the_agent_along(machines: DropIn) -> None:
    """supervisor knows the script alone. An agent that outlived it would keep the next one out."""
    if not machines.variant:
        machines.use("vxlan")
    host = machines.hosts[22]
    (agent,) = host.agents()
    host.kill_script()
    wait_until(lambda: host.agents() not in ([], [agent]), describe=host.said)
    machines.settle()


def test_logs_go_where_the_section_says(machines: DropIn) -> None:
    if not machines.variant:
        machines.use("vxlan")
    for number, host in machines.hosts.items():
        text = host.log.read_text()
        assert f"This node has the lease of 172.7.{number}.0/24 in etcd" in text
        assert "Health is served at 0.0.0.0, port 2401" in text
        assert "Traceback" not in text
