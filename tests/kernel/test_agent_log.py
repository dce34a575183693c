"""The log of an agent that runs: the start, peers, rejected leases, drift, problems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from flannel_dp.agent.logs import fields_of
from tests.lib.agent_log import Log
from tests.lib.agents import AgentNode, rest
from tests.lib.leases import lease_of, peers, subnet
from tests.lib.waiting import wait_until


@pytest.fixture
def small(host: Any, log: Log) -> Iterator[AgentNode]:
    """An agent with three peers of both families."""
    with AgentNode(host, leases=[lease_of(host), *peers([1, 2, 3])]) as node:
        rest(node)
        yield node


def test_the_start_is_one_line_and_each_peer_is_another(small: AgentNode, log: Log) -> None:
    start = log.one("is ready on node")

    assert start["peers"] == "3 IPv4 peers, 3 IPv6 peers"
    assert (start["peers4"], start["mode"], start["source"]) == ("3", "vxlan", "the test")
    assert start["interface"]
    for number in (4, 6):
        node = small.plane.known[number].family.admission.node
        assert node.public_ip in start["addresses"]
        assert node.subnet in start["subnets"]
        for peer in (1, 2, 3):
            assert log.one("was added", subnet(number, peer))["family"] == str(number)
    said = [one.getMessage() for one in log.said("")]
    lines = [number for number, text in enumerate(said) if "was added" in text]
    assert len(lines) == 6
    assert said.index(log.said("is ready on node")[0].getMessage()) < min(lines)
    for name in (small.plane.config.device_v4, small.plane.config.device_v6):
        assert log.one(f"Device {name} ", "was created: vxlan id 1 local", ", up")["ifindex"]
    device = small.host.ip(f"-o link show {small.plane.config.device_v4}")
    assert f" mtu {start['mtu'].partition(',')[0]} " in device


@pytest.mark.parametrize("family", [4, 6])
def test_each_change_of_a_peer_is_told(small: AgentNode, log: Log, family: int) -> None:
    (four,) = peers([4])
    small.script.change(added=[four])
    assert log.one("was added", subnet(family, 4))["peer"]

    small.script.change(removed=[four.label])
    assert log.one("was removed", subnet(family, 4))["family"] == str(family)
    small.script.replace([lease_of(small.host), *peers([1, 2])])
    assert log.one("was removed", subnet(family, 3))["family"] == str(family)


@pytest.mark.parametrize("family", [4, 6])
def test_a_rejected_lease_is_told_with_the_one_that_wins(
    small: AgentNode, log: Log, family: int
) -> None:
    first, other = peers([1, 9])
    rival = replace(
        other, name="rival", revision=99, subnet=first.subnet, ipv6_subnet=first.ipv6_subnet
    )
    small.script.change(added=[rival])

    wait_until(lambda: len(log.said("Lease rival is rejected (overlap)")) == 2)
    found = [fields_of(one) for one in log.said("Lease rival is rejected (overlap)")]
    (told,) = [one for one in found if one["family"] == str(family)]
    assert "which comes first" in told["detail"]


@pytest.mark.parametrize("family", [4, 6])
def test_drift_is_told_entry_by_entry_with_before_and_after(
    small: AgentNode, log: Log, family: int
) -> None:
    prefix = subnet(family, 2)
    small.host.ip(f"-{family} route del {prefix}")
    gone = log.one("Drift repaired: restored", f"route {prefix}", "deleted")
    assert (gone["before"], gone["table"], gone["change"]) == ("none", "route", "deleted")

    device = small.plane.config.backend.device_of(family)
    gateway = prefix.partition("/")[0]
    mac = "02:66:66:66:66:66"
    small.host.ip(f"-{family} neigh replace {gateway} lladdr {mac} dev {device} nud permanent")
    changed = log.one("Drift repaired: restored neighbour", gateway)
    assert (changed["table"], changed["change"]) == ("neighbour", "changed")
    assert mac in changed["before"]
    assert mac not in changed["after"]

    stray = subnet(family, 77)
    via = f"via {gateway} dev {device} onlink proto 138"
    small.host.ip(f"-{family} route add {stray} {via}")
    added = log.one("Drift repaired: removed", stray)
    assert (added["after"], added["change"]) == ("none", "added")


def test_a_problem_is_told_at_its_beginning_and_at_its_end(small: AgentNode, log: Log) -> None:
    from flannel_dp.errors import Unavailable

    small.script.post(Unavailable("the store is away", hint="start it"))
    assert log.one("Problem (source): the store is away")["problem"] == "source"

    small.script.post(None)
    assert float(log.one("Problem (source) ended after")["seconds"]) >= 0
