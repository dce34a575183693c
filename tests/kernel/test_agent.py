"""The agent: follows its source and the kernel, and keeps the two together."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flannel_dp import BackendData, ConfigError, DataPlane, Unavailable
from flannel_dp.agent.agent import Agent
from flannel_dp.agent.status import StatusBoard
from flannel_dp.backoff import Backoff
from flannel_dp.cluster.lease import BadClaim
from flannel_dp.errors import AuthFailed
from flannel_dp.sources import Change, Inbox
from flannel_dp.tables.entries import EventFilter
from tests.lib.agents import NUMBERS, AgentNode, Script, Watched, rest
from tests.lib.kernel import everything, expected, observed, stranger
from tests.lib.leases import DEVICE, address, lease_of, mac, peer, peers, plane, replaced, subnet
from tests.lib.monitor import Monitor
from tests.lib.waiting import LIMIT, NEVER, wait_until


@contextmanager
def no_further_attempt(watched: Watched) -> Iterator[None]:
    """While this is open, nothing that failed is tried again because its pause is over."""
    agent = watched.agent
    agent._timers._backoff = Backoff(NEVER, NEVER)
    wait_until(lambda: (agent._timers.retry_at or 0.0) - time.monotonic() > NEVER / 2)
    yield
    agent._timers._backoff = Backoff()


# ---- the source -------------------------------------------------------------------------


def test_ready_after_the_first_snapshot(host: Any) -> None:
    called: list[bool] = []
    board = StatusBoard()
    node = AgentNode(host, board=board, on_ready=lambda: called.append(node.agrees()))
    with node:
        status = node.status
        assert status is board.status
        assert status.ready
        assert status.source_ok
        assert not status.degraded
        assert status.origin == "the test"
        assert status.peers == {4: 30, 6: 30}
        assert status.accepted == 30
        assert status.entries == {"fdb": 60, "neighbour": 60, "nexthop": 30, "route": 60}
        assert (status.syncs, status.failures, status.conflicts) == (1, 0, 0)
        assert status.writes >= 210
        assert status.last_sync is not None
        assert sum(status.apply.counts) >= 1
    assert called == [True], "once, with the peers in the kernel"
    assert node.agrees(), "and they stay when it is gone"


def test_changes_are_followed(node: AgentNode) -> None:
    node.script.change(added=peers([40, 41]), removed=[peer(3).label])
    wait_until(node.agrees)
    node.script.change(added=[peer(3)])
    wait_until(node.agrees)
    wait_until(lambda: node.status.updates == 2)  # counted when all of it is written

    assert node.status.syncs == 1, "without another snapshot"
    assert node.status.peers == {4: 32, 6: 32}


def test_changes_that_come_together_are_applied_together(host: Any) -> None:
    with AgentNode(host) as node:
        rest(node)
        with node.plane.exclusive:  # busy, as far as the agent knows
            for number in range(100, 150):
                node.script.change(added=[peer(number)])
            wait_until(lambda: not node.script._posted)
        wait_until(node.agrees)
        assert 1 <= node.status.updates <= 2


def test_a_new_snapshot_replaces_all(node: AgentNode) -> None:
    node.script.replace([lease_of(node.host), *peers(range(11, 45))])
    wait_until(node.agrees)
    wait_until(lambda: node.status.syncs == 2)


def test_a_change_of_the_own_lease_takes_a_snapshot(node: AgentNode, host: Any) -> None:
    """The VTEP has to have the MAC that the others were told."""
    own = replaced(lease_of(host), backend_data=BackendData(1, mac(4, 77)))
    node.script.change(added=[own])

    wait_until(lambda: host.ip_json(f"link show {DEVICE[4]}")[0]["address"] == mac(4, 77))
    wait_until(node.settled)
    wait_until(lambda: node.status.syncs == 2)
    assert node.script.refreshes == 1


def test_the_own_lease_may_come_later(host: Any) -> None:
    """As a change: that it was missing from the snapshot is a problem until then."""
    node = AgentNode(host, leases=peers(NUMBERS))
    node.agent.start()
    try:
        wait_until(lambda: node.status.problems)
        assert not node.status.ready
        assert "leases" in node.status.problems
        node.script.change(added=[lease_of(host)])
        assert node.agent.wait_ready(LIMIT)
        wait_until(node.settled)
    finally:
        node.agent.stop()
        node.agent.join(LIMIT)
        node.plane.close()


def test_a_source_in_trouble_changes_nothing(node: AgentNode) -> None:
    before = everything(node.host)
    node.script.post(Unavailable("the test is down", hint="wait"))
    wait_until(lambda: node.status.degraded)

    assert node.status.problems == {"source": "the test is down - wait"}
    assert not node.status.source_ok
    node.script.post(AuthFailed("the test does not let us in", hint="log in"))
    wait_until(lambda: "let us in" in node.status.problems.get("source", ""))
    node.host.ip(f"route del {subnet(4, 3)}")
    wait_until(node.agrees)
    assert everything(node.host) == before, "drift is still undone"

    node.script.post(None)
    wait_until(lambda: not node.status.degraded)
    assert node.status.source_ok
    assert node.status.syncs == 1


def test_a_source_that_fails_by_accident_is_told_of(host: Any, caplog: Any) -> None:
    class Broken(Script):
        def follow(self, inbox: Inbox) -> None:
            inbox.put(self.snapshot())
            raise RuntimeError("a mistake in the source")

    watched = Watched(plane(host), Broken([lease_of(host), *peers(NUMBERS)]))
    with watched:
        wait_until(lambda: "a mistake" in watched.status.problems.get("source", ""))
        assert watched.status.ready
        host.ip(f"route del {subnet(4, 3)}")
        wait_until(lambda: observed(host, 4) == expected(peers(NUMBERS), 4))
    assert "Thread source failed and starts again" in caplog.text
    assert caplog.text.count("Traceback") == 1


def test_a_snapshot_that_shrinks_is_refused_and_shown(node: AgentNode) -> None:
    before = everything(node.host)
    node.script.replace([lease_of(node.host), *peers(range(1, 6))])
    wait_until(lambda: "shrink" in node.status.problems)

    assert "25 of 30" in node.status.problems["shrink"]
    assert "allow_shrink=True" in node.status.problems["shrink"]
    assert everything(node.host) == before
    node.host.ip(f"route del {subnet(4, 20)}")
    wait_until(lambda: everything(node.host) == before)

    node.script.replace([lease_of(node.host), *peers(range(1, 25))])
    wait_until(node.settled)


def test_a_shrinking_snapshot_is_taken_where_that_was_allowed(host: Any) -> None:
    with AgentNode(host, allow_shrink=True) as node:
        node.script.replace([lease_of(host)])
        wait_until(node.agrees)
        assert not node.status.problems


def test_rejected_claims_are_counted_by_reason(node: AgentNode) -> None:
    bad = BadClaim("nobody", "bad-claim", "it is broken")
    outside = replaced(peer(60), subnet="192.168.0.0/24", ipv6_subnet="")
    node.script.post(Change((outside,), (), (bad,)))

    wait_until(lambda: sum(node.status.rejected.values()) == 2)
    assert node.status.rejected["bad-claim"] == 1
    assert not node.status.degraded, "the cluster's mistakes are not ours"


def test_refresh_reads_everything_again(node: AgentNode) -> None:
    audits, seen = node.status.audits, node.script.refreshes
    node.script.leases |= {lease.label: lease for lease in peers([50])}
    node.agent.refresh()

    wait_until(lambda: node.status.audits > audits)
    wait_until(node.agrees)
    wait_until(lambda: node.status.syncs == 2)
    assert node.script.refreshes == seen + 1


# ---- the kernel -------------------------------------------------------------------------


def test_drift_is_repaired_and_told(node: AgentNode, family: int) -> None:
    host = node.host
    host.ip(f"-{family} route del {subnet(family, 3)}")
    wait_until(node.agrees)
    host.bridge(f"fdb del {mac(family, 4)} dev {DEVICE[family]}")
    wait_until(node.agrees)
    host.ip(
        f"-{family} route add {subnet(family, 77)} via {address(family, 4)} "
        f"dev {DEVICE[family]} onlink"
    )
    wait_until(node.agrees)
    wait_until(lambda: len(node.repairs) == 3)

    assert node.status.drift == {"route-deleted": 1, "fdb-deleted": 1, "route-added": 1}
    assert [[*repair.counts] for repair in node.repairs] == [
        [("route", "deleted")],
        [("fdb", "deleted")],
        [("route", "added")],
    ]
    assert node.status.audits == 0


def test_a_conflict_is_shown_and_solved_when_the_other_route_goes(
    node: AgentNode, family: int
) -> None:
    """At once: the event tells, no audit does."""
    host, metric = node.host, "metric 1024" if family == 6 else ""
    stranger(host, "other0")
    own = lease_of(host).key
    node.script.change(removed=[peer(3).label])
    wait_until(node.agrees)
    host.ip(f"-{family} route add {subnet(family, 3)} dev other0 proto static {metric}")
    node.script.change(added=[peer(3)])
    wait_until(lambda: node.status.conflicts == 1)
    said = node.status.problems["entries"]
    assert said.startswith(f"1 entry conflicts with a foreign one: route {subnet(family, 3)}")
    foreign = host.ip(f"-{family} route show {subnet(family, 3)}")
    assert "other0" in foreign
    assert own in node.script.leases

    host.ip(f"-{family} route del {subnet(family, 3)} dev other0")

    wait_until(node.agrees)
    wait_until(lambda: node.status.conflicts == 0 and not node.status.problems)
    assert node.status.audits == 0


def test_a_conflict_is_over_when_one_family_was_read_again(node: AgentNode, family: int) -> None:
    """The device has changed in the same moment, for which all of its family is read, and of no
    other one."""
    host, metric = node.host, "metric 1024" if family == 6 else ""
    stranger(host, "other0")
    node.script.change(removed=[peer(3).label])
    wait_until(node.agrees)
    host.ip(f"-{family} route add {subnet(family, 3)} dev other0 proto static {metric}")
    node.script.change(added=[peer(3)])
    wait_until(lambda: node.status.conflicts == 1)

    with node.agent.plane.exclusive:  # both events are there when the first one is read
        host.ip(f"-{family} route del {subnet(family, 3)} dev other0")
        host.ip(f"link set {DEVICE[family]} mtu 1300")

    wait_until(node.agrees)
    wait_until(lambda: node.status.conflicts == 0 and not node.status.problems)
    assert ("device", "changed") in [change for one in node.repairs for change in one.counts]
    assert node.status.audits == 0


def test_peers_that_fail_are_tried_again_and_hold_nobody_up(host: Any) -> None:
    """host-gw peers behind a router cannot be reached, until an address makes them near."""
    near = {"public_ip": "192.0.2.77", "public_ipv6": "2001:db8::77"}
    far = {"public_ip": "198.51.100.7", "public_ipv6": "2001:db8:7::7"}
    fields = {"backend_type": "host-gw"}
    leases = [
        replaced(lease_of(host), **fields),
        peer(1, **fields, **near),
        peer(2, **fields, **far),
    ]
    from tests.lib.leases import network_config

    dp = DataPlane(network_config(4, Type="host-gw"), iface="eth0", netns=host.ns)
    with Watched(dp, Script(leases)) as watched:

        def routes() -> set[str]:
            return {r["dst"] for r in host.ip_json("route show proto 138")}

        wait_until(lambda: routes() == {subnet(4, 1)})
        wait_until(lambda: watched.status.failing == 1)
        assert "1 entry failed: " in watched.status.problems["entries"]
        failures = watched.status.failures
        wait_until(lambda: watched.status.failures >= failures + 2)
        with no_further_attempt(watched):
            watched.script.change(added=[peer(3, **fields, **near | {"public_ip": "192.0.2.78"})])
            wait_until(lambda: routes() == {subnet(4, 1), subnet(4, 3)})

        host.ip("address add 198.51.100.1/24 dev eth0")
        wait_until(lambda: subnet(4, 2) in routes())
        wait_until(lambda: not watched.status.problems)
        assert watched.status.failing == 0


def test_a_family_that_cannot_be_does_not_stop_the_other(host: Any) -> None:
    """No IPv6 address when the agent starts: IPv4 follows source and kernel all the same."""
    host.ip("-6 address flush dev eth0 scope global")
    node = AgentNode(host, 4, 6)
    node.agent.start()

    def agrees() -> bool:
        others = [lease for lease in node.script.leases.values() if lease.key != lease_of(host).key]
        return observed(host, 4) == expected(others, 4)

    try:
        wait_until(agrees)
        wait_until(lambda: "IPv6" in node.status.problems.get("kernel", ""))
        assert not node.status.ready
        # Each attempt comes later than the one before; none of this waits for one.
        wait_until(lambda: node.status.failures >= 4)
        with no_further_attempt(node):
            for step in (
                lambda: node.script.change(added=[peer(40)], removed=[peer(5).label]),
                lambda: host.ip(f"route del {subnet(4, 3)}"),
                lambda: host.ip(f"link set {DEVICE[4]} down"),
            ):
                step()
                wait_until(agrees)

        host.ip("address add 2001:db8::1/64 dev eth0 nodad")
        assert node.agent.wait_ready(LIMIT)
        wait_until(node.settled)
    finally:
        node.agent.stop()
        node.agent.join(LIMIT)
        node.plane.close()


# ---- audits -----------------------------------------------------------------------------


def test_audits_of_what_is_right_write_nothing(host: Any) -> None:
    with AgentNode(host, audit=0.02) as node:
        wait_until(lambda: node.status.audits >= 2 and node.settled())
        with Monitor(host) as monitor:
            sent, writes = node.plane.kernel.channel.messages_sent, node.status.writes
            audits = node.status.audits
            wait_until(lambda: node.status.audits >= audits + 10)
            assert monitor.events() == []
        assert node.plane.kernel.channel.messages_sent == sent
        assert node.status.writes == writes
        assert not any("audit" in kind for kind in node.status.drift)
        assert node.status.last_audit is not None


def deaf(node: AgentNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the agent hear of nothing any more, whatever the kernel tells."""
    watch = node.agent._watch
    assert watch is not None
    with node.plane.exclusive:
        monkeypatch.setattr(watch, "_narrow_filter", lambda: None)
        watch._events.set_filter(EventFilter(protocol=255, id_nibble=15))


