"""A node that flanneld runs is taken over, and given back, with everybody's rules and routes as
they were: flanneld's own chains, too, which are flanneld's to remove."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pyroute2 import IPRoute

from flannel_dp import DataPlane
from flannel_dp.kernel.netns import call_in_netns, call_on_thread
from flannel_dp.resources.firewall.options import RulesOptions
from tests.lib.kernel import everything, expected, ifindex, observed, stranger
from tests.lib.leases import (
    DEVICE,
    NETWORK,
    PROTOCOL,
    half,
    lease_of,
    network_config,
    peer,
    peers,
    plane,
    subnet,
)
from tests.lib.monitor import Monitor
from tests.lib.traffic import Pings, pod, pod_address

ENGINES = ("nft", "iptables-nft")
DIRECT: tuple[dict[str, Any], ...] = (
    {"Type": "host-gw"},
    {"Type": "vxlan", "DirectRouting": True},
)
MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}
NOTHING: dict[str, set[Any]] = {name: set() for name in ("route", "neighbour", "fdb", "nexthop")}

#: What flanneld's pkg/trafficmngr/iptables hands to iptables-restore.
FLANNELD_RULES = """\
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {own} -d {net} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {net} -d {own} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s {net} -d {own} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {net} ! -d {multicast} -m comment --comment "flanneld masq" \
-j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {net} -d {net} -m comment --comment "flanneld masq" \
-j MASQUERADE --random-fully
-A POSTROUTING -s {own} ! -o docker0 -j MASQUERADE
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {net} -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d {net} -m comment --comment "flanneld forward" -j ACCEPT
-A INPUT -p tcp --dport 22 -j ACCEPT
COMMIT
"""
THEIR_TABLE = """
add table inet theirs
add chain inet theirs forward { type filter hook forward priority 5; policy accept; }
add rule inet theirs forward iifname "eth7" drop
"""


@dataclass(frozen=True)
class Nodes:
    """Two nodes as flanneld leaves them, a pod on each, and all their leases."""

    family: int
    hosts: list[Any]
    pods: list[str]
    own: list[Any]
    others: list[Any]
    bare: list[list[str]]

    @property
    def leases(self) -> list[Any]:
        return [*self.own, *self.others]

    def flanneld_starts(self, number: int) -> None:
        """flanneld's start on a node: an existing device is kept, every entry is replaced."""
        host, leases = self.hosts[number], [self.own[1 - number], *self.others]
        device, family = DEVICE[self.family], self.family
        if device not in host.ip("link show"):
            net, local, lladdr = half(self.own[number], family)
            host.ip(
                f"link add {device} address {lladdr} mtu {1450 if family == 4 else 1430} "
                f"type vxlan id 1 local {local} dev eth0 dstport 8472 nolearning"
            )
            bits = "32" if family == 4 else "128 nodad"
            place, _, flags = bits.partition(" ")
            host.ip(f"address add {net.partition('/')[0]}/{place} dev {device} {flags}")
            host.ip(f"link set {device} up")
        call_in_netns(host.ns, call_on_thread, self._fill, ifindex(host, device), leases)
        nets = [half(lease, family)[0] for lease in leases]
        host.ip_batch(
            f"-{family}",
            *(
                f"route replace {net} via {net.partition('/')[0]} dev {device} onlink proto boot"
                for net in nets
            ),
        )

    def _fill(self, device: int, leases: list[Any]) -> None:
        with IPRoute() as ipr:
            for net, underlay, lladdr in (half(lease, self.family) for lease in leases):
                to = net.partition("/")[0]
                ipr.neigh("replace", ifindex=device, dst=to, lladdr=lladdr, state=0x80)
                ipr.fdb("replace", ifindex=device, lladdr=lladdr, dst=underlay, state=0x80, flags=2)

    def plane(self, number: int, engine: str) -> DataPlane:
        rules = RulesOptions(ip_masq=True, engine=engine)
        return plane(self.hosts[number], self.family, rules=rules)

    def sync(self, number: int, engine: str) -> None:
        with self.plane(number, engine) as dp:
            assert dp.sync(self.leases).ok
            assert dp.plan(self.leases).is_empty

    def clean(self, number: int, engine: str, *, keep_device: bool) -> None:
        with self.plane(number, engine) as dp:
            assert dp.clean(keep_device=keep_device).ok

    def foreign(self, number: int) -> list[str]:
        """All but what concerns the overlay's device."""
        return everything(self.hosts[number], DEVICE[self.family])

    def entries(self, number: int) -> dict[str, set[Any]]:
        return observed(self.hosts[number], self.family)

    def pinging(self) -> tuple[Pings, Pings]:
        """From pod to pod, both ways, every 10 ms."""
        there, back = (pod_address(self.family, number) for number in (1, 0))
        return Pings(self.pods[0], there), Pings(self.pods[1], back)


