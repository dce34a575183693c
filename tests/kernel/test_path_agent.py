"""An agent on a node whose packets are diverted: health, metrics, and how soon it acts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import DataPlane
from flannel_dp.agent.health import HealthServer
from flannel_dp.agent.metrics import Exposition
from flannel_dp.agent.status import StatusBoard
from tests.lib.agents import Script, Watched
from tests.lib.diverted import BRIEFLY, IP, advised, leftover, reaches
from tests.lib.forwarding import Nodes, PodNode
from tests.lib.kernel import stranger
from tests.lib.leases import DEVICE, NETWORK, subnet
from tests.lib.waiting import NEVER, wait_until


class Agent:
    """Two nodes with pods; the first has an agent, which audits every ``audit`` seconds."""

    def __init__(self, nodes: list[PodNode], family: int, audit: float) -> None:
        self.family, (self.near, self.far) = family, nodes
        self.leases = [node.lease for node in nodes]
        with self.far.plane(family, forwarding="kernel") as other:
            assert other.sync(self.leases).ok
        self.host = self.near.host
        self.plane: DataPlane = self.near.plane(family, forwarding="kernel")
        self.board = StatusBoard()
        self.watched = Watched(self.plane, Script(self.leases), audit=audit, board=self.board)

    @property
    def problem(self) -> str | None:
        """What /healthz has of the path."""
        found = self.board.status.problems.get(f"path{self.family}")
        return found

    def reaches(self, seconds: float = 60.0) -> bool:
        return reaches(self.near, self.family, seconds)

    def ip(self, words: str) -> None:
        self.host.ip(f"-{self.family}", words)

    def healthz(self) -> tuple[int, str]:
        server = HealthServer(self.board, "127.0.0.1", 0)
        try:
            answer = server.answer("/healthz", "", False)
            assert answer is not None
            return answer.code, answer.body.decode()
        finally:
            server.close()

    def series(self) -> list[str]:
        text = Exposition(self.board).render()[0].decode()
        return [line for line in text.splitlines() if line.startswith("flannel_dp_path_diversion{")]


@pytest.fixture
def audited(nodes: Nodes, family: int) -> Iterator[Agent]:
    made = Agent(nodes(2), family, 0.2)
    with made.watched:
        yield made


@pytest.fixture
def unaudited(nodes: Nodes, family: int) -> Iterator[Agent]:
    """Whatever it does, no audit had it done."""
    made = Agent(nodes(2), family, NEVER)
    with made.watched:
        yield made
        assert made.board.status.audits == 0


def test_fr25_each_audit_looks_for_what_diverts_packets(audited: Agent, family: int) -> None:
    assert audited.reaches()
    stranger(audited.host, "tun0")
    audited.ip("rule add pref 5270 lookup 52")
    audited.ip(f"route add {subnet(family, 2)} dev tun0 table 52")
    wait_until(lambda: audited.problem)

    text = (
        f"route {subnet(family, 2)} dev tun0 in table 52, which policy rule 5270 (from all lookup "
        "52) has looked up before table main, diverts packets of pods: "
        f"'{IP[family]} route del {subnet(family, 2)} table 52' removes it"
    )
    assert audited.problem == text
    assert audited.healthz() == (200, f"degraded\npath{family}: {text}\n")
    assert audited.series() == [
        f'flannel_dp_path_diversion{{device="tun0",family="{family}",kind="route",'
        f'prefix="{subnet(family, 2)}",rule="5270",table="52",type=""}} 1.0'
    ]
    assert audited.board.status.ready
    assert not audited.reaches(BRIEFLY)

    audited.host.exec(*advised(text)[0].split())
    wait_until(lambda: not audited.problem)
    assert audited.healthz() == (200, "ok\n")
    assert audited.series() == []
    assert audited.reaches()


def test_fr24_a_vpn_that_starts_is_told_of_and_pods_can_be_exempted(
    audited: Agent, family: int
) -> None:
    stranger(audited.host, "tun0")
    audited.ip("rule add pref 5270 lookup 52")
    audited.ip("route add default dev tun0 table 52")
    wait_until(lambda: audited.problem)

    said = audited.problem or ""
    assert f"diverts packets of pods to {NETWORK[family]}" in said
    commands = advised(said)
    for command in (commands[0], commands[2]):
        audited.host.exec(*command.split())
    wait_until(lambda: not audited.problem)
    assert audited.reaches()


def test_fr43_a_leftover_bridge_is_told_of_and_its_removal_acted_upon_at_once(
    unaudited: Agent, family: int
) -> None:
    assert unaudited.reaches()
    held = leftover(unaudited, 2)
    wait_until(lambda: unaudited.problem)

    label = unaudited.far.lease.label
    assert unaudited.problem == (
        f"bridge cni0 has {held}, in {subnet(family, 2)} of lease {label}: packets to its pods "
        "stay here: 'ip link delete cni0' removes it"
    )
    assert unaudited.healthz()[0] == 200
    assert f'device="cni0",family="{family}",kind="device"' in unaudited.series()[0]
    assert unaudited.board.status.rejected == {"underlay": 1}
    assert not unaudited.reaches(BRIEFLY)

    unaudited.host.exec(*advised(unaudited.problem or "")[0].split())
    wait_until(lambda: not unaudited.problem)
    assert unaudited.board.status.rejected == {}
    assert unaudited.reaches()


def test_fr43_an_address_of_a_peer_s_subnet_that_is_removed_is_acted_upon_at_once(
    unaudited: Agent, family: int
) -> None:
    """The device stays: only its address says that anything has happened."""
    held = leftover(unaudited, 2)
    wait_until(lambda: unaudited.problem)
    unaudited.ip(f"address del {held} dev cni0")

    wait_until(lambda: not unaudited.problem)
    assert unaudited.reaches()


def test_fr26_an_address_on_our_device_comes_and_goes(unaudited: Agent, family: int) -> None:
    device = DEVICE[family]
    unaudited.host.ip(f"address add 192.168.1.125/24 dev {device}")
    wait_until(lambda: unaudited.problem)
    assert f"device {device} has 192.168.1.125/24" in (unaudited.problem or "")

    unaudited.host.exec(*advised(unaudited.problem or "")[0].split())
    wait_until(lambda: not unaudited.problem)


def test_an_address_of_the_external_interface_is_missed_at_once(
    unaudited: Agent, family: int
) -> None:
    """And welcomed back: neither waits for an audit."""
    own, bits = unaudited.host.underlay(family), 24 if family == 4 else 64
    unaudited.ip(f"address del {own}/{bits} dev eth0")
    wait_until(lambda: "kernel" in unaudited.board.status.problems)
    assert "eth0" in unaudited.board.status.problems["kernel"]

    nodad = "nodad" if family == 6 else ""
    unaudited.ip(f"address add {own}/{bits} dev eth0 {nodad}")
    wait_until(lambda: not unaudited.board.status.problems)
    assert unaudited.reaches()


def test_pods_that_come_and_go_are_no_reason_to_read_anything(
    unaudited: Agent, family: int
) -> None:
    """Some plugins give each pod's device an address of this node's subnet."""
    from tests.lib.traffic import pod_address

    watch: Any = unaudited.watched.agent._watch
    base = pod_address(family, 1)[:-1]
    bits, nodad = (32, "") if family == 4 else (128, "nodad")
    stranger(unaudited.host, "veth9")
    for number in range(3, 9):
        for words in (
            f"add {base}{number}/{bits} dev veth9 {nodad}",
            f"del {base}{number}/{bits} dev veth9",
        ):
            seen = watch.seen
            unaudited.ip(f"address {words}")
            wait_until(lambda seen=seen: watch.seen > seen)
    assert unaudited.watched.repairs == []
    assert watch.dirty == set()


def test_fr25_a_policy_rule_and_routes_of_its_table_are_told_of_at_once(
    unaudited: Agent, family: int
) -> None:
    """Whichever of the two comes first, and when either goes."""
    stranger(unaudited.host, "tun0")
    rule, route = "pref 5270 lookup 52", f"{subnet(family, 2)} dev tun0 table 52"
    for first, second in (("rule", "route"), ("route", "rule")):
        words = {"rule": rule, "route": route}
        unaudited.ip(f"{first} add {words[first]}")
        unaudited.ip(f"{second} add {words[second]}")
        wait_until(lambda: unaudited.problem)
        assert f"route {subnet(family, 2)} dev tun0 in table 52" in (unaudited.problem or "")
        unaudited.ip(f"{first} del {words[first]}")
        wait_until(lambda: not unaudited.problem)
        unaudited.ip(f"{second} del {words[second]}")
    assert unaudited.reaches()


def test_fr24_a_default_route_of_a_table_that_is_looked_up_before_main(
    unaudited: Agent, family: int
) -> None:
    stranger(unaudited.host, "tun0")
    unaudited.ip("rule add pref 5270 lookup 52")
    unaudited.ip("route add default dev tun0 table 52")
    wait_until(lambda: unaudited.problem)
    unaudited.ip("route flush table 52")
    wait_until(lambda: not unaudited.problem)
    halves = {4: ("0.0.0.0/1", "128.0.0.0/1"), 6: ("::/1", "8000::/1")}[family]
    for half in halves:
        unaudited.ip(f"route add {half} dev tun0 table 52")
    wait_until(lambda: unaudited.problem)


def test_a_route_of_a_pod_in_another_table_is_no_reason_to_read_anything(
    unaudited: Agent, family: int
) -> None:
    from tests.lib.traffic import pod_address

    watch: Any = unaudited.watched.agent._watch
    stranger(unaudited.host, "veth9")
    seen = watch.seen
    unaudited.ip(f"route add {pod_address(family, 1)} dev veth9 table 52")
    unaudited.ip(f"route del {pod_address(family, 1)} dev veth9 table 52")
    wait_until(lambda: watch.seen >= seen + 2)
    assert not watch.path_changed
    assert watch.dirty == set()
