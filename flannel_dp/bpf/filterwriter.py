"""Write filters: what :mod:`flannel_dp.bpf.attach` decided, and nothing else.

This module imports pyroute2; so it is imported when, and only when, a filter has to be
attached or detached. Its functions work in the network namespace of the thread that calls
them.
"""

from __future__ import annotations

import errno

from flannel_dp.bpf.filters import HANDLE, PARENTS, Parent
from flannel_dp.kernel.writing import netlink, operation

_ETH_P_ALL = 3

#: What the kernel says to the removal of a filter or qdisc that is gone already.
_GONE = frozenset({errno.ENOENT, errno.ENODEV, errno.EINVAL})


def add_clsact(index: int) -> None:
    """Run ``tc qdisc add dev NAME clsact``."""
    with operation(f"add a clsact qdisc to device {index}"), netlink() as ipr:
        ipr.tc("add", kind="clsact", index=index)


def delete_clsact(index: int) -> None:
    """Run ``tc qdisc del dev NAME clsact``; one that is gone is no error."""
    with operation(f"remove the clsact qdisc of device {index}", benign=_GONE), netlink() as ipr:
        ipr.tc("del", kind="clsact", index=index)


def replace(index: int, parent: Parent, priority: int, program: int, name: str) -> None:
    """Run ``tc filter replace``; ``program`` is a descriptor."""
    with operation(f"attach {name} to the {parent} of device {index}"), netlink() as ipr:
        ipr.tc(
            "replace-filter",
            kind="bpf",
            index=index,
            handle=HANDLE,
            parent=PARENTS[parent],
            prio=priority,
            protocol=_ETH_P_ALL,
            fd=program,
            name=name,
            direct_action=True,
        )


def delete(index: int, parent: Parent, priority: int, name: str) -> None:
    """Run ``tc filter del``; one that is gone is no error."""
    with (
        operation(f"detach {name} from the {parent} of device {index}", benign=_GONE),
        netlink() as ipr,
    ):
        ipr.tc(
            "del-filter",
            kind="bpf",
            index=index,
            handle=HANDLE,
            parent=PARENTS[parent],
            prio=priority,
            protocol=_ETH_P_ALL,
        )
