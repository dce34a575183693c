"""Which interface and which addresses a node publishes and sends from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flannel_dp import ConfigError, NotYet
from flannel_dp.command.cli import main
from tests.lib.kernel import has_device, stranger
from tests.lib.leases import DEVICE, lease_of, network_config, peer, plane
from tests.lib.uplinks import (
    ANYWHERE,
    GATEWAY,
    LENGTH,
    SECOND,
    VPN,
    cluster,
    local,
    published,
    second_interface,
    vpn,
)
from tests.lib.waiting import wait_until

# ---- a named address is the published one ---------------------------------------------


def test_publishes_and_sends_from_the_address_that_iface_names(two: Any, family: int) -> None:
    second = SECOND[family]
    assert published(two, family, iface=two.underlay(family)) == {family: two.underlay(family)}
    assert published(two, family, iface=second) == {family: second}
    own = peer(0, public_ip=SECOND[4], public_ipv6=SECOND[6])
    with plane(two, family, iface=second) as dp:
        assert dp.sync([own, peer(1)]).ok

    assert local(two, family) == ("eth0", second)


def test_iface_names_an_address_of_each_family(two: Any) -> None:
    assert published(two, iface=SECOND[4]) == {4: SECOND[4], 6: two.ipv6}
    assert published(two, iface=SECOND[6]) == {4: two.ipv4, 6: SECOND[6]}
    assert published(two, iface=[SECOND[4], SECOND[6]]) == SECOND
    assert published(two, iface=[SECOND[6], "198.51.100.1", SECOND[4]]) == SECOND


def test_an_interface_that_is_named_first_keeps_its_first_addresses(two: Any) -> None:
    """Several --iface are alternatives: what comes after the first that is there is not used."""
    assert published(two, iface=["eth0", SECOND[4]]) == {4: two.ipv4, 6: two.ipv6}


def test_publishes_the_address_that_a_pattern_matches(two: Any, family: int) -> None:
    pattern = {4: r"\.101$", 6: "::101$"}[family]
    assert published(two, family, iface_regex=[pattern]) == {family: SECOND[family]}
    assert published(two, family, iface_regex=["^nope$", pattern]) == {family: SECOND[family]}
    assert published(two, family, iface_regex=["^eth0$"]) == {family: two.underlay(family)}


def test_a_pattern_may_match_an_address_of_each_family(two: Any) -> None:
    assert published(two, iface_regex=["101$"]) == SECOND
    assert published(two, iface_regex=[r"^192.*\.101$"]) == {4: SECOND[4], 6: two.ipv6}


def test_a_pattern_prefers_an_interface_with_both_families(two: Any) -> None:
    stranger(two, "aaa0")
    two.ip("address add 198.51.100.101/24 dev aaa0")

    assert published(two, iface_regex=["101$"]) == SECOND


def test_a_pattern_matches_none_of_our_own_devices(two: Any, family: int) -> None:
    """The overlay's addresses are in the same private range as many an underlay."""
    with plane(two, family) as dp:
        assert dp.sync([lease_of(two), peer(1)]).ok
    prefix = {4: r"^10\.|\.101$", 6: "^fd00:|::101$"}[family]

    assert published(two, family, iface_regex=[prefix]) == {family: SECOND[family]}
    assert published(two, family, iface_regex=["^flannel|^eth"]) == {family: two.underlay(family)}


def test_a_pattern_matches_no_address_that_only_this_node_reaches(host: Any, family: int) -> None:
    """127.0.0.1 and ::1 match many a pattern, and lo is the first interface."""
    for pattern in (".*", "1", "^[a-z]+[0-9]*$"):
        assert published(host, family, iface_regex=[pattern]) == {family: host.underlay(family)}
    with pytest.raises(NotYet, match=r"there is no interface '\^lo\$'"):
        published(host, family, iface_regex=["^lo$"])
    with pytest.raises(ConfigError, match=r"lo has no IPv[46] address that could be the public"):
        published(host, family, iface="lo")


def test_an_address_of_lo_that_other_nodes_reach_may_be_published(host: Any, family: int) -> None:
    """As where a routing protocol announces it."""
    announced = {4: "198.51.100.7", 6: "2001:db8:7::7"}[family]
    length = {4: "/32", 6: "/128"}[family]
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {announced}{length} dev lo {nodad}")

    for choice in ({"iface": "lo"}, {"iface": announced}, {"iface_regex": ["^198|:7::7$"]}):
        assert published(host, family, **choice) == {family: announced}
    assert published(host, family, iface_regex=["^lo$"]) == {family: announced}


def test_an_address_given_as_public_wins_over_the_named_one(two: Any, family: int) -> None:
    flag = {4: "public_ip", 6: "public_ipv6"}[family]
    choice = {"iface": SECOND[family], flag: two.underlay(family)}

    assert published(two, family, **choice) == {family: two.underlay(family)}


def test_publishes_what_the_kernel_sends_from_to_the_address_to_reach(
    two: Any, family: int
) -> None:
    target = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    bits = {4: 32, 6: 128}[family]
    assert published(two, family, iface_can_reach=target) == {family: two.underlay(family)}
    two.ip(f"-{family} route add {target}/{bits} dev eth0 src {SECOND[family]}")

    assert published(two, family, iface_can_reach=target) == {family: SECOND[family]}


