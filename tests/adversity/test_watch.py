"""A running agent and everything that happens to a node: queues that overflow, devices that
go, change and come back, writers that do not give in, kernels and sources that stall."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import DataPlane, Overrun, Unavailable
from flannel_dp.agent.agent import Agent
from flannel_dp.reconcile.watch import Watch
from flannel_dp.sources import Inbox
from tests.adversity.worker import added, held
from tests.lib.agents import Script, Watched
from tests.lib.kernel import everything, expected, ifindex, observed
from tests.lib.leases import (
    DEVICE,
    NETWORK,
    address,
    endpoint,
    lease_of,
    mac,
    near_peer,
    network_config,
    peer,
    peers,
    plane,
    replaced,
    subnet,
)
from tests.lib.short import run
from tests.lib.waiting import LIMIT, NEVER, wait_until

ROOT = Path(__file__).parents[2]
PEERS = range(1, 1001)


class Cluster(Watched):
    """An agent on a host and its peers; ``clean`` when the kernel has exactly them."""

    def __init__(
        self,
        host: Any,
        *families: int,
        numbers: Iterable[int] = PEERS,
        lock: bool = True,
        **options: Any,
    ) -> None:
        self.host, self.peers = host, peers(numbers)
        options = {"random": random.Random(3)} | options
        source = Script([lease_of(host), *self.peers])
        super().__init__(plane(host, *families, lock=lock), source, **options)
        self._wanted = {f: expected(self.peers, f) for f in self.plane.families}

    def clean(self, *families: int) -> bool:
        return all(
            observed(self.host, family) == self._wanted[family]
            for family in families or self.plane.families
        )

    def at_rest(self) -> bool:
        """Nothing is left of what has happened."""
        watch = self.agent._watch
        assert watch is not None
        if watch.read():
            self.agent._wake()
            return False
        return True

    def is_clean_again(self) -> None:
        """Wait for the repair. Events alone lead to it: the next audit is an hour away."""
        wait_until(self.clean)
        wait_until(self.at_rest)


@pytest.fixture(scope="module")
def module_host() -> Iterator[Any]:
    from tests.lib.hosts import Lab

    with Lab() as lab:
        yield lab.host()


@pytest.fixture(scope="module")
def thousand(module_host: Any) -> Iterator[Cluster]:
    """One agent with a thousand peers of both families, for the tests that leave it as it was."""
    with Cluster(module_host) as made:
        wait_until(made.at_rest)
        yield made


def flood(host: Any, family: int, enough: Callable[[int], bool]) -> None:
    """Write and delete neighbours of the overlay's device as fast as a socket takes it, until
    ``enough(how many)``. What was there is gone in the end."""
    device = ifindex(host, DEVICE[family])
    from flannel_dp._core import ADD, REMOVE, Table
    from flannel_dp.kernel.netns import call_in_netns
    from flannel_dp.tables.entries import Neighbour

    table = Table("neighbour")
    for number in range(1, 101):
        table.add(Neighbour(device, address(family, number), mac(family, 999)))
    burst = b"".join(table.encode(n, op) for n in range(100) for op in (ADD, REMOVE))
    writer: socket.socket = call_in_netns(
        host.ns, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    )
    count, end = 0, time.monotonic() + LIMIT
    with writer:
        while not enough(count):
            assert time.monotonic() < end
            writer.send(burst)
            count += 200


# ---- events are lost -----------------------------------------------------------------------


def small_queue(plane: DataPlane) -> Watch:
    return Watch(plane, rcvbuf=16384)


@pytest.fixture
def overflowing(host: Any, family: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """An agent at rest whose event socket holds a few dozen events."""
    monkeypatch.setattr("flannel_dp.agent.agent.Watch", small_queue)
    with Cluster(host, family) as cluster:
        wait_until(cluster.at_rest)
        yield cluster


def test_a_storm_that_overflows_the_event_socket(
    host: Any, family: int, overflowing: Cluster
) -> None:
    """It lives, is right after the storm's end, and tells of every overrun."""
    cluster, watch = overflowing, overflowing.agent._watch
    assert watch is not None
    overruns = cluster.status.overruns
    flood(host, family, lambda count: count > 1000 and watch.overruns > overruns)
    cluster.is_clean_again()

    assert watch.overruns > overruns
    wait_until(lambda: cluster.status.overruns == watch.overruns)
    assert not cluster.status.problems


