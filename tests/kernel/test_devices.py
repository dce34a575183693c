"""Vxlan devices: made, adopted, repaired in place, refused, replaced, and nothing half-made."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from flannel_dp.backends import device as device_spec
from flannel_dp.backends.device import VxlanDevice, default_mac, overlay_mtu, stable_mac
from flannel_dp.errors import ConfigError, Conflict, DeviceGone, KernelError
from flannel_dp.kernel import devicewriter
from flannel_dp.kernel.devices import (
    DevicePlan,
    apply_device,
    delete_device,
    plan_device,
)
from flannel_dp.kernel.links import LinkReader

OTHER_ADDRESS = {4: "10.244.9.9/32", 6: "fd00:10:244:9::9/128"}


def wanted(host: Any, family: int, **changes: Any) -> VxlanDevice:
    """A device as the vxlan backend would ask for it on ``host``."""
    values: dict[str, Any] = {
        "name": "flannel.1" if family == 4 else "flannel-v6.1",
        "vni": 1,
        "lower": host.ifindex,
        "local": host.underlay(family),
        "port": 8472,
        "mtu": overlay_mtu(1500, family),
        "mac": "02:00:00:00:00:03",
        "address": "10.244.3.0/32" if family == 4 else "fd00:10:244:3::/128",
        "network": "10.244.0.0/16" if family == 4 else "fd00:10:244::/48",
    }
    return VxlanDevice(**values | changes)


def plan(host: Any, want: VxlanDevice, *, take_over: bool = False) -> DevicePlan:
    with LinkReader(host.ns) as reader:
        return plan_device(reader, want, take_over=take_over, netns=host.ns)


def sync(host: Any, want: VxlanDevice, *, take_over: bool = False) -> DevicePlan:
    """Plan and apply, require that nothing is left to do, return what was planned."""
    made = plan(host, want, take_over=take_over)
    index = apply_device(made, netns=host.ns)
    again = plan(host, want)
    assert (again.action, again.changes, again.ifindex) == ("none", (), index)
    return made


def shown(host: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = host.ip_json("link", "show", "dev", name)[0]
    return found


def overlay_addresses(host: Any, want: VxlanDevice) -> set[str]:
    entries = host.ip_json(f"-{want.family} addr show dev {want.name}")[0]["addr_info"]
    return {f"{e['local']}/{e['prefixlen']}" for e in entries if e["scope"] != "link"}


def add_vxlan(host: Any, want: VxlanDevice, **changes: str) -> None:
    """Make a device by iproute2; ``changes`` replaces words, "" drops an option."""
    options = {
        "id": str(want.vni),
        "local": want.local,
        "dev": host.iface,
        "dstport": str(want.port),
        "flags": "nolearning",
    } | changes
    flags = options.pop("flags")
    words = " ".join(f"{key} {value}" for key, value in options.items() if value)
    host.ip(f"link add {want.name} type vxlan {words} {flags}")


def test_create_gives_what_iproute2_shows(host: Any, family: int) -> None:
    want = wanted(host, family)

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
        assert sync(host, wanted(host, family)).action == "create"


def test_v6_address_is_usable_at_once(host: Any) -> None:
    want = wanted(host, 6)
    apply_device(plan(host, want), netns=host.ns)

    entries = host.ip_json(f"-6 addr show dev {want.name}")[0]["addr_info"]

    ours = next(e for e in entries if e["local"] == want.address.split("/")[0])
    assert not ours.get("tentative")
    assert ours["nodad"]


def test_learning_and_gbp_are_made_as_asked(host: Any, family: int) -> None:
    want = wanted(host, family, learning=True, gbp=True)

    sync(host, want)

    data = shown(host, want.name)["linkinfo"]["info_data"]
    assert data["learning"] is True
    assert data["gbp"] is True


def test_plan_writes_nothing(host: Any, family: int) -> None:
    before = host.ip("-d link show") + host.ip("addr show")

    made = plan(host, wanted(host, family))

    assert made.changes[0].startswith("create vxlan id 1 local ")
    assert made.changes[-1] == "up"
    assert host.ip("-d link show") + host.ip("addr show") == before


def test_plan_and_no_change_do_not_import_pyroute2(host: Any, family: int) -> None:
    want = wanted(host, family)
    sync(host, want)
    script = f"""
