"""``sync --watch --probe``: peers are probed, and the node is ready when they are reachable."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flannel_dp.cluster.lease import Lease
from flannel_dp.command.cli import main
from tests.lib.forwarding import Nodes
from tests.lib.probed import Probed
from tests.lib.service import CAP_NET_ADMIN, Service, fetch, free_port
from tests.lib.waiting import LIMIT

FORWARDING = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}
PROBE = ("--probe", "--probe-interval", "0.5")


class Probing(Service):
    """A service on the first of three nodes; the others are in sync when they are told to."""

    def __init__(
        self, probed: Probed, folder: Path, wait: Callable[..., None], published: int
    ) -> None:
        self.probed, self.published = probed, published
        super().__init__(probed.first.host, probed.family, folder, wait)
        self.port = free_port(self.host)

    def publish(self, count: int) -> list[Lease]:
        leases = self.probed.leases[: self.published]
        self.replace('{"leases": [' + ",".join(one.to_json() for one in leases) + "]}")
        return leases

    def begin(self, *more: str) -> None:
        self.start("--healthz-port", str(self.port), "--healthz-ip", "127.0.0.1", *more)

    def ask(self, path: str) -> tuple[int, str]:
        return fetch(self.host, self.port, path)

    def metric(self, text: str) -> bool:
        return text in self.ask("/metrics")[1]


@pytest.fixture
def probed(nodes: Nodes, family: int) -> Iterator[Probed]:
    made = Probed(nodes(3), family, "kernel")
    made.planes[0].clean()
    made.planes[0].close()
    yield made
    made.close()


@pytest.fixture
def begun(
    probed: Probed, tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Callable[..., Probing]]:
    made: list[Probing] = []

    def begin(*flags: str, published: int = 3) -> Probing:
        made.append(Probing(probed, tmp_path, wait_until, published))
        made[-1].begin(*flags)
        return made[-1]

    yield begin
    for one in made:
        if not one.ended():
            one.end(signal.SIGKILL)


def test_ready_when_peers_are_reachable(
    probed: Probed, begun: Callable[..., Probing], capsys: pytest.CaptureFixture[str]
) -> None:
    """The deaths and returns of peers are in the log, the metrics, and the agent's status."""
    for node in probed.nodes[1:]:
        node.host.sysctl(FORWARDING[probed.family], 0)
    service = begun(*PROBE, "--ready-when", "reachable", "--ready-timeout", "3600")
    waiting = "not ready: 0 of 2 peers have answered probes, and half of them have to"
    service.wait(lambda: service.ask("/readyz")[1].startswith(waiting))
    assert service.ask("/readyz")[0] == 503
    assert service.metric("flannel_dp_ready 0.0")
    for node in probed.nodes[1:]:
        node.host.sysctl(FORWARDING[probed.family], 1)
    service.wait(lambda: service.ask("/readyz") == (200, "ready\n"))
    family, subnet = probed.family, probed.subnet(probed.second)
    count = f'flannel_dp_probed_peers{{family="{family}",life="%s"}} %.1f'
    service.wait(lambda: service.metric(count % ("alive", 2)))
    assert service.metric('flannel_dp_probe_seconds_bucket{le="+Inf"}')

    for task in os.listdir(f"/proc/{service.pid}/task"):
        text = Path(f"/proc/{service.pid}/task/{task}/status").read_text()
        assert f"CapPrm:\t{CAP_NET_ADMIN:016x}" in text

    probed.second.host.sysctl(FORWARDING[family], 0)
    name = probed.second.lease.label
    service.wait(lambda: service.said(f"Peer {name} at "))
    assert "is unreachable: no probe has come back for" in service.log.read_text()
    service.wait(lambda: service.metric(count % ("dead", 1)))
    assert service.metric(
        f'flannel_dp_peer_unreachable{{endpoint="{probed.second.host.underlay(family)}"'
    )
    assert service.ask("/readyz")[0] == 200  # once ready, a node stays so
    assert service.ask("/healthz")[0] == 200
    main(["status", "--netns", service.host.ns, "--output", "json"])
    (agent,) = json.loads(capsys.readouterr().out)["agents"]
    assert agent["probes"]["lives"][str(family)] == {"new": 0, "alive": 1, "lossy": 0, "dead": 1}
    assert [one["subnet"] for one in agent["probes"]["peers"]] == [subnet]
    look = ("--netns", service.host.ns, "--net-conf", str(service.net_conf), "--iface", "eth0")
    main(["show", *look, "--output", "json"])
    (view,) = json.loads(capsys.readouterr().out)["families"]
    lives = {peer["subnet"]: peer["life"] for peer in view["peers"]}
    assert {each: life["life"] for each, life in lives.items()} == {
        subnet: "dead",
        probed.subnet(probed.nodes[2]): "alive",
    }
    assert 0 < lives[probed.subnet(probed.nodes[2])]["rtt"] < LIMIT
    main(["explain", *look, subnet.partition("/")[0]])
    assert "the agent's probes: dead" in capsys.readouterr().out
    main(["status", "--netns", service.host.ns])
    told = capsys.readouterr().out
    assert "1 alive, 1 dead; one every 0.5 s" in told
    assert f"{subnet} at {probed.second.host.underlay(family)}: no probe has come back" in told
    probed.second.host.sysctl(FORWARDING[family], 1)
    service.wait(lambda: service.said(f"Peer {name} is reachable again after "))
    main(["history", "--netns", service.host.ns, subnet])
    told = capsys.readouterr().out
    assert f"peer {name} became unreachable: no probe has come back for" in told
    assert service.metric(f'subnet="{subnet}"') is False

    service.published = 2  # one leaves
    service.publish(1)
    service.wait(lambda: service.metric(count % ("alive", 1)))
    assert service.end() == 0


