"""A node that is in sync and watched."""

from __future__ import annotations

from typing import Any

from flannel_dp import DataPlane, Lease
from flannel_dp.reconcile.drift import Repair
from flannel_dp.reconcile.watch import Watch
from tests.lib.kernel import everything
from tests.lib.waiting import wait_until


def settle(watch: Watch, turns: int = 10) -> list[Repair]:
    """Read and repair until there is nothing left to do."""
    made = []
    while watch.read():
        assert len(made) < turns, f"it does not come to rest: {made[-3:]}"
        made.append(watch.repair())
    return made


class Kept:
    """A node in sync, watched, with the lines that iproute2 shows of it."""

    def __init__(self, host: Any, dp: DataPlane, leases: list[Lease]) -> None:
        self.host, self.dp, self.leases = host, dp, leases
        self.watch = Watch(dp)
        assert dp.sync(leases, progress=self.watch.progress).ok
        self.watch.remember()
        settle(self.watch)
        self.before = everything(host)

    def rest(self) -> None:
        """Wait until no address is tentative any more: the kernel tells when one is usable."""
        wait_until(lambda: "tentative" not in self.host.ip("-6 address show"))
        settle(self.watch)

    @property
    def families(self) -> list[int]:
        return [*self.dp.families]

    def clean(self) -> bool:
        """As it was; another process agrees that there is nothing to do."""
        with DataPlane(
            self.dp.config, iface=self.host.iface, netns=self.host.ns, allow_shrink=True
        ) as fresh:
            return fresh.plan(self.leases).is_empty and everything(self.host) == self.before

    def close(self) -> None:
        self.watch.close()
        self.dp.close()


def nexthop_id(number: int) -> int:
    return 0x50000000 | (0xA << 24 | 240 << 16 | number << 8) & 0x0FFFFFFF
