"""Traffic counters per peer of a node's vxlan devices, set up, kept and read.

Optional and on their own: what goes wrong with them is told and stops nothing else. They
live in the kernel, so they go on counting when this process has ended, and whoever comes
next finds them. See docs/architecture.md for how they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flannel_dp.errors import DeviceGone, FlannelDPError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS
from flannel_dp.resources.counters.device import DeviceCounters, Done
from flannel_dp.resources.counters.reading import Reading


class Counters:
    """The counters of ``devices`` (names of vxlan devices, such as ``flannel.1``) in ``netns``.

    A device need not be there; one that is made later, or made anew, is counted from the next
    ``ensure`` on. Setting up takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, and bcc; later calls
    of ``ensure`` take CAP_NET_ADMIN. Not for two threads at once, except for ``read``.
    """

    def __init__(self, devices: Sequence[str], netns: NetNS = None) -> None:
        self.netns = netns
        self._devices = {name: DeviceCounters(name, netns) for name in dict.fromkeys(devices)}

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices."""
        return tuple(self._devices)

    def prepare(self) -> None:
        """Load what is not loaded yet and hold on to it, before privileges are given up.

        Raises Unsupported (bcc, headers, BTF or a capability is missing; the message says
        which), Conflict where something of others is pinned in our place, KernelError.
        """
        for device in self._devices.values():
            device.prepare()

    def ensure(self) -> dict[str, Done]:
        """Count on every device that is there: load, pin and attach what is missing.

        Returns what had to be done, by device: "loaded", "attached" or "" for nothing. Where
        one device fails the others are done first. Raises as ``prepare``, and Conflict where
        somebody else's filter has our priority (13801). Equivalent: ``tc filter replace dev
        NAME ingress prio 13801 bpf direct-action ...``, and the same for egress.
        """
        done: dict[str, Done] = {}
        failed: FlannelDPError | None = None
        for name, index in self._indexes().items():
            try:
                done[name] = self._devices[name].ensure(index)
            except DeviceGone:
                continue
            except FlannelDPError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return done

    def lacks(self, name: str, index: int) -> bool:
        """Whether the device with this name and ifindex has lost what counts on it.

        Raises KernelError, NotPermitted.
        """
        return name in self._devices and self._devices[name].lacks(index)

    def remove(self) -> tuple[str, ...]:
        """Detach and unpin all of it; the devices that had counters, by name.

        Raises NotPermitted, KernelError.
        """
        indexes = self._indexes()
        return tuple(
            name for name, one in self._devices.items() if one.remove(indexes.get(name, 0))
        )

    def read(self) -> dict[str, Reading]:
        """What was counted, by device; devices without counters are left out.

        Batches of entries of all processors (BPF_MAP_LOOKUP_BATCH, Linux 5.6). Raises
        KernelError, NotPermitted. Equivalent: ``bpftool map dump pinned PATH``.
        """
        found = {name: device.read() for name, device in self._devices.items()}
        return {name: reading for name, reading in found.items() if reading is not None}

    def make_room(self, keep: Iterable[bytes]) -> int:
        """Delete counts of MACs that are not in ``keep`` where a map is full; how many."""
        full = [device for device in self._devices.values() if device.fills_up()]
        kept = {*keep} if full else set()
        return sum(device.forget(kept) for device in full)

    def _indexes(self) -> dict[str, int]:
        """ifindexes of those that are there and vxlan devices."""
        found = {}
        with LinkReader(self.netns) as reader:
            for name in self._devices:
                link = reader.link(name)
                if link is not None and link.kind == "vxlan":
                    found[name] = link.index
        return found