import sys
from flannel_dp.backends.device import VxlanDevice
from flannel_dp.kernel.devices import apply_device, plan_device
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
    want = wanted(host, family)
    other = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    words = dataclasses.asdict(want) | {"other": other, "extra": OTHER_ADDRESS[family]}
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
    want = wanted(host, family)
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
    want = wanted(host, family)
    add_vxlan(host, want)
    host.ip(f"link set {want.name} up")
    return want.name


def test_device_of_flanneld_is_adopted_with_its_entries(host: Any, family: int) -> None:
    """Made as flanneld makes it; FDB and ifindex stay, and routes when MAC and MTU fit."""
    want = wanted(host, family)
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
    want = wanted(host, family)
    old = dataclasses.replace(want, address=OTHER_ADDRESS[family])
    sync(host, old)
    peer = {4: "10.244.7.0", 6: "fd00:10:244:7::"}[family]
    route = f"{peer}/{24 if family == 4 else 64} via {peer} dev {want.name} onlink"
    host.ip(f"-{family} route add {route}")

    made = sync(host, want)

    assert made.changes == (f"address + {want.address}", f"address - {old.address}")
    assert peer in host.ip(f"-{family} route show dev {want.name}")


def test_address_with_another_prefix_length_is_put_right(host: Any, family: int) -> None:
    want = wanted(host, family)
    sync(host, want)
    bare = want.address.split("/")[0]
    host.ip(f"addr del {want.address} dev {want.name}")
    host.ip(f"addr add {bare}/{24 if family == 4 else 64} dev {want.name} nodad")

    sync(host, want)

    assert overlay_addresses(host, want) == {want.address}


def test_addresses_outside_the_network_stay_on_ipv4_and_go_on_ipv6(host: Any, family: int) -> None:
    want = wanted(host, family)
    sync(host, want)
    outside = {4: "198.51.100.5/32", 6: "2001:db8:ffff::5/128"}[family]
    host.ip(f"addr add {outside} dev {want.name}")

    sync(host, want)

    expected = {want.address, outside} if family == 4 else {want.address}
    assert overlay_addresses(host, want) == expected


def test_link_local_address_stays(host: Any, family: int) -> None:
    want = wanted(host, family)
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
    want = wanted(host, family)
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
    assert "--take-over" in caught.value.hint
    assert host.ip("-d link show") == before
    assert sync(host, want, take_over=True).action == "replace"


def test_device_of_another_kind_is_refused_then_taken_over(host: Any, family: int) -> None:
    want = wanted(host, family)
    host.ip(f"link add {want.name} type bridge")

    with pytest.raises(Conflict, match="exists as bridge"):
        plan(host, want)
    with pytest.raises(Conflict, match="exists as bridge"):
        delete_device(want.name, netns=host.ns)

    made = sync(host, want, take_over=True)
    assert made.changes[0] == "delete what is there: it exists as bridge"


def test_device_with_its_external_interface_elsewhere_is_refused(
    make_host: Callable[..., Any], family: int
) -> None:
    """It looks right by every number, and sends its packets through another namespace."""
    host, elsewhere = make_host(), make_host()
    want = wanted(host, family)
    add_vxlan(elsewhere, wanted(elsewhere, family))
    elsewhere.ip(f"link set {want.name} netns {host.ns}")

    with pytest.raises(Conflict, match="external interface in another network namespace"):
        plan(host, want)

    assert sync(host, want, take_over=True).action == "replace"


def test_read_only_proc_does_not_stop_a_sync(host: Any, family: int) -> None:
    """An unprivileged container with CAP_NET_ADMIN: the first sync warns, the second is silent."""
    want = wanted(host, family)
    script = f"""
from flannel_dp.backends.device import VxlanDevice
from flannel_dp.kernel.devices import apply_device, plan_device
from flannel_dp.kernel.links import LinkReader
for action in ("create", "none"):
    with LinkReader() as reader:
        plan = plan_device(reader, {want!r})
    assert plan.action == action, plan
    apply_device(plan)
"""
    shell = 'mount --bind -o ro /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && "$@"'

    host.exec("unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", script)

    assert overlay_addresses(host, want) == {want.address}
    assert plan(host, want).changes == ("accept_ra 1 -> 0",)


