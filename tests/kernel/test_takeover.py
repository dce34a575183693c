"""Taking a node over from flanneld: what it left on the device is adopted in place, what is
stale goes, and nobody who talks to a live peer notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pyroute2 import IPRoute

from flannel_dp import Conflict
from flannel_dp.kernel.netns import call_in_netns, call_on_thread
from tests.lib.kernel import everything, expected, ifindex, observed, stranger
from tests.lib.leases import (
    DEVICE,
    PROTOCOL,
    address,
    endpoint,
    half,
    lease_of,
    mac,
    peer,
    peers,
    plane,
    subnet,
)
from tests.lib.monitor import Monitor
from tests.lib.traffic import Pings, pod, pod_address


def flanneld(host: Any, family: int, own: Any, others: list[Any], *, learning: bool = False) -> int:
    """Leave what flanneld leaves (vxlan/device.go, vxlan_network.go); the device's ifindex."""
    net, local, lladdr = half(own, family)
    device, bits = DEVICE[family], 32 if family == 4 else 128
    mode = "learning" if learning else "nolearning"
    host.ip(
        f"link add {device} address {lladdr} mtu {1450 if family == 4 else 1430} type vxlan id 1 "
        f"local {local} dev eth0 dstport 8472 {mode}"
    )
    # Without duplicate address detection: flanneld's device has long been through with it.
    nodad = "nodad" if family == 6 else ""
    host.ip(f"address add {net.partition('/')[0]}/{bits} dev {device} {nodad}")
    host.ip(f"link set {device} up")
    index = ifindex(host, device)
    for lease in others:
        net, _, lladdr = half(lease, family)
        gateway = net.partition("/")[0]
        host.ip(f"-{family} neigh replace {gateway} lladdr {lladdr} dev {device} nud permanent")
        host.ip(f"-{family} route replace {net} via {gateway} dev {device} onlink proto boot")
    # Not by bridge(8), which adds NUD_NOARP to the state; flanneld does not.
    remotes = [half(lease, family)[1:] for lease in others]
    call_in_netns(host.ns, call_on_thread, _fill_fdb, index, remotes)
    return index


def _fill_fdb(index: int, remotes: list[tuple[str, str]]) -> None:
    with IPRoute() as ipr:
        for underlay, lladdr in remotes:
            ipr.fdb("replace", ifindex=index, lladdr=lladdr, dst=underlay, state=0x80, flags=2)


@pytest.mark.parametrize("nexthops", [True, False], ids=["objects", "gateways"])
def test_flannelds_entries_are_adopted_in_place(host: Any, family: int, nexthops: bool) -> None:
    own, live, stale = lease_of(host), peers(range(1, 21)), peers(range(100, 106))
    index = flanneld(host, family, own, [*live, *stale])
    before = {row[2] for row in observed(host, family)["route"]}
    assert before == {"boot"}

    with Monitor(host) as monitor, plane(host, family, nexthops=nexthops) as dp:
        report = dp.sync([own, *live])
        deleted = [event for event in monitor.events() if event.deleted]

    assert report.ok
    assert observed(host, family) == expected(live, family, nexthops=nexthops)
    assert ifindex(host, DEVICE[family]) == index
    gone = {part for lease in stale for part in half(lease, family)}
    gone |= {lease.partition("/")[0] for lease in gone}
    assert {event.key for event in deleted} <= gone
    assert {event.table for event in deleted} == {"route", "neighbour", "fdb"}
    removed = {table: row["removed"] for table, row in report.tables.items()}
    assert removed == {"route": 6, "neighbour": 6, "fdb": 6, "nexthop": 0, "peer": 0}
    kept = {table: row["unchanged"] for table, row in report.tables.items()}
    assert (kept["neighbour"], kept["fdb"]) == (20, 20)


def test_a_plan_for_a_take_over_tells_what_it_does(host: Any, family: int) -> None:
    own, live = lease_of(host), peers(range(1, 4))
    flanneld(host, family, own, [*live, peer(9)])
    before = everything(host)

    with plane(host, family) as dp:
        document = dp.plan([own, *live]).to_json()
        assert everything(host) == before
        assert {d["action"] for d in document["devices"]} <= {"none", "adopt"}
        operations = {(o["op"], o["table"]) for o in document["operations"]}
        assert ("replace", "route") in operations
        assert {o for o in operations if o[0] == "remove"} == {
            ("remove", "route"),
            ("remove", "neighbour"),
            ("remove", "fdb"),
        }
        report = dp.sync([own, *live])

    assert report.writes == len(document["operations"])


