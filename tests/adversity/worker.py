"""A process of its own for what a test cannot do to itself: being killed at a chosen
message, losing a capability, running out of descriptors, or being weighed.

``python -m tests.adversity.worker TASK ARGUMENTS``: prints one JSON value for each thing done.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flannel_dp import BackendData, DataPlane, FlannelDPError, Lease, decode_leases
from tests.lib.leases import mac, network_config

CAP_NET_ADMIN = 12
#: Of a run of many syncs; the objects of each are counted.
QUARTERS = 4
_MALLINFO = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
             "fordblks", "keepcost"]  # fmt: skip


class Fuse:
    """A channel that blows after a number of messages, in whatever batch they are."""

    def __init__(self, channel: Any, messages: int, action: Any) -> None:
        self._channel, self._left, self._action = channel, messages, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def apply(self, diff: Any, start: int, stop: int, results: Any, broken: Any) -> list[Any]:
        complaints: list[Any] = []
        while start < stop:
            end = min(stop, start + self._left) if self._left > 0 else stop
            complaints += self._channel.apply(diff, start, end, results, broken)
            self._left -= end - start
            start = end
            if self._left == 0:
                self._left = -1
                self._action()
        return complaints


def commit_suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def drop_net_admin() -> None:
    """capset(2) without CAP_NET_ADMIN, for this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(1 << CAP_NET_ADMIN)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def make_plane(netns: str, family: str, **options: Any) -> DataPlane:
    families = {"4": (4,), "6": (6,), "46": (4, 6)}[family]
    return DataPlane(
        network_config(*families), iface="eth0", netns=netns or None, allow_shrink=True, **options
    )


def read_leases(path: str) -> list[Lease]:
    return decode_leases(Path(path).read_bytes(), origin=path).leases


def kill_at(netns: str, family: str, path: str) -> None:
    """For each number on stdin: sync in a child that dies after so many messages.

    Numbers below zero count the steps of making the device instead."""
    leases = read_leases(path)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            with make_plane(netns, family) as dp:
                _set_fuse(dp, int(line))
                dp.sync(leases)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say({"killed": os.WIFSIGNALED(status), "exit": status})


def _set_fuse(dp: DataPlane, point: int) -> None:
    if point > 0:
        channel: Any = Fuse(dp.kernel.channel, point, commit_suicide)
        dp.kernel.channel = channel
        return
    from flannel_dp.resources.device import writer

    writer: Any = writer
    step, left = writer._run, -point

    def counted(*args: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            commit_suicide()
        step(*args)

    writer._run = counted


def drop_capability(netns: str, family: str, path: str, messages: str) -> None:
    """Sync, and lose CAP_NET_ADMIN after so many messages (0: before the first)."""
    with make_plane(netns, family) as dp:
        if int(messages):
            channel: Any = Fuse(dp.kernel.channel, int(messages), drop_net_admin)
            dp.kernel.channel = channel
        else:
            assert dp.kernel  # opened while that is allowed
            drop_net_admin()
        say(outcome(dp, read_leases(path)))


def outcome(dp: DataPlane, leases: list[Lease]) -> dict[str, Any]:
    """What a sync came to: ok, or the class of the error and its hint."""
    try:
        return {"ok": dp.sync(leases).ok, "error": ""}
    except FlannelDPError as error:
        return {"ok": False, "error": type(error).__name__, "hint": error.hint}


def many_syncs(netns: str, family: str, path: str, times: str) -> None:
    """Sync again and again, now and then something else; what that adds to the process, and how
    many objects each quarter of it adds."""
    leases = read_leases(path)
    others = leases[: len(leases) // 2]
    with make_plane(netns, family) as dp:
        for turn in range(30):
            dp.sync(others if turn % 10 == 0 else leases)
        before, blocks = held(), []
        for _ in range(QUARTERS):
            start = held()["blocks"]
            for turn in range(int(times) // QUARTERS):
                dp.sync(others if turn % 10 == 0 else leases)
            blocks.append(held()["blocks"] - start)
        say(added(before) | {"blocks": blocks})


def few_descriptors(netns: str, family: str, path: str) -> None:
    """Sync with room for ever more descriptors, until it succeeds."""
    leases = read_leases(path)
    with make_plane(netns, family) as dp:
        dp.sync(leases)  # imports what it needs
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = fds()
    for limit in range(used + 20):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            with make_plane(netns, family) as dp:
                found = outcome(dp, leases)
        except FlannelDPError as error:
            found = {"ok": False, "error": type(error).__name__, "hint": error.hint}
        except Exception as error:
            found = {"ok": False, "error": f"not one of ours: {error!r}", "hint": ""}
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        say(found | {"leaked": fds() - used})
        if found["ok"]:
            return


def hostile_leases(netns: str, family: str, path: str, count: str) -> None:
    """Plan with so many hostile leases besides the honest ones; the memory of the leases, and the
    most that was used, both without what the process had before."""
    leases = read_leases(path)
    before = rss()
    number = int(count)
    leases += [
        Lease(
            subnet=f"10.{240 + (n >> 16 & 15)}.{n >> 8 & 255}.{n & 255}/32",
            ipv6_subnet=f"fd00:10:{n & 63:x}:{n >> 6:x}::/80",
            public_ip=f"198.{18 + (n & 1)}.{n >> 8 & 255}.{n & 255}",
            public_ipv6=f"2001:db8:9::{n:x}",
            backend_type="vxlan",
            backend_data=BackendData(1, mac(4, n & 0xFFFF)),
            backend_v6_data=BackendData(1, mac(6, n & 0xFFFF)),
            revision=10 + n,
        )
        for n in range(number)
    ]
    given = rss() - before
    with make_plane(netns, family) as dp:
        plan = dp.plan(leases)
        rejected = len(plan.rejected)
        text = str(plan.rejected[-1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    say({"given": given, "peak": peak, "rejected": rejected, "last": text})


def rss() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of mallinfo(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]


def held() -> dict[str, int]:
    """What this process holds: descriptors, Python objects, bytes of malloc, resident bytes."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return {
        "fds": fds(),
        "blocks": sys.getallocatedblocks(),
        "malloc": info.uordblks + info.hblkhd,
        "rss": rss(),
    }


def added(before: dict[str, int]) -> dict[str, int]:
    """What it holds more than before."""
    return {name: now - before[name] for name, now in held().items()}


def fds() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd")) - 1


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


TASKS: dict[str, Callable[..., None]] = {
    "kill-at": kill_at,
    "drop-capability": drop_capability,
    "many-syncs": many_syncs,
    "few-descriptors": few_descriptors,
    "hostile-leases": hostile_leases,
}

if __name__ == "__main__":
    TASKS[sys.argv[1]](*sys.argv[2:])
