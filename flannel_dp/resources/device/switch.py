"""Put one vxlan device in the place of another: the new one is made beside it, down, and both
change their names while neither is up, which every kernel permits."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress

from msgspec.structs import replace

from flannel_dp.errors import FlannelDPError, KernelError
from flannel_dp.kernel.link_writer import LinkWriter
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS
from flannel_dp.resources.device import writer as device_writer
from flannel_dp.resources.device.aside import left_aside, replaced_name, waiting_name
from flannel_dp.resources.device.plan import DevicePlan
from flannel_dp.resources.device.vxlan import VxlanDevice


def prepare(plan: DevicePlan) -> int:
    """Make the device of a plan, down and under a name of its own, in this thread's namespace;
    return its ifindex. One of that name, which a killed process has left, goes first.

    ``ip link add ... type vxlan ...``, ``sysctl``, ``ip address add``. Raises KernelError.
    """
    want = replace(plan.device, name=waiting_name(plan.device.vni, plan.device.family))
    steps = tuple(step for step in plan.steps if step.op not in ("delete", "up"))
    with LinkReader() as reader, LinkWriter() as writer:
        for name in left_aside(reader, want.vni):
            if name in (want.name, replaced_name(want.vni)):
                _delete(writer, reader, name)
    return device_writer.apply(replace(plan, device=want, steps=steps, ifindex=None), up=False)


def exchange(netns: NetNS, old: int, new: Iterable[tuple[int, VxlanDevice]]) -> None:
    """Set a device down and others up, which get their names: they have one UDP port. Where one
    cannot be set up the old device has its name again, and is up.

    ``ip link set down``, ``ip link set name``, ``ip link set up``. Raises Conflict, KernelError.
    """
    wanted = list(new)
    with LinkReader(netns) as reader, LinkWriter(netns) as writer:
        before = reader.link(old)
        name = before.name if before else ""
        aside = replaced_name(wanted[0][1].vni)
        try:
            writer.set(old, up=False, what=f"set device {name} down")
            writer.set(old, name=aside, what=f"rename device {name} to {aside}")
            for index, want in wanted:
                what = f"rename device {waiting_name(want.vni, want.family)} to {want.name}"
                writer.set(index, name=want.name, what=what)
            for index, want in wanted:
                device_writer.set_up(writer, index, want)
        except FlannelDPError:
            _restore(writer, old, name, [index for index, _ in wanted])
            raise


def discard(netns: NetNS, index: int) -> None:
    """Delete a device that nothing needs any more, if it is still there. ``ip link delete``."""
    with LinkWriter(netns) as writer:
        _delete_index(writer, index)


def discard_left(netns: NetNS, vni: int) -> list[str]:
    """Delete what a killed process has left of an exchange; return the names."""
    with LinkReader(netns) as reader, LinkWriter(netns) as writer:
        names = left_aside(reader, vni)
        for name in names:
            _delete(writer, reader, name)
    return names


def _restore(writer: LinkWriter, old: int, name: str, new: Iterable[int]) -> None:
    for index in new:
        with suppress(FlannelDPError):
            _delete_index(writer, index)
    with suppress(FlannelDPError):
        writer.set(old, name=name, what=f"give device {name} its name back")
    with suppress(FlannelDPError):
        writer.set(old, up=True, what=f"set device {name} up")


def _delete(writer: LinkWriter, reader: LinkReader, name: str) -> None:
    if (found := reader.link(name)) is not None:
        _delete_index(writer, found.index)


def _delete_index(writer: LinkWriter, index: int) -> None:
    try:
        writer.delete(index, what=f"delete the device with ifindex {index}")
    except KernelError as error:
        if error.errno != errno.ENODEV:
            raise
