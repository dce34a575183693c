"""host-gw, and vxlan with DirectRouting: each peer by its own way, and from one way to
the other without losing a packet or leaving anything behind."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flannel_dp import ConfigError, DataPlane, Lease
from flannel_dp.look.show import show
from tests.lib.kernel import everything, has_device, observed, stranger
from tests.lib.leases import (
    DEVICE,
    HOST_GW,
    NETWORK,
    address,
    lease_of,
    mac,
    near,
    near_peer,
    network_config,
    peer,
    plane,
    replaced,
    subnet,
)
from tests.lib.monitor import Monitor
from tests.lib.traffic import Pings, on_threads, pod, pod_address

DIRECT = {"Type": "VxLAN", "Directrouting": True}
TUNNEL = {"Type": "vxlan"}

NEAR, FAR = range(1, 11), range(11, 21)


def node(number: int, backend_type: str = "vxlan") -> Lease:
    """Nodes of NEAR are on the hosts' own network, those of FAR are not."""
    placed = near_peer if number in NEAR else peer
    return placed(number, backend_type=backend_type)


def cluster(host: Any, backend_type: str = "vxlan") -> list[Lease]:
    own = replaced(lease_of(host), backend_type=backend_type)
    return [own, *(node(number, backend_type) for number in (*NEAR, *FAR))]


@contextmanager
def layout(host: Any, family: int, backend: dict[str, Any], **options: Any) -> Iterator[DataPlane]:
    config = network_config(family, **backend)
    with DataPlane(config, **({"iface": host.iface, "netns": host.ns} | options)) as made:
        yield made


def direct_routes(host: Any, family: int) -> dict[str, str]:
    """Routes of our protocol on the external interface: ``{subnet: gateway}``."""
    routes = host.ip_json(f"-{family} route show dev {host.iface} proto 138")
    gateways = {n["id"]: n.get("gateway") for n in host.ip_json("nexthop show")}
    return {r["dst"]: r.get("gateway") or gateways[r["nhid"]] for r in routes}


def tunnelled(host: Any, family: int) -> set[str]:
    return {key[0] for key in observed(host, family)["route"]}


@pytest.fixture
def routed(host: Any) -> Any:
    """A host with a default route, so that far endpoints are reachable through a gateway."""
    host.ip("route add default via 192.0.2.254")
    host.ip("-6 route add default via 2001:db8::fe")
    return host


@pytest.mark.parametrize("spelling", ["host-gw", "Host-GW", "HOST-GW"])
def test_host_gw_is_one_route_per_peer(host: Any, family: int, spelling: str) -> None:
    leases = [
        lease
        for lease in cluster(host, "host-gw")
        if lease.subnet not in {subnet(4, number) for number in FAR}
    ]
    with layout(host, family, {"Type": spelling}) as dp:
        report = dp.sync(leases)
        sent = dp.kernel.channel.messages_sent
        again = dp.sync(leases)

        assert report.ok
        assert direct_routes(host, family) == {
            subnet(family, number): near(family, number) for number in NEAR
        }
        assert again.writes == 0
        assert dp.kernel.channel.messages_sent == sent
        assert not has_device(host, family)


def test_host_gw_names_the_peers_it_cannot_reach(host: Any, family: int) -> None:
    leases = cluster(host, "host-gw")
    with layout(host, family, HOST_GW) as dp:
        report = dp.sync(leases)

        assert not report.ok
        assert {f.error for f in report.failures} == {errno.ENETUNREACH}
        assert {f.entry.prefix for f in report.failures} == {subnet(family, n) for n in FAR}
        assert "not on-link on eth0" in report.failures[0].message()
        assert set(direct_routes(host, family)) == {subnet(family, n) for n in NEAR}

        # The underlay changes; the next sync tries them again.
        far = "198.18.0.250/15" if family == 4 else "2001:db8:1::fff/64 nodad"
        host.ip(f"address add {far} dev {host.iface}")
        assert dp.sync(leases).ok
        assert len(direct_routes(host, family)) == len(NEAR) + len(FAR)


