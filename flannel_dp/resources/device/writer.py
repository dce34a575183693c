"""Write to devices: what :mod:`flannel_dp.resources.device.plan` planned, and nothing else.

This module imports pyroute2, which takes longer than a whole sync that changes nothing;
so it is imported when, and only when, a device has to be changed. Its functions work in
the network namespace of the thread that calls them.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from flannel_dp.errors import Conflict, FlannelDPError, KernelError, kernel_error
from flannel_dp.kernel.links import IFA_F_NODAD, Link, LinkReader
from flannel_dp.kernel.sysctls import read_sysctl, write_sysctl
from flannel_dp.kernel.writing import netlink, operation
from flannel_dp.resources.device.plan import (
    DevicePlan,
    DeviceStep,
    address_repairs,
    check_no_rival,
    differences,
)
from flannel_dp.resources.device.vxlan import VxlanDevice

log = logging.getLogger(__name__)


def apply(plan: DevicePlan, before_up: Callable[[int], None] | None = None) -> int:
    """Run the steps in this thread's namespace, undo a half-made device, read back."""
    want = plan.device
    created = False
    with netlink() as ipr, LinkReader() as reader:
        index = plan.ifindex or 0
        try:
            for step in plan.steps:
                if step.op == "create":
                    _create(ipr, reader, plan)
                    created = True
                    index = _made(reader, want)
                elif step.op == "delete":
                    _delete(ipr, reader, step)
                else:
                    if step.op == "up" and before_up is not None:
                        before_up(index)
                    _run(ipr, reader, index, step, want)
            _verify(reader, plan, index)
        except BaseException:
            if created:
                _undo(ipr, reader, index, want.name)
            raise
    log.info(
        "device=%s action=%s ifindex=%d changes=%d", want.name, plan.action, index, len(plan.steps)
    )
    return index


def _create(ipr: Any, reader: LinkReader, plan: DevicePlan) -> None:
    """Create the device, down. MAC and MTU are in the message itself.

    A MAC set afterwards races with udev's MACAddressPolicy=persistent, which leaves
    alone what the kernel marks as set by the creator (NET_ADDR_SET).
    """
    want = plan.device
    attributes: dict[str, Any] = {
        "ifname": want.name,
        "kind": "vxlan",
        "mtu": plan.mtu,
        "address": want.mac,
        "vxlan_port": want.port,
        "vxlan_learning": int(want.learning),
    }
    if want.external:
        attributes["vxlan_collect_metadata"] = True
    else:
        attributes |= {
            "vxlan_id": want.vni,
            "vxlan_link": want.lower,
            _local_key(want): want.local,
        }
    if want.gbp:
        attributes["vxlan_gbp"] = True
    text = f"create device {want.name}"
    try:
        with operation(text):
            ipr.link("add", **attributes)
    except KernelError as error:
        if error.errno == errno.EEXIST:
            check_no_rival(reader, want)
        if error.errno == errno.EOPNOTSUPP:
            hint = "load the module: modprobe vxlan"
            raise KernelError(error.errno, text, error.kernel_message, hint=hint) from error
        raise


def _run(ipr: Any, reader: LinkReader, index: int, step: DeviceStep, want: VxlanDevice) -> None:
    with operation(f"{step.text} on device {want.name}"):
        match step.op:
            case "name":
                _rename(ipr, index, step.value)
            case "lower":
                ipr.link("set", index=index, kind="vxlan", vxlan_link=int(step.value))
            case "local":
                ipr.link("set", index=index, kind="vxlan", **{_local_key(want): step.value})
            case "learning":
                ipr.link("set", index=index, kind="vxlan", vxlan_learning=int(step.value))
            case "mtu":
                ipr.link("set", index=index, mtu=int(step.value))
            case "mac":
                ipr.link("set", index=index, address=step.value)
            case "accept_ra" | "disable_ipv6":
                _set_sysctl(step, want.name)
            case "address-":
                _address(ipr, "del", index, step.value)
            case "address+":
                _address(ipr, "add", index, step.value)
            case "up":
                _up(ipr, index, want)


def _delete(ipr: Any, reader: LinkReader, step: DeviceStep) -> None:
    found = reader.link(step.value)
    if found is not None:
        with operation(f"{step.text}: device {step.value}"):
            ipr.link("del", index=found.index)


