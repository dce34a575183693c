"""A change of what forwards that is killed at any of its steps is finished by the next sync,
whichever mode that one asks for."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import pytest

from flannel_dp.resources.forwarding.pinned import names_of_pins
from tests.lib.forwarding import DEVICES, PodNode, filters, held, wanted_in_map
from tests.lib.kernel import expected, observed
from tests.lib.leases import DEVICE, peers

OTHERS = range(20, 24)

#: What writes: Python functions by module and name, and calls of the system.
STEPS = {
    ("flannel_dp.bpf.attach", "attach"),
    ("flannel_dp.bpf.filterwriter", "add_clsact"),
    ("flannel_dp.bpf.loader", "load"),
    ("flannel_dp.kernel.link_writer", "delete"),
    ("flannel_dp.kernel.link_writer", "set"),
    ("flannel_dp.kernel.tables", "apply"),
    ("flannel_dp.resources.device.writer", "_create"),
    ("flannel_dp.resources.device.writer", "_run"),
    ("flannel_dp.resources.forwarding.program", "write_node_state"),
    ("flannel_dp.resources.forwarding.program", "_forget_old"),
}
CALLS = {"rename", "rmdir", "unlink"}


def killed_before(step: int, node: PodNode, family: int, forwarding: str, leases: Any) -> bool:
    """Sync in a process that is killed before its write number ``step``; whether it got there."""
    child = os.fork()
    if not child:
        try:
            left = step

            def count(frame: Any, event: str, what: Any) -> None:
                nonlocal left
                module = frame.f_globals.get("__name__", "")
                if event == "call":
                    is_step = (module, frame.f_code.co_name) in STEPS
                else:  # not those of the process that compiles, which is not killed
                    is_step = event == "c_call" and what.__name__ in CALLS and module != "_compile"
                if is_step:
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)

            with node.plane(family, forwarding=forwarding) as dp:
                threading.setprofile(count)
                sys.setprofile(count)
                dp.sync(leases)
                sys.setprofile(None)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def check(node: PodNode, family: int, forwarding: str, leases: Any) -> None:
    """The node forwards in this mode, and nothing is left of the other one."""
    with node.plane(family, forwarding=forwarding) as dp:
        assert dp.sync(leases).ok
        assert dp.plan(leases).is_empty
        if forwarding == "ebpf":
            assert held(dp, family) == wanted_in_map(leases[1:], family)
    kept = observed(node.host, family)
    assert "fldp-" not in node.host.ip("link show type vxlan")
    pinned = [name for device in DEVICES for name in names_of_pins(device, node.host.ns)]
    attached = len(filters(node.host, DEVICE[family]))
    if forwarding == "ebpf":
        assert len(pinned) == 6
        assert not [name for name in pinned if name.endswith("%old")]
        assert not kept["fdb"]
        # A program that forwards has one device for both families.
        assert sum(len(filters(node.host, device)) for device in DEVICES) == 2
    else:
        assert (pinned, attached) == ([], 0)
        assert kept == expected(leases[1:], family)


@pytest.mark.parametrize(("before", "after"), [("kernel", "ebpf"), ("ebpf", "kernel")])
def test_a_change_killed_at_any_step(lab: Any, family: int, before: str, after: str) -> None:
    node = PodNode(lab, 1)
    leases = [node.lease, *peers(OTHERS)]
    check(node, family, before, leases)
    step = 1
    while killed_before(step, node, family, after, leases):
        # Each step with one of the two modes asked for next; the other family has the other one.
        back = (step + (family == 6)) % 2 == 0
        check(node, family, before if back else after, leases)
        if not back:
            check(node, family, before, leases)
        step += 1
        assert step < 100
    assert step > 8
    check(node, family, after, leases)