def test_an_audit_finds_what_no_event_told(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AgentNode(host, audit=0.3) as node:
        rest(node)
        deaf(node, monkeypatch)
        with node.plane.exclusive:  # one audit sees all of it
            host.ip(f"-{family} route del {subnet(family, 3)}")
            host.ip(
                f"-{family} route add {subnet(family, 77)} via {address(family, 4)} "
                f"dev {DEVICE[family]} onlink"
            )
            host.ip(f"neigh del {address(family, 4)} dev {DEVICE[family]}")
            host.bridge(f"fdb del {mac(family, 5)} dev {DEVICE[family]}")
            host.ip(f"link set {DEVICE[family]} mtu 1290")
        wait_until(node.agrees)
        wait_until(lambda: host.ip_json(f"link show {DEVICE[family]}")[0]["mtu"] > 1290)

        wait_until(lambda: node.status.drift.get("route-audit") == 2)
        assert node.status.drift["neighbour-audit"] == 1
        assert node.status.drift["fdb-audit"] == 1
        assert node.repairs == []


def test_what_happens_during_an_audit_is_not_overlooked(host: Any) -> None:
    """The audit has looked and found all in order; before it is over, the device goes down,
    which takes the IPv4 routes along in silence."""
    with AgentNode(host, 4) as node:
        rest(node)
        done: list[int] = []

        def meanwhile() -> None:
            if not done:
                done.append(1)
                host.ip(f"link set {DEVICE[4]} down")

        node.plane.on_written.insert(0, meanwhile)
        node.agent._timers.audit_at = 0.0
        node.agent._wake()
        wait_until(lambda: done and node.status.audits >= 1)

        wait_until(node.agrees)


def test_audits_do_not_keep_step(host: Any) -> None:
    board = StatusBoard()
    agent = Agent(plane(host), Script(), audit=60.0, random=random.Random(1), board=board)
    pauses = [agent._timers.audit_pause() for _ in range(200)]

    assert 54 <= min(pauses) < 55
    assert 65 < max(pauses) <= 66
    agent.plane.close()


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_an_audit_takes_a_time(host: Any, seconds: float) -> None:
    with plane(host) as dp, pytest.raises(ConfigError, match=f"every {seconds} seconds") as caught:
        Agent(dp, Script(), audit=seconds)
    assert caught.value.hint
