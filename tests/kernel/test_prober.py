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
from tests.lib.forwarding import Nodes, PodNode
from tests.lib.leases import half
from tests.lib.probed import Probed
from tests.lib.waiting import LIMIT, wait_until

FORWARDING = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}


class Told:
    """What a prober has told."""

    def __init__(self, peers: Any, **options: Any) -> None:
        self.changes: list[LifeChange] = []
        self.problems: list[str] = []
        self.mtus: list[tuple[str, int]] = []
        self.prober = Prober(
            peers,
            **({"interval": 0.5} | options),
            on_mtu=lambda new: self.mtus.extend((n.peer.subnet, n.peer.path_mtu) for n in new),
            on_change=self.changes.extend,
            on_problem=self.problems.append,
        )

    def lives(self) -> dict[str, str]:
        return {one.subnet: one.life for one in self.prober.peers()}

    def wait(self, condition: Callable[[], object]) -> None:
        wait_until(
            condition,
            describe=lambda: f"{self.lives()} {self.mtus} {self.changes} {self.prober.problem}",
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


def test_the_path_mtu_is_measured(probed: Probed) -> None:
    """Of peers behind a switch that takes less than the device sends: when they come, when it takes
    still less, and when it takes all again."""
    first, second = probed.nodes[1:3]
    # A veth lets in four bytes more than its MTU; in IPv6 the answer is what does not go out.
    around = {4: 46, 6: 70}[probed.family]

    def take(mtus: dict[PodNode, int]) -> None:
        for node, mtu in mtus.items():
            node.host.ip(f"link set {node.host.iface} mtu {mtu}")

    def narrow(mtus: dict[PodNode, int]) -> dict[str, int]:
        return {probed.subnet(node): mtu - around for node, mtu in mtus.items()}

    def taken(prober: Prober) -> dict[str, int]:
        return {one.subnet: one.path_mtu for one in prober.narrow()}

    steps: list[dict[PodNode, int]] = [{first: 1350, second: 1400}, {first: 1300, second: 1400}]
    take(steps[0])
    told = Told(probed.planes[0], interval=0.05)
    with told.prober as prober:
        for step in steps:
            take(step)
            told.wait(lambda step=step: taken(prober) == narrow(step))
        found = prober.peer(probed.subnet(first))
        assert found is not None
        assert found.life == "lossy"
        assert found.lost_size == found.mtu > found.path_mtu == 1300 - around
        assert found.described == (
            f"packets of {found.mtu} bytes are lost, its path takes {found.path_mtu} bytes"
        )
        take({first: 1500, second: 1500})
        for node in probed.nodes:  # the kernel remembers for ten minutes what a path took
            node.host.ip("-6 route flush cache")
        told.wait(lambda: not prober.narrow())
        told.wait(lambda: prober.totals.count("alive") == 3)
        assert prober.peers()[0].path_mtu == found.mtu
    assert [mtu for subnet, mtu in told.mtus if subnet == found.subnet] == [
        1350 - around,
        1300 - around,
        found.mtu,
    ]
    assert probed.subnet(probed.nodes[3]) not in {subnet for subnet, _ in told.mtus}
    assert [one.peer.life for one in told.changes if one.peer.subnet != found.subnet].count(
        "lossy"
    ) == 1


def test_a_device_takes_more_than_the_largest_probe(probed: Probed) -> None:
    """Probes have 9216 bytes then, of which the switch takes a part."""
    iface, subnet = probed.first.host.iface, probed.subnet(probed.nodes[1])
    probed.at(probed.first, f"link set {iface} mtu 65000", f"link set {probed.device} mtu 64900")
    found = probed.prove(subnet).peers[0]
    assert (found.code, found.mtu) == ("mtu", 9216)
    assert 1300 < (found.path_mtu or 0) <= 1500
    told = Told(probed.planes[0])
    with told.prober as prober:
        told.wait(lambda: told.lives().get(subnet) == "lossy")
        peer = prober.peer(subnet)
    assert peer is not None
    assert peer.lost_size == 9216


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
        host.exec("nft", "delete table inet cut")
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
