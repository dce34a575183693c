"""Write to devices: what :mod:`flannel_dp.resources.device.plan` planned, and nothing else.

It is imported when, and only when, a device has to be changed. Its functions work in the network
namespace of the thread that calls them.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from flannel_dp.errors import Conflict, FlannelDPError, KernelError, kernel_error
from flannel_dp.kernel.link_writer import LinkWriter, vxlan_data
from flannel_dp.kernel.links import Link, LinkReader
from flannel_dp.kernel.sysctls import read_sysctl, write_sysctl
from flannel_dp.resources.device.plan import (
    DevicePlan,
    DeviceStep,
    address_repairs,
    check_no_rival,
    differences,
)
from flannel_dp.resources.device.vxlan import VxlanDevice

log = logging.getLogger(__name__)

#: What the log says was done to a device.
_DONE = {"create": "created", "adopt": "changed", "replace": "replaced"}


def apply(
    plan: DevicePlan, before_up: Callable[[int], None] | None = None, *, up: bool = True
) -> int:
    """Run the steps in this thread's namespace, undo a half-made device, read back. Without ``up``
    the device is to stay down."""
    want = plan.device
    created = False
    with LinkWriter() as writer, LinkReader() as reader:
        index = plan.ifindex or 0
        try:
            for step in plan.steps:
                if step.op == "create":
                    _create(writer, reader, plan)
                    created = True
                    index = _made(reader, want)
                elif step.op == "delete":
                    _delete(writer, reader, step)
                else:
                    if step.op == "up" and before_up is not None:
                        before_up(index)
                    _run(writer, reader, index, step, want)
            _verify(reader, plan, index, up=up)
        except BaseException:
            if created:
                _undo(writer, reader, index, want.name)
            raise
    log.info(
        "Device %(device)s (ifindex %(ifindex)d) was %(done)s: %(steps)s",
        {
            "device": want.name,
            "ifindex": index,
            "done": _DONE.get(plan.action, plan.action),
            "steps": ", ".join(plan.changes).removeprefix("create "),
            "action": plan.action,
            "changes": len(plan.steps),
        },
    )
    return index


def _create(writer: LinkWriter, reader: LinkReader, plan: DevicePlan) -> None:
    """Create the device, down. MAC and MTU are in the message itself.

    A MAC set afterwards races with udev's MACAddressPolicy=persistent, which leaves
    alone what the kernel marks as set by the creator (NET_ADDR_SET).
    """
    want = plan.device
    own = {} if want.external else {"vni": want.vni, "lower": want.lower}
    data = vxlan_data(
        **own,
        local="" if want.external else want.local,
        port=want.port,
        learning=want.learning,
        external=want.external,
        gbp=want.gbp,
    )
    text = f"create device {want.name}"
    try:
        writer.add(want.name, "vxlan", mtu=plan.mtu, mac=want.mac, data=data, what=text)
    except KernelError as error:
        if error.errno == errno.EEXIST:
            check_no_rival(reader, want)
        if error.errno == errno.EOPNOTSUPP:
            hint = "load the module: modprobe vxlan"
            raise KernelError(error.errno, text, error.kernel_message, hint=hint) from error
        raise


def _run(
    writer: LinkWriter, reader: LinkReader, index: int, step: DeviceStep, want: VxlanDevice
) -> None:
    text = f"{step.text} on device {want.name}"
    match step.op:
        case "name":
            _rename(writer, index, step.value, text)
        case "lower":
            writer.set_kind(index, "vxlan", vxlan_data(lower=int(step.value)), what=text)
        case "local":
            writer.set_kind(index, "vxlan", vxlan_data(local=step.value), what=text)
        case "learning":
            data = vxlan_data(learning=step.value == "1")
            writer.set_kind(index, "vxlan", data, what=text)
        case "mtu":
            writer.set(index, mtu=int(step.value), what=text)
        case "mac":
            writer.set(index, mac=step.value, what=text)
        case "accept_ra" | "disable_ipv6":
            _set_sysctl(step, want.name)
        case "address-":
            with _no_error(errno.EADDRNOTAVAIL):  # it is gone already
                writer.delete_address(index, step.value, what=f"del address {step.value}")
        case "address+":
            with _no_error(errno.EEXIST):  # it is there already
                writer.add_address(index, step.value, what=f"add address {step.value}")
        case "up":
            set_up(writer, index, want)


def _delete(writer: LinkWriter, reader: LinkReader, step: DeviceStep) -> None:
    found = reader.link(step.value)
    if found is not None:
        writer.delete(found.index, what=f"{step.text}: device {step.value}")


def _rename(writer: LinkWriter, index: int, name: str, text: str) -> None:
    """Give a device its name back; before Linux 6.2 only a device that is down takes one."""
    try:
        writer.set(index, name=name, what=text)
    except KernelError as error:
        if error.errno != errno.EBUSY:
            raise
        writer.set(index, up=False, what=text)
        writer.set(index, name=name, what=text)
        writer.set(index, up=True, what=text)


def set_up(writer: LinkWriter, index: int, want: VxlanDevice) -> None:
    """Set the device up, which is when the kernel opens its UDP socket. Raises Conflict where
    another program or device has it."""
    text = f"set device {want.name} up"
    try:
        writer.set(index, up=True, what=text)
    except KernelError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise Conflict(
            error.errno,
            text,
            f"UDP port {want.port} is taken",
            hint="'ss -lun' and 'ip -d link show type vxlan' show by what; or choose another Port",
        ) from error


@contextmanager
def _no_error(benign: int) -> Iterator[None]:
    """Take one errno of the kernel for a success."""
    try:
        yield
    except KernelError as error:
        if error.errno != benign:
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
            log.warning(
                "Cannot set sysctl %(sysctl)s of %(device)s to %(value)s: %(error)s",
                {"device": name, "sysctl": step.op, "value": value, "error": error},
            )


def _verify(reader: LinkReader, plan: DevicePlan, index: int, *, up: bool) -> None:
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
    if up and not found.up:
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


def _undo(writer: LinkWriter, reader: LinkReader, index: int, name: str) -> None:
    """Delete what ``_create`` made, whatever it is called by now (``index`` 0: not known);
    the error that led here is the one to report."""
    with suppress(FlannelDPError):
        found = reader.link(index or name)
        if found is not None and found.kind == "vxlan":
            writer.delete(found.index, what=f"delete half-made device {name}")


def delete(index: int, name: str) -> bool:
    """Delete a device in this thread's namespace; False where it is gone already."""
    with LinkWriter() as writer:
        try:
            writer.delete(index, what=f"delete device {name}")
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
    return True