def _rename(ipr: Any, index: int, name: str) -> None:
    """Give a device its name back; before Linux 6.2 only a device that is down takes one."""
    try:
        ipr.link("set", index=index, ifname=name)
    except NetlinkError as error:
        if error.code != errno.EBUSY:
            raise
        ipr.link("set", index=index, state="down")
        ipr.link("set", index=index, ifname=name)
        ipr.link("set", index=index, state="up")


def _up(ipr: Any, index: int, want: VxlanDevice) -> None:
    """Set the device up, which is when the kernel opens its UDP socket."""
    text = f"set device {want.name} up"
    try:
        with operation(text):
            ipr.link("set", index=index, state="up")
    except KernelError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise Conflict(
            error.errno,
            text,
            f"UDP port {want.port} is taken",
            hint="'ss -lun' and 'ip -d link show type vxlan' show by what; or choose another Port",
        ) from error


def _address(ipr: Any, command: str, index: int, text: str) -> None:
    """Add or remove an address; what is there, or gone, already is a success."""
    interface = ipaddress.ip_interface(text)
    extra: dict[str, Any] = {}
    if command == "add" and interface.version == 6:
        # The address is ours by lease: waiting a second for duplicates would only lose packets.
        extra["flags"] = IFA_F_NODAD
    try:
        with operation(f"{command} address {text}"):
            ipr.addr(
                command,
                index=index,
                address=str(interface.ip),
                prefixlen=interface.network.prefixlen,
                **extra,
            )
    except KernelError as error:
        if error.errno != (errno.EEXIST if command == "add" else errno.EADDRNOTAVAIL):
            raise


def _set_sysctl(step: DeviceStep, name: str) -> None:
    """Write a sysctl of the device; only what IPv6 cannot work without is an error."""
    try:
        write_sysctl(step.value, "ipv6", "conf", name, step.op)
    except KernelError as error:
        value = read_sysctl("ipv6", "conf", name, step.op)
        if step.op == "disable_ipv6" and value != step.value:
            raise
        if value is not None and value != step.value:
            log.warning("device=%s sysctl=%s value=%s error=%s", name, step.op, value, error)


def _verify(reader: LinkReader, plan: DevicePlan, index: int) -> None:
    """Read the device back and raise KernelError when it is not what the plan promised."""
    want = plan.device
    found = _require(reader, want.name)
    wrong: list[str] = []
    hint = "sync again; if it stays, find what else configures this device"
    if found.index != index:
        raise kernel_error(errno.ENODEV, f"set up device {want.name}", "it was recreated meanwhile")
    if found.mac != want.mac.lower():
        wrong.append(f"mac is {found.mac}, wanted {want.mac.lower()}")
        hint = "keep udev off it: a .link file with MACAddressPolicy=none for flannel devices"
    if found.mtu != plan.mtu:
        wrong.append(f"mtu is {found.mtu}, wanted {plan.mtu}")
    if not found.up:
        wrong.append("it is down")
    if address_repairs(reader.addresses(index, want.family), want):
        wrong.append(f"address {want.address} is not in use, or others are")
    wrong += differences(found, want)
    if wrong:
        raise KernelError(errno.EIO, f"set up device {want.name}", "; ".join(wrong), hint=hint)


def _require(reader: LinkReader, name: str) -> Link:
    found = reader.link(name)
    if found is None:
        raise kernel_error(errno.ENODEV, f"read back device {name}")
    return found


def _made(reader: LinkReader, want: VxlanDevice) -> int:
    """Return the ifindex of what ``_create`` has just made. Another program may have renamed it
    already; no other device is like it, or the kernel would have rejected ours."""
    if reader.link(want.name) is None:
        for link in reader.links("vxlan"):
            if link.mac == want.mac.lower() and not differences(link, want):
                return link.index
    return _require(reader, want.name).index


def _undo(ipr: Any, reader: LinkReader, index: int, name: str) -> None:
    """Delete what ``_create`` made, whatever it is called by now (``index`` 0: not known);
    the error that led here is the one to report."""
    with suppress(FlannelDPError), operation(f"delete half-made device {name}"):
        found = reader.link(index or name)
        if found is not None and found.kind == "vxlan":
            ipr.link("del", index=found.index)


def delete(index: int, name: str) -> bool:
    with netlink() as ipr:
        try:
            with operation(f"delete device {name}"):
                ipr.link("del", index=index)
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
    return True


def _local_key(want: VxlanDevice) -> str:
    return "vxlan_local6" if want.underlay_family == 6 else "vxlan_local"
