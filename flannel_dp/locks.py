"""The locks that one instance holds while it writes, and what it tidies up when it has them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from flannel_dp.cluster.network import NetworkConfig, devices_of, other_devices
from flannel_dp.errors import Busy, FlannelDPError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.lock import DeviceLocks, has_other_notes, has_pins
from flannel_dp.kernel.netns import NetNS
from flannel_dp.options import Options

log = logging.getLogger(__name__)


class Locks:
    """The locks of one data plane: of each device of its network, taken once, until ``release``.

    Without ``options.lock`` the caller holds them itself. ``links`` opens a reader of the
    namespace's devices.
    """

    def __init__(
        self,
        config: NetworkConfig,
        options: Options,
        links: Callable[[], AbstractContextManager[LinkReader]],
    ) -> None:
        self._config, self._options, self._links = config, options, links
        self._locks = DeviceLocks(options.netns, options.run_dir)
        self._devices = other_devices(config) if options.lock else ()
        #: Whether there are locks that have yet to be taken before something is written.
        self.missing = bool(self._devices)

    def take(self) -> None:
        """Take the locks that are missing, and tidy up. Raises Busy, NotPermitted, KernelError."""
        if not self.missing:
            return
        self._locks.take(self._names())
        tidy_up(self._options.run_dir, self._options.netns, self._devices)
        self.missing = False

    def taken(self) -> Busy | None:
        """Return the error that ``take`` would raise because another instance has a lock, None
        where they are free, or held here."""
        return self._locks.taken(self._names()) if self.missing else None

    def _names(self) -> Sequence[str]:
        if devices_of(self._config):
            return self._devices
        from flannel_dp.node.instance import lock_names

        return lock_names(self._config, self._links)

    def release(self) -> None:
        """Release all of them: they are missing again."""
        self.missing = bool(self._devices)
        self._locks.release()


def tidy_up(run_dir: str, netns: NetNS, devices: Sequence[str]) -> None:
    """Remove what was left behind on this host, with the locks of ``devices`` held. Where there is
    nothing but what is theirs this looks into two or three folders. Failures are logged."""
    try:
        others = has_other_notes(run_dir, netns)
        if has_pins(run_dir):
            from flannel_dp.bpf.pins import has_others

            others = others or has_others(netns, devices, run_dir)
        if others:
            from flannel_dp.leftovers import sweep

            sweep(run_dir, netns)
    except (FlannelDPError, OSError) as error:
        log.warning(
            "Cannot look for what was left behind in %(directory)s: %(error)s",
            {"directory": run_dir, "error": error},
        )
