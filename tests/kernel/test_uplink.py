"""Which interface and which addresses a node publishes and sends from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from flannel_dp import ConfigError, DataPlane, NotYet, SourceError
from flannel_dp.cluster.lease import Identity
from flannel_dp.command.cli import main
from tests.lib.agents import Script, Watched
from tests.lib.kernel import expected, has_device, observed, stranger
from tests.lib.leases import DEVICE, lease_of, network_config, peer, plane
from tests.lib.waiting import wait_until

SECOND = {4: "192.0.2.101", 6: "2001:db8::101"}
LENGTH = {4: 24, 6: 64}


@pytest.fixture
def two(host: Any) -> Any:
    """A host with a second address of each family."""
    for family, address in SECOND.items():
        nodad = "nodad" if family == 6 else ""
        host.ip(f"-{family} address add {address}/{LENGTH[family]} dev eth0 {nodad}")
    # Of IPv6 addresses the kernel shows the youngest first.
    host.ip(f"address del {host.ipv6}/64 dev eth0")
    host.ip(f"address add {host.ipv6}/64 dev eth0 nodad")
    return host


def published(host: Any, *families: int, **choice: Any) -> dict[int, str]:
    with plane(host, *families, **({"iface": None} | choice)) as dp:
        identity: Identity = dp.identity()
    return identity.public


def local(host: Any, family: int) -> tuple[str, str]:
    """The interface below the vxlan device, and the address that its packets leave from."""
    info = host.ip_json(f"link show {DEVICE[family]}")[0]["linkinfo"]["info_data"]
    return info["link"], info["local" if family == 4 else "local6"]


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


# ---- without a choice: what is in use stays --------------------------------------------

GATEWAY = {4: "192.0.2.254", 6: "2001:db8::fe"}
VPN = {4: "100.64.0.19", 6: "fd7a:115c::19"}
ANYWHERE = {4: ("0.0.0.0/1", "128.0.0.0/1"), 6: ("::/1", "8000::/1")}


@pytest.fixture
def routed(host: Any) -> Any:
    """A host with a default route of each family, which the kernel uses last."""
    for family, gateway in GATEWAY.items():
        host.ip(f"-{family} route add default via {gateway} dev eth0 metric 5000")
    return host


def moves(warnings: tuple[str, ...]) -> list[str]:
    """What was said of a device that moves to another interface or address."""
    return [one for one in warnings if "on the underlay" in one]


def vpn(host: Any, family: int, *, kind: str = "tun", table: str = "52") -> None:
    """A VPN's device, and its default route in a table that comes before the main one."""
    if kind == "tun":
        host.ip("tuntap add dev vpn0 mode tun")
    else:
        host.ip(f"link add vpn0 type {kind}")
    length = {4: 32, 6: 128}[family]
    host.ip(f"-{family} address add {VPN[family]}/{length} dev vpn0")
    host.ip("link set vpn0 up")
    if table != "main":
        host.ip(f"-{family} rule add pref 5270 lookup {table}")
    host.ip(f"-{family} route add default dev vpn0 table {table}")


def cluster(host: Any) -> list[Any]:
    return [lease_of(host), peer(1), peer(2)]


@pytest.mark.parametrize("table", ["52", "main"])
def test_a_vpn_does_not_move_a_working_device(routed: Any, family: int, table: str) -> None:
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok
        vpn(routed, family, table=table)
        again, whole = dp.resync(), dp.sync(cluster(routed))

    assert (again.writes, whole.writes, whole.rejected) == (0, 0, [])
    with plane(routed, family, iface=None) as dp:
        assert dp.plan(cluster(routed)).is_empty
        assert dp.sync(cluster(routed)).writes == 0
    assert local(routed, family) == ("eth0", routed.underlay(family))


@pytest.mark.parametrize("kind", ["tun", "vxlan id 77 dstport 4790"])
def test_a_first_start_takes_the_main_table_s_default_route(
    routed: Any, family: int, kind: str
) -> None:
    vpn(routed, family, kind=kind)
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok

    assert local(routed, family) == ("eth0", routed.underlay(family))


def test_halves_of_the_address_space_hide_no_default_route(routed: Any, family: int) -> None:
    """OpenVPN's redirect-gateway def1."""
    routed.ip("tuntap add dev tun0 mode tun")
    routed.ip("link set tun0 up")
    for half in ANYWHERE[family]:
        routed.ip(f"-{family} route add {half} dev tun0")
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok

    assert local(routed, family) == ("eth0", routed.underlay(family))


