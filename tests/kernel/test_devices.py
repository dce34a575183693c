"""Vxlan devices: made, adopted, repaired in place, refused, replaced, deleted."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from flannel_dp.errors import Conflict
from flannel_dp.node import mac as node_mac
from flannel_dp.node.mac import default_mac, stable_mac
from flannel_dp.resources.device.change import apply_device, delete_device
from flannel_dp.resources.device.vxlan import VxlanDevice, overlay_mtu
from tests.lib.vxlan_devices import add_vxlan, overlay_addresses, plan, shown, sync, wanted_device

OTHER_ADDRESS = {4: "10.244.9.9/32", 6: "fd00:10:244:9::9/128"}


def test_create_gives_what_iproute2_shows(host: Any, family: int) -> None:
    want = wanted_device(host, family)

    made = sync(host, want)

    link = shown(host, want.name)
    data = link["linkinfo"]["info_data"]
    assert made.action == "create"
    assert made.ifindex is None
    assert (link["mtu"], link["address"]) == (want.mtu, want.mac)
    assert "UP" in link["flags"]
    assert (data["id"], data["port"], data["learning"], data["link"]) == (1, 8472, False, "eth0")
    assert data["local" if family == 4 else "local6"] == want.local
    assert overlay_addresses(host, want) == {want.address}
    assert host.sysctl(f"ipv6/conf/{want.name}/accept_ra") == "0"


def test_both_families_share_vni_and_port(host: Any) -> None:
    for family in (4, 6):
        assert sync(host, wanted_device(host, family)).action == "create"


def test_v6_address_is_usable_at_once(host: Any) -> None:
    want = wanted_device(host, 6)
    apply_device(plan(host, want), netns=host.ns)

    entries = host.ip_json(f"-6 addr show dev {want.name}")[0]["addr_info"]

    ours = next(e for e in entries if e["local"] == want.address.split("/")[0])
    assert not ours.get("tentative")
    assert ours["nodad"]


def test_learning_and_gbp_are_made_as_asked(host: Any, family: int) -> None:
    want = wanted_device(host, family, learning=True, gbp=True)

    sync(host, want)

    data = shown(host, want.name)["linkinfo"]["info_data"]
    assert data["learning"] is True
    assert data["gbp"] is True


def test_plan_writes_nothing(host: Any, family: int) -> None:
    before = host.ip("-d link show") + host.ip("addr show")

    made = plan(host, wanted_device(host, family))

    assert made.changes[0].startswith("create vxlan id 1 local ")
    assert made.changes[-1] == "up"
    assert host.ip("-d link show") + host.ip("addr show") == before


def test_plan_and_no_change_do_not_import_pyroute2(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    sync(host, want)
    script = f"""
import sys
from flannel_dp.resources.device.vxlan import VxlanDevice
from flannel_dp.resources.device.change import apply_device
from flannel_dp.resources.device.plan import plan_device
from flannel_dp.kernel.links import LinkReader
want = {want!r}
with LinkReader({host.ns!r}) as reader:
    plan = plan_device(reader, want, netns={host.ns!r})
assert plan.action == "none", plan
assert apply_device(plan, netns={host.ns!r}) == plan.ifindex
assert "pyroute2" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("link set {name} mtu 1300", "mtu 1300 -> {mtu}"),
        ("link set {name} address 02:00:00:00:00:99", "mac 02:00:00:00:00:99 -> {mac}"),
        ("link set {name} type vxlan learning", "learning -> nolearning"),
        ("link set {name} type vxlan dev eth1", "dev eth1 -> eth0"),
        ("link set {name} type vxlan local {other}", "local {other} -> {local}"),
        ("link set {name} down", "up"),
        ("addr add {extra} dev {name}", "address - {extra}"),
        ("addr del {address} dev {name}", "address + {address}"),
    ],
)
def test_drift_is_repaired_in_place(host: Any, family: int, command: str, line: str) -> None:
    want = wanted_device(host, family)
    other = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    words = structs.asdict(want) | {"other": other, "extra": OTHER_ADDRESS[family]}
    sync(host, want)
    host.ip("link add eth1 type veth peer name eth1p")
    host.ip("link set eth1 up")
    host.ip(f"addr add {other} dev eth1")
    index = shown(host, want.name)["ifindex"]
    host.ip(command.format(**words))

    made = sync(host, want)

    assert made.action == "adopt"
    assert line.format(**words) in made.changes
    assert shown(host, want.name)["ifindex"] == index
    assert overlay_addresses(host, want) == {want.address}