def test_a_storm_that_is_over_is_undone_at_once(
    host: Any, family: int, overflowing: Cluster
) -> None:
    """Events were lost, so that everything is read again: one repair, and then no other."""
    cluster = overflowing
    overruns, repairs = cluster.status.overruns, len(cluster.repairs)
    with cluster.plane.exclusive:  # it reads nothing before the end of the storm
        flood(host, family, lambda count: count > 1000)
    cluster.is_clean_again()

    [repair] = cluster.repairs[repairs:]
    assert repair.report is not None
    assert repair.counts == {("neighbour", "deleted"): 100}
    assert cluster.status.overruns > overruns


def test_lost_acknowledgements_stop_no_repair(thousand: Cluster, family: int) -> None:
    """ENOBUFS while a repair is written: it is read back what happened, and finished."""
    kernel = thousand.plane.kernel
    channel = kernel.channel
    lost = threading.Event()

    class Lossy:
        def __getattr__(self, name: str) -> Any:
            return getattr(channel, name)

        def apply(self, *args: Any, **options: Any) -> Any:
            if not lost.is_set():
                lost.set()
                raise Overrun(105, "write a batch", hint="sync again")
            return channel.apply(*args, **options)

    kernel.channel = Lossy()  # type: ignore[assignment]
    try:
        thousand.host.ip(f"-{family} route del {subnet(family, 3)}")
        thousand.is_clean_again()
        assert lost.is_set()
        wait_until(lambda: not thousand.status.problems)
    finally:
        kernel.channel = channel


# ---- devices ---------------------------------------------------------------------------------


def test_the_device_is_deleted(thousand: Cluster, family: int) -> None:
    """Made again, with the MAC the others know and the lease of before."""
    host, device = thousand.host, DEVICE[family]
    shown, before = host.ip_json(f"link show {device}")[0], ifindex(host, device)
    syncs, refreshes = thousand.status.syncs, thousand.script.refreshes
    host.ip(f"link del {device}")

    thousand.is_clean_again()
    after = host.ip_json(f"link show {device}")[0]
    assert after["ifindex"] != before
    assert (after["address"], after["mtu"]) == (shown["address"], shown["mtu"])
    assert (thousand.status.syncs, thousand.script.refreshes) == (syncs, refreshes)


def test_the_device_goes_down_and_up(thousand: Cluster, family: int) -> None:
    """Up restores nothing, and neither tells of IPv4 routes and nexthops."""
    before = ifindex(thousand.host, DEVICE[family])
    thousand.host.ip(f"link set {DEVICE[family]} down")
    thousand.host.ip(f"link set {DEVICE[family]} up")

    thousand.is_clean_again()
    assert ifindex(thousand.host, DEVICE[family]) == before


def test_the_device_stays_down(thousand: Cluster, family: int) -> None:
    thousand.host.ip(f"link set {DEVICE[family]} down")

    thousand.is_clean_again()
    assert "UP" in thousand.host.ip_json(f"link show {DEVICE[family]}")[0]["flags"]


def test_the_device_gets_another_mac(thousand: Cluster, family: int) -> None:
    """Which flushes a thousand permanent neighbours; the lease's MAC is put back."""
    host, device = thousand.host, DEVICE[family]
    own = host.ip_json(f"link show {device}")[0]["address"]
    host.ip(f"link set {device} address 02:aa:aa:aa:aa:aa")

    thousand.is_clean_again()
    assert host.ip_json(f"link show {device}")[0]["address"] == own


def attribute(host: Any, device: str, name: str) -> Any:
    link = host.ip_json(f"link show {device}")[0]
    return link.get(name, link["linkinfo"].get("info_data", {}).get(name))


@pytest.mark.parametrize(
    ("words", "name"),
    [("mtu 1290", "mtu"), ("type vxlan learning", "learning")],
    ids=["mtu", "learning"],
)
def test_the_device_is_configured_by_somebody_else(
    thousand: Cluster, family: int, words: str, name: str
) -> None:
    host, device = thousand.host, DEVICE[family]
    before, index = attribute(host, device, name), ifindex(host, device)
    repaired = thousand.status.drift.get("device-changed", 0)
    host.ip(f"link set {device} {words}")

    wait_until(lambda: attribute(host, device, name) == before)
    wait_until(lambda: thousand.status.drift.get("device-changed", 0) == repaired + 1)
    assert ifindex(host, device) == index
    assert thousand.clean()


