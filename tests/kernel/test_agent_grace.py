"""A peer whose lease cannot be used any more keeps its entries for a grace period."""

from __future__ import annotations

import time
from typing import Any

import pytest

from flannel_dp.agent.grace import Grace
from flannel_dp.cluster.lease import BackendData, BadClaim, Lease
from tests.lib.agents import AgentNode
from tests.lib.kernel import expected, observed
from tests.lib.leases import endpoint, lease_of, mac, peer, peers, subnet
from tests.lib.waiting import wait_until

FOREVER = 3600.0

#: What becomes of a lease of both families, by what is wrong with it.
BROKEN: dict[str, dict[str, Any]] = {
    "address": {"public_ip": "", "public_ipv6": "nowhere"},
    "other family's address": {"public_ip": "2001:db8::9", "public_ipv6": "192.0.2.9"},
    "MAC": {"backend_data": None, "backend_v6_data": BackendData(1, "none")},
    "backend type": {"backend_type": "", "backend_data": None, "backend_v6_data": None},
}


def node(host: Any, leases: list[Lease], seconds: float = FOREVER) -> AgentNode:
    grace = Grace(time.monotonic, seconds=seconds)
    return AgentNode(host, leases=[lease_of(host), *leases], grace=grace)


def named(*numbers: int) -> list[Lease]:
    """Leases with the names of nodes, as of Kubernetes."""
    return [peer(number, name=f"node-{number}") for number in numbers]


def holds(host: Any, *leases: Lease) -> bool:
    return all(observed(host, family) == expected(leases, family) for family in (4, 6))


def unreadable(number: int) -> BadClaim:
    subnets = (subnet(4, number), subnet(6, number))
    return BadClaim(f"node-{number}", "bad-claim", "backend-data: not JSON", subnets)


def test_entries_stay_while_a_lease_is_incomplete(host: Any) -> None:
    """Other parts of it are followed; a change that comes later does not end it."""
    with node(host, named(1, 2, 3)) as agent:
        for name, changes in BROKEN.items():
            updates = agent.status.updates
            agent.script.change([peer(2, name="node-2", **changes)])
            wait_until(lambda seen=updates: agent.status.updates > seen)
            assert holds(host, *peers([1, 2, 3])), name
            assert agent.status.unusable == 1
            assert "node-2: its " in agent.status.problems["unusable"], name

        half = peer(2, name="node-2", backend_data=None, public_ipv6=endpoint(6, 900))
        agent.script.change([half])
        moved = peer(2, public_ipv6=endpoint(6, 900))
        wait_until(lambda: holds(host, peer(1), moved, peer(3)))
        agent.script.change(named(4))
        wait_until(lambda: holds(host, peer(1), moved, peer(3), peer(4)))
        assert "IPv4 VtepMAC is missing" in agent.status.problems["unusable"]

        agent.script.change([peer(2, name="node-2", backend_data=BackendData(1, mac(4, 902)))])
        wait_until(lambda: not agent.status.problems)
        assert agent.status.unusable == 0
        assert holds(host, *peers([1, 3, 4]), peer(2, backend_data=BackendData(1, mac(4, 902))))


@pytest.mark.parametrize("way", ["change", "list"])
def test_entries_stay_while_a_lease_is_unreadable_and_go_with_it(host: Any, way: str) -> None:
    with node(host, named(1, 2, 3)) as agent:
        syncs = agent.status.syncs
        agent.script.change(bad=[unreadable(2)])
        if way == "list":
            agent.agent.refresh()
            wait_until(lambda: agent.status.syncs > syncs)
        wait_until(lambda: "backend-data: not JSON" in agent.status.problems.get("unusable", ""))
        assert holds(host, *peers([1, 2, 3]))
        assert agent.status.rejected == {"bad-claim": 1}

        agent.script.change(removed=["node-2"])
        wait_until(lambda: not agent.status.problems)
        assert holds(host, *peers([1, 3]))


def test_a_restarted_agent_keeps_them_by_the_kernel(host: Any) -> None:
    with node(host, named(1, 2, 3, 4)):
        pass
    broken = peer(2, name="node-2", backend_data=None, public_ipv6="")
    made = node(host, [*named(1), broken])
    key = peer(4).key  # of etcd, which names the subnets
    made.script.bad = {"node-3": unreadable(3), key: BadClaim(key, "bad-claim", "not JSON")}
    with made as agent:
        assert holds(host, *peers([1, 2, 3, 4]))
        assert agent.status.unusable == 3


def test_they_go_at_the_end_of_the_period(host: Any) -> None:
    """The lease is rejected then, with its reason."""
    with node(host, named(1, 2, 3, 4), seconds=0.3) as agent:
        agent.script.change([peer(2, name="node-2", backend_data=None)], bad=[unreadable(3)])
        wait_until(lambda: agent.status.rejected.get("bad-mac") and not agent.status.problems)
        assert agent.script.refreshes >= 1
        assert observed(host, 4) == expected(peers([1, 4]), 4)
        assert observed(host, 6) == expected(peers([1, 2, 4]), 6)
        assert agent.status.unusable == 0


def test_a_lease_that_takes_the_subnet_is_stronger(host: Any) -> None:
    """What is kept is a claim as it was, and no more."""
    with node(host, named(1, 2, 3)) as agent:
        agent.script.change(bad=[unreadable(2)])
        wait_until(lambda: agent.status.unusable)
        other = peer(2, name="node-0", public_ip=endpoint(4, 9), public_ipv6=endpoint(6, 9))
        taken = [peer(number) for number in (1, 3)]
        agent.script.change([other])
        agent.script.change(removed=["node-2"])
        wait_until(lambda: holds(host, *taken, other))
