"""Attach programs to a device and detach them: filters on its clsact qdisc (tc-bpf(8)).

The filters that exist are read first; pyroute2 (:mod:`flannel_dp.bpf.filterwriter`) is
imported only when one has to be written.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from flannel_dp._core import BpfProgram
from flannel_dp.bpf.filters import HANDLE, Filter, Parent, has_clsact, read_filters
from flannel_dp.errors import FlannelDPError, kernel_error
from flannel_dp.kernel.netns import NetNS, call_in_netns


def attach(
    index: int,
    parent: Parent,
    priority: int,
    program: BpfProgram,
    name: str,
    netns: NetNS = None,
) -> bool:
    """Attach ``program`` to each packet that comes in (ingress) or goes out (egress) of a device.

    A filter of ours, which is one of that priority and name, is replaced without a gap.
    Return True if the clsact qdisc had to be made (see ``note_clsact``). Raises Conflict
    where another program's filter has the priority or an ingress qdisc blocks it, DeviceGone,
    NotPermitted, KernelError. Equivalent: ``tc qdisc add dev NAME clsact; tc filter replace dev
    NAME egress prio 13801 handle 1 protocol all bpf direct-action pinned PATH``.
    """
    present = [one for one in read_filters(index, netns) if one.parent == parent]
    for one in present:
        if one.priority == priority and (one.name != name or one.handle != HANDLE):
            raise _foreign(index, one)
    made = not present and not has_clsact(index, netns)
    from flannel_dp.bpf import filterwriter  # imports pyroute2

    if made:
        call_in_netns(netns, filterwriter.add_clsact, index)
    call_in_netns(netns, filterwriter.replace, index, parent, priority, program.fileno(), name)
    return made


def detach(index: int, parent: Parent, priority: int, name: str, netns: NetNS = None) -> bool:
    """Remove our filter (of that priority and name). Return False if there was none.

    Raises NotPermitted, KernelError. Equivalent: ``tc filter del dev NAME egress prio 13801``.
    """
    ours = [
        one
        for one in read_filters(index, netns)
        if (one.parent, one.priority, one.name) == (parent, priority, name)
    ]
    if not ours:
        return False
    from flannel_dp.bpf import filterwriter  # imports pyroute2

    call_in_netns(netns, filterwriter.delete, index, parent, priority, name)
    return True


def note_clsact(index: int, directory: Path) -> None:
    """Note beside the pins that the clsact qdisc of the device is ours, as ``attach`` said. A note
    of another index is of a device that was recreated since, and goes."""
    note = directory / f"clsact-{index}"
    note.mkdir(0o700, exist_ok=True)
    for other in directory.glob("clsact-*"):
        if other != note:
            other.rmdir()


def release_clsact(index: int, directory: Path, netns: NetNS = None) -> bool:
    """Remove the clsact qdisc if it was noted as ours and no filter is left. Return True if so.

    One that existed before stays, as does one with filters of other programs.
    Raises NotPermitted, KernelError. Equivalent: ``tc qdisc del dev NAME clsact``.
    """
    note = directory / f"clsact-{index}"
    if not os.path.isdir(note) or read_filters(index, netns):
        return False
    from flannel_dp.bpf import filterwriter  # imports pyroute2

    call_in_netns(netns, filterwriter.delete_clsact, index)
    note.rmdir()
    return True


def _foreign(index: int, found: Filter) -> FlannelDPError:
    label = found.name or found.kind
    error = kernel_error(
        errno.EEXIST,
        f"attach to the {found.parent} of device {index}",
        f"filter {label} has priority {found.priority} there",
    )
    error.hint = "it is not ours: see 'tc filter show', and give it another priority"
    return error