def rogues(host: Any, family: int) -> None:
    """Entries on our device that nobody's lease asks for."""
    device = DEVICE[family]
    host.bridge(f"fdb add 02:aa:aa:aa:aa:aa dev {device} dst {endpoint(family, 7)} self permanent")
    host.bridge(
        f"fdb append {mac(family, 8)} dev {device} dst {endpoint(family, 7)} self permanent"
    )
    host.ip(
        f"-{family} route add {subnet(family, 2000)} via {address(family, 9)} dev {device} onlink"
    )
    host.ip(f"neigh add {address(family, 2000)} lladdr {mac(family, 7)} dev {device}")


def test_rogue_entries_on_the_device(thousand: Cluster, family: int) -> None:
    rogues(thousand.host, family)
    thousand.is_clean_again()


def test_what_no_event_told_is_found_by_the_audit(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, and the device's settings, with an agent that is deaf to events."""
    from flannel_dp.tables.entries import EventFilter

    with Cluster(host, family, numbers=range(1, 101), audit=0.25) as cluster:
        wait_until(cluster.at_rest)
        watch, device = cluster.agent._watch, DEVICE[family]
        assert watch is not None
        before = {name: attribute(host, device, name) for name in ("mtu", "learning")}
        with cluster.plane.exclusive:
            monkeypatch.setattr(watch, "_narrow_filter", lambda: None)
            watch._events.set_filter(EventFilter(protocol=255, id_nibble=15))
        rogues(host, family)
        host.ip(f"link set {device} mtu 1290")
        host.ip(f"link set {device} type vxlan learning")

        wait_until(cluster.clean)
        wait_until(lambda: {n: attribute(host, device, n) for n in ("mtu", "learning")} == before)
        wait_until(lambda: cluster.status.drift.get("route-audit") == 1)
        assert {kind for kind in cluster.status.drift if "audit" in kind} >= {
            "fdb-audit",
            "neighbour-audit",
        }


def new_underlay(lab: Any, host: Any) -> None:
    """eth0 once more, with the same addresses: another device of the same name."""
    switch = lab.switch
    host.ip(f"link add eth0 type veth peer name again netns {switch}")
    run("ip", "-n", switch, "link", "set", "again", "master", lab.bridge, "up")
    host.ip(f"address add {host.ipv4}/24 dev eth0")
    host.ip(f"address add {host.ipv6}/64 dev eth0 nodad")
    host.ip("link set eth0 up")


def test_the_underlay_is_deleted_and_comes_back(lab: Any, host: Any) -> None:
    """The tunnels go with it. Changes of the cluster meanwhile are not forgotten."""
    with Cluster(host) as cluster:
        before = ifindex(host, "eth0")
        host.ip("link del eth0")
        wait_until(lambda: "eth0" in cluster.status.problems.get("kernel", ""))
        failures = cluster.status.failures
        cluster.script.change(added=[peer(1500)], removed=[peer(5).label])
        wait_until(lambda: cluster.status.failures > failures)
        cluster.peers = [p for p in cluster.peers if p != peer(5)] + [peer(1500)]
        cluster._wanted = {f: expected(cluster.peers, f) for f in (4, 6)}

        new_underlay(lab, host)

        cluster.is_clean_again()
        assert ifindex(host, "eth0") != before
        wait_until(lambda: not cluster.status.problems)


# ---- others who write ------------------------------------------------------------------------


def test_two_agents_of_one_cluster_do_not_fight(host: Any) -> None:
    """Each sees in the kernel what it wants, whoever wrote it."""
    with Cluster(host, numbers=range(1, 51)) as one:
        wait_until(one.at_rest)
        with Cluster(host, numbers=range(1, 51), audit=0.05, lock=False) as other:
            wait_until(other.at_rest)
            wait_until(one.at_rest)
            written = one.status.writes, other.status.writes
            assert other.status.writes == 0
            host.ip(f"route del {subnet(4, 3)}")
            host.ip(f"link set {DEVICE[6]} down")
            audits = other.status.audits
            wait_until(one.clean)
            wait_until(lambda: other.status.audits >= audits + 5)
            wait_until(lambda: one.at_rest() and other.at_rest())
            assert one.clean()
            # Both may have repaired it, and that is all.
            total = one.status.writes + other.status.writes - sum(written)
            assert total <= 4 * 3 * 50


class Rival:
    """Another program that puts its own route back whenever it was removed, like a second
    daemon with another idea of the cluster."""

    def __init__(self, host: Any, family: int) -> None:
        self._host, self._family = host, family
        self._stop = threading.Event()
        self.written = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        from flannel_dp._core import ADD, Table
        from flannel_dp.kernel.netns import call_in_netns
        from flannel_dp.tables.entries import Neighbour

        table = Table("neighbour")
        device = ifindex(self._host, DEVICE[self._family])
        table.add(Neighbour(device, address(self._family, 3), mac(self._family, 333)))
        message = table.encode(0, ADD)
        writer: socket.socket = call_in_netns(
            self._host.ns,
            lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE),
        )
        with writer:
            while not self._stop.is_set():
                writer.send(message)
                self.written += 1

    def __enter__(self) -> Rival:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_second_writer_that_does_not_give_in(host: Any, family: int) -> None:
    """A hundred repairs at once, ten a second from then on, and the cluster is followed."""
    with Cluster(host, family, numbers=range(1, 51)) as cluster:
        wait_until(cluster.at_rest)
        before, started = len(cluster.repairs), time.monotonic()
        with Rival(host, family) as rival:
            wait_until(lambda: len(cluster.repairs) - before >= 105)
            cluster.script.change(removed=[peer(40).label])
            gone = subnet(family, 40)
            wait_until(lambda: gone not in {r[0] for r in observed(host, family)["route"]})
            repairs, passed = [*cluster.repairs[before:]], time.monotonic() - started
            made = len(repairs)
            assert rival.written > 2 * made
        assert made <= 101 + 10 * passed
        written = sum(sum(repair.counts.values()) for repair in repairs)
        assert written <= made + 1, "one entry each"
        cluster.peers.remove(peer(40))
        cluster._wanted = {family: expected(cluster.peers, family)}
        cluster.is_clean_again()