def test_only_the_drift_is_listed(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    sync(host, want)
    host.ip(f"link set {want.name} mtu 1300")
    host.sysctl(f"ipv6/conf/{want.name}/accept_ra", 1)

    assert sync(host, want).changes == (f"mtu 1300 -> {want.mtu}", "accept_ra 1 -> 0")


def test_all_in_place_changes_work_on_a_device_that_is_up(host: Any, family: int) -> None:
    """The kernel facts that the module's docstring states."""
    name = add_and_up(host, family)
    other = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    host.ip("link add eth1 type veth peer name eth1p")

    for change in ("dev eth1", f"local {other}", "learning", "nolearning"):
        host.ip(f"link set {name} type vxlan {change}")
    for change in ("id 7", "dstport 4789", "gbp", "l2miss"):
        with pytest.raises(AssertionError, match=r"[Cc]annot change"):
            host.ip(f"link set {name} type vxlan {change}")
    wrong = {4: "2001:db8::77", 6: "192.0.2.77"}[family]
    with pytest.raises(AssertionError, match="family does not match"):
        host.ip(f"link set {name} type vxlan local {wrong}")


def add_and_up(host: Any, family: int) -> str:
    want = wanted_device(host, family)
    add_vxlan(host, want)
    host.ip(f"link set {want.name} up")
    return want.name


def test_device_of_flanneld_is_adopted_with_its_entries(host: Any, family: int) -> None:
    """Made as flanneld makes it; FDB and ifindex stay, and routes when MAC and MTU fit."""
    want = wanted_device(host, family)
    add_vxlan(host, want)
    host.ip(f"link set {want.name} address {want.mac} mtu {want.mtu} up")
    host.ip(f"addr add {want.address} dev {want.name} nodad")
    peer = {4: "10.244.7.0", 6: "fd00:10:244:7::"}[family]
    host.bridge(f"fdb add 02:00:00:00:00:07 dev {want.name} dst {host.underlay(family)} self")
    host.ip(f"neigh add {peer} lladdr 02:00:00:00:00:07 dev {want.name} nud permanent")
    host.ip(
        f"-{family} route add {peer}/{24 if family == 4 else 64} via {peer} dev {want.name} onlink"
    )
    before = entries(host, want)
    index = shown(host, want.name)["ifindex"]
    host.sysctl(f"ipv6/conf/{want.name}/accept_ra", 1)

    made = sync(host, want)

    assert made.changes == ("accept_ra 1 -> 0",)
    assert shown(host, want.name)["ifindex"] == index
    assert entries(host, want) == before


def entries(host: Any, want: VxlanDevice) -> tuple[str, str, str]:
    routes = host.ip(f"-{want.family} route show dev {want.name}")
    neighbours = host.ip(f"-{want.family} neigh show dev {want.name} nud permanent")
    fdb = host.bridge(f"fdb show dev {want.name}")
    assert "244:7" in routes or "244.7" in routes
    assert "02:00:00:00:00:07" in neighbours
    assert "02:00:00:00:00:07" in fdb
    return routes, neighbours, fdb


def test_replacing_an_address_keeps_the_routes(host: Any, family: int) -> None:
    """IPv4 drops all routes of a device together with its last address."""
    want = wanted_device(host, family)
    old = structs.replace(want, address=OTHER_ADDRESS[family])
    sync(host, old)
    peer = {4: "10.244.7.0", 6: "fd00:10:244:7::"}[family]
    route = f"{peer}/{24 if family == 4 else 64} via {peer} dev {want.name} onlink"
    host.ip(f"-{family} route add {route}")

    made = sync(host, want)

    assert made.changes == (f"address + {want.address}", f"address - {old.address}")
    assert peer in host.ip(f"-{family} route show dev {want.name}")


def test_address_with_another_prefix_length_is_put_right(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    sync(host, want)
    bare = want.address.split("/")[0]
    host.ip(f"addr del {want.address} dev {want.name}")
    host.ip(f"addr add {bare}/{24 if family == 4 else 64} dev {want.name} nodad")

    sync(host, want)

    assert overlay_addresses(host, want) == {want.address}


def test_addresses_outside_the_network_stay_on_ipv4_and_go_on_ipv6(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    sync(host, want)
    outside = {4: "198.51.100.5/32", 6: "2001:db8:ffff::5/128"}[family]
    host.ip(f"addr add {outside} dev {want.name}")

    sync(host, want)

    expected = {want.address, outside} if family == 4 else {want.address}
    assert overlay_addresses(host, want) == expected


def test_link_local_address_stays(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    sync(host, want)
    host.ip(f"addr add fe80::5/64 dev {want.name} nodad")

    assert plan(host, want).action == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "7"}, "has VNI 7, wanted 1"),
        ({"dstport": "4789"}, "has port 4789, wanted 8472"),
        ({"flags": "nolearning gbp"}, "has gbp set, not wanted"),
        ({"flags": "nolearning l2miss"}, "has l2miss set, not wanted"),
        ({"flags": "nolearning proxy"}, "has proxy set, not wanted"),
        ({"id": "", "flags": "external"}, "is in collect-metadata (external) mode"),
        ({"group": "GROUP"}, "has group or remote"),
        ({"local": "OTHER"}, "tunnels over IPv"),
    ],
)
def test_foreign_vxlan_is_refused_then_taken_over(
    host: Any, family: int, changes: dict[str, str], message: str
) -> None:
    want = wanted_device(host, family)
    words = {
        "GROUP": {4: "239.1.1.1", 6: "ff05::1"}[family],
        "OTHER": host.underlay(10 - family),
    }
    add_vxlan(host, want, **{key: words.get(value, value) for key, value in changes.items()})
    before = host.ip("-d link show")

    with pytest.raises(Conflict) as caught:
        plan(host, want)

    assert caught.value.errno == errno.EEXIST
    assert message in str(caught.value)
    assert want.name in caught.value.operation
    assert "take_over=True" in caught.value.hint
    assert host.ip("-d link show") == before
    assert sync(host, want, take_over=True).action == "replace"


