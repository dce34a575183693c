"""Who forwards to the peers of one data plane: here the kernel's own tables, which need nothing.

Where an eBPF program does, :class:`flannel_dp.resources.forwarding.ebpf.ProgramForwarder` stands in
its place, and callers ask neither which of the two it is.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flannel_dp.cluster.network import NetworkConfig, devices_of
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.netns import NetNS

if TYPE_CHECKING:
    from flannel_dp.resources.forwarding.program import Dropped

log = logging.getLogger(__name__)


class Forwarder:
    """The kernel forwards: all that there is to do is to remove what a program has left."""

    #: Whether filters of the devices matter.
    watches_filters = False

    @staticmethod
    def capabilities() -> frozenset[str]:
        """Return what forwarding goes on to need beside CAP_NET_ADMIN."""
        return frozenset()

    def __init__(self, config: NetworkConfig, netns: NetNS, *, room: int = 0) -> None:
        self._config, self._netns = config, netns
        #: The devices that a program may have forwarded for.
        self._names = tuple(config.backend.device_of(number) for number in devices_of(config))

    def close(self) -> None:
        """Close the descriptors of maps and programs."""

    def find(self) -> None:
        """Open what is pinned, if anything is. Raises Conflict, KernelError."""

    def maps(self, family: int) -> int:
        """Return the descriptor of a family's map, 0 where it is not there (yet)."""
        return 0

    def reserve(self) -> None:
        """Make room for every peer that there may ever be: for a process that will not be
        permitted to make larger maps later."""

    def check(self) -> str:
        """For a plan: who forwards, and whether that can be."""
        return ""

    def may_convert(self) -> bool:
        """Return whether a device that is ours but for its mode may be recreated: one of the
        program's mode where a program of ours forwarded for it."""
        from flannel_dp.resources.forwarding.program import remains

        return any(remains(name, self._netns) for name in self._names)

    def missing(self, index: int) -> tuple[str, ...]:
        """Return where on a device the program is not, and should be."""
        return ()

    def not_attached(self, index: int) -> bool:
        """Return whether the program should be on a device and is not."""
        return bool(self.missing(index))

    def attach(self, index: int) -> None:
        """Put the program on a device, where it is not."""

    def problem(self, index: int) -> str:
        """Return why packets of a device do not get to the program, "" where they do."""
        return ""

    def dropped(self) -> list[Dropped]:
        """Return what the program has dropped, by reason."""
        return []

    def remove_superseded(self) -> None:
        """A device was made: a program that forwarded before is not needed. Not only where a
        device was converted: who did that may not have come to its end."""
        try:
            self.remove()
        except FlannelDPError as error:
            log.warning("a program that forwarded before is still pinned: %s", error)

    def remove(self) -> list[str]:
        """Unpin whatever there is. Returns the pins' names. Raises as ``Forwarding.remove``."""
        self.close()
        from flannel_dp.resources.forwarding.program import Forwarding

        return [pin for name in self._names for pin in Forwarding(name, self._netns).remove()]