# ---- the first choice ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tun", "vxlan id 77 dstport 4790"])
def test_no_device_of_another_overlay_is_chosen(routed: Any, family: int, kind: str) -> None:
    """Its default route is in the main table and the better one; tests/unit/test_interface.py has
    all kinds."""
    vpn(routed, family, kind=kind, table="main")
    assert published(routed, family) == {family: routed.underlay(family)}

    routed.ip(f"-{family} route del default metric 5000")
    with pytest.raises(NotYet, match="vpn0"):
        published(routed, family)


@pytest.mark.parametrize("how", ["a port of cni0", "without an address"])
def test_no_pod_s_device_is_chosen(routed: Any, family: int, how: str) -> None:
    stranger(routed, "veth5a")
    if how == "a port of cni0":
        routed.ip("link add cni0 type bridge")
        nodad = "nodad" if family == 6 else ""
        routed.ip(f"-{family} address add {VPN[family]}/{LENGTH[family]} dev veth5a {nodad}")
        routed.ip("link set veth5a master cni0")
    routed.ip(f"-{family} route add default dev veth5a metric 1")

    assert published(routed, family) == {family: routed.underlay(family)}


def test_of_several_default_routes_that_of_the_lowest_metric(routed: Any, family: int) -> None:
    second = second_interface(routed, family, 100)
    assert published(routed, family) == {family: second}

    routed.ip(f"-{family} route del default dev eth1")
    second_interface_gateway = {4: "198.51.100.254", 6: "2001:db8:77::fe"}[family]
    routed.ip(f"-{family} route add default via {second_interface_gateway} dev eth1 metric 9000")
    assert published(routed, family) == {family: routed.underlay(family)}


@pytest.mark.parametrize("halves", [False, True], ids=["alone", "beside a VPN's halves"])
@pytest.mark.parametrize("compat", ["1", "0"])
@pytest.mark.parametrize("group", [False, True], ids=["object", "group"])
def test_a_default_route_on_a_nexthop_object(
    host: Any, family: int, halves: bool, compat: str, group: bool
) -> None:
    host.sysctl("ipv4/nexthop_compat_mode", compat)
    host.ip(f"nexthop add id 7 via {GATEWAY[family]} dev eth0")
    if group:
        host.ip("nexthop add id 9 group 7")
    host.ip(f"-{family} route add default nhid {9 if group else 7}")
    if halves:
        host.ip("tuntap add dev tun0 mode tun")
        host.ip("link set tun0 up")
        for half in ANYWHERE[family]:
            host.ip(f"-{family} route add {half} dev tun0")

    assert published(host, family) == {family: host.underlay(family)}


def test_a_default_route_of_several_paths(host: Any, family: int) -> None:
    """The first one that leads out of no tunnel."""
    host.ip("tuntap add dev tun0 mode tun")
    host.ip("link set tun0 up")
    inside, far = {4: ("10.8.0.1/24", "10.8.0.2"), 6: ("fd08::1/64", "fd08::2")}[family]
    host.ip(f"-{family} address add {inside} dev tun0 {'nodad' if family == 6 else ''}")
    ways = f"nexthop via {far} dev tun0 onlink nexthop via {GATEWAY[family]} dev eth0"
    host.ip(f"-{family} route add default {ways}")
    assert published(host, family) == {family: host.underlay(family)}


def test_the_preferred_source_of_the_default_route_is_published(two: Any, family: int) -> None:
    second, gateway = SECOND[family], GATEWAY[family]
    two.ip(f"-{family} route add default via {gateway} dev eth0 src {second}")
    assert published(two, family) == {family: second}

    own = peer(0, public_ip=SECOND[4], public_ipv6=SECOND[6])
    with plane(two, family, iface=None) as dp:
        assert dp.sync([own, peer(1)]).ok
        two.ip(f"-{family} route del default")
        assert dp.sync([own, peer(1), peer(2)]).ok
    assert local(two, family) == ("eth0", second)


def test_the_preferred_source_may_be_on_lo(host: Any, family: int) -> None:
    """As where a routing protocol announces the node's address."""
    announced, bits = {4: "198.51.100.7", 6: "2001:db8:7::7"}[family], {4: 32, 6: 128}[family]
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {announced}/{bits} dev lo {nodad}")
    host.ip(f"-{family} route add default via {GATEWAY[family]} dev eth0 src {announced}")

    assert published(host, family) == {family: announced}
    own = peer(0, public_ip=announced, public_ipv6=announced)
    with plane(host, family, iface=None) as dp:
        assert dp.sync([own, peer(1)]).ok
        assert dp.resync().writes == 0
    assert local(host, family) == ("eth0", announced)