def test_device_of_another_kind_is_refused_then_taken_over(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    host.ip(f"link add {want.name} type bridge")

    with pytest.raises(Conflict, match="exists as bridge"):
        plan(host, want)
    with pytest.raises(Conflict, match="exists as bridge"):
        delete_device(want.name, netns=host.ns)

    made = sync(host, want, take_over=True)
    assert made.changes[0] == "delete the existing device: it exists as bridge"


def test_device_with_its_external_interface_elsewhere_is_refused(
    make_host: Callable[..., Any], family: int
) -> None:
    """It looks right by every number, and sends its packets through another namespace."""
    host, elsewhere = make_host(), make_host()
    want = wanted_device(host, family)
    add_vxlan(elsewhere, wanted_device(elsewhere, family))
    elsewhere.ip(f"link set {want.name} netns {host.ns}")

    with pytest.raises(Conflict, match="external interface in another network namespace"):
        plan(host, want)

    assert sync(host, want, take_over=True).action == "replace"


def test_take_over_of_a_compatible_device_keeps_it(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    add_vxlan(host, want)
    index = shown(host, want.name)["ifindex"]

    assert sync(host, want, take_over=True).action == "adopt"
    assert shown(host, want.name)["ifindex"] == index


def test_mtu_the_kernel_clamps_is_planned_as_it_will_be(
    make_host: Callable[..., Any], family: int
) -> None:
    host = make_host(mtu=1400)
    want = wanted_device(host, family, mtu=1450)

    made = sync(host, want)

    assert made.mtu == overlay_mtu(1400, family)
    assert shown(host, want.name)["mtu"] == made.mtu


def test_mtu_follows_the_external_interface(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    sync(host, want)
    host.ip("link set eth0 mtu 1400")

    made = sync(host, want)

    assert made.changes == (f"mtu {want.mtu} -> {overlay_mtu(1400, family)}",)


def test_ipv6_switched_off_by_default_is_switched_on_for_our_device(host: Any) -> None:
    host.sysctl("ipv6/conf/default/disable_ipv6", 1)
    want = wanted_device(host, 6)

    sync(host, want)

    assert overlay_addresses(host, want) == {want.address}
    host.sysctl(f"ipv6/conf/{want.name}/disable_ipv6", 1)
    assert "disable_ipv6 1 -> 0" in sync(host, want).changes


def test_delete(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    sync(host, want)

    assert delete_device(want.name, netns=host.ns) is True
    assert delete_device(want.name, netns=host.ns) is False
    assert want.name not in host.ip("link show")


def test_works_under_a_running_event_loop(host: Any, family: int) -> None:
    want = wanted_device(host, family)

    async def main() -> None:
        sync(host, want)

    asyncio.run(main())


def test_two_hosts_reach_each_other(make_host: Callable[..., Any], family: int) -> None:
    one, two = make_host(), make_host()
    subnets = {
        4: ("10.244.1.0/32", "10.244.2.0/32"),
        6: ("fd00:10:244:1::/128", "fd00:10:244:2::/128"),
    }[family]
    macs = ("02:00:00:00:00:01", "02:00:00:00:00:02")
    wants = [
        wanted_device(host, family, address=subnets[i], mac=macs[i])
        for i, host in enumerate((one, two))
    ]
    for i, (host, other) in enumerate(((one, two), (two, one))):
        sync(host, wants[i])
        name, peer = wants[i].name, subnets[1 - i].split("/")[0]
        host.bridge(f"fdb add {macs[1 - i]} dev {name} dst {other.underlay(family)} self")
        host.ip(f"neigh add {peer} lladdr {macs[1 - i]} dev {name} nud permanent")
        host.ip(f"-{family} route add {peer} dev {name}")

    assert one.ping(subnets[1].split("/")[0], count=3)


@pytest.mark.parametrize(
    ("underlay", "family", "mtu"),
    [
        (1500, 4, 1450),
        (1500, 6, 1430),
        (9000, 4, 8950),
        (9000, 6, 8930),
    ],
)
def test_overlay_mtu(underlay: int, family: int, mtu: int) -> None:
    assert overlay_mtu(underlay, family) == mtu


def test_overlay_mtu_is_the_most_the_kernel_takes(host: Any, family: int) -> None:
    name = add_and_up(host, family)

    host.ip(f"link set {name} mtu {overlay_mtu(1500, family)}")
    with pytest.raises(AssertionError, match="Invalid argument"):
        host.ip(f"link set {name} mtu {overlay_mtu(1500, family) + 1}")


def test_macs_are_stable_distinct_local_and_unicast(monkeypatch: pytest.MonkeyPatch) -> None:
    macs = {stable_mac("node", str(number)) for number in range(1000)}

    assert len(macs) == 1000
    assert {int(mac[:2], 16) & 3 for mac in macs} == {2}
    assert stable_mac("a", "bc") != stable_mac("ab", "c")
    assert stable_mac("a") == stable_mac("a") == "ca:97:81:12:ca:1b"


def test_default_mac_depends_on_machine_device_and_ip(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("0123456789abcdef0123456789abcdef\n")
    two.write_text("ffffffffffffffffffffffffffffffff\n")
    found = []
    for path in (one, two, tmp_path / "missing"):
        monkeypatch.setattr(node_mac, "MACHINE_ID", str(path))
        found += [
            default_mac("flannel.1", "192.0.2.1"),
            default_mac("flannel-v6.1", "192.0.2.1"),
            default_mac("flannel.1", "192.0.2.2"),
        ]
        assert default_mac("flannel.1", "192.0.2.1") == found[-3]

    assert len(set(found)) == 9
