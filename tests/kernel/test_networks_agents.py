"""Two agents on one node, each with a network of its own: what is one's is neither seen nor
repaired, counted or removed by the other."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.cluster.lease import Lease
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.peers.kept import overlap
from tests.lib import programs
from tests.lib.kernel import observed
from tests.lib.leases import NETWORK, address, lease_of, near_peer
from tests.lib.networks import BACKENDS, SECOND, second_document, second_leases
from tests.lib.service import fetch, free_port
from tests.lib.waiting import LIMIT, NEVER

FIRST = {
    "Network": NETWORK[4],
    "SubnetLen": 24,
    "EnableIPv6": True,
    "IPv6Network": NETWORK[6],
    "Backend": {"Type": "vxlan"},
}
#: The network of each, and the address of its node 2's pod, by family.
NETWORKS = (NETWORK, SECOND)
PODS = (
    {4: address(4, 2)[:-1] + "9", 6: address(6, 2) + "9"},
    {4: "10.11.2.9", 6: "fd00:11:0:2::9"},
)


class Instance:
    """``sync --watch`` of one network, and the other commands with the same flags."""

    def __init__(self, host: Any, folder: Path, conf: str, leases: list[Lease]) -> None:
        self.host, self.folder, self.leases = host, folder, leases
        folder.mkdir()
        (folder / "net-conf.json").write_text(conf)
        listed = ",".join(lease.to_json() for lease in leases)
        (folder / "leases.json").write_text(f'{{"leases": [{listed}]}}')
        self.health, self.process = free_port(host), None

    def words(self, command: str, *more: str) -> list[str]:
        return [
            *("ip", "netns", "exec", self.host.ns, sys.executable, "-m", "flannel_dp", command),
            *("--net-conf", str(self.folder / "net-conf.json")),
            *("--leases", str(self.folder / "leases.json"), "--iface", self.host.iface),
            *("--subnet-file", str(self.folder / "subnet.env"), *more),
        ]

    def start(self, *more: str) -> None:
        port, every = str(self.health), str(NEVER)
        words = self.words("sync", "--watch", "--healthz-port", port, "--audit-interval", every)
        with (self.folder / "log").open("wb") as log:
            self.process = programs.Popen([*words, *more], stdout=log, stderr=log, env=os.environ)

    def run(self, *words: str) -> Any:
        """Run a command to its end; its JSON document."""
        command = self.words(words[0], *words[1:], "--output", "json")
        done = programs.run(command, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def ask(self, path: str) -> tuple[int, str]:
        return fetch(self.host, self.health, path)

    def said(self) -> str:
        return f"{self.ask('/healthz?format=json')}\n{(self.folder / 'log').read_text()}"

    def metric(self, name: str) -> dict[str, float]:
        """The series of one metric, by their labels."""
        rows = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", self.ask("/metrics")[1], re.M)
        return {labels: float(value) for labels, value in rows}

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(LIMIT) == 0
        self.process = None


@pytest.fixture(name="start")
def start_fixture(host: Any, tmp_path: Path) -> Iterator[Callable[..., list[Instance]]]:
    made: list[Instance] = []

    def make(backend: dict[str, Any]) -> list[Instance]:
        first = [lease_of(host), *(near_peer(number) for number in (1, 2, 3))]
        made.append(Instance(host, tmp_path / "one", json.dumps(FIRST), first))
        second = second_leases(host, backend)
        made.append(Instance(host, tmp_path / "two", second_document(backend), second))
        return made

    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        host.sysctl(name, 1)
    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def half(lease: Lease, family: int) -> tuple[str, str]:
    """The subnet and the endpoint of one family."""
    if family == 4:
        return lease.subnet, lease.public_ip
    return lease.ipv6_subnet, lease.public_ipv6


def send(host: Any, to: str) -> None:
    """A datagram that nobody receives."""
    kind = socket.AF_INET6 if ":" in to else socket.AF_INET
    with call_in_netns(host.ns, socket.socket, kind, socket.SOCK_DGRAM) as udp:
        udp.sendto(b"x", (to, 9))


def settled(one: Instance, wait_until: Callable[..., None]) -> None:
    """Have all read and compared once more, with what the other one has written; nothing of that
    is drift, a problem or a warning."""
    before = one.metric("flannel_dp_syncs_total")[""]
    assert one.process is not None
    one.process.send_signal(signal.SIGHUP)
    wait_until(lambda: one.metric("flannel_dp_syncs_total")[""] > before, describe=one.said)
    assert one.ask("/healthz") == (200, "ok\n")
    assert one.ask("/readyz")[0] == 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_agents_know_their_own_network_only(
    start: Callable[..., list[Instance]], host: Any, backend: str, wait_until: Callable[..., None]
) -> None:
    """From start to clean, in both families: views, counters, metrics, repairs, files."""
    both = start(BACKENDS[backend])
    counted = both[: 1 if backend in ("host-gw", "direct") else 2]  # packets in a tunnel
    for one in both:
        one.start("--ip-masq", "--firewall", "nft", *(["--counters"] if one in counted else []))
    for one in both:
        wait_until(lambda one=one: one.ask("/readyz")[0] == 200)
    for pods in PODS:
        for family in (4, 6):
            send(host, pods[family])

    for which, one in enumerate(both):
        settled(one, wait_until)
        nets, others = NETWORKS[which], PODS[1 - which]
        shown = one.run("show")
        assert [shown[key] for key in ("rejected", "blockers", "warnings")] == [[], [], []]
        for family, view in zip((4, 6), shown["families"], strict=True):
            wanted = {half(lease, family) for lease in one.leases[1:]}
            assert {(peer["subnet"], peer["endpoint"]) for peer in view["peers"]} == wanted
            assert {peer["state"] for peer in view["peers"]} == {"ok"}
            assert (view["strays"], view["error"]) == ([], "")
            assert one.run("explain", PODS[which][family])["verdict"] == "peer"
            assert one.run("explain", others[family])["verdict"] == "outside-network"
        plan = one.run("plan", "--ip-masq", "--firewall", "nft")
        assert plan["operations"] == []
        subnets = (one.folder / "subnet.env").read_text()
        assert f"FLANNEL_NETWORK={nets[4]}" in subnets
        assert f"FLANNEL_IPV6_NETWORK={nets[6]}" in subnets
        assert sum(one.metric("flannel_dp_peers").values()) == 6
        assert set(one.metric("flannel_dp_drift_repaired_total").values()) <= {0.0}
        if one not in counted:
            continue
        for family, view in zip((4, 6), one.run("stats")["families"], strict=True):
            sent = {peer["subnet"]: peer["sent"]["packets"] for peer in view["peers"]}
            assert sent == {
                half(lease, family)[0]: n
                for lease, n in zip(one.leases[1:], (0, 1, 0), strict=True)
            }
        packets = one.metric("flannel_dp_peer_packets_total")
        assert sum(packets.values()) == 2
        assert not [labels for labels in packets if others[4].rpartition(".")[0] in labels]

    # A route of the second one goes: that one repairs it, and to the first one it is nothing.
    first, second = both
    (route,) = [
        r["dst"] for r in host.ip_json("-4 route show proto 138") if r["dst"] == "10.11.2.0/24"
    ]
    host.ip(f"route del {route}")
    wait_until(lambda: sum(second.metric("flannel_dp_drift_repaired_total").values()) == 1)
    assert host.ip(f"route show {route}")
    settled(first, wait_until)
    assert set(first.metric("flannel_dp_drift_repaired_total").values()) <= {0.0}

    # The second one leaves, and nothing but its own goes.
    kept = {family: observed(host, family) for family in (4, 6)}
    second.end()
    assert not second.run("clean", "--stale")["removed"]
    assert second.run("clean")["ok"]
    assert {family: observed(host, family) for family in (4, 6)} == kept
    assert SECOND[4] not in host.exec("nft", "list", "ruleset")
    assert not [
        r
        for f in (4, 6)
        for r in host.ip_json(f"-{f} route show proto 138")
        if overlap(r["dst"], SECOND[f])
    ]
    assert "FLANNEL_NETWORK=10.11.0.0/16" in (second.folder / "subnet.env").read_text()
    settled(first, wait_until)
    assert set(first.metric("flannel_dp_drift_repaired_total").values()) <= {0.0}
    assert first.run("stats")["families"][0]["peers"][1]["sent"]["packets"] == 1

    # It joins again; the first one leaves.
    second.start("--ip-masq", "--firewall", "nft")
    wait_until(lambda: second.ask("/readyz")[0] == 200)
    first.end()
    assert first.run("clean")["ok"]
    settled(second, wait_until)
    assert set(second.metric("flannel_dp_drift_repaired_total").values()) <= {0.0}
    assert NETWORK[4] not in host.exec("nft", "list", "ruleset")
    plan = second.run("plan", "--ip-masq", "--firewall", "nft")
    assert plan["operations"] == []
