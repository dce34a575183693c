"""``sync --watch --forwarding ebpf`` as a process: it follows, repairs, drops its privileges, and
when it is killed the packets go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import Lease
from flannel_dp.resources.forwarding.program import Forwarding
from tests.lib import programs
from tests.lib.forwarding import PodNode, config, filters, reaches, remove_pins
from tests.lib.hosts import Lab
from tests.lib.kernel import ifindex
from tests.lib.leases import DEVICE, NETWORK, peers
from tests.lib.traffic import Pings, pod_address
from tests.lib.waiting import LIMIT, NEVER, wait_until

OURS = {("egress", 13800, "forward_out"), ("ingress", 13800, "forward_in")}


class Agent:
    """The process of one node, with its files."""

    def __init__(self, node: PodNode, family: int, folder: Path) -> None:
        self.node, self.family, self.folder = node, family, folder
        self.log = folder / "log"
        self.leases, self.net_conf = folder / "leases.json", folder / "net-conf.json"
        self.configure("ebpf")
        self.process: Any = None

    def configure(self, forwarding: str) -> None:
        self.net_conf.write_text(config(self.family, forwarding=forwarding).to_json())

    def publish(self, leases: list[Lease]) -> None:
        fresh = self.folder / "fresh"
        fresh.write_text('{"leases": [' + ",".join(one.to_json() for one in leases) + "]}")
        fresh.rename(self.leases)

    def start(self, *more: str, **environment: str) -> None:
        command = [sys.executable, "-m", "flannel_dp", "sync", "--watch"]
        command += ["--netns", self.node.host.ns, "--iface", "eth0", "--firewall", "none"]
        command += ["--net-conf", str(self.net_conf), "--leases", str(self.leases)]
        with self.log.open("ab") as log:
            self.process = programs.Popen(
                [*command, "--audit-interval", str(NEVER), *more],
                stdout=log,
                stderr=log,
                env=os.environ | environment,
            )

    def forwards(self, count: int) -> bool:
        """Whether all is there: so many peers in the map, the filters, the network's route."""
        route = self.node.host.ip(f"-{self.family} route show {NETWORK[self.family]}")
        return self.held() == count and self.filters() == OURS and bool(route)

    def await_peers(self, count: int) -> None:
        def there() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            return self.forwards(count)

        wait_until(there)

    def held(self) -> int:
        """How many peers are in the map that is pinned."""
        seen = Forwarding(DEVICE[self.family], self.node.host.ns)
        try:
            return seen._maps[f"peers{self.family}"].read()[0] if seen.open_pinned() else -1
        finally:
            seen.close()

    def filters(self) -> set[Any]:
        return filters(self.node.host, DEVICE[self.family])

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


@pytest.fixture
def cluster(lab: Lab, family: int, tmp_path: Path) -> Iterator[tuple[Agent, PodNode]]:
    """A node with an agent (not started), and another one, of the kernel's kind."""
    near, far = PodNode(lab, 1), PodNode(lab, 2)
    leases = [near.lease, far.lease]
    with far.plane(family, forwarding="kernel") as dp:
        assert dp.sync(leases).ok
    agent = Agent(near, family, tmp_path)
    agent.publish(leases)
    yield agent, far
    if agent.process is not None and agent.process.poll() is None:
        agent.kill()
    remove_pins(near.host)


def test_it_follows_and_needs_no_more_than_net_admin(
    cluster: tuple[Agent, PodNode], family: int
) -> None:
    agent, far = cluster
    agent.start()
    agent.await_peers(1)
    assert reaches(agent.node.pod, pod_address(family, 2))

    agent.publish([agent.node.lease, far.lease, *peers(range(10, 30))])
    agent.await_peers(21)
    agent.publish([agent.node.lease, far.lease, *peers(range(10, 28))])
    agent.await_peers(19)

    assert agent.process is not None
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    held = {
        line.split()[0]: int(line.split()[1], 16) for line in status.splitlines() if "Cap" in line
    }
    assert held["CapEff:"] == held["CapBnd:"] == 1 << 12
    maps = Path(f"/proc/{agent.process.pid}/maps").read_text()
    assert "libbcc" not in maps, "no compiler stays"
    assert "libLLVM" not in maps
    assert agent.kill(signal.SIGTERM) == 0


