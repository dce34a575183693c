"""What the kernel holds and a table cannot: reading and planning raise Unsupported and touch
nothing; who owns the whole device may have it repaired, and foreign routes stop nobody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import (
    DataPlane,
    Fdb,
    Kernel,
    Route,
    Table,
    Unsupported,
    fdb_scope,
    nexthop_scope,
    nexthop_table,
    route_scope,
    route_table,
)
from flannel_dp.look.show import show
from flannel_dp.resources.peers.stack import whole_main_table
from tests.lib.core_overlay import Overlay
from tests.lib.kernel import expected, observed
from tests.lib.leases import DEVICE, address, endpoint, lease_of, mac, near, peers, plane, subnet

ZERO = "00:00:00:00:00:00"


@pytest.fixture
def overlay(host: Any, family: int) -> Iterator[Overlay]:
    overlay = Overlay(host, family)
    with overlay.kernel:
        yield overlay


def test_a_plain_fdb_reads_as_bridge_shows_it(overlay: Overlay) -> None:
    overlay.sync(overlay.wanted(range(1, 5)))
    overlay.bridge(
        f"fdb add {ZERO} dst {endpoint(overlay.family, 9)} dev {overlay.device} self permanent"
    )

    table = overlay.kernel.read("fdb", fdb_scope(overlay.index))

    shown = overlay.host.bridge_json(f"-d fdb show dev {overlay.device}")
    assert {(e.mac, e.endpoint) for e in table} == {(e["mac"], e["dst"]) for e in shown}
    assert len(table) == len(shown) == 5
    assert {overlay.kernel.get(fdb_scope(overlay.index), entry) for entry in table} == {*table}


@pytest.fixture
def multi(overlay: Overlay) -> int:
    """A device of several VNIs, with one MAC behind two peers; its ifindex."""
    host, family = overlay.host, overlay.family
    host.ip(
        f"link add vx0 type vxlan external vnifilter dstport 9999 nolearning "
        f"local {host.underlay(family)}"
    )
    host.ip("link set vx0 addrgenmode none up")
    host.bridge("vni add dev vx0 vni 10-11")
    for vni in (10, 11):
        host.bridge(
            f"fdb add {mac(family, 1)} dst {endpoint(family, vni)} src_vni {vni} vni {vni} dev vx0 "
            "self permanent"
        )
    return int(host.ip_json("link show vx0")[0]["ifindex"])


def test_an_owner_of_the_device_gets_rid_of_all_vnis(overlay: Overlay, multi: int) -> None:
    """Each is removed by the VNI that it is for, and none is taken for another."""
    with Kernel(overlay.host.ns, strict=False) as kernel:
        held = kernel.read("fdb", fdb_scope(multi))
        assert {(e.src_vni, e.vni, e.endpoint) for e in held} == {
            (vni, vni, endpoint(overlay.family, vni)) for vni in (10, 11)
        }
        (result,) = kernel.apply(kernel.diff(Table("fdb"), fdb_scope(multi)))

        assert result.counts()["removed"] == 2
        assert len(kernel.read("fdb", fdb_scope(multi))) == 0
    assert overlay.host.bridge_json("fdb show dev vx0") == []


# ---- routes --------------------------------------------------------------------------


def paths(overlay: Overlay, number: int, protocol: int) -> str:
    """Add a route over two paths; what ``ip`` is told."""
    hops = " ".join(
        f"nexthop via {address(overlay.family, n)} dev {overlay.device} onlink" for n in (91, 92)
    )
    metric = "metric 1024" if overlay.family == 6 else ""
    words = f"{subnet(overlay.family, number)} proto {protocol} {metric} {hops}"
    overlay.ip(f"route add {words}")
    return words


@pytest.mark.parametrize("wanted", [True, False])
def test_routes_over_several_paths_are_not_touched(overlay: Overlay, wanted: bool) -> None:
    family, device = overlay.family, overlay.index
    paths(overlay, 7, 138)
    held = overlay.host.ip_json(f"-{family} route show")
    table = route_table({subnet(family, 7): address(family, 7)} if wanted else {}, device=device)
    scopes = [route_scope(family), route_scope(family, device=device, exclusive=True)]

    for scope in scopes:
        for act in (
            lambda: overlay.kernel.read("route", scope),  # noqa: B023
            lambda: overlay.kernel.diff(table, scope),  # noqa: B023
        ):
            with pytest.raises(Unsupported) as caught:
                act()
            assert f"route {subnet(family, 7)} multipath" in caught.value.message
    assert overlay.host.ip_json(f"-{family} route show") == held


def test_a_foreign_route_over_several_paths_stops_nothing(overlay: Overlay) -> None:
    """It is reported where it is in the way, as what it is, and stays."""
    family = overlay.family
    paths(overlay, 7, 4)
    held = overlay.host.ip_json(f"-{family} route show {subnet(family, 7)}")
    table = route_table(
        {subnet(family, n): address(family, n) for n in (7, 8)}, device=overlay.index
    )

    diff = overlay.kernel.diff(table, route_scope(family), whole_main_table(family))

    ((_, foreign),) = diff.conflicts()
    assert isinstance(foreign, Route)
    assert (foreign.prefix, foreign.other) == (subnet(family, 7), "multipath")
    assert not foreign.is_plain
    assert "multipath" in str(overlay.plan([(table, whole_main_table(family))]))
    (result,) = overlay.kernel.apply(diff)
    assert (result.counts()["added"], result.counts()["failed"]) == (1, 0)
    assert overlay.host.ip_json(f"-{family} route show {subnet(family, 7)}") == held
    with pytest.raises(Unsupported, match="multipath"):
        overlay.kernel.read("route", whole_main_table(family))


def test_several_ipv4_routes_to_one_prefix_are_not_touched(host: Any) -> None:
    """``ip route append``, which IPv4 alone has."""
    overlay = Overlay(host, 4)
    with overlay.kernel:
        for number in (91, 92):
            overlay.ip(
                f"route append {subnet(4, 7)} via {address(4, number)} dev {overlay.device} "
                "onlink proto 138"
            )
        held = host.ip_json("-4 route show")

        for table in (
            Table("route"),
            route_table({subnet(4, 7): address(4, 91)}, device=overlay.index),
        ):
            with pytest.raises(Unsupported, match=rf"{address(4, 91)}.*{address(4, 92)}|92.*91"):
                overlay.kernel.diff(table, route_scope(4))
        with pytest.raises(Unsupported):
            overlay.kernel.read("route", route_scope(4))
        assert host.ip_json("-4 route show") == held


def test_an_ipv4_route_through_an_ipv6_gateway_is_not_touched(host: Any) -> None:
    with Kernel(host.ns) as kernel:
        host.ip(f"route add {subnet(4, 7)} via inet6 2001:db8::9 dev eth0 proto 138")

        with pytest.raises(Unsupported, match="via the other family"):
            kernel.diff(Table("route"), route_scope(4))
        assert host.ip_json(f"route show {subnet(4, 7)}") != []


def test_a_blackhole_nexthop_is_not_touched(overlay: Overlay) -> None:
    """One that carries our protocol; groups are in no dump of one family or device."""
    family = overlay.family
    overlay.ip("nexthop add id 3 blackhole proto 138")
    wanted = nexthop_table(overlay.index, {3: address(family, 3)})

    for table in (wanted, Table("nexthop")):
        with pytest.raises(Unsupported, match="nexthop 3 blackhole"):
            overlay.kernel.diff(table, nexthop_scope(0, family))
    with pytest.raises(Unsupported, match="nexthop 3 blackhole"):
        overlay.kernel.read("nexthop", nexthop_scope(0, family))
    assert [n["id"] for n in overlay.host.ip_json("nexthop show")] == [3]


# ---- the data plane's own device -------------------------------------------------------


@pytest.fixture
def dp(host: Any, family: int) -> Iterator[DataPlane]:
    with plane(host, family) as made:
        yield made


def test_a_data_plane_repairs_its_own_device(dp: DataPlane, host: Any, family: int) -> None:
    device, there = DEVICE[family], host.underlay(family)
    leases = [lease_of(host), *peers(range(1, 6))]
    dp.sync(leases)
    for number in (1, 2):
        far = f"{there[:-1]}{number + 6}"
        host.bridge(f"fdb append {ZERO} dst {far} dev {device} self permanent")
    host.bridge(f"fdb replace {mac(family, 1)} dst {there} dev {device} self extern_learn")

    assert dp.sync(leases).ok
    assert observed(host, family) == expected(peers(range(1, 6)), family)


def test_a_plan_names_what_an_append_changed(dp: DataPlane, host: Any, family: int) -> None:
    """The kernel takes no second remote for a unicast MAC (vxlan_fdb_update_existing): it
    says 0 and changes nothing but the state, which the line has to show."""
    leases = [lease_of(host), *peers(range(1, 3))]
    dp.sync(leases)
    address, device = mac(family, 1), DEVICE[family]
    host.bridge(f"fdb append {address} dst {host.underlay(family)} dev {device}")
    (shown,) = [e for e in host.bridge_json(f"fdb show dev {device}") if e["mac"] == address]

    (line,) = [one for one in dp.plan(leases).lines() if one.startswith("~ fdb")]

    new, _, old = line.partition("  (was ")
    assert shown["dst"] in new
    assert shown["dst"] in old
    assert old.endswith("state noarp,permanent)")
    assert "state" not in new


def test_a_plan_names_the_remote_that_goes(dp: DataPlane, host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(range(1, 3))]
    dp.sync(leases)
    address, there = mac(family, 1), host.underlay(family)
    host.bridge(f"fdb replace {address} dst {there} dev {DEVICE[family]} self permanent")

    (line,) = [one for one in dp.plan(leases).lines() if one.startswith("~ fdb")]

    assert f"(was fdb {address} dst {there} dev" in line


def test_foreign_multipath_routes_stop_no_data_plane(dp: DataPlane, host: Any, family: int) -> None:
    """A default route over several paths stays; one in a peer's place is a conflict."""
    routers = near(family, 1), near(family, 2)
    hops = " ".join(f"nexthop via {one} dev eth0" for one in routers)
    metric = "metric 1024" if family == 6 else ""
    host.ip(f"-{family} route add default {hops}")
    host.ip(f"-{family} route add {subnet(family, 1)} {metric} proto static {hops}")
    held = [host.ip_json(f"-{family} route show {w}") for w in ("default", subnet(family, 1))]
    leases = [lease_of(host), *peers(range(1, 4))]

    plan, report = dp.plan(leases), dp.sync(leases)

    assert [h for h in plan.to_json()["conflicts"] if h["foreign"]["other"] != "multipath"] == []
    ((_, foreign),) = report.conflicts
    assert isinstance(foreign, Route)
    assert (foreign.prefix, foreign.other) == (subnet(family, 1), "multipath")
    assert f"route {subnet(family, 1)} multipath" in "\n".join(plan.lines())
    assert report.failures == []
    after = [host.ip_json(f"-{family} route show {w}") for w in ("default", subnet(family, 1))]
    assert after == held