def test_the_first_node_of_a_cluster_is_ready(begun: Callable[..., Probing]) -> None:
    service = begun(*PROBE, "--ready-when", "reachable", "--ready-timeout", "3600", published=1)
    service.wait(lambda: service.ask("/readyz")[0] == 200)
    assert service.end() == 0


def test_a_node_whose_peers_never_answer_is_ready_in_the_end(
    probed: Probed, begun: Callable[..., Probing]
) -> None:
    """And a dead uplink is one problem."""
    for node in probed.nodes[1:]:
        node.host.sysctl(FORWARDING[probed.family], 0)
    service = begun(*PROBE, "--ready-when", "reachable", "--ready-timeout", "1")
    service.wait(lambda: service.ask("/readyz")[0] == 200)
    assert service.said("The node is called ready although 0 of 2 peers have answered probes")
    for node in probed.nodes[1:]:
        node.host.sysctl(FORWARDING[probed.family], 1)
    service.wait(lambda: service.metric('life="alive"} 2.0'))
    service.host.ip(f"link set {service.host.iface} down")
    problem = f"{service.host.iface} is down"
    service.wait(lambda: f"uplink: {problem}" in service.ask("/healthz")[1])
    assert not service.said("is unreachable: no probe has come back for")
    assert service.end() == 0


@pytest.mark.parametrize(("family", "mode"), [(4, "kernel"), (6, "ebpf")], indirect=["family"])
def test_a_route_gets_the_mtu_of_its_path(
    probed: Probed, begun: Callable[..., Probing], mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Across a restart, until the path takes again what the device does."""
    narrow, family, subnet = probed.second, probed.family, probed.subnet(probed.second)
    narrow.host.ip(f"link set {narrow.host.iface} mtu 1400")
    flags = ("--probe", "--probe-interval", "0.1", "--path-mtu", "fix", "--forwarding", mode)
    service = begun(*flags)
    takes = 1400 - {4: 46, 6: 70}[family]

    def mtus() -> dict[str, int]:
        routes = service.host.ip_json(f"-{family} route show")
        return {one["dst"]: one["metrics"][0]["mtu"] for one in routes if "metrics" in one}

    service.wait(lambda: mtus() == {subnet: takes})
    assert service.said(f"The path to peer {narrow.lease.label} at ")
    assert service.said(": its route gets the MTU of the path")
    service.wait(
        lambda: service.metric(f'flannel_dp_probed_peers{{family="{family}",life="alive"}} 2')
    )
    assert service.metric("flannel_dp_peer_path_mtu_bytes{")
    main(["status", "--netns", service.host.ns, "--output", "json"])
    told = json.loads(capsys.readouterr().out)["agents"][0]["probes"]["path_mtu"]
    assert (told["mode"], told["narrow"], told["peers"][0]["path_mtu"]) == ("fix", 1, takes)
    # Another program takes it away.
    probed.at(probed.first, f"route del {subnet}")
    service.wait(lambda: mtus() == {subnet: takes})

    # With the agent's flags other commands find nothing to change, without them they do.
    source = ("--net-conf", str(service.net_conf), "--forwarding", mode, "--iface", "eth0")
    leases = ("--leases", str(service.leases), "--firewall", "none")
    command = ["plan", "--netns", service.host.ns, *source, *leases, "--exit-code"]
    assert main([*command, "--watch", *flags]) == 0
    assert main(command) == 10
    capsys.readouterr()
    main(["show", "--netns", service.host.ns, *source])
    assert f"ok (mtu {takes})" in capsys.readouterr().out
    main(["explain", subnet.partition("/")[0], "--netns", service.host.ns, *source])
    assert f"mtu {takes}" in capsys.readouterr().out

    assert service.end() == 0
    assert mtus() == {subnet: takes}
    service.begin(*flags)
    service.wait(lambda: service.ask("/readyz")[0] == 200)
    assert mtus() == {subnet: takes}
    narrow.host.ip(f"link set {narrow.host.iface} mtu 1500")
    for node in probed.nodes:  # the kernel remembers for ten minutes what a path took
        node.host.ip("-6 route flush cache")
    service.wait(lambda: mtus() == {})
    assert service.said(f"The path to peer {narrow.lease.label} takes packets of ")
    assert service.end() == 0
    main(["history", "--netns", service.host.ns, subnet])
    told = capsys.readouterr().out
    assert f"took packets of {takes} bytes and no larger ones" in told


@pytest.mark.parametrize("family", [4], indirect=True)
def test_without_the_right_to_probe(
    begun: Callable[..., Probing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is told, and everything else works."""
    setpriv = shutil.which("setpriv")
    assert setpriv
    limited = ("--bounding-set", "-net_raw", "--inh-caps", "-net_raw", "--ambient-caps", "-all")
    plain = Probing.command
    monkeypatch.setattr(
        Probing, "command", lambda self, *more: [setpriv, *limited, *plain(self, *more)]
    )
    service = begun(*PROBE, "--ready-when", "reachable", "--ready-timeout", "3600", "--log-json")
    service.wait(lambda: service.ask("/readyz")[0] == 200)
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    told = [line for line in lines if line["message"].startswith("Peers are not probed: ")]
    assert len(told) == 1
    assert told[0]["message"].endswith("run as root or grant CAP_NET_RAW")
    assert "probe: open a socket for probes" in service.ask("/healthz")[1]
    assert service.end() == 0
