"""Changing the mode of forwarding, and going back where that fails.

The device of one mode has to go before that of the other can be up, as one UDP port serves one
mode. Where the new device cannot be made the node is synced in the mode it had, and the error says
so. This stands outside of the loop over resources: it alone knows both configurations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from flannel_dp._core import Table
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import FlannelDPError, KernelError
from flannel_dp.kernel.host import Host
from flannel_dp.tables.scopes import route_scope

log = logging.getLogger(__name__)

#: Before a change of the mode of forwarding is tried again after it has failed.
_PAUSE_SECONDS = 600.0


class Cooldown:
    """Keeps a change of the mode of forwarding that failed from being tried again at once: each
    attempt takes the device down."""

    def __init__(self) -> None:
        self._reason: KernelError | None = None
        self._until = 0.0

    def begin(self, reason: KernelError) -> None:
        """A change failed."""
        self._reason, self._until = reason, time.monotonic() + _PAUSE_SECONDS

    @property
    def reason(self) -> KernelError | None:
        """Why it failed, for as long as it is not to be tried again."""
        return self._reason if time.monotonic() < self._until else None


def other_mode(config: NetworkConfig) -> NetworkConfig:
    """The same network in the other mode of forwarding."""
    return replace(config, backend=config.backend.in_other_mode())


def go_back(
    config: NetworkConfig, sync: Callable[[NetworkConfig], bool], error: KernelError
) -> None:
    """Sync the mode that this node had, by ``sync(configuration)``, and say so in ``error``."""
    before = other_mode(config)
    try:
        back = sync(before)
    except FlannelDPError as second:
        log.error("going back failed, too: %s", second)
        back = False
    mode = before.backend.forwarding
    error.hint = (
        f"the node forwards as before ('--forwarding {mode}'); correct this and try again"
        if back
        else f"going back to '--forwarding {mode}' has failed, too: sync with that"
    )


def check_failing(
    host: Host, replaced: Iterable[str], errors: Mapping[int, FlannelDPError]
) -> None:
    """Raise the error of a family that cannot be synced, and that is forwarded by a device of
    ``replaced``, which would go: what is there is all that it has."""
    devices = {host.kernel.ifindex(name) for name in replaced} if errors else set()
    for number, error in errors.items():
        for device in devices:
            scope = route_scope(number, device=device, exclusive=True)
            if host.kernel.diff(Table("route"), scope).removed:
                log.error("family=%d is on a device that would be replaced: %s", number, error)
                raise error
