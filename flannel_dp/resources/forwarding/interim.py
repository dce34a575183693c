"""The program on devices of the kernel's mode, for as long as routes to their peers are written.

On the way out it puts the peer's MAC into the frame, whatever device it is on, and the FDB knows
the endpoint of each MAC. So one route is enough for all peers, until each has its own. The tunnel
key that the program sets as well has no effect on such a device.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Mapping

from flannel_dp.bpf import attach, pins
from flannel_dp.bpf.filters import FORWARDING_PRIORITY, read_filters
from flannel_dp.errors import FlannelDPError, kernel_error
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.resources.forwarding.program import Forwarding

log = logging.getLogger(__name__)

_NAME = "forward_out"


def attach_interim(device: str, successors: Iterable[int], netns: NetNS, run_dir: str) -> bool:
    """Put the program that forwards for ``device`` on the egress of the devices with these
    ifindexes. Return False, and log why, where that cannot be done.

    ``tc filter replace dev NAME egress prio 13800 handle 1 protocol all bpf direct-action pinned
    PATH``.
    """
    program = Forwarding(device, netns, run_dir=run_dir)
    try:
        if not program.open_pinned():
            raise kernel_error(errno.ENOENT, f"find the program that forwards for {device}")
        for index in successors:
            program.attach(index, ("egress",))
    except FlannelDPError as error:
        log.warning(
            "Traffic pauses until a route to each peer is written, because the forwarding program "
            "cannot be attached to the device that takes its place: %(error)s",
            {"error": error},
        )
        return False
    finally:
        program.close()
    return True


def detach_interim(devices: Mapping[str, int], netns: NetNS, run_dir: str) -> None:
    """Take the program from these devices, by name and ifindex, where it is on them; the clsact
    qdisc goes with it, or stays for the counters, as theirs.

    ``tc qdisc del dev NAME clsact``. Raises NotPermitted, KernelError.
    """
    for name, index in devices.items():
        found = read_filters(index, netns)
        others = [one for one in found if (one.priority, one.name) != (FORWARDING_PRIORITY, _NAME)]
        if len(others) == len(found):
            continue
        if not others:
            from flannel_dp.bpf import filterwriter  # imports pyroute2

            call_in_netns(netns, filterwriter.delete_clsact, index)
            continue
        attach.detach(index, "egress", FORWARDING_PRIORITY, _NAME, netns)
        directory = pins.pin_directory(name, netns, run_dir=run_dir)
        if directory.is_dir():
            attach.note_clsact(index, directory)