def test_one_replacement_repoints_a_peer(host: Any, family: int) -> None:
    leases = [lease_of(host), *(node(n) for n in NEAR)]
    leases = [peer_as_host_gw(lease) for lease in leases]
    moved = peer_as_host_gw(peer(3, public_ip=near(4, 33), public_ipv6=near(6, 33)))
    with layout(host, family, HOST_GW) as dp:
        dp.sync(leases)
        with Monitor(host) as monitor:
            report = dp.update(added=[moved])
            gone = monitor.deleted("route", "nexthop")

        changed = "nexthop" if family == 4 else "route"
        assert report.tables[changed]["replaced"] == 1
        assert report.writes == 1
        assert gone == set()
        assert direct_routes(host, family)[subnet(family, 3)] == near(family, 33)


def peer_as_host_gw(lease: Lease) -> Lease:
    return replaced(lease, backend_type="host-gw")


def test_direct_routing_decides_for_each_peer(routed: Any, family: int) -> None:
    leases = cluster(routed)
    with layout(routed, family, DIRECT) as dp:
        report = dp.sync(leases)

        assert report.ok
        assert direct_routes(routed, family) == {
            subnet(family, number): near(family, number) for number in NEAR
        }
        held = observed(routed, family)
        assert {key[0] for key in held["route"]} == {subnet(family, n) for n in FAR}
        assert held["neighbour"] == {(address(family, n), mac(family, n)) for n in FAR}
        assert {key[0] for key in held["fdb"]} == {mac(family, n) for n in FAR}
        assert dp.plan(leases).is_empty


def test_direct_needs_the_external_interface(routed: Any, family: int) -> None:
    """A peer on-link on another interface goes through the tunnel: flannel would send it
    out there."""
    stranger(routed, "eth1")
    routed.ip("address add 198.18.0.1/24 dev eth1")
    routed.ip("address add 2001:db8:1::1/120 dev eth1 nodad")
    with layout(routed, family, DIRECT) as dp:
        assert dp.sync(cluster(routed)).ok

    assert tunnelled(routed, family) == {subnet(family, n) for n in FAR}


def test_explain_and_show_say_which_way_and_why(routed: Any, family: int) -> None:
    leases = cluster(routed)
    with layout(routed, family, DIRECT) as dp:
        dp.sync(leases)
        beside = str(dp.explain(pod_address(family, 3)))
        behind = str(dp.explain(pod_address(family, 13)))
        shown = str(show(dp, leases))

    assert f"{near(family, 3)} is on-link on eth0" in beside
    assert "behind gateway" in behind
    assert "on-link on eth0" in shown
    assert f"the others through {DEVICE[family]}" in shown


@pytest.mark.parametrize(
    ("before", "after"),
    [(TUNNEL, DIRECT), (DIRECT, TUNNEL)],
    ids=["tunnel-to-direct", "direct-to-tunnel"],
)
def test_a_change_of_way_leaves_nothing_behind(
    routed: Any, family: int, before: dict[str, Any], after: dict[str, Any]
) -> None:
    leases = cluster(routed)
    with layout(routed, family, before) as dp:
        assert dp.sync(leases).ok
    with Monitor(routed) as monitor, layout(routed, family, after) as dp:
        assert dp.sync(leases).ok
        deleted = monitor.deleted("route")
        assert dp.plan(leases).is_empty

    # IPv6 puts up a host route to a gateway while it needs one; no subnet's is ever gone.
    assert {prefix for prefix in deleted if not prefix.endswith("/128")} == set()
    direct = set(NEAR) if after is DIRECT else set()
    assert set(direct_routes(routed, family)) == {subnet(family, n) for n in direct}
    through = {*NEAR, *FAR} - direct
    assert tunnelled(routed, family) == {subnet(family, n) for n in through}
    assert {m for m, _ in observed(routed, family)["fdb"]} == {mac(family, n) for n in through}


def test_the_underlay_decides_again_at_every_sync(routed: Any, family: int) -> None:
    leases = cluster(routed)
    with layout(routed, family, DIRECT) as dp:
        dp.sync(leases)
        if family == 4:
            routed.ip("route replace 192.0.2.96/27 via 192.0.2.254")
        else:
            routed.ip("-6 route replace 2001:db8::60/123 via 2001:db8::fe")
        assert dp.sync(leases).ok

        behind = {n for n in NEAR if n < 28 and 96 <= 100 + n < 128}
        assert set(direct_routes(routed, family)) == {subnet(family, n) for n in set(NEAR) - behind}
        assert dp.plan(leases).is_empty