def test_it_is_ready_when_all_of_it_is_there(cluster: tuple[Agent, PodNode], family: int) -> None:
    agent, _ = cluster
    path = agent.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(LIMIT)
        agent.start(NOTIFY_SOCKET=str(path))
        while b"READY=1" not in manager.recv(4096):
            pass
        assert agent.forwards(1)


def test_a_large_cluster_finds_room(cluster: tuple[Agent, PodNode], family: int) -> None:
    """The maps are made before the leases are read: afterwards nothing may be loaded."""
    agent, far = cluster
    agent.publish([agent.node.lease, far.lease, *peers(range(10, 1510))])
    agent.start()
    agent.await_peers(1501)
    agent.publish([agent.node.lease, far.lease, *peers(range(10, 3010))])
    agent.await_peers(3001)


def test_maps_that_filled_up_are_larger_after_a_restart(
    cluster: tuple[Agent, PodNode], family: int
) -> None:
    agent, far = cluster
    agent.publish([agent.node.lease, far.lease, *peers(range(10, 1033))])
    with agent.node.plane(family, room=1024) as dp:
        assert dp.sync([agent.node.lease, far.lease, *peers(range(10, 1033))]).ok
    agent.start()
    agent.await_peers(1024)
    agent.publish([agent.node.lease, far.lease, *peers(range(10, 1510))])
    agent.await_peers(1501)


def test_packets_go_on_when_it_is_killed_and_it_is_found_again(
    cluster: tuple[Agent, PodNode], family: int
) -> None:
    agent, _ = cluster
    agent.start()
    agent.await_peers(1)
    index = ifindex(agent.node.host, DEVICE[family])
    with Pings(agent.node.pod, pod_address(family, 2)) as pings:
        agent.kill()
        pings.await_answers(20)
        agent.start()
        agent.await_peers(1)
        wait_until(lambda: "forwarding" in agent.log.read_text() or agent.held() == 1)
        pings.await_answers(20)
    assert pings.lost == 0
    assert ifindex(agent.node.host, DEVICE[family]) == index


@pytest.mark.parametrize("what", ["egress", "ingress", "clsact"])
def test_a_program_that_somebody_detached_is_attached_again(
    cluster: tuple[Agent, PodNode], family: int, what: str
) -> None:
    """The kernel tells of it: the next audit is an hour away."""
    agent, _ = cluster
    agent.start()
    agent.await_peers(1)
    device = DEVICE[family]

    if what == "clsact":
        agent.node.host.exec("tc", "qdisc", "del", "dev", device, "clsact")
    else:
        agent.node.host.exec("tc", "filter", "del", "dev", device, what)

    agent.await_peers(1)
    assert reaches(agent.node.pod, pod_address(family, 2))


def test_the_route_and_the_device_are_repaired(cluster: tuple[Agent, PodNode], family: int) -> None:
    agent, _ = cluster
    agent.start()
    agent.await_peers(1)
    host, device = agent.node.host, DEVICE[family]

    host.ip(f"-{family} route del {NETWORK[family]} dev {device}")
    wait_until(lambda: NETWORK[family] in host.ip(f"-{family} route show dev {device}"))
    host.ip(f"link del {device}")
    wait_until(lambda: agent.filters() == OURS)
    wait_until(lambda: reaches(agent.node.pod, pod_address(family, 2)))


def test_a_changed_configuration_changes_the_node_over(
    cluster: tuple[Agent, PodNode], family: int
) -> None:
    """From the program's kind to the kernel's, in the running process."""
    agent, _ = cluster
    agent.start()
    agent.await_peers(1)
    agent.configure("kernel")

    assert agent.process is not None
    os.kill(agent.process.pid, signal.SIGHUP)

    wait_until(lambda: agent.filters() == set() and agent.held() == -1)
    wait_until(lambda: reaches(agent.node.pod, pod_address(family, 2)))
    assert agent.process.poll() is None
    (link,) = json.loads(agent.node.host.exec("ip", "-d", "-j", "link", "show", DEVICE[family]))
    assert link["linkinfo"]["info_data"]["id"] == 1