@pytest.mark.parametrize("by", ["lo", "the address"])
def test_an_address_of_lo_leaves_by_the_way_to_the_peers(host: Any, family: int, by: str) -> None:
    """The tunnel is on the interface that reaches them, with its MTU, and not on lo."""
    announced, bits = {4: "198.51.100.7", 6: "2001:db8:7::7"}[family], {4: 32, 6: 128}[family]
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {announced}/{bits} dev lo {nodad}")
    host.ip(f"-{family} route add {peer_of(family, 1)}/{bits} via {GATEWAY[family]} dev eth0")
    host.ip("link set eth0 mtu 1400")
    own = peer(0, public_ip=announced, public_ipv6=announced)
    with plane(host, family, iface="lo" if by == "lo" else announced) as dp:
        assert dp.sync([own, peer(1)]).ok
        assert dp.resync().writes == 0
        assert dp.sync([own, peer(1)]).writes == 0

    assert local(host, family) == ("eth0", announced)
    shown = host.ip_json(f"link show {DEVICE[family]}")[0]
    assert shown["mtu"] == 1400 - {4: 50, 6: 70}[family]


def test_no_tunnel_is_on_lo(host: Any, family: int) -> None:
    """Its packets would go nowhere; the route comes later."""
    announced, bits = {4: "198.51.100.7", 6: "2001:db8:7::7"}[family], {4: 32, 6: 128}[family]
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {announced}/{bits} dev lo {nodad}")
    own = peer(0, public_ip=announced, public_ipv6=announced)
    with plane(host, family, iface="lo") as dp:
        with pytest.raises(NotYet, match="on lo, and no route"):
            dp.sync([own, peer(1)])
        assert not has_device(host, family)
        host.ip(f"-{family} route add default via {GATEWAY[family]} dev eth0")
        assert dp.sync([own, peer(1)]).ok
    assert local(host, family) == ("eth0", announced)


def peer_of(family: int, number: int) -> str:
    lease = peer(number)
    return lease.public_ip if family == 4 else lease.public_ipv6


def test_a_link_local_address_names_the_interface_and_is_not_published(host: Any) -> None:
    """Other networks do not know it: peers would reject it."""
    shown = host.ip_json("address show dev eth0")[0]["addr_info"]
    (mine,) = [one["local"] for one in shown if one.get("scope") == "link"]
    stranger(host, "eth1")

    for name in (mine, f"{mine}%eth0"):
        assert published(host, 6, iface=name) == {6: host.ipv6}
        assert published(host, iface=name) == {4: host.ipv4, 6: host.ipv6}


def test_an_address_to_reach_that_is_this_node_s_own(two: Any, family: int) -> None:
    """The kernel says lo; the interface that has it is meant."""
    assert published(two, family, iface_can_reach=two.underlay(family)) == {
        family: two.underlay(family)
    }


@pytest.mark.parametrize("address", ["127.0.0.1", "224.0.0.5", "::1", "fe80::1", "ff02::1"])
def test_a_public_address_that_no_other_node_reaches_is_an_error(host: Any, address: str) -> None:
    family = 6 if ":" in address else 4
    flag = {4: "public_ip", 6: "public_ipv6"}[family]
    for nat in (False, True):
        with pytest.raises(ConfigError, match=f"{address} is a .* no other node") as caught:
            published(host, family, iface="eth0", behind_nat=nat, **{flag: address})
        assert not isinstance(caught.value, NotYet)


@pytest.mark.parametrize("command", ["sync", "plan", "show", "leases", "explain"])
def test_fr32_commands_without_a_default_route(
    routed: Any, family: int, tmp_path: Path, command: str
) -> None:
    """They ended with exit code 2 while the device was there and right."""
    config, leases = tmp_path / "net-conf.json", tmp_path / "leases.json"
    config.write_text(network_config(family).to_json())
    leases.write_text('{"leases": [' + ",".join(one.to_json() for one in cluster(routed)) + "]}")
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok
    routed.ip(f"-{family} route del default metric 5000")

    more = [{4: "10.240.1.5", 6: "fd00:10:1::5"}[family]] if command == "explain" else []
    words = [command, *more, "--netns", routed.ns, "--net-conf", str(config)]
    assert main([*words, "--leases", str(leases), "--firewall", "none"]) == 0


def test_our_own_device_is_not_the_way_to_an_address(routed: Any, family: int) -> None:
    with plane(routed, family) as dp:
        assert dp.sync(cluster(routed)).ok
    inside = {4: "10.240.1.5", 6: "fd00:10:1::5"}[family]
    with pytest.raises(NotYet, match="there is no interface"):
        published(routed, family, iface_can_reach=inside)


def test_temporary_addresses_are_not_published(host: Any) -> None:
    """RFC 8981: tomorrow it has another one."""
    host.sysctl("ipv6/conf/eth0/use_tempaddr", 2)
    host.ip(f"address del {host.ipv6}/64 dev eth0")
    host.ip(
        "address add 2001:db8:9::1/64 dev eth0 mngtmpaddr nodad valid_lft 3600 preferred_lft 3600"
    )

    def temporary() -> list[Any]:
        shown = host.ip_json("-6 address show dev eth0")[0]["addr_info"]
        return [one for one in shown if one.get("temporary") and not one.get("tentative")]

    wait_until(temporary)
    with plane(host, 6, iface="eth0") as dp:
        assert dp.resolver.public_addresses() == {6: ("2001:db8:9::1",)}