def test_a_tunnel_is_the_uplink_only_where_it_is_named(host: Any, family: int) -> None:
    vpn(host, family, table="main")
    own = peer(0, public_ip=VPN[4], public_ipv6=VPN[6])
    with plane(host, family, iface=None) as dp, pytest.raises(ConfigError, match="vpn0") as caught:
        dp.sync([own, peer(1)])
    assert "--iface" in caught.value.hint

    with plane(host, family, iface="vpn0") as dp:
        assert dp.sync([own, peer(1)]).ok
    assert local(host, family) == ("vpn0", VPN[family])


def test_a_tap_device_may_be_a_machine_s_only_interface(host: Any, family: int) -> None:
    host.ip("tuntap add dev tap0 mode tap")
    length = {4: 32, 6: 128}[family]
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {VPN[family]}/{length} dev tap0 {nodad}")
    host.ip("link set tap0 up")
    host.ip(f"-{family} route add default dev tap0")

    assert published(host, family) == {family: VPN[family]}


def test_a_policy_s_default_route_serves_where_there_is_no_other(host: Any, family: int) -> None:
    host.ip(f"-{family} rule add pref 5270 lookup 52")
    host.ip(f"-{family} route add default via {GATEWAY[family]} dev eth0 table 52")

    assert published(host, family) == {family: host.underlay(family)}


def test_a_default_route_over_our_own_device_is_not_taken(routed: Any, family: int) -> None:
    """What dhcpcd makes of a device that it takes for a network card. One that is worse than
    the host's own is removed as any stale route of ours."""
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok
    device = DEVICE[family]
    routed.ip(f"-{family} route add default dev {device} metric 100 proto dhcp")
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok

    assert local(routed, family) == ("eth0", routed.underlay(family))
    assert device not in routed.ip(f"-{family} route show default")


def test_a_first_start_passes_over_an_own_device_without_an_uplink(
    routed: Any, family: int
) -> None:
    """A device that names no interface tells nothing; the standby default route is found."""
    version = {4: "", 6: f"local {routed.ipv6}"}[family]
    routed.ip(f"link add {DEVICE[family]} type vxlan id 1 dstport 8472 nolearning {version}")
    routed.ip(f"link set {DEVICE[family]} up")
    routed.ip(f"-{family} route add default dev {DEVICE[family]} metric 100")
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok

    assert local(routed, family) == ("eth0", routed.underlay(family))


def test_an_agent_s_uplink_outlives_the_default_route(routed: Any, family: int) -> None:
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok
        routed.ip(f"-{family} route del default metric 5000")
        assert dp.sync([*cluster(routed), peer(3)]).ok
        assert dp.resync().ok
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok


def test_host_gw_stays_on_its_interface_while_it_runs(routed: Any, family: int) -> None:
    own = {"backend_type": "host-gw", "backend_data": None, "backend_v6_data": None}
    near = {"public_ip": "192.0.2.77", "public_ipv6": "2001:db8::77"}
    leases = [peer(0, public_ip=routed.ipv4, public_ipv6=routed.ipv6, **own)]
    leases.append(peer(1, **near, **own))
    config = network_config(family, Type="host-gw")
    with DataPlane(config, netns=routed.ns) as dp:
        assert dp.sync(leases).ok
        vpn(routed, family, table="main")
        routed.ip(f"-{family} route del default metric 5000")
        assert dp.sync(leases).writes == 0
        assert dp.resync().writes == 0


@pytest.mark.parametrize("same", [True, False], ids=["an address", "an interface"])
def test_a_flag_moves_the_device_and_that_is_told(two: Any, family: int, same: bool) -> None:
    """What changes is announced: peers with checks on source addresses drop packets."""
    stranger(two, "eth1")
    other = {4: "198.51.100.7", 6: "2001:db8:77::7"}[family]
    two.ip(f"-{family} address add {other}/{LENGTH[family]} dev eth1")
    wait_until(lambda: "tentative" not in two.ip("address show dev eth1"), 60)
    target = SECOND[family] if same else other
    own = peer(0, public_ip=target, public_ipv6=target)
    with plane(two, family, iface="eth0") as dp:
        assert not moves(dp.sync([lease_of(two), peer(1)]).warnings)
    with plane(two, family, iface=target) as dp:
        report = dp.sync([own, peer(1)])

    said = moves(report.warnings)
    assert local(two, family) == ("eth0" if same else "eth1", target)
    assert len(said) == 1
    assert f"{two.underlay(family)} -> {target}" in said[0]
    assert ("eth0 -> eth1" in said[0]) is not same