def test_updates_equal_a_sync(routed: Any, family: int) -> None:
    leases = cluster(routed)
    with layout(routed, family, DIRECT) as dp, layout(routed, family, DIRECT) as fresh:
        dp.sync(leases)
        steps: list[tuple[list[Lease], list[Lease]]] = [
            ([node(30), near_peer(31)], []),
            ([peer(5)], []),  # from direct to tunnel
            ([near_peer(15)], []),  # and back
            ([], [node(1), node(20)]),
            ([node(1)], [peer(5)]),
        ]
        known = {lease.subnet: lease for lease in leases}
        for added, removed in steps:
            report = dp.update(added, removed)
            for lease in removed:
                known.pop(lease.subnet)
            known |= {lease.subnet: lease for lease in added}

            assert report.ok
            plan = fresh.plan(list(known.values()))
            assert plan.is_empty, str(plan)


def test_no_ping_is_lost_between_the_ways(lab: Any, family: int) -> None:
    hosts = [lab.host(), lab.host()]
    leases = [lease_of(host, number) for number, host in enumerate(hosts)]
    pods = [pod(lab, host, number) for number, host in enumerate(hosts)]

    def everywhere(backend: dict[str, Any]) -> None:
        for host in hosts:
            with layout(host, family, backend) as dp:
                assert dp.sync(leases).ok

    everywhere(TUNNEL)
    with Pings(pods[0], pod_address(family, 1)):
        pass  # answered three times: duplicate address detection is over everywhere
    with Pings(pods[0], pod_address(family, 1)) as pings:
        for backend in (DIRECT, TUNNEL, DIRECT, TUNNEL):
            everywhere(backend)
            pings.await_answers(5)

    assert pings.sent > 20
    assert pings.lost == 0


def test_flanneld_s_direct_routes_are_taken_over_in_place(routed: Any, family: int) -> None:
    for number in NEAR:
        routed.ip(
            f"-{family} route add {subnet(family, number)} via {near(family, number)} dev eth0"
        )
    leases = cluster(routed)
    with Monitor(routed) as monitor, layout(routed, family, DIRECT) as dp:
        plan = dp.plan(leases)
        report = dp.sync(leases)
        deleted = monitor.deleted("route")

        assert plan.conflicts() == []
        assert report.ok
        assert report.tables["route"]["replaced"] == len(NEAR)
        assert deleted & {subnet(family, n) for n in NEAR} == set()
        assert len(direct_routes(routed, family)) == len(NEAR)


def test_a_stranger_s_route_in_our_place_stays(routed: Any, family: int) -> None:
    elsewhere = near(family, 90)
    routed.ip(f"-{family} route add {subnet(family, 3)} via {elsewhere} dev eth0")
    before = routed.ip(f"-{family} route show {subnet(family, 3)}")
    with layout(routed, family, DIRECT) as dp:
        report = dp.sync(cluster(routed))

        assert not report.ok
        assert [wanted.prefix for wanted, _ in report.conflicts] == [subnet(family, 3)]
        assert routed.ip(f"-{family} route show {subnet(family, 3)}") == before
        assert set(direct_routes(routed, family)) == {subnet(family, n) for n in NEAR if n != 3}


def test_stale_routes_of_flanneld_go_only_when_told(routed: Any, family: int) -> None:
    stale = subnet(family, 99)
    routed.ip(f"-{family} route add {stale} via {near(family, 99)} dev eth0")
    with layout(routed, family, DIRECT) as dp:
        assert dp.sync(cluster(routed)).ok
    assert stale in routed.ip(f"-{family} route show")

    with layout(routed, family, DIRECT, take_over=True) as dp:
        assert dp.sync(cluster(routed)).ok
    assert stale not in routed.ip(f"-{family} route show")


def test_a_foreign_route_that_covers_the_gateways_is_no_obstacle(routed: Any, family: int) -> None:
    """IPv6 refuses an onlink gateway that another route covers; a host route helps."""
    cover = NETWORK[family]
    via = near(family, 90)
    routed.ip(f"-{family} route add {cover} via {via} dev eth0 proto static")
    leases = cluster(routed)
    with layout(routed, family, TUNNEL) as dp:
        assert dp.sync(leases).ok
        assert dp.update(added=[node(40)]).ok
        assert dp.plan([*leases, node(40)]).is_empty

    assert tunnelled(routed, family) == {subnet(family, n) for n in (*NEAR, *FAR, 40)}
    assert f"{cover} via {via} dev eth0 proto static" in routed.ip(f"-{family} route show")


