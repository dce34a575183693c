"""Entering namespaces, the sysctls inside them, and the caller staying where it was."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import ConfigError, DeviceGone, KernelError, NotPermitted
from flannel_dp.kernel.netns import call_in_netns, call_on_thread, netns_identity
from flannel_dp.kernel.sysctls import (
    can_write_sysctl,
    forwarding_warnings,
    read_sysctl,
    write_sysctl,
)


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def test_none_is_a_plain_call() -> None:
    assert call_in_netns(None, threading.get_ident) == threading.get_ident()


def test_call_happens_inside_and_the_caller_stays(host: Any) -> None:
    before = netns_identity()
    host.ip("link add only-here type bridge")

    inside = call_in_netns(host.ns, interfaces)

    assert "only-here" in inside
    assert "only-here" not in interfaces()
    assert netns_identity() == before
    assert call_on_thread(netns_identity) == before


def test_name_path_and_descriptor_mean_the_same_namespace(netns: str) -> None:
    path = f"/run/netns/{netns}"
    fd = os.open(path, os.O_RDONLY)
    try:
        found = {netns_identity(netns), netns_identity(path), netns_identity(fd)}
        os.fstat(fd)
    finally:
        os.close(fd)

    stat = os.stat(path)
    assert found == {(stat.st_dev, stat.st_ino)}
    assert netns_identity() not in found


def test_result_arguments_and_exceptions_come_back(netns: str) -> None:
    class OddError(BaseException):
        pass

    def fail() -> None:
        raise OddError("told")

    assert call_in_netns(netns, max, 3, 9, 5) == 9
    assert call_in_netns(netns, sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(OddError, match="told"):
        call_in_netns(netns, fail)


def test_nothing_leaks(netns: str) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))

    for _ in range(200):
        call_in_netns(netns, interfaces)
        with pytest.raises(ZeroDivisionError):
            call_in_netns(netns, lambda: 1 // 0)

    assert threading.active_count() <= threads  # those of earlier tests may end
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_missing_namespace_names_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"namespace no-such-ns does not exist") as caught:
        call_in_netns("no-such-ns", interfaces)

    assert "ip netns add no-such-ns" in caught.value.hint
    with pytest.raises(ConfigError, match="/proc/1/ns/nothing"):
        call_in_netns("/proc/1/ns/nothing", interfaces)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b"])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name"):
        call_in_netns(name, interfaces)


def test_what_is_no_namespace(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with file.open() as opened, pytest.raises(ConfigError, match="not a network namespace"):
        call_in_netns(opened.fileno(), interfaces)
    with pytest.raises(ConfigError, match="not a network namespace"):
        call_in_netns(str(file), interfaces)
    with pytest.raises(ConfigError, match="not a network namespace"):
        call_in_netns("/proc/self/ns/uts", interfaces)
    with pytest.raises(ConfigError, match="descriptor 987654 is not open"):
        call_in_netns(987654, interfaces)


def test_without_the_right_to_enter(host: Any, netns: str) -> None:
    script = f"""
from flannel_dp.errors import NotPermitted
from flannel_dp.kernel.netns import netns_identity
try:
    netns_identity({netns!r})
except NotPermitted as error:
    assert "CAP_SYS_ADMIN" in error.hint
    print(error.operation)
"""
    without = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]

    told = host.exec(*without, sys.executable, "-c", script).strip()

    assert told == f"enter network namespace {netns}"


def test_sysctl_is_that_of_the_namespace(host: Any, netns: str) -> None:
    forwarding = ("ipv4", "ip_forward")
    write_sysctl("1", *forwarding, netns=host.ns)
    write_sysctl("0", *forwarding, netns=netns)

    assert read_sysctl(*forwarding, netns=host.ns) == "1"
    assert read_sysctl(*forwarding, netns=netns) == "0"
    assert host.sysctl("ipv4/ip_forward") == "1"


def test_sysctl_of_a_device_with_a_dot_in_its_name(host: Any) -> None:
    host.ip("link add flannel.1 type bridge")
    where = ("ipv6", "conf", "flannel.1", "accept_ra")

    write_sysctl("0", *where, netns=host.ns)

    assert read_sysctl(*where, netns=host.ns) == "0"
    assert host.sysctl("ipv6/conf/flannel.1/accept_ra") == "0"
    assert can_write_sysctl(*where, netns=host.ns)


def test_sysctl_that_is_not_there(netns: str) -> None:
    where = ("ipv6", "conf", "flannel.1", "accept_ra")

    assert read_sysctl(*where, netns=netns) is None
    assert not can_write_sysctl(*where, netns=netns)
    with pytest.raises(DeviceGone, match=r"conf/flannel\.1/accept_ra"):
        write_sysctl("0", *where, netns=netns)


def test_sysctl_value_the_kernel_refuses(netns: str) -> None:
    with pytest.raises(KernelError, match="write many to"):
        write_sysctl("many", "ipv4", "ip_forward", netns=netns)


@pytest.mark.parametrize("part", ["", ".", "..", "../../kernel", "a/b", "a\0"])
def test_sysctl_names_do_not_leave_their_place(netns: str, part: str) -> None:
    with pytest.raises(ConfigError, match="cannot be part of a sysctl name"):
        read_sysctl("ipv6", "conf", part, "accept_ra", netns=netns)


def test_sysctl_on_a_read_only_proc(host: Any) -> None:
    """What an unprivileged container with CAP_NET_ADMIN sees."""
    script = """
from flannel_dp.errors import NotPermitted
from flannel_dp.kernel.sysctls import can_write_sysctl, write_sysctl
assert not can_write_sysctl("ipv4", "ip_forward")
try:
    write_sysctl("1", "ipv4", "ip_forward")
except NotPermitted as error:
    print(error.hint)
"""
    shell = 'mount --bind -o ro /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && "$@"'
    told = host.exec("unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", script)

    assert "sysctl -w net/ipv4/ip_forward=1" in told
    assert issubclass(NotPermitted, KernelError)


def test_forwarding_warnings_name_the_family_that_is_off(netns: str, family: int) -> None:
    parts = {4: ("ipv4", "ip_forward"), 6: ("ipv6", "conf", "all", "forwarding")}
    for each, where in parts.items():
        write_sysctl("0" if each == family else "1", *where, netns=netns)

    warnings = forwarding_warnings((4, 6), netns)

    assert len(warnings) == 1
    assert f"net.{'.'.join(parts[family])} is 0" in warnings[0]
    assert forwarding_warnings((10 - family,), netns) == []
