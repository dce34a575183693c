"""``Prober``: who is alive is known all the time, and deaths are told once and rightly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import ConfigError, LifeChange, NotPermitted, Prober, SourceError
from flannel_dp.kernel.capabilities import drop_capabilities
from flannel_dp.kernel.netns import call_in_netns, call_on_thread
from flannel_dp.probe.line import PacketSockets
from tests.lib.forwarding import Nodes
from tests.lib.hosts import run
from tests.lib.leases import half
from tests.lib.probed import Probed
from tests.lib.waiting import LIMIT, wait_until

FORWARDING = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}


class Told:
    """What a prober has told."""

    def __init__(self, peers: Any, **options: Any) -> None:
        self.changes: list[LifeChange] = []
        self.problems: list[str] = []
        self.prober = Prober(
            peers,
            interval=0.5,
            on_change=self.changes.extend,
            on_problem=self.problems.append,
            **options,
        )

    def lives(self) -> dict[str, str]:
        return {one.subnet: one.life for one in self.prober.peers()}

    def wait(self, condition: Callable[[], object]) -> None:
        wait_until(
            condition,
            describe=lambda: f"{self.lives()} {self.changes} {self.prober.problem}",
        )


@pytest.fixture
def probed(nodes: Nodes, family: int) -> Iterator[Probed]:
    made = Probed(nodes(4), family, "kernel")
    yield made
    made.close()


def forward(probed: Probed, number: int, on: int) -> None:
    probed.nodes[number].host.sysctl(FORWARDING[probed.family], on)


def subnets(probed: Probed) -> list[str]:
    return [probed.subnet(node) for node in probed.nodes[1:]]


def test_a_peer_dies_and_comes_back(probed: Probed) -> None:
    """Each is told once; a peer that loses packets is lossy, and is not told to die."""
    told = Told(probed.planes[0])
    dying, losing, well = subnets(probed)
    with told.prober as prober:
        assert prober.wait_known(LIMIT)
        assert told.lives() == dict.fromkeys(subnets(probed), "alive")
        told.wait(lambda: len(told.changes) == 3)
        probed.drop(probed.nodes[2], "udp dport 8472 numgen inc mod 3 == 0", "input")
        forward(probed, 1, 0)
        told.wait(lambda: told.lives() == {dying: "dead", losing: "lossy", well: "alive"})
        found = prober.peer(dying)
        assert found is not None
        assert (found.endpoint, found.mac) == half(probed.second.lease, probed.family)[1:]
        assert found.described.startswith("no probe has come back for ")
        assert prober.totals.count("dead") == 1
        forward(probed, 1, 1)
        told.wait(lambda: told.lives()[dying] == "alive")
        more = prober.totals.sent + 40
        told.wait(lambda: prober.totals.sent > more)
        # A data plane's changes are followed.
        probed.planes[0].update(removed=[probed.nodes[3].lease])
        told.wait(lambda: {*told.lives()} == {dying, losing})
        probed.planes[0].update(added=[probed.nodes[3].lease])
        told.wait(lambda: told.lives().get(well) == "alive")
    turns = [(one.before, one.peer.life) for one in told.changes if one.peer.subnet == dying]
    assert turns == [("new", "alive"), ("alive", "dead"), ("dead", "alive")]
    turns = [(one.before, one.peer.life) for one in told.changes if one.peer.subnet == losing]
    assert ("lossy", "dead") not in turns
    assert turns[:2] == [("new", "alive"), ("alive", "lossy")]
    assert told.problems == []


def test_large_packets_that_are_lost(probed: Probed) -> None:
    """A switch on the way takes less than the device sends."""
    narrow = probed.nodes[1]
    narrow.host.ip(f"link set {narrow.host.iface} mtu 1400")
    told = Told(probed.planes[0])
    subnet = probed.subnet(narrow)
    with told.prober as prober:
        told.wait(lambda: told.lives().get(subnet) == "lossy")
        found = prober.peer(subnet)
        assert found is not None
        assert found.alive
        assert found.lost_size > 1380
        assert found.described == (
            f"packets of {found.lost_size} bytes are lost, and smaller ones are not"
        )
        narrow.host.ip(f"link set {narrow.host.iface} mtu 1500")
        told.wait(lambda: told.lives()[subnet] == "alive")
    assert [one.peer.life for one in told.changes if one.peer.subnet != subnet] == ["alive"] * 2


def test_a_dead_uplink_is_one_problem(probed: Probed) -> None:
    """And no peer is told to die: an interface that is down, and a network that takes nothing."""
    told, host = Told(probed.planes[0]), probed.first.host
    with told.prober as prober:
        assert prober.wait_known(LIMIT)
        host.ip(f"link set {host.iface} down")
        told.wait(lambda: prober.problem == f"{host.iface} is down")
        host.ip(f"link set {host.iface} up")
        if probed.family == 6:  # its addresses went with it
            host.ip(f"address add {host.underlay(6)}/64 dev {host.iface} nodad")
        probed.sync(0)
        told.wait(lambda: not prober.problem)
        told.wait(lambda: prober.totals.count("alive") == 3)
        probed.drop(probed.first, "udp dport 8472", "input")
        told.wait(lambda: prober.problem.startswith("no peer answers"))
        call = ["ip", "netns", "exec", host.ns, "nft", "delete", "table", "inet", "cut"]
        run(*call)
        told.wait(lambda: not prober.problem)
        told.wait(lambda: prober.totals.count("alive") == 3)
    assert {one.peer.life for one in told.changes} == {"alive"}
    assert len(told.changes) <= 6  # once more where the device lost its routes


def test_a_list_of_peers_is_enough(probed: Probed) -> None:
    """By (address, MAC, device), with the privileges that were there before, and with asyncio."""
    family, ns = probed.family, probed.first.host.ns
    bits = {4: 32, 6: 128}[family]
    peers = [
        (half(node.lease, family)[0].partition("/")[0], half(node.lease, family)[2], probed.device)
        for node in probed.nodes[1:]
    ]
    sockets = PacketSockets(ns)

    def unprivileged() -> Prober:
        drop_capabilities({"CAP_NET_ADMIN", "CAP_SYS_ADMIN"}, no_new_privs=False, thread=True)
        with pytest.raises(NotPermitted, match="CAP_NET_RAW"):
            Prober(peers, netns=ns)
        return Prober(peers, interval=0.5, netns=ns, sockets=sockets)

    page = (Path(__file__).parents[2] / "docs/probe.md").read_text()
    snippet = page.partition("```python\n")[2].partition("```")[0]
    begin, end = snippet.index("peers = "), snippet.index("\nwith ")
    lines: list[object] = []
    given = {"peers": peers, "print": lambda *words: lines.append(words)}
    call_in_netns(ns, exec, snippet[:begin] + snippet[end:], given)
    assert [line[:2] for line in lines if isinstance(line, tuple)][:3] == [
        (f"{address}/{bits}", "alive") for address, _, _ in peers
    ]

    async def first_death(prober: Prober) -> LifeChange:
        async for change in prober:
            if change.peer.life == "dead":
                return change
        raise AssertionError("it ended")

    try:
        with call_on_thread(unprivileged) as prober:
            assert prober.wait_known(LIMIT)
            forward(probed, 1, 0)
            found = asyncio.run(asyncio.wait_for(first_death(prober), LIMIT))
            assert found.peer.subnet == f"{peers[0][0]}/{bits}"
            assert prober.totals.count("alive") == 2
            assert len(prober) == 3
    finally:
        sockets.close()


@pytest.mark.parametrize(
    ("peers", "options", "error"),
    [
        ([("10.244.2.0", "02:00:00:00:00:02")], {}, "this is no peer"),
        ([("10.244.2", "02:00:00:00:00:02", "lo")], {}, "this is no peer"),
        ([("10.244.2.0", "02", "lo")], {}, "this cannot be a peer entry"),
        ([("10.244.2.0", "02:00:00:00:00:02", "absent0")], {}, "there is no device 'absent0'"),
        ([], {"interval": 0}, "an interval of 0 seconds"),
        ([], {"paths": 17}, "17 paths"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(peers: Any, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        Prober(peers, **options)


def test_a_data_plane_that_was_never_synced(nodes: Nodes) -> None:
    with nodes(1)[0].plane(4, forwarding="kernel") as plane, pytest.raises(SourceError):
        Prober(plane)
