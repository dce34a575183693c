"""An agent and peers that its source lacks: kept, told in health, removed once confirmed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from flannel_dp.agent.holding import Holding
from tests.lib.agents import AgentNode, Script, Watched
from tests.lib.kernel import expected, has_device, observed
from tests.lib.leases import lease_of, peer, peers, plane, subnet
from tests.lib.waiting import wait_until

WAIT = 60.0
FOREVER = 3600.0


def node(host: Any, *numbers: int, **seconds: float) -> AgentNode:
    """An agent of both families that follows a store's lists, with these peers."""
    holding = Holding(time.monotonic, **({"confirm": FOREVER, "grace": FOREVER} | seconds))
    made = AgentNode(host, leases=[lease_of(host), *peers(numbers)], holding=holding)
    made.script.consistent = True
    return made


def holds(host: Any, *numbers: int) -> bool:
    return all(observed(host, f) == expected(peers(numbers), f) for f in (4, 6))


def test_adds_at_once_and_removes_after_a_second_list(host: Any) -> None:
    with node(host, 1, 2, 3) as agent:
        agent.script.replace([lease_of(host), peer(60)])
        wait_until(lambda: "shrink" in agent.status.problems, WAIT)

        assert holds(host, 1, 2, 3, 60)
        assert "3 of 3 IPv4" in agent.status.problems["shrink"]
        assert "3 of 3 IPv6" in agent.status.problems["shrink"]
        assert agent.script.refreshes == 0

    with node(host, 1, 2, 3, 60, confirm=0.2) as agent:
        agent.script.replace([lease_of(host), peer(60)])
        wait_until(lambda: agent.script.refreshes and not agent.status.problems, WAIT)
        assert holds(host, 60)


def test_an_empty_list_confirms_nothing(host: Any) -> None:
    """Not even this node is in it: that takes a person, however often it comes."""
    script = Script([lease_of(host), peer(1)])
    script.consistent = True
    subnets = ",".join(subnet(family, 0) for family in (4, 6))
    holding = Holding(time.monotonic, confirm=0.0)
    with Watched(plane(host, subnet=subnets), script, holding=holding) as agent:
        for count in range(1, 4):
            syncs = agent.status.syncs
            script.replace([])
            wait_until(lambda: "1 of 1 IPv4" in agent.status.problems.get("shrink", ""), WAIT)
            wait_until(lambda seen=syncs: agent.status.syncs > seen, WAIT)
            assert holds(host, 1), count
        assert script.refreshes == 0
        assert "allow_shrink=True" in agent.status.problems["shrink"]
        script.replace([lease_of(host), peer(1)])
        wait_until(lambda: not agent.status.problems, WAIT)
        assert holds(host, 1)


def test_a_take_over_adds_at_once_and_removes_after_a_second_list(host: Any) -> None:
    """flanneld leaves the routes of nodes that went, here of nearly all."""
    with plane(host, hand_back=True) as theirs:
        assert theirs.sync([lease_of(host), *peers(range(1, 31))]).ok

    with node(host, 1, 2, 60) as agent:
        assert holds(host, *range(1, 31), 60)
        assert "28 of 30" in agent.status.problems["shrink"]

    with node(host, 1, 2, 60, confirm=0.2) as agent:
        wait_until(lambda: agent.script.refreshes and not agent.status.problems, WAIT)
        assert holds(host, 1, 2, 60)


def test_audits_and_repairs_keep_what_is_held(host: Any) -> None:
    with node(host, 1, 2, 3) as agent:
        agent.script.replace([lease_of(host)])
        wait_until(lambda: "shrink" in agent.status.problems, WAIT)

        host.ip("link del flannel.1")
        host.ip(f"-6 route del {subnet(6, 2)}")
        wait_until(lambda: has_device(host, 4) and holds(host, 1, 2, 3), WAIT)
        agent.plane.resync()
        assert holds(host, 1, 2, 3)
        assert "shrink" in agent.status.problems


def test_held_peers_that_come_back_end_it(host: Any) -> None:
    with node(host, 1, 2, 3) as agent:
        agent.script.replace([lease_of(host)])
        wait_until(lambda: "shrink" in agent.status.problems, WAIT)
        agent.script.change(added=[peer(1), peer(2)])
        agent.script.change(removed=[peer(3).key])

        wait_until(lambda: not agent.status.problems, WAIT)
        assert holds(host, 1, 2)


@pytest.mark.parametrize("missing", [1, 9])
def test_a_store_that_started_afresh_removes_no_peer(host: Any, missing: int) -> None:
    """Not even one of many."""
    numbers = range(1, 10)
    with node(host, *numbers) as agent:
        agent.script.afresh = "its cluster ID is another one"
        agent.script.replace([lease_of(host), *peers(numbers[missing:])])
        wait_until(lambda: "shrink" in agent.status.problems, WAIT)

        assert "its cluster ID is another one" in agent.status.problems["shrink"]
        assert f"{missing} of 9 IPv4" in agent.status.problems["shrink"]
        assert holds(host, *numbers)
        agent.agent.refresh()
        wait_until(lambda: agent.script.refreshes and agent.status.syncs >= 3, WAIT)
        assert holds(host, *numbers)
        agent.script.change(added=peers(numbers[:missing]))
        wait_until(lambda: not agent.status.problems, WAIT)


def test_after_the_grace_period_a_later_list_removes_peers(host: Any) -> None:
    with node(host, 1, 2, 3, 4, grace=0.5, confirm=0.1) as agent:
        agent.script.afresh = "its cluster ID is another one"
        agent.script.replace([lease_of(host), *peers([2, 3, 4])])

        wait_until(lambda: agent.script.refreshes and not agent.status.problems, WAIT)
        assert holds(host, 2, 3, 4)
