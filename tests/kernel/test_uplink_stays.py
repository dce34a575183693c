"""An interface and an address in use stay until they are gone, or until a flag names others."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from flannel_dp import ConfigError, DataPlane, NotYet, SourceError
from tests.lib.agents import Script, Watched
from tests.lib.kernel import expected, observed, stranger
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

# ---- without a choice: what is in use stays --------------------------------------------


def moves(warnings: tuple[str, ...]) -> list[str]:
    """What was said of a device that moves to another interface or address."""
    return [one for one in warnings if "on the underlay" in one]


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
    assert "iface=" in caught.value.hint

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
    wait_until(lambda: "tentative" not in two.ip("address show dev eth1"))
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
    wait_until(lambda: "tentative" not in host.ip("address show dev eth0"))
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
        wait_until(lambda: "tentative" not in host.ip("address show dev eth0"))
        assert dp.resync().writes == 0

    assert published(host, family, iface="eth0") == {family: own}


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
    wait_until(lambda: "tentative" not in host.ip("address show dev eth0"))
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
