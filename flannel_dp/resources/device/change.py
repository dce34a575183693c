"""Change a vxlan device: apply a plan of :mod:`flannel_dp.resources.device.plan`, or delete it.

:mod:`flannel_dp.resources.device.writer` is imported only when there is something to write.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from flannel_dp.errors import Conflict, require
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS, call_in_netns, call_on_thread
from flannel_dp.resources.device.plan import DevicePlan, kind_text


def apply_device(
    plan: DevicePlan, *, netns: NetNS = None, before_up: Callable[[int], None] | None = None
) -> int:
    """Do what ``plan`` says and return the device's ifindex.

    ``before_up(ifindex)`` is called when a device is about to be set up. A device whose
    making fails half-way is deleted again. Afterwards the device is read back: what the
    kernel or another program made of MAC, MTU and address is what counts.

    Equivalent: ``ip link add NAME address MAC mtu MTU type vxlan id VNI local LOCAL dev
    LOWER dstport PORT nolearning``, ``sysctl -w net.ipv6.conf.NAME.accept_ra=0``, ``ip
    address add ADDRESS dev NAME nodad`` and ``ip link set NAME up``.

    Raises Conflict when another device took its name, NotPermitted without
    CAP_NET_ADMIN, DeviceGone when the device or its external interface vanished, and
    KernelError for the rest.
    """
    require(isinstance(plan, DevicePlan), "plan", plan, "what plan_device() returned")
    if plan.action == "none" and plan.ifindex is not None:
        return plan.ifindex
    from flannel_dp.resources.device import writer

    return call_in_netns(netns, call_on_thread, writer.apply, plan, before_up)


def delete_device(name: str, *, netns: NetNS = None) -> bool:
    """Delete a vxlan device; False when there is no device of that name.

    Its routes, neighbours and FDB go with it. Raises Conflict for a device of another
    kind, which is never ours. Equivalent: ``ip link delete NAME type vxlan``.
    """
    require(isinstance(name, str), "name", name, "the name of a device")
    with LinkReader(netns) as reader:
        found = reader.link(name)
    if found is None:
        return False
    if found.kind != "vxlan":
        raise Conflict(
            errno.EEXIST,
            f"delete device {name}",
            f"it {kind_text(found)}, not as vxlan",
            hint="it is not ours; delete it with 'ip link delete' if you mean to",
        )
    from flannel_dp.resources.device import writer

    return call_in_netns(netns, writer.delete, found.index, name)