def test_a_device_with_other_settings_is_mended_in_place(host: Any, family: int) -> None:
    """MTU, learning and address are not what they should be: repaired, and no entry lost."""
    own, live = lease_of(host), peers(range(1, 21))
    index = flanneld(host, family, own, live, learning=True)
    host.ip(f"link set {DEVICE[family]} mtu 1400")
    bits = 32 if family == 4 else 128
    host.ip(f"address add {address(family, 77)}/{bits} dev {DEVICE[family]}")

    with Monitor(host) as monitor, plane(host, family) as dp:
        assert dp.sync([own, *live]).ok
        lost = monitor.deleted("neighbour", "fdb", "link")

    keys = {part for lease in live for part in half(lease, family)}
    assert not lost & (keys | {key.partition("/")[0] for key in keys})
    assert ifindex(host, DEVICE[family]) == index
    assert observed(host, family) == expected(live, family)
    link = host.ip_json(f"link show {DEVICE[family]}")[0]
    assert link["mtu"] == (1450 if family == 4 else 1430)
    assert link["linkinfo"]["info_data"]["learning"] is False


def test_entries_that_flanneld_got_wrong_are_mended(host: Any, family: int) -> None:
    """flanneld leaves the old MAC's FDB entry when a peer's MAC changes, and does not follow
    a change it missed."""
    own = lease_of(host)
    flanneld(host, family, own, peers(range(1, 5)))
    device = DEVICE[family]
    host.bridge(f"fdb add {mac(family, 99)} dev {device} dst {endpoint(family, 1)} self permanent")
    host.ip(f"-{family} neigh replace {address(family, 2)} lladdr {mac(family, 98)} dev {device}")
    moved = peer(3, public_ip="198.18.9.3", public_ipv6="2001:db8:1::903")
    leases = [peer(1), peer(2), moved, peer(4)]

    with plane(host, family) as dp:
        assert dp.sync([own, *leases]).ok

    assert observed(host, family) == expected(leases, family)


def test_routes_of_others_on_other_devices_stay(host: Any, family: int) -> None:
    """Protocol boot is also that of every ``ip route add`` typed by hand."""
    own, live = lease_of(host), peers(range(1, 5))
    stranger(host, "other0")
    host.ip(f"-{family} route add {subnet(family, 300)} dev other0")
    before = everything(host)
    flanneld(host, family, own, live)

    with plane(host, family) as dp:
        dp.sync([own, *live])
        assert [line for line in everything(host) if line in set(before)] == before
        dp.clean()

    assert everything(host) == before


@pytest.mark.parametrize(
    "kind",
    ["type vxlan id 7 local {} dev eth0 dstport 8472", "type bridge", "type veth peer name p0"],
    ids=["vni", "bridge", "veth"],
)
def test_a_device_of_another_kind_is_refused(host: Any, family: int, kind: str) -> None:
    host.ip(f"link add {DEVICE[family]} {kind.format(host.underlay(family))}")
    before = everything(host)
    leases = [lease_of(host), *peers(range(1, 5))]

    with plane(host, family) as dp, pytest.raises(Conflict, match=DEVICE[family]) as caught:
        dp.sync(leases)
    assert "take_over=True" in caught.value.hint
    assert everything(host) == before

    with plane(host, family, take_over=True) as dp:
        report = dp.sync(leases)
    assert [change.action for change in report.devices] == ["replace"]
    assert observed(host, family) == expected(leases[1:], family)


def test_no_packet_is_lost_in_a_take_over(
    lab: Any, make_host: Callable[..., Any], family: int
) -> None:
    """Two nodes that flanneld set up, a pod on each, an echo request every 10 ms."""
    here, there = make_host(), make_host()
    pods = [pod(lab, here, 0), pod(lab, there, 1)]
    mine, theirs = lease_of(here, 0), lease_of(there, 1)
    flanneld(here, family, mine, [theirs, *peers(range(2, 60))])
    flanneld(there, family, theirs, [mine, *peers(range(2, 60))])
    leases = [mine, theirs, *peers(range(30, 90))]

    with (
        Pings(pods[0], pod_address(family, 1)) as forth,
        Pings(pods[1], pod_address(family, 0)) as back,
    ):
        for one in (here, there):
            with plane(one, family) as dp:
                assert dp.sync(leases).ok
                assert dp.sync(leases).writes == 0
            forth.await_answers(3)
            back.await_answers(3)

    assert (forth.lost, back.lost) == (0, 0)
    routes = {row[2] for row in observed(here, family)["route"]}
    assert routes == {PROTOCOL}


def test_flanneld_can_have_the_node_back(host: Any, family: int) -> None:
    """flanneld replaces routes of any owner: the way back loses nothing either, and coming
    once more finds everything in order."""
    own, live = lease_of(host), peers(range(1, 11))
    with plane(host, family) as dp:
        dp.sync([own, *live])
    device = DEVICE[family]
    with Monitor(host) as monitor:
        for lease in live:
            net = half(lease, family)[0]
            gateway = net.partition("/")[0]
            host.ip(f"-{family} route replace {net} via {gateway} dev {device} onlink proto boot")
        assert monitor.deleted("route", "neighbour", "fdb") == set()
    with Monitor(host) as monitor, plane(host, family) as dp:
        assert dp.sync([own, *live]).ok
        assert monitor.deleted("route", "neighbour", "fdb") == set()

    assert observed(host, family) == expected(live, family)