def test_show_has_no_gateway_for_a_multipath_route(dp: DataPlane, host: Any, family: int) -> None:
    dp.sync([lease_of(host), *peers([1])])
    device = DEVICE[family]
    hops = " ".join(f"nexthop via {n} dev {device} onlink" for n in _gateways(family))
    host.ip(f"-{family} route add {subnet(family, 9)} {hops}")

    (view,) = show(dp).families
    (peer,) = [one for one in view.peers if one.subnet == subnet(family, 9)]

    assert (peer.via, peer.state, peer.detail) == ("", "foreign", "multipath")


def _gateways(family: int) -> tuple[str, str]:
    return ("10.244.0.91", "10.244.0.92") if family == 4 else ("fd00:10:244::91", "fd00:10:244::92")


def test_entries_read_from_the_kernel_do_not_fit_into_tables() -> None:
    fdb, route = Table("fdb"), Table("route")
    for entry in (
        Fdb(1, mac(4, 1), "192.0.2.1", src_vni=10),
        Fdb(1, mac(4, 1), "192.0.2.1", other="extern_learn"),
        Fdb(1, mac(4, 1), "192.0.2.1", flags="extern_learn"),
        Fdb(1, mac(4, 1), master=3),
        Fdb(1, mac(4, 1), "192.0.2.1", vlan=3),
    ):
        with pytest.raises(Unsupported, match="cannot hold"):
            fdb.add(entry)
    with pytest.raises(Unsupported, match="cannot hold"):
        route.add(Route("10.244.1.0/24", other="multipath"))
    assert len(fdb) == len(route) == 0