def test_from_layout_to_layout(routed: Any, family: int) -> None:
    reachable = [lease_of(routed), *(node(n) for n in NEAR)]
    gateways = [peer_as_host_gw(lease) for lease in reachable]
    for backend, leases in (
        (TUNNEL, reachable),
        (HOST_GW, gateways),
        (DIRECT, reachable),
        (TUNNEL, reachable),
        (HOST_GW, gateways),
    ):
        with layout(routed, family, backend) as dp:
            report = dp.sync(leases)
            assert report.ok, report.to_json()
            assert dp.plan(leases).is_empty
            held = (
                len(direct_routes(routed, family))
                if backend is not TUNNEL
                else len(tunnelled(routed, family))
            )
            assert held == len(NEAR)


@pytest.mark.parametrize("backend", [HOST_GW, DIRECT], ids=["host-gw", "direct"])
def test_clean_leaves_the_rest_as_it_was(routed: Any, family: int, backend: dict[str, Any]) -> None:
    stranger(routed, "eth1")
    routed.ip(f"-{family} route add {subnet(family, 99)} via {near(family, 99)} dev eth0")
    before = everything(routed)
    leases = cluster(routed, backend["Type"].lower())
    with layout(routed, family, backend) as dp:
        dp.sync(leases)
        assert everything(routed) != before
        dp.clean()

    assert everything(routed) == before


def test_both_families_at_once(routed: Any) -> None:
    with DataPlane(network_config(**DIRECT), iface="eth0", netns=routed.ns) as dp:
        leases = cluster(routed)
        assert dp.sync(leases).ok
        assert dp.plan(leases).is_empty
    for family in (4, 6):
        assert len(direct_routes(routed, family)) == len(NEAR)


def test_two_nodes_at_once_from_threads(lab: Any) -> None:
    hosts = [lab.host(), lab.host()]

    def sync(host: Any) -> None:
        with DataPlane(network_config(**DIRECT), iface="eth0", netns=host.ns) as dp:
            assert dp.sync([lease_of(host), *(node(n) for n in NEAR)]).ok

    on_threads(*(lambda host=host: sync(host) for host in hosts))
    for host in hosts:
        assert len(direct_routes(host, 4)) == len(NEAR)


# ---- which interface, which address ------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        {"iface": "eth0"},
        {"iface": ["nope0", "eth0"]},
        {"iface": "192.0.2.1"},
        {"iface": "2001:db8::1"},
        {"iface_regex": ["^nope", r"^192\.0\.2\."]},
        {"iface_regex": ["^eth0$"]},
        {"iface_can_reach": "192.0.2.77"},
        {"iface_can_reach": "2001:db8::77"},
        {"iface": None},
        {"iface": None, "public_ip": "192.0.2.1"},
    ],
    ids=str,
)
def test_the_external_interface_is_found(routed: Any, choice: dict[str, Any]) -> None:
    stranger(routed, "eth9")
    options = {"iface": None} | choice
    with plane(routed, **options) as dp:
        assert dp.sync([lease_of(routed)]).ok
        assert {state.family.iface for state in dp.state.values()} == {"eth0"}


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"iface": "eth7"}, "eth7"),
        ({"iface_regex": ["^x"]}, "^x"),
        ({"iface_regex": ["("]}, "iface_regex: "),
        ({"iface": "eth0", "public_ip": "198.51.100.9"}, "198.51.100.9"),
        ({"iface": "eth0", "public_ip": "2001:db8::1"}, "public_ip: "),
        ({"iface": "eth0", "public_ipv6": "192.0.2.1"}, "public_ipv6: "),
    ],
    ids=str,
)
def test_an_interface_or_address_that_is_not_there(
    host: Any, choice: dict[str, Any], said: str
) -> None:
    before = everything(host)
    with plane(host, **({"iface": None} | choice)) as dp, pytest.raises(ConfigError) as caught:
        dp.sync([lease_of(host)])

    assert said in str(caught.value)
    assert caught.value.hint
    assert everything(host) == before