@pytest.mark.parametrize("kind", ["host-gw", "vxlan"])
def test_direct_routes_that_a_network_manager_removes(host: Any, family: int, kind: str) -> None:
    """As systemd-networkd does at its start with ManageForeignRoutes=yes: all routes that it
    does not know, on the interfaces that it manages. The tunnel's routes are not among them."""
    backend = {"Type": kind} | ({"DirectRouting": True} if kind == "vxlan" else {})
    fields = {"backend_type": kind}
    close = [near_peer(number, **fields) for number in range(1, 51)]
    far = peers(range(51, 101)) if kind == "vxlan" else []
    dp = DataPlane(network_config(family, **backend), iface="eth0", netns=host.ns)

    def routes(device: str) -> set[str]:
        return {r["dst"] for r in host.ip_json(f"-{family} route show proto 138 dev {device}")}

    wanted = {subnet(family, number) for number in range(1, 51)}
    with Watched(dp, Script([replaced(lease_of(host), **fields), *close, *far])) as watched:
        wait_until(lambda: routes("eth0") == wanted)
        lines = [f"route del {route}" for route in sorted(wanted)]
        objects = host.ip_json("nexthop show dev eth0") if family == 4 else []
        tunnelled = observed(host, family) if far else None
        for batch in ([f"nexthop del id {n['id']}" for n in objects] or lines, lines):
            host.ip_batch(f"-{family}", *batch)
            wait_until(lambda: routes("eth0") == wanted)
        wait_until(lambda: watched.status.drift["route-deleted"] >= 100)  # written, then counted
        assert watched.status.drift["route-deleted"] == 100
        if tunnelled is not None:
            assert len(tunnelled["route"]) == 50
            assert observed(host, family) == tunnelled


# ---- what stalls -------------------------------------------------------------------------------


def test_a_source_that_stalls_holds_nothing_up(host: Any, family: int) -> None:
    """It hangs in the middle of its work, deaf to everything: drift is repaired, audits are
    made, and the agent can be stopped."""
    hung, release = threading.Event(), threading.Event()

    class Stalling(Script):
        def follow(self, inbox: Inbox) -> None:
            inbox.put(self.snapshot())
            inbox.trouble(Unavailable("the store does not answer", hint="wait"))
            hung.set()
            release.wait(NEVER)

    leases = [lease_of(host), *peers(range(1, 51))]
    watched = Watched(plane(host), Stalling(leases), audit=0.1)
    try:
        with watched:
            assert hung.wait(LIMIT)
            host.ip(f"-{family} route del {subnet(family, 3)}")
            host.ip(f"link set {DEVICE[family]} down")
            wait_until(lambda: observed(host, family) == expected(leases[1:], family))
            watched.agent.refresh()
            audits = watched.status.audits
            wait_until(lambda: watched.status.audits >= audits + 2)
            assert "does not answer" in watched.status.problems["source"]
            watched.agent.stop()
            watched.agent.join(LIMIT)
    finally:
        release.set()


