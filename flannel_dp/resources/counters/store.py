"""Traffic counters per peer of a node's vxlan devices, set up, kept and read.

They live in the kernel, so they go on counting when this process has ended, and the next one
finds them. See docs/ebpf.md for how they are loaded. Importing this loads nothing of
eBPF, and neither does a store that is not used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from flannel_dp.errors import DeviceGone, FlannelDPError, require
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS, check_netns
from flannel_dp.later import Later

if TYPE_CHECKING:
    from flannel_dp.resources.counters import device as counting
    from flannel_dp.resources.counters import reading
    from flannel_dp.resources.counters.device import DeviceCounters
else:
    counting = Later("flannel_dp.resources.counters.device")
    reading = Later("flannel_dp.resources.counters.reading")


class Counters:
    """The counters of ``devices`` (names of vxlan devices, such as ``flannel.1``) in ``netns``.

    A device need not be there; one that is made later, or recreated, is counted from the next
    ``ensure`` on. Setting up takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, and bcc; later calls
    of ``ensure`` take CAP_NET_ADMIN. Not for two threads at once, except for ``read``.
    """

    def __init__(
        self, devices: Sequence[str], netns: NetNS = None, *, run_dir: str = DEFAULT_DIRECTORY
    ) -> None:
        fits = isinstance(devices, Iterable) and not isinstance(devices, str)
        require(fits, "devices", devices, "names of devices")
        self.netns, self._run_dir = netns, run_dir
        self._names = tuple(dict.fromkeys(devices))
        require(
            all(isinstance(n, str) for n in self._names), "devices", devices, "names of devices"
        )
        check_netns(netns)
        self._opened: dict[str, DeviceCounters] | None = None
        self._opening = threading.Lock()

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices."""
        return self._names

    @property
    def _devices(self) -> dict[str, DeviceCounters]:
        """The counters of each device, made when they are first needed, by any thread."""
        with self._opening:
            if self._opened is None:
                from flannel_dp.resources.counters.device import DeviceCounters

                self._opened = {
                    name: DeviceCounters(name, self.netns, run_dir=self._run_dir)
                    for name in self._names
                }
            return self._opened

    # ---- setting up

    def prepare(self) -> None:
        """Load what is not loaded yet and hold on to it, before privileges are given up.

        Raises Unsupported (bcc, headers, BTF or a capability is missing; the message says
        which), Conflict where something of others is pinned in our place, KernelError.
        """
        for device in self._devices.values():
            device.prepare()

    def compare(self, indexes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """Return what ``ensure`` would do, in words, by the name of the device; devices with
        nothing to do are left out.

        ``indexes`` are the ifindexes of the devices, 0 for one that is not made yet. An error
        of one device is its words: ``ensure`` will raise it. Writes nothing.
        """
        found: dict[str, tuple[str, ...]] = {}
        for name, index in indexes.items():
            try:
                words = self._devices[name].compare(index)
            except FlannelDPError as error:
                words = (str(error),)
            if words:
                found[name] = words
        return found

    def ensure(self, indexes: Mapping[str, int] | None = None) -> dict[str, counting.Ensured]:
        """Count on every device that is there: load, pin and attach what is missing.

        ``indexes`` are the ifindexes of the devices by name (default: they are read). Returns
        what had to be done, by device: "loaded", "attached" or "" for nothing. Where
        one device fails the others are done first. Raises as ``prepare``, and Conflict where
        a filter of another program has our priority (13801). Equivalent: ``tc filter replace dev
        NAME ingress prio 13801 bpf direct-action ...``, and the same for egress.
        """
        done: dict[str, counting.Ensured] = {}
        failed: FlannelDPError | None = None
        for name, index in (self.indexes() if indexes is None else indexes).items():
            try:
                done[name] = self._devices[name].ensure(index)
            except DeviceGone:
                continue
            except FlannelDPError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return done

    def not_attached(self, name: str, index: int) -> bool:
        """Return whether the device with this name and ifindex has lost what counts on it.

        Raises KernelError, NotPermitted.
        """
        return name in self._names and self._devices[name].not_attached(index)

    def indexes(self) -> dict[str, int]:
        """Return the ifindexes of those devices that are there and vxlan devices, by name."""
        found = {}
        with LinkReader(self.netns) as reader:
            for name in self._names:
                link = reader.link(name)
                if link is not None and link.kind == "vxlan":
                    found[name] = link.index
        return found

    # ---- taking away

    def to_remove(self) -> tuple[str, ...]:
        """Return the names of the devices that ``remove`` would take counters from.

        Raises KernelError.
        """
        if not self._names:
            return ()
        indexes = self.indexes()
        return tuple(
            name for name, one in self._devices.items() if one.is_there(indexes.get(name, 0))
        )

    def remove(self) -> tuple[str, ...]:
        """Detach and unpin all of it; the devices that had counters, by name.

        Raises NotPermitted, KernelError.
        """
        indexes = self.indexes()
        return tuple(
            name for name, one in self._devices.items() if one.remove(indexes.get(name, 0))
        )

    # ---- reading and making room

    def read(self) -> dict[str, reading.Reading]:
        """Return what was counted, by device; devices without counters are left out.

        Batches of entries of all processors (BPF_MAP_LOOKUP_BATCH, Linux 5.6). Raises
        KernelError, NotPermitted. Equivalent: ``bpftool map dump pinned PATH``.
        """
        found = {name: device.read() for name, device in self._devices.items()}
        return {name: reading for name, reading in found.items() if reading is not None}

    def full(self) -> tuple[str, ...]:
        """Return the devices whose map had no room for a peer since ``make_room``; one look-up
        each."""
        return tuple(name for name, device in self._devices.items() if device.fills_up())

    def make_room(self, keep: Iterable[bytes]) -> int:
        """Delete counts of MACs (six bytes each) that are not in ``keep`` where a map is full.

        Returns how many were deleted.
        """
        full = self.full()
        kept = {*keep} if full else set()
        return sum(self._devices[name].forget(kept) for name in full)