def test_a_virtual_address_is_not_published(host: Any, family: int) -> None:
    """keepalived's, beside a DHCP or SLAAC address; alone on an interface it is that one's."""
    length, virtual = {4: 32, 6: 128}[family], SECOND[family]
    address = f"{host.underlay(family)}/{LENGTH[family]}"
    host.ip(f"-{family} address change {address} dev eth0 valid_lft 3600 preferred_lft 3600")
    host.ip(f"-{family} address add {virtual}/{length} dev eth0")
    wait_until(lambda: "tentative" not in host.ip("address show dev eth0"), 60)
    assert published(host, family, iface="eth0") == {family: host.underlay(family)}

    host.ip(f"-{family} address del {address} dev eth0")
    assert published(host, family, iface="eth0") == {family: virtual}


def test_the_address_in_use_stays_when_another_comes_first(host: Any, family: int) -> None:
    length = LENGTH[family]
    with plane(host, family) as dp:
        assert dp.sync(cluster(host)).ok
        own = host.underlay(family)
        host.ip(f"-{family} address add {SECOND[family]}/{length} dev eth0")
        host.ip(f"-{family} address change {own}/{length} dev eth0 valid_lft 3600 preferred_lft 90")
        wait_until(lambda: "tentative" not in host.ip("address show dev eth0"), 60)
        assert dp.resync().writes == 0

    assert published(host, family, iface="eth0") == {family: own}


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


def second_interface(host: Any, family: int, metric: int) -> str:
    """eth1, and a default route out of it; return its address."""
    stranger(host, "eth1")
    address = {4: "198.51.100.7", 6: "2001:db8:77::7"}[family]
    gateway = {4: "198.51.100.254", 6: "2001:db8:77::fe"}[family]
    nodad = "nodad" if family == 6 else ""
    host.ip(f"-{family} address add {address}/{LENGTH[family]} dev eth1 {nodad}")
    host.ip(f"-{family} route add default via {gateway} dev eth1 metric {metric}")
    return address


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

    wait_until(temporary, 60)
    with plane(host, 6, iface="eth0") as dp:
        assert dp.resolver.public_addresses() == {6: ("2001:db8:9::1",)}


# ---- what is in use moves only where it is gone ------------------------------------------------


def test_an_address_that_a_bridge_takes_over_takes_the_tunnel_along(
    routed: Any, family: int
) -> None:
    """eth0 becomes a port of br0, and its address is br0's: packets leave by br0."""
    with plane(routed, family, iface=None) as dp:
        assert dp.sync(cluster(routed)).ok
        address = f"{routed.underlay(family)}/{LENGTH[family]}"
        routed.ip("link add br0 type bridge")
        routed.ip("link set br0 up")
        routed.ip("link set eth0 master br0")
        routed.ip(f"-{family} address del {address} dev eth0")
        nodad = "nodad" if family == 6 else ""
        routed.ip(f"-{family} address add {address} dev br0 {nodad}")
        report = dp.resync()

    assert local(routed, family) == ("br0", routed.underlay(family))
    assert any("eth0 -> br0" in text for text in moves(report.warnings))


def test_a_virtual_address_is_no_evidence_of_this_node_s_lease(host: Any, family: int) -> None:
    """fr27: the lease that another node published with the virtual address is not taken over by
    the next node that has it."""
    length = {4: 32, 6: 128}[family]
    host.ip(f"-{family} address add {SECOND[family]}/{length} dev eth0")
    wait_until(lambda: "tentative" not in host.ip("address show dev eth0"), 60)
    theirs = peer(7, public_ip=SECOND[4], public_ipv6=SECOND[6], name="n7")
    with plane(host, family) as dp:
        assert dp.sync([theirs, lease_of(host), peer(1)]).ok
    with plane(host, family) as dp, pytest.raises(SourceError, match="n7") as caught:
        dp.sync([theirs, peer(1)])
    assert SECOND[family] in str(caught.value)


# ---- where no route tells, the leases do --------------------------------------------------------


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_a_lease_tells_the_interface_without_a_default_route(
    host: Any, family: int, backend: str
) -> None:
    """fr32: an air gap, or a router that is down while a node joins."""
    shape: dict[str, Any] = {"backend_type": backend}
    if backend == "host-gw":
        shape |= {"backend_data": None, "backend_v6_data": None}
    near = {"public_ip": "192.0.2.77", "public_ipv6": "2001:db8::77"}
    own = peer(0, public_ip=host.ipv4, public_ipv6=host.ipv6, **shape)
    leases = [peer(1, **near, **shape), own]
    with DataPlane(network_config(family, Type=backend), netns=host.ns) as dp:
        assert dp.sync(leases).ok
        assert dp.sync(leases).writes == 0
    if backend == "vxlan":
        assert local(host, family) == ("eth0", host.underlay(family))
    with (
        DataPlane(network_config(family, Type=backend, VNI=5), netns=host.ns) as dp,
        pytest.raises(NotYet, match="default route"),
    ):
        dp.sync([peer(1, **near, **shape)])