def test_a_family_whose_device_cannot_be_made_does_not_stop_the_other(host: Any) -> None:
    """Somebody took IPv6's device away and put one of another kind in its place."""
    with Cluster(host, numbers=range(1, 101)) as cluster:
        wait_until(cluster.at_rest)
        with cluster.plane.exclusive:  # quicker than the agent
            host.ip(f"link del {DEVICE[6]}")
            host.ip(f"link add {DEVICE[6]} type bridge")
        wait_until(lambda: DEVICE[6] in cluster.status.problems.get("kernel", ""))
        host.ip(f"link set {DEVICE[4]} down")
        wait_until(lambda: cluster.clean(4))
        assert host.ip_json(f"link show {DEVICE[6]}")[0]["linkinfo"]["info_kind"] == "bridge"

        host.ip(f"link del {DEVICE[6]}")
        cluster.is_clean_again()
        wait_until(lambda: not cluster.status.problems)


# ---- families ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [4, 6], ids=["ipv4", "ipv6"])
def test_a_family_is_lost_and_comes_back(host: Any, number: int) -> None:
    """The addresses of one family leave the interface and return; the other one does not
    notice, and drift of it is repaired meanwhile."""
    other = 10 - number
    bits = {4: 24, 6: 64}
    with Cluster(host, numbers=range(1, 101)) as cluster:
        wait_until(cluster.at_rest)
        host.ip(f"address del {host.underlay(number)}/{bits[number]} dev eth0")
        wait_until(lambda: f"IPv{number}" in cluster.status.problems.get("kernel", ""))
        assert cluster.clean(other)
        host.ip(f"-{other} route del {subnet(other, 3)}")
        wait_until(lambda: cluster.clean(other))
        cluster.script.change(added=[peer(300)])
        there = subnet(other, 300)
        wait_until(lambda: there in {r[0] for r in observed(host, other)["route"]})

        nodad = "nodad" if number == 6 else ""
        host.ip(f"address add {host.underlay(number)}/{bits[number]} dev eth0 {nodad}")

        cluster.peers.append(peer(300))
        cluster._wanted = {f: expected(cluster.peers, f) for f in (4, 6)}
        cluster.is_clean_again()
        wait_until(lambda: not cluster.status.problems)


def test_ipv6_alone(host: Any) -> None:
    """With no IPv4 address on the node at all."""
    host.ip("-4 address flush dev eth0")
    with Cluster(host, 6, numbers=range(1, 101)) as cluster:
        wait_until(cluster.at_rest)
        assert cluster.status.peers == {6: 100}
        host.ip(f"link set {DEVICE[6]} down")
        cluster.is_clean_again()
        host.ip(f"link del {DEVICE[6]}")
        cluster.is_clean_again()
        rogues(host, 6)
        cluster.is_clean_again()
        assert NETWORK[4] not in "".join(everything(host))


# ---- a long time --------------------------------------------------------------------------------


class Here:
    """The namespace that the process is in, as ``plane`` and ``lease_of`` ask for it."""

    ns, iface = None, "eth0"
    ipv4, ipv6 = "192.0.2.1", "2001:db8::1"


def many_passes(count: int) -> None:
    """In a process of its own: so many audits after the first ones, and drift now and then."""
    before: list[dict[str, int]] = []
    found: list[dict[str, int]] = []
    first = 100

    def turn() -> None:
        done = agent.status.audits
        if not before and done >= first:
            before.append(held())
        elif done >= first + count and not found:
            found.append(added(before[0]))
            agent.stop()
        elif done % 50 == 7:
            family = 4 if done % 100 < 50 else 6
            run("ip", f"-{family}", "route", "del", subnet(family, 3))

    with plane(Here) as dp:
        cluster = Script([lease_of(Here), *peers(range(1, 6))])
        agent = Agent(dp, cluster, audit=1e-4, on_turn=turn)
        agent.run()
    status = agent.status
    print(json.dumps(found[0] | {"audits": status.audits, "drift": status.drift}))


def test_hundreds_of_passes_leave_no_trace_in_the_process(host: Any) -> None:
    count = 500
    program = f"from tests.adversity.test_watch import many_passes as m; m({count})"
    done = subprocess.run(
        ["ip", "netns", "exec", host.ns, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=2 * LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert found["audits"] >= count
    assert found["fds"] == 0
    assert found["blocks"] < count, "not one object for every pass"
    assert found["malloc"] < 100 * count
    assert found["rss"] < 1 << 20
    assert found["drift"]["route-deleted"] >= count // 50 - 1