def rules(host: Any) -> str:
    """Every rule, counters aside: as nft and as both iptables see them."""
    listings = (["nft", "list", "ruleset"], ["iptables-nft-save"], ["ip6tables-nft-save"])
    text = "".join(host.exec(*listing) for listing in listings)
    text = re.sub(r"\[\d+:\d+\]|packets \d+ bytes \d+", "", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def flanneld_rules(host: Any, family: int, number: int) -> None:
    text = FLANNELD_RULES.format(
        own=subnet(family, number), net=NETWORK[family], multicast=MULTICAST[family]
    )
    program = "iptables-nft-restore" if family == 4 else "ip6tables-nft-restore"
    command = ["ip", "netns", "exec", host.ns]
    subprocess.run([*command, program, "--noflush"], input=text, text=True, check=True)
    subprocess.run([*command, "nft", "-f", "-"], input=THEIR_TABLE, text=True, check=True)


@pytest.fixture
def nodes(lab: Any, make_host: Callable[..., Any], family: int) -> Nodes:
    hosts = [make_host(), make_host()]
    pods = [pod(lab, host, number) for number, host in enumerate(hosts)]
    for host in hosts:
        stranger(host, "other0")
        host.ip(f"-{family} route add {subnet(family, 300)} dev other0")
        host.ip(f"-{family} neigh add {host.underlay(family)}7 lladdr 02:00:00:00:77:77 dev eth0")
    own = [lease_of(host, number) for number, host in enumerate(hosts)]
    bare = [everything(host) for host in hosts]
    made = Nodes(family, hosts, pods, own, peers(range(2, 40)), bare)
    for number, host in enumerate(hosts):
        flanneld_rules(host, family, number)
        made.flanneld_starts(number)
    return made


@pytest.mark.parametrize("engine", ENGINES)
def test_take_over_and_hand_back(nodes: Nodes, engine: str) -> None:
    family, device = nodes.family, DEVICE[nodes.family]
    before = [(rules(host), nodes.foreign(n)) for n, host in enumerate(nodes.hosts)]
    links = [host.ip(f"link show {device}") for host in nodes.hosts]
    theirs = [nodes.entries(number) for number in (0, 1)]
    assert {route[2] for route in theirs[0]["route"]} == {"boot"}
    forth, back = nodes.pinging()

    with forth, back:
        for number in (0, 1):
            nodes.sync(number, engine)
            forth.await_answers(3)
            back.await_answers(3)

    assert (forth.lost, back.lost) == (0, 0)
    for number, host in enumerate(nodes.hosts):
        others = [nodes.own[1 - number], *nodes.others]
        assert nodes.entries(number) == expected(others, family)
        assert nodes.foreign(number) == before[number][1]
        now = rules(host).splitlines()
        assert [line for line in before[number][0].splitlines() if line not in now] == []
        assert "flannel-dp" in "\n".join(now).lower()

    for number, host in enumerate(nodes.hosts):
        nodes.clean(number, engine, keep_device=True)
        assert (rules(host), nodes.foreign(number)) == before[number]
        assert nodes.entries(number) == NOTHING
        assert host.ip(f"link show {device}") == links[number]
        nodes.flanneld_starts(number)
        assert nodes.entries(number) == theirs[number]

    forth, back = nodes.pinging()
    with forth, back:
        forth.await_answers(10)
        back.await_answers(10)
    assert (forth.lost, back.lost) == (0, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_clean_leaves_the_node_as_if_no_overlay_had_been_there(nodes: Nodes, engine: str) -> None:
    before = [rules(host) for host in nodes.hosts]
    for number, host in enumerate(nodes.hosts):
        nodes.sync(number, engine)

        nodes.clean(number, engine, keep_device=False)

        assert DEVICE[nodes.family] not in host.ip("link show")
        assert everything(host) == nodes.bare[number]
        assert rules(host) == before[number]
        with nodes.plane(number, engine) as dp:
            again = dp.clean()
        assert again.ok
        assert (again.writes, again.devices) == (0, ())
        nodes.flanneld_starts(number)

    forth, back = nodes.pinging()
    with forth, back:
        forth.await_answers(3)
        back.await_answers(3)
    assert (forth.lost, back.lost) == (0, 0)


def test_flanneld_takes_a_running_node_back_without_a_lost_packet(nodes: Nodes) -> None:
    """Started over our entries, it replaces each; what then is left of ours serves nobody."""
    theirs = [nodes.entries(number) for number in (0, 1)]
    before = [rules(host) for host in nodes.hosts]
    for number in (0, 1):
        nodes.sync(number, "nft")
    forth, back = nodes.pinging()

    with forth, back:
        for number, host in enumerate(nodes.hosts):
            nodes.flanneld_starts(number)
            host.ip(f"nexthop flush proto {PROTOCOL}")
            host.exec("nft", f"delete table {'ip' if nodes.family == 4 else 'ip6'} flannel-dp")
            forth.await_answers(3)
            back.await_answers(3)

    assert (forth.lost, back.lost) == (0, 0)
    assert [nodes.entries(number) for number in (0, 1)] == theirs
    assert [rules(host) for host in nodes.hosts] == before


def test_a_node_is_handed_back_entry_by_entry_before_flanneld_starts(nodes: Nodes) -> None:
    """It has exactly flanneld's entries; our rules stay until flanneld has its own."""
    theirs = [nodes.entries(number) for number in (0, 1)]
    before = [rules(host) for host in nodes.hosts]
    for number in (0, 1):
        nodes.sync(number, "nft")
    forth, back = nodes.pinging()

    with forth, back:
        for number, host in enumerate(nodes.hosts):
            ours = rules(host)
            with (
                Monitor(host) as monitor,
                plane(host, nodes.family, hand_back=True, subnet_file="/nowhere/subnet.env") as dp,
            ):
                assert dp.sync(nodes.leases).ok
                assert dp.plan(nodes.leases).is_empty
                assert monitor.deleted("route", "neighbour", "fdb", "link") == set()
            assert nodes.entries(number) == theirs[number]
            assert host.ip("nexthop show") == ""
            assert rules(host) == ours
            nodes.flanneld_starts(number)
            with nodes.plane(number, "auto") as dp:
                assert dp.clean(only_rules=True).ok
            assert nodes.entries(number) == theirs[number]
            assert rules(host) == before[number]
            forth.await_answers(3)
            back.await_answers(3)
    assert (forth.lost, back.lost) == (0, 0)


@pytest.mark.parametrize("backend", DIRECT, ids=["host-gw", "direct"])
def test_direct_routes_are_taken_over_and_given_back(
    lab: Any, make_host: Callable[..., Any], family: int, backend: dict[str, Any]
) -> None:
    """flanneld's host-gw: a route of protocol boot for each peer, and stale ones that nobody
    can tell from those of an administrator."""
    hosts = [make_host(), make_host()]
    pods = [pod(lab, host, number) for number, host in enumerate(hosts)]
    leases = [
        peer(number, public_ip=host.ipv4, public_ipv6=host.ipv6, backend_type=backend["Type"])
        for number, host in enumerate(hosts)
    ]
    for number, host in enumerate(hosts):
        via = f"via {hosts[1 - number].underlay(family)} dev eth0 proto boot"
        host.ip(f"-{family} route add {subnet(family, 1 - number)} {via}")
        host.ip(f"-{family} route add {subnet(family, 200)} {via}")
    show = f"-{family} -N route show proto 3 dev eth0"
    theirs = [host.ip(show) for host in hosts]
    stale = subnet(family, 200)
    forth, back = (Pings(pods[n], pod_address(family, 1 - n)) for n in (0, 1))

    with forth, back:
        for host in hosts:
            config = network_config(family, **backend)
            with DataPlane(config, iface=host.iface, netns=host.ns) as dp:
                assert dp.sync(leases).ok
            forth.await_answers(3)
            back.await_answers(3)
            assert [line.split()[0] for line in host.ip(show).splitlines()] == [stale]
        for number, host in enumerate(hosts):
            via = f"via {hosts[1 - number].underlay(family)} dev eth0 proto boot"
            host.ip(f"-{family} route replace {subnet(family, 1 - number)} {via}")
            with DataPlane(config, iface=host.iface, netns=host.ns) as dp:
                assert dp.clean().ok
            forth.await_answers(3)
            back.await_answers(3)

    assert (forth.lost, back.lost) == (0, 0)
    assert [host.ip(show) for host in hosts] == theirs
    assert all("138" not in host.ip("-N nexthop show") for host in hosts)


def flanneld_adds(host: Any, family: int, net: str, gateway: str) -> None:
    """flanneld's host-gw for one lease (routeAdd in pkg/backend/route_network.go): of the routes
    to ``net`` the first one is kept if it leads there, else deleted as it was listed."""
    listed = host.ip_json(f"-{family} -N route show {net}")
    if listed:
        first = listed[0]
        if (first["gateway"], first["dev"]) == (gateway, "eth0"):
            return
        flanneld_removes(host, family, net, first["gateway"], f"proto {first['protocol']}")
    host.ip(f"-{family} route add {net} via {gateway} dev eth0 proto boot")


def flanneld_removes(host: Any, family: int, net: str, gateway: str, proto: str = "") -> None:
    host.ip(f"-{family} route del {net} via {gateway} dev eth0 {proto}")


@pytest.mark.parametrize("backend", DIRECT, ids=["host-gw", "direct"])
def test_direct_routes_are_handed_back_without_a_lost_packet(
    lab: Any, make_host: Callable[..., Any], family: int, backend: dict[str, Any]
) -> None:
    """flanneld keeps routes that lead to the right place, and has to be able to delete and replace
    them later. The kernel does not match a gateway against a route with a nexthop object."""
    hosts = [make_host(), make_host(), make_host()]
    pods = [pod(lab, host, number) for number, host in enumerate(hosts[:2])]
    leases = [
        peer(number, public_ip=host.ipv4, public_ipv6=host.ipv6, backend_type=backend["Type"])
        for number, host in enumerate(hosts)
    ]
    config = network_config(family, **backend)
    for host in hosts[:2]:
        with DataPlane(config, iface=host.iface, netns=host.ns) as dp:
            assert dp.sync(leases).ok
    if family == 4:
        for host in hosts[:2]:
            assert host.ip("nexthop show proto 138")
            with pytest.raises(AssertionError, match="No such process"):
                flanneld_removes(host, family, subnet(family, 2), hosts[2].underlay(family))
    forth, back = (Pings(pods[n], pod_address(family, 1 - n)) for n in (0, 1))

    with forth, back:
        for number, host in enumerate(hosts[:2]):
            with (
                Monitor(host) as monitor,
                DataPlane(config, iface=host.iface, netns=host.ns, hand_back=True) as dp,
            ):
                assert dp.sync(leases).ok
                assert dp.sync(leases).ok  # once more, over routes that look like flanneld's
                assert monitor.deleted("route") == set()
            assert host.ip("nexthop show") == ""
            assert host.ip(f"-{family} route show proto 138") == ""
            assert len(host.ip_json(f"-{family} route show proto boot dev eth0")) == 2
            for other in {0, 1, 2} - {number}:
                flanneld_adds(host, family, subnet(family, other), hosts[other].underlay(family))
            forth.await_answers(3)
            back.await_answers(3)
    assert (forth.lost, back.lost) == (0, 0)

    moved = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    for host in hosts[:2]:  # the third node gets another address, then leaves
        flanneld_adds(host, family, subnet(family, 2), moved)
        (route,) = host.ip_json(f"-{family} route show {subnet(family, 2)}")
        assert (route["gateway"], route["protocol"]) == (moved, "boot")
        flanneld_removes(host, family, subnet(family, 2), moved)
        assert host.ip_json(f"-{family} route show {subnet(family, 2)}") == []