# ---- a move is announced each time ---------------------------------------------------------------


def test_an_agent_logs_each_move_with_old_and_new(
    routed: Any, family: int, caplog: pytest.LogCaptureFixture
) -> None:
    """This node's lease is published with eth1's address, and with eth0's again, twice."""
    second = second_interface(routed, family, 9000)
    first = routed.underlay(family)
    at = {
        first: lease_of(routed),
        second: replace(lease_of(routed), public_ip=second, public_ipv6=second),
    }
    script = Script([at[first], peer(1)])

    def lines() -> list[str]:
        told = [one for one in caplog.records if one.levelname == "WARNING"]
        return [one.getMessage() for one in told if "moves on the underlay" in one.getMessage()]

    with Watched(plane(routed, family, iface=None), script):
        wait_until(lambda: local(routed, family) == ("eth0", first))
        for count, address in enumerate((second, first, second, first), 1):
            script.replace([at[address], peer(1)])
            name = "eth0" if address == first else "eth1"
            wait_until(lambda name=name, address=address: local(routed, family) == (name, address))
            wait_until(lambda count=count: len(lines()) == count)

    there, back, *_ = lines()
    assert f"dev eth0 -> eth1, local {first} -> {second}" in there
    assert f"dev eth1 -> eth0, local {second} -> {first}" in back


def test_a_tunnel_that_went_with_its_interface_tells_where_it_is_now(
    routed: Any, family: int
) -> None:
    """The kernel deletes the device with the interface below it; the next one is elsewhere."""
    second = second_interface(routed, family, 9000)
    moved = replace(lease_of(routed), public_ip=second, public_ipv6=second)
    with plane(routed, family, iface=None) as dp:
        assert dp.sync([lease_of(routed), peer(1)]).ok
        routed.ip("link del eth0")
        report = dp.sync([moved, peer(1)])

    assert local(routed, family) == ("eth1", second)
    (said,) = moves(report.warnings)
    assert f"dev eth0 -> eth1, local {routed.underlay(family)} -> {second}" in said


def test_fr32_a_node_that_joins_without_a_default_route_is_programmed(
    routed: Any, family: int
) -> None:
    """The router is down: the agent goes on where it was, by list and by change."""
    script = Script(cluster(routed))
    with Watched(plane(routed, family, iface=None), script) as node:
        routed.ip(f"-{family} route del default metric 5000")
        script.change([peer(3)])
        wait_until(
            lambda: observed(routed, family) == expected([peer(n) for n in (1, 2, 3)], family)
        )
        script.replace([*cluster(routed), peer(4)])
        wait_until(
            lambda: observed(routed, family) == expected([peer(n) for n in (1, 2, 4)], family)
        )
        assert not node.status.degraded


@pytest.mark.parametrize("policy", ["table 52", "halves", "over flannel"])
def test_fr24_a_vpn_that_comes_while_an_agent_runs_moves_nothing(
    routed: Any, family: int, policy: str
) -> None:
    script = Script(cluster(routed))
    with Watched(plane(routed, family, iface=None), script) as node:
        if policy == "over flannel":  # fr26, dhcpcd
            routed.ip(f"-{family} route add default dev {DEVICE[family]} metric 100 proto dhcp")
            wait_until(
                lambda: not routed.ip_json(f"-{family} route show default dev {DEVICE[family]}")
            )
        elif policy == "halves":
            vpn(routed, family, table="51")
            for half in ANYWHERE[family]:
                routed.ip(f"-{family} route add {half} dev vpn0")
        else:
            vpn(routed, family)
        script.replace([*cluster(routed), peer(3)])
        wait_until(
            lambda: observed(routed, family) == expected([peer(n) for n in (1, 2, 3)], family)
        )
        node.agent.refresh()
        wait_until(lambda: script.refreshes)
        script.change([peer(4)])
        wait_until(
            lambda: observed(routed, family) == expected([peer(n) for n in (1, 2, 3, 4)], family)
        )

    assert local(routed, family) == ("eth0", routed.underlay(family))