def test_behind_nat_the_tunnel_leaves_from_the_interface_s_address(host: Any, family: int) -> None:
    outside = {4: "198.51.100.9", 6: "2001:db8:ffff::9"}
    own = peer(0, public_ip=outside[4], public_ipv6=outside[6])
    options = {"public_ip": outside[4], "public_ipv6": outside[6], "behind_nat": True}
    with plane(host, family, **options) as dp:
        assert dp.sync([own, peer(1)]).ok

    info = host.ip_json(f"link show {DEVICE[family]}")[0]["linkinfo"]["info_data"]
    assert info["local" if family == 4 else "local6"] == host.underlay(family)


def test_a_public_address_on_another_interface(host: Any, family: int) -> None:
    host.ip("address add 198.51.100.9/32 dev lo")
    host.ip("address add 2001:db8:ffff::9/128 dev lo nodad")
    own = peer(0, public_ip="198.51.100.9", public_ipv6="2001:db8:ffff::9")
    options = {"public_ip": "198.51.100.9", "public_ipv6": "2001:db8:ffff::9"}
    with plane(host, family, **options) as dp:
        assert dp.sync([own, peer(1)]).ok
        assert dp.state[family].family.iface == "eth0"


def test_address_preference(host: Any, family: int) -> None:
    """Deprecated addresses are not published; a permanent one comes before a dynamic one."""
    if family == 4:
        host.ip("address flush dev eth0 scope global")
        host.ip("address add 192.0.2.50/24 dev eth0 valid_lft 1000 preferred_lft 1000")
        host.ip("address add 192.0.2.60/24 dev eth0 valid_lft 1000 preferred_lft 0")
        host.ip("address add 198.51.100.70/24 dev eth0")
        own = peer(0, public_ip="198.51.100.70")
    else:
        host.ip("-6 address flush dev eth0 scope global")
        host.ip("address add 2001:db8::50/64 dev eth0 nodad valid_lft 1000 preferred_lft 1000")
        host.ip("address add 2001:db8::60/64 dev eth0 nodad valid_lft 1000 preferred_lft 0")
        host.ip("address add 2001:db8::70/64 dev eth0 nodad")
        own = peer(0, public_ipv6="2001:db8::70")
    with plane(host, family) as dp:
        assert dp.sync([own, peer(1)]).ok


# ---- the own subnet ------------------------------------------------------------


def blackholes(host: Any, family: int) -> list[str]:
    """Destinations of blackhole routes of our protocol."""
    text = host.ip(f"-{family} route show type blackhole proto 138")
    return [line.split()[1] for line in text.splitlines()]


@pytest.mark.parametrize("backend", [TUNNEL, HOST_GW], ids=["vxlan", "host-gw"])
def test_blackhole_route(host: Any, family: int, backend: dict[str, Any]) -> None:
    leases = [lease_of(host), node(1), node(2)]
    if backend is HOST_GW:
        leases = [peer_as_host_gw(lease) for lease in leases]
    with layout(host, family, backend, ip_blackhole_route=True) as dp:
        assert dp.sync(leases).ok
        assert blackholes(host, family) == [subnet(family, 0)]
        again = dp.sync(leases)
        assert again.writes == 0
        assert again.tables["route"]["unchanged"] == 3
        assert dp.update(added=[leases[1]], removed=[leases[2]]).ok
        assert blackholes(host, family) == [subnet(family, 0)]
    with layout(host, family, backend) as dp:
        dp.sync(leases)  # nobody asked: it stays
        assert blackholes(host, family) == [subnet(family, 0)]
    with layout(host, family, backend, ip_blackhole_route=False) as dp:
        report = dp.sync(leases)
        assert report.ok
        assert report.tables["route"]["removed"] == 1
        assert blackholes(host, family) == []
    with layout(host, family, backend, ip_blackhole_route=True) as dp:
        dp.sync(leases)
        dp.clean()
        assert blackholes(host, family) == []


def test_a_blackhole_takes_nothing_from_the_pods(lab: Any, family: int) -> None:
    hosts = [lab.host(), lab.host()]
    leases = [lease_of(host, number) for number, host in enumerate(hosts)]
    pods = [pod(lab, host, number) for number, host in enumerate(hosts)]
    for host in hosts:
        with plane(host, family, ip_blackhole_route=True) as dp:
            assert dp.sync(leases).ok

    with Pings(pods[0], pod_address(family, 1)) as pings:
        pings.await_answers(3)
