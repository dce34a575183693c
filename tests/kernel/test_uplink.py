"""Which interface and which addresses a node publishes and sends from."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp import ConfigError, DataPlane, NotYet
from flannel_dp.cluster.lease import Identity
from tests.lib.kernel import stranger
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
