"""Vxlan devices where something is in the way: rivals, missing rights, values that cannot
work, changes by others; every failure names its cause and leaves nothing half-made."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from flannel_dp.errors import ConfigError, Conflict, DeviceGone, FlannelDPError, KernelError, NotYet
from flannel_dp.resources.device import writer
from flannel_dp.resources.device.change import apply_device
from flannel_dp.resources.device.vxlan import VxlanDevice
from tests.lib.vxlan_devices import add_vxlan, overlay_addresses, plan, sync, wanted_device


def test_read_only_proc_does_not_stop_a_sync(host: Any, family: int) -> None:
    """An unprivileged container with CAP_NET_ADMIN: the first sync warns, the second is silent."""
    want = wanted_device(host, family)
    script = f"""
from flannel_dp.resources.device.vxlan import VxlanDevice
from flannel_dp.resources.device.change import apply_device
from flannel_dp.resources.device.plan import plan_device
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


@pytest.mark.parametrize("external", [False, True], ids=["same-vni", "external"])
def test_rival_with_our_vni_and_port_is_named(host: Any, family: int, external: bool) -> None:
    want = wanted_device(host, family)
    rival = structs.replace(want, name="other0")
    if external:
        add_vxlan(host, rival, id="", local="", dev="", flags="external")
    else:
        add_vxlan(host, rival)
    host.ip("link set other0 up")

    with pytest.raises(Conflict, match="other0 already has"):
        plan(host, want)


def test_rival_that_came_after_the_plan_is_named(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    made = plan(host, want)
    add_vxlan(host, structs.replace(want, name="other0"))

    with pytest.raises(Conflict, match="other0 already has VNI 1 on port 8472"):
        apply_device(made, netns=host.ns)

    assert want.name not in host.ip("link show")


def test_udp_port_taken_by_a_program_leaves_nothing(host: Any, family: int) -> None:
    want = wanted_device(host, family)
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
    want = wanted_device(host, family)
    run, verify = writer._run, writer._verify

    def failing_run(ipr: Any, reader: Any, index: int, step: Any, want: VxlanDevice) -> None:
        if step.op == op:
            raise KernelError(errno.EIO, "made to fail")
        run(ipr, reader, index, step, want)

    def failing_verify(*args: Any, **named: Any) -> None:
        if op == "verify":
            raise KernelError(errno.EIO, "made to fail")
        verify(*args, **named)

    monkeypatch.setattr(writer, "_run", failing_run)
    monkeypatch.setattr(writer, "_verify", failing_verify)
    made = plan(host, want)

    with pytest.raises(KernelError, match="made to fail"):
        apply_device(made, netns=host.ns)

    assert want.name not in host.ip("link show")
    monkeypatch.undo()
    sync(host, want)


def test_one_that_is_renamed_as_soon_as_it_is_made_is_not_left_over(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be a rival with our VNI, of which nobody knows whose it is."""
    want = wanted_device(host, family)
    create = writer._create

    def and_rename(*args: Any) -> None:
        create(*args)
        host.ip(f"link set {want.name} name renamed0")

    monkeypatch.setattr(writer, "_create", and_rename)

    with pytest.raises(FlannelDPError):
        apply_device(plan(host, want), netns=host.ns)

    assert "renamed0" not in host.ip("link show")
    monkeypatch.undo()
    sync(host, want)


def test_ipv6_needs_1280_bytes(make_host: Callable[..., Any]) -> None:
    """fr38: an interface without the room may get it later. 1230 is what a node computes."""
    host = make_host(mtu=1300)

    for mtu in (1430, 1230):
        with pytest.raises(NotYet, match=r"eth0 has MTU 1300, which leaves 1230 bytes") as caught:
            plan(host, wanted_device(host, 6, mtu=mtu))
        assert caught.value.hint == "raise the MTU of eth0"
    assert plan(host, wanted_device(host, 4)).mtu == 1250
    host.ip("link set eth0 mtu 1500")
    with pytest.raises(ConfigError, match="MTU 1200 is out of range"):
        plan(host, wanted_device(host, 6, mtu=1200))


def test_something_that_resets_the_mac_is_reported(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for udev: the MAC changes between our last write and the read-back."""
    want = wanted_device(host, family)
    verify = writer._verify

    def meddle(*args: Any, **named: Any) -> None:
        host.ip(f"link set {want.name} address 02:00:00:00:00:99")
        verify(*args, **named)

    monkeypatch.setattr(writer, "_verify", meddle)

    with pytest.raises(KernelError, match="mac is 02:00:00:00:00:99") as caught:
        apply_device(plan(host, want), netns=host.ns)

    assert "MACAddressPolicy" in caught.value.hint
    assert want.name not in host.ip("link show")


def test_device_that_vanished_after_the_plan(host: Any, family: int) -> None:
    want = wanted_device(host, family)
    sync(host, want)
    host.ip(f"link set {want.name} mtu 1300")
    made = plan(host, want)
    host.ip(f"link delete {want.name}")

    with pytest.raises(DeviceGone, match=want.name):
        apply_device(made, netns=host.ns)


def test_external_interface_that_is_not_there(host: Any, family: int) -> None:
    with pytest.raises(DeviceGone, match="find external interface 4711"):
        plan(host, wanted_device(host, family, lower=4711))


def test_device_cannot_be_its_own_external_interface(host: Any, family: int) -> None:
    with pytest.raises(ConfigError, match="both the vxlan device and its external interface"):
        plan(host, wanted_device(host, family, name=host.iface))


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
    want = wanted_device(host, family, **change)

    with pytest.raises(ConfigError, match=str(next(iter(change.values())))) as caught:
        plan(host, want)

    assert caught.value.hint


def test_without_the_right_to_write(host: Any, family: int) -> None:
    """A process without CAP_NET_ADMIN plans, and is told what it lacks when it applies."""
    script = f"""
from flannel_dp.errors import NotPermitted
from flannel_dp.resources.device.vxlan import VxlanDevice
from flannel_dp.resources.device.change import apply_device
from flannel_dp.resources.device.plan import plan_device
from flannel_dp.kernel.links import LinkReader
with LinkReader() as reader:
    plan = plan_device(reader, {wanted_device(host, family)!r})
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
