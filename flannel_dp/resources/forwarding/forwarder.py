"""Who forwards to the peers of one data plane: here the kernel's own tables, which need nothing.

Where an eBPF program does, :class:`flannel_dp.resources.forwarding.ebpf.ProgramForwarder` stands in
its place, and callers ask neither which of the two it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from flannel_dp.cluster.network import NetworkConfig, devices_of
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY, has_pins
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

    def __init__(
        self,
        config: NetworkConfig,
        netns: NetNS,
        *,
        room: int = 0,
        run_dir: str = DEFAULT_DIRECTORY,
    ) -> None:
        self._config, self._netns, self.run_dir = config, netns, run_dir
        self._is_alone = False  # nothing is left of a program
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
        from flannel_dp.resources.forwarding.pinned import remains

        return any(remains(name, self._netns, self.run_dir) for name in self._names)

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

    def remove_superseded(self, discard: Callable[[], object]) -> None:
        """The device is the kernel's: a program that forwarded before is not needed. Not only
        where a device was converted: whoever did that, or began to load a program for a device
        that was yet to be converted, may not have come to the end. ``discard`` deletes devices
        that such a process has left; it is called before the pins go, which tell of it. Looked
        for once."""
        if self._is_alone or not has_pins(self.run_dir):
            return
        try:
            with LinkReader(self._netns) as reader:
                links = [reader.link(name) for name in self._names]
            if any(one and one.vxlan and one.vxlan.collect_metadata for one in links):
                return
            from flannel_dp.resources.forwarding.pinned import names_of_pins

            if any(names_of_pins(name, self._netns, self.run_dir) for name in self._names):
                from flannel_dp.resources.forwarding.interim import detach_interim

                there = {one.name: one.index for one in links if one is not None}
                detach_interim(there, self._netns, self.run_dir)
                discard()
                self.remove()
            self._is_alone = True
        except FlannelDPError as error:
            log.warning(
                "A program that forwarded before is still pinned: %(error)s", {"error": error}
            )

    def remove(self) -> list[str]:
        """Unpin whatever there is. Returns the pins' names. Raises as ``Forwarding.remove``."""
        self.close()
        from flannel_dp.resources.forwarding.program import Forwarding

        of_devices = [Forwarding(n, self._netns, run_dir=self.run_dir) for n in self._names]
        return [pin for one in of_devices for pin in one.remove()]