def test_take_over_of_a_compatible_device_keeps_it(host: Any, family: int) -> None:
    want = wanted(host, family)
    add_vxlan(host, want)
    index = shown(host, want.name)["ifindex"]

    assert sync(host, want, take_over=True).action == "adopt"
    assert shown(host, want.name)["ifindex"] == index


@pytest.mark.parametrize("external", [False, True], ids=["same-vni", "external"])
def test_rival_with_our_vni_and_port_is_named(host: Any, family: int, external: bool) -> None:
    want = wanted(host, family)
    rival = dataclasses.replace(want, name="other0")
    if external:
        add_vxlan(host, rival, id="", local="", dev="", flags="external")
    else:
        add_vxlan(host, rival)
    host.ip("link set other0 up")

    with pytest.raises(Conflict, match="other0 already has"):
        plan(host, want)


def test_rival_that_came_after_the_plan_is_named(host: Any, family: int) -> None:
    want = wanted(host, family)
    made = plan(host, want)
    add_vxlan(host, dataclasses.replace(want, name="other0"))

    with pytest.raises(Conflict, match="other0 already has VNI 1 on port 8472"):
        apply_device(made, netns=host.ns)

    assert want.name not in host.ip("link show")


def test_udp_port_taken_by_a_program_leaves_nothing(host: Any, family: int) -> None:
    want = wanted(host, family)
    kind = "AF_INET" if family == 4 else "AF_INET6"
    script = (
        f"import socket, sys; s = socket.socket(socket.{kind}, socket.SOCK_DGRAM);"
        "s.bind(('', 8472)); print('bound', flush=True); sys.stdin.read()"
    )
    command = ["ip", "netns", "exec", host.ns, sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "bound\n"
        with pytest.raises(Conflict, match="UDP port 8472 is taken"):
            apply_device(plan(host, want), netns=host.ns)
        holder.stdin.close()

    assert want.name not in host.ip("link show")
    sync(host, want)


@pytest.mark.parametrize("op", ["address+", "up", "verify"])
def test_a_create_that_fails_half_way_leaves_nothing(
    host: Any, family: int, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = wanted(host, family)
    run, verify = devicewriter._run, devicewriter._verify

    def failing_run(ipr: Any, reader: Any, index: int, step: Any, want: VxlanDevice) -> None:
        if step.op == op:
            raise KernelError(errno.EIO, "made to fail")
        run(ipr, reader, index, step, want)

    def failing_verify(*args: Any) -> None:
        if op == "verify":
            raise KernelError(errno.EIO, "made to fail")
        verify(*args)

    monkeypatch.setattr(devicewriter, "_run", failing_run)
    monkeypatch.setattr(devicewriter, "_verify", failing_verify)
    made = plan(host, want)

    with pytest.raises(KernelError, match="made to fail"):
        apply_device(made, netns=host.ns)

    assert want.name not in host.ip("link show")
    monkeypatch.undo()
    sync(host, want)


def test_mtu_the_kernel_clamps_is_planned_as_it_will_be(
    make_host: Callable[..., Any], family: int
) -> None:
    host = make_host(mtu=1400)
    want = wanted(host, family, mtu=1450)

    made = sync(host, want)

    assert made.mtu == overlay_mtu(1400, family)
    assert shown(host, want.name)["mtu"] == made.mtu


def test_mtu_follows_the_external_interface(host: Any, family: int) -> None:
    want = wanted(host, family)
    sync(host, want)
    host.ip("link set eth0 mtu 1400")

    made = sync(host, want)

    assert made.changes == (f"mtu {want.mtu} -> {overlay_mtu(1400, family)}",)


def test_ipv6_needs_1280_bytes(make_host: Callable[..., Any]) -> None:
    host = make_host(mtu=1300)

    with pytest.raises(ConfigError, match=r"eth0 has MTU 1300, which leaves 1230 bytes"):
        plan(host, wanted(host, 6))
    with pytest.raises(ConfigError, match="MTU 1200 is out of range"):
        plan(host, wanted(host, 6, mtu=1200))
    assert plan(host, wanted(host, 4)).mtu == 1250


def test_something_that_resets_the_mac_is_reported(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for udev: the MAC changes between our last write and the read-back."""
    want = wanted(host, family)
    verify = devicewriter._verify

    def meddle(*args: Any) -> None:
        host.ip(f"link set {want.name} address 02:00:00:00:00:99")
        verify(*args)

    monkeypatch.setattr(devicewriter, "_verify", meddle)

    with pytest.raises(KernelError, match="mac is 02:00:00:00:00:99") as caught:
        apply_device(plan(host, want), netns=host.ns)

    assert "MACAddressPolicy" in caught.value.hint
    assert want.name not in host.ip("link show")


def test_ipv6_switched_off_by_default_is_switched_on_for_our_device(host: Any) -> None:
    host.sysctl("ipv6/conf/default/disable_ipv6", 1)
    want = wanted(host, 6)

    sync(host, want)

    assert overlay_addresses(host, want) == {want.address}
    host.sysctl(f"ipv6/conf/{want.name}/disable_ipv6", 1)
    assert "disable_ipv6 1 -> 0" in sync(host, want).changes


def test_device_that_vanished_after_the_plan(host: Any, family: int) -> None:
    want = wanted(host, family)
    sync(host, want)
    host.ip(f"link set {want.name} mtu 1300")
    made = plan(host, want)
    host.ip(f"link delete {want.name}")

    with pytest.raises(DeviceGone, match=want.name):
        apply_device(made, netns=host.ns)


def test_external_interface_that_is_not_there(host: Any, family: int) -> None:
    with pytest.raises(DeviceGone, match="find external interface 4711"):
        plan(host, wanted(host, family, lower=4711))


def test_device_cannot_be_its_own_external_interface(host: Any, family: int) -> None:
    with pytest.raises(ConfigError, match="both the vxlan device and its external interface"):
        plan(host, wanted(host, family, name=host.iface))


@pytest.mark.parametrize(
    "change",
    [
        {"vni": 1 << 24},
        {"port": 0},
        {"port": 65536},
        {"mtu": 10},
        {"local": "192.0.2"},
        {"address": "10.244.3.0/33"},
        {"network": "10.244.3.0/16"},
    ],
    ids=str,
)
def test_values_that_cannot_work_are_named(host: Any, family: int, change: dict[str, Any]) -> None:
    want = wanted(host, family, **change)

    with pytest.raises(ConfigError, match=str(next(iter(change.values())))) as caught:
        plan(host, want)

    assert caught.value.hint


def test_without_the_right_to_write(host: Any, family: int) -> None:
    """A process without CAP_NET_ADMIN plans, and is told what it lacks when it applies."""
    script = f"""
from flannel_dp.errors import NotPermitted
from flannel_dp.backends.device import VxlanDevice
from flannel_dp.kernel.devices import apply_device, plan_device
from flannel_dp.kernel.links import LinkReader
with LinkReader() as reader:
    plan = plan_device(reader, {wanted(host, family)!r})
assert plan.action == "create"
try:
    apply_device(plan)
except NotPermitted as error:
    assert "CAP_NET_ADMIN" in error.hint, error
    print("not permitted")
"""
    without = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]

    assert host.exec(*without, sys.executable, "-c", script).strip() == "not permitted"
    assert "flannel" not in host.ip("link show")


def test_delete(host: Any, family: int) -> None:
    want = wanted(host, family)
    sync(host, want)

    assert delete_device(want.name, netns=host.ns) is True
    assert delete_device(want.name, netns=host.ns) is False
    assert want.name not in host.ip("link show")


def test_works_under_a_running_event_loop(host: Any, family: int) -> None:
    want = wanted(host, family)

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
        wanted(host, family, address=subnets[i], mac=macs[i]) for i, host in enumerate((one, two))
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
        monkeypatch.setattr(device_spec, "MACHINE_ID", str(path))
        found += [
            default_mac("flannel.1", "192.0.2.1"),
            default_mac("flannel-v6.1", "192.0.2.1"),
            default_mac("flannel.1", "192.0.2.2"),
        ]
        assert default_mac("flannel.1", "192.0.2.1") == found[-3]

    assert len(set(found)) == 9
