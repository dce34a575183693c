"""A namespace to measure in, and the patience to wait until the kernel has finished."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import AF_INET

from bench import cluster
from flannel_dp import Kernel
from flannel_dp._core import Table
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import nexthop_scope

_numbers = itertools.count(1)

#: Seconds that quiet() waits at most; then the round is run and counted as noisy.
PATIENCE = float(os.environ.get("FLANNEL_DP_BENCH_PATIENCE", "3"))

_LEAST_PATIENCE = 0.35

_WINDOW = 0.05
_IDLE = 0.95
_WINDOWS = 2


def ip(*words: str, stdin: str | None = None) -> None:
    """Run ``ip``; raises RuntimeError with what it said."""
    done = subprocess.run(["ip", *words], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def namespace(family: int) -> Iterator[str]:
    """A network namespace that is node 0 of a cluster: ``eth0`` up, with its public address.

    ``eth0`` is one end of a veth pair whose other end is up beside it, so it has carrier.
    The namespace is deleted in the end, whatever happened.
    """
    if os.geteuid() != 0:
        raise PermissionError("the benchmarks make network namespaces: run them as root")
    name = f"fdp-bench-{os.getpid()}-{next(_numbers)}"
    ip("netns", "add", name)
    try:
        address = cluster.public_address(family)
        nodad = " nodad" if family == 6 else ""
        steps = [
            "link set lo up",
            "link add eth0 type veth peer name peer0",
            f"addr add {address} dev eth0{nodad}",
            "link set peer0 up",
            "link set eth0 up",
            f"route add default via {cluster.ROUTER[family]} dev eth0",
        ]
        ip("-n", name, "-batch", "-", stdin="\n".join(steps) + "\n")
        # So that no sync has to warn about it.
        for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            ip("netns", "exec", name, "sh", "-c", f"echo 1 > /proc/sys/net/{path}")
        yield name
    finally:
        try:
            _remove_routes(name)
        finally:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _remove_routes(name: str) -> None:
    """Remove IPv4 routes, then nexthop objects, before the namespace goes.

    Left to itself the kernel looks through all routes once for each object
    (nexthop_net_exit_rtnl), under the lock that every other namespace needs, too: with
    100,000 of each that takes ten minutes, in which nobody on the machine changes a route.
    """
    with Kernel(name) as kernel:
        routes = Scope("route", AF_INET, protocol=0)
        objects = nexthop_scope(0, protocol=0)
        kernel.apply(kernel.diff(Table("route"), routes))
        kernel.apply(kernel.diff(Table("nexthop"), objects))


def _processor_time() -> tuple[int, int]:
    """Ticks idle and in all since boot, over all processors (proc_stat(5))."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def quiet(patience: float = PATIENCE) -> bool:
    """Wait until the processors have been idle for a tenth of a second in a row.

    Removing tens of thousands of routes leaves the kernel's workers busy for seconds;
    who measures meanwhile measures the round before. False when that did not happen
    within ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    still = 0
    idle, total = _processor_time()
    while time.monotonic() < deadline:
        time.sleep(_WINDOW)
        new_idle, new_total = _processor_time()
        share = (new_idle - idle) / max(new_total - total, 1)
        idle, total = new_idle, new_total
        still = still + 1 if share >= _IDLE else 0
        if still == _WINDOWS:
            return True
    return False


class Quiet:
    """``quiet`` for a whole run, with less patience each time that it was in vain.

    On a machine where others work all the time, waiting in full before each of some
    hundred rounds would take longer than the benchmarks and help none of them.
    """

    def __init__(self) -> None:
        self.noisy = 0
        self._in_vain = 0

    def __call__(self) -> None:
        if quiet(max(PATIENCE / 2**self._in_vain, _LEAST_PATIENCE)):
            self._in_vain = 0
        else:
            self.noisy += 1
            self._in_vain += 1


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Move this thread into a namespace: where an agent is, that looks after its own node."""
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newnet = 0x40000000
    with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{name}") as there:
        if libc.setns(there.fileno(), clone_newnet):
            raise OSError(ctypes.get_errno(), f"enter {name}")
        try:
            yield
        finally:
            if libc.setns(before.fileno(), clone_newnet):
                raise OSError(ctypes.get_errno(), f"leave {name}")
