"""One reading of a family, for all views: what is a peer in it, and what is a stray."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp import DataPlane, Kernel, Scope, Table
from flannel_dp.look.drift_viewer import DriftViewer
from flannel_dp.look.explain import explain
from flannel_dp.look.held import FamilyReader
from flannel_dp.look.show import show
from tests.lib.forwarding import config, remove_pins
from tests.lib.leases import (
    DEVICE,
    endpoint,
    lease_of,
    mac,
    network_config,
    peer,
    peers,
    plane,
    replaced,
    subnet,
)
from tests.lib.traffic import pod_address


def test_a_stray_on_another_device_has_its_name(host: Any, family: int) -> None:
    with plane(host, family) as dp:
        dp.sync([lease_of(host), peer(2)])
        host.ip(f"-{family} route add {subnet(family, 9)} dev eth0 proto 138")

        overview = show(dp)

    (stray,) = overview.to_json()["families"][0]["strays"]
    assert (stray["table"], stray["dev"]) == ("route", "eth0")
    assert f"route {subnet(family, 9)} dev eth0" in str(overview)


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_the_blackhole_of_this_node_is_no_peer_and_no_stray(
    host: Any, family: int, backend: str
) -> None:
    with DataPlane(
        network_config(family, Type=backend),
        iface=host.iface,
        netns=host.ns,
        ip_blackhole_route=True,
    ) as dp:
        own = lease_of(host)
        if backend == "host-gw":
            own = replaced(own, backend_type="host-gw", backend_data=None, backend_v6_data=None)
        dp.sync([own])
        host.ip(f"-{family} route add blackhole {subnet(family, 9)} metric 7 proto 138")

        (view,) = show(dp).families

    assert "blackhole" in host.ip(f"-{family} route show {subnet(family, 0)} proto 138")
    others = view.peers if backend == "host-gw" else view.strays
    assert [getattr(one, "prefix", "") or getattr(one, "subnet", "") for one in others] == [
        subnet(family, 9)
    ]


def test_live_view_and_overview_come_from_one_reading(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each table is read once, whether it is watched or not."""
    kinds: list[str] = []
    read = Kernel.read

    def counted(kernel: Kernel, kind: str, *scopes: Scope) -> Table:
        kinds.append(kind)
        return read(kernel, kind, *scopes)

    with plane(host, family) as dp:
        dp.sync([lease_of(host), *peers(range(1, 4))])
        monkeypatch.setattr(Kernel, "read", counted)
        show(dp)
        once = kinds.copy()
        kinds.clear()
        with DriftViewer(dp) as viewer:
            viewer.read()

    assert sorted(once) == ["fdb", "neighbour", *["nexthop"] * (family == 4), "route"]
    assert kinds == once


def test_what_packets_reach_is_what_leases_said(host: Any, family: int) -> None:
    """What the brake reads: subnet, endpoint and MAC of each complete peer."""
    with plane(host, family) as dp:
        dp.sync([lease_of(host), *peers(range(1, 4))])
        dev = DEVICE[family]
        host.exec("bridge", "fdb", "del", mac(family, 3), "dev", dev)

        found = [*FamilyReader.of(dp, family).held().reached()]

    assert found == [(subnet(family, n), endpoint(family, n), mac(family, n)) for n in (1, 2)]


def test_a_peers_own_route_beside_the_programs_is_seen(host: Any, family: int) -> None:
    """It takes the peer's packets away from the route of all; the map has the peer still."""
    with DataPlane(config(family), iface=host.iface, netns=host.ns) as dp:
        try:
            dp.sync([lease_of(host), *peers(range(1, 4))])
            via = pod_address(family, 2)
            onlink = f"via {via} dev {DEVICE[family]} onlink proto static"
            host.ip(f"-{family} route add {subnet(family, 2)} {onlink}")

            (view,) = show(dp).families
            told = explain(dp, pod_address(family, 2))
            reached = [*FamilyReader.of(dp, family).held().reached()]
        finally:
            dp.close()
            remove_pins(host)

    assert [(p.subnet, p.state) for p in view.peers] == [
        (subnet(family, n), "no neighbour" if n == 2 else "ok") for n in range(1, 4)
    ]
    assert "route" in [step.name for step in told.steps if not step.ok]
    assert len(reached) == 3


def test_without_leases_the_programs_map_says_whose_no_address_is(host: Any, family: int) -> None:
    with DataPlane(config(family), iface=host.iface, netns=host.ns) as dp:
        try:
            dp.sync([lease_of(host), *peers(range(1, 4))])
            with DataPlane(config(family), iface=host.iface, netns=host.ns) as fresh:
                told = explain(fresh, pod_address(family, 77))
        finally:
            dp.close()
            remove_pins(host)

    assert (told.verdict, told.ok) == ("unknown", True)
    assert "the program drops it" in str(told)


def test_clean_removes_a_nexthop_of_another_networks_range(host: Any) -> None:
    """From the device that is kept: all of it is ours."""
    with plane(host, 4) as dp:
        dp.sync([lease_of(host), peer(2)])
        other = 0x50000000 | 0x0B000900
        host.ip(f"nexthop add id {other} via 10.99.9.0 dev {DEVICE[4]} onlink proto 138")

        report = dp.clean(keep_device=True)

    assert report.ok
    assert host.ip("nexthop show") == ""
    assert DEVICE[4] in host.ip("link show")
