"""Write filters: what :mod:`flannel_dp.bpf.filters` decided, and nothing else.

This module imports pyroute2; so it is imported when, and only when, a filter has to be
attached or detached. Its functions work in the network namespace of the thread that calls
them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from flannel_dp.bpf.filters import HANDLE, PARENTS, Parent
from flannel_dp.errors import kernel_error

_ETH_P_ALL = 3


def add_clsact(index: int) -> None:
    """``tc qdisc add dev NAME clsact``."""
    with _operation(f"add a clsact qdisc to device {index}") as ipr:
        ipr.tc("add", kind="clsact", index=index)


def delete_clsact(index: int) -> None:
    """``tc qdisc del dev NAME clsact``; one that is gone is no error."""
    with _operation(f"remove the clsact qdisc of device {index}", gone=True) as ipr:
        ipr.tc("del", kind="clsact", index=index)


def replace(index: int, parent: Parent, priority: int, program: int, name: str) -> None:
    """``tc filter replace``; ``program`` is a descriptor."""
    with _operation(f"attach {name} to the {parent} of device {index}") as ipr:
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
    """``tc filter del``; one that is gone is no error."""
    with _operation(f"detach {name} from the {parent} of device {index}", gone=True) as ipr:
        ipr.tc(
            "del-filter",
            kind="bpf",
            index=index,
            handle=HANDLE,
            parent=PARENTS[parent],
            prio=priority,
            protocol=_ETH_P_ALL,
        )


@contextmanager
def _operation(text: str, *, gone: bool = False) -> Iterator[IPRoute]:
    """A socket, and pyroute2's errors turned into ours, with the kernel's own words."""
    try:
        with IPRoute(ext_ack=True) as ipr:
            yield ipr
    except NetlinkError as error:
        if gone and error.code in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
            return
        message = str(error.args[1]) if len(error.args) > 1 else ""
        plain = kernel_error(error.code, text)
        raise plain if message in str(plain) else kernel_error(error.code, text, message) from error
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, text) from error
