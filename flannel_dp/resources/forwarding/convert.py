"""Changing the mode of forwarding, and going back where that fails.

The device of one mode has to go before that of the other can be up, as one UDP port serves one
mode. Where the new device cannot be made the node is synced in the mode it had, and the error says
so. This is outside of the loop over resources: it alone knows both configurations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from msgspec.structs import replace

from flannel_dp._core import Table
from flannel_dp.cluster.lease import Lease, LeaseList
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import FlannelDPError, KernelError, ShrinkRefused
from flannel_dp.kernel.host import Host
from flannel_dp.reconcile.resource import Unfinished
from flannel_dp.tables.scopes import route_scope

log = logging.getLogger(__name__)

#: Before a change of the mode of forwarding is tried again after it has failed.
_PAUSE_SECONDS = 600.0


class Conversion:
    """The changes of the mode of one data plane.

    ``sync(config, leases)`` syncs another configuration of this node. A change that failed is not
    tried again for ten minutes: each attempt takes the device down.
    """

    def __init__(
        self, config: NetworkConfig, sync: Callable[[NetworkConfig, LeaseList | list[Lease]], bool]
    ) -> None:
        self._config, self._sync = config, sync
        self._failed: KernelError | None = None
        self._until = 0.0

    @property
    def reason(self) -> KernelError | None:
        """Why a change failed, for as long as it is not to be tried again."""
        return self._failed if time.monotonic() < self._until else None

    @contextmanager
    def of_sync(self, leases: LeaseList | list[Lease]) -> Iterator[None]:
        """Around a sync of ``leases``: where the new device cannot be made, and the old one is
        gone, sync the mode that there was; raise the error, which says so. For a while after
        that only the mode that there was is synced."""
        if (reason := self.reason) is not None:
            self._go_back(leases, reason)
            raise reason
        try:
            yield
        except Unfinished as error:
            mode = self._config.backend.forwarding
            log.error(
                "Forwarding in mode %(mode)s failed, going back: %(error)s",
                {"mode": mode, "error": error},
            )
            self._failed, self._until = error.reason, time.monotonic() + _PAUSE_SECONDS
            self._go_back(leases, error.reason)
            raise error.reason from error

    @contextmanager
    def of_resync(self) -> Iterator[None]:
        """Around a resync: the leases are not at hand, so that only a sync goes back."""
        if (reason := self.reason) is not None:
            raise reason
        try:
            yield
        except Unfinished as error:
            raise error.reason from error

    def _go_back(self, leases: LeaseList | list[Lease], error: KernelError) -> None:
        """Sync the mode that this node had, and say so in ``error``."""
        before = other_mode(self._config)
        try:
            back = self._sync(before, leases)
        except ShrinkRefused as held:  # what the list lacks is kept, and all else is done
            back = held.report is not None and bool(held.report.ok)
        except FlannelDPError as second:
            log.error("Going back failed, too: %(error)s", {"error": second})
            back = False
        mode = before.backend.forwarding
        error.hint = (
            f"the node forwards as before ('--forwarding {mode}'); correct this and try again"
            if back
            else f"going back to '--forwarding {mode}' has failed, too: sync with that"
        )


def other_mode(config: NetworkConfig) -> NetworkConfig:
    """Return the same network in the other mode of forwarding."""
    return replace(config, backend=config.backend.in_other_mode())


def check_failing(
    host: Host, replaced: Iterable[str], errors: Mapping[int, FlannelDPError]
) -> None:
    """Raise the error of a family that cannot be synced, and that is forwarded by a device of
    ``replaced``, which would be deleted: the existing entries are all that it has."""
    devices = {host.kernel.ifindex(name) for name in replaced} if errors else set()
    for number, error in errors.items():
        for device in devices:
            scope = route_scope(number, device=device, exclusive=True)
            if host.kernel.diff(Table("route"), scope).removed:
                log.error(
                    "IPv%(family)d is on a device that would be replaced: %(error)s",
                    {"family": number, "error": error},
                )
                raise error
