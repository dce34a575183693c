"""The counters of one vxlan device: its pins, its filters, and what they have counted.

Programs on the device's way in and out count per tunnel end (csrc/bpf/counters.c), one on
the kernel's tracepoint skb:kfree_skb counts what is dropped on the device and why. All of
it is pinned, so that it continues when the process that set it up has ended, and is found again.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from flannel_dp._core import BpfMap, BpfProgram, merge_percpu, possible_cpus
from flannel_dp.bpf import attach, filters, loader, pins
from flannel_dp.bpf.filters import COUNTERS_PRIORITY, Parent
from flannel_dp.bpf.loader import MapPin, ProgramPin
from flannel_dp.errors import KernelError, NotPermitted
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS, netns_identity
from flannel_dp.resources.counters.reading import PLACES, TRAFFIC, Reading, merge_others
from flannel_dp.resources.counters.reasons import MAX_REASONS, NAME, name_reasons, reason_names

log = logging.getLogger(__name__)

FILTER: Final = "flannel-dp-counters"
SOURCE: Final = "counters"


#: Room for so many ends of tunnels (one for each family and direction), and for so many kinds
#: of drops (one for each peer, family, direction and reason).
MAX_PEERS, MAX_DROPS = 131072, 2048

_ARRAY, _PERCPU_HASH, _PERCPU_ARRAY = 2, 5, 6
#: type, bytes of a key, bytes of a value
MAPS: Final[Mapping[str, tuple[int, int, int]]] = {
    "peers": (_PERCPU_HASH, 8, TRAFFIC),
    "others": (_PERCPU_ARRAY, 4, PLACES * TRAFFIC),
    "drops": (_PERCPU_HASH, 16, TRAFFIC),
    "device": (_ARRAY, 4, 8),
    "reasons": (_ARRAY, 4, NAME),
}
_LAST = 0b1100  # of packets, bytes, last, tick: of the last two the largest counts

_PROGRAMS: Final[Mapping[Parent, str]] = {"ingress": "count_ingress", "egress": "count_egress"}
_DROPS = "count_drop"
_ENUM = "skb_drop_reason"
_OFFSETS: Final = {
    "SK_BUFF_DEV": "sk_buff.dev",
    "SK_BUFF_HEAD": "sk_buff.head",
    "SK_BUFF_MAC_HEADER": "sk_buff.mac_header",
    "SK_BUFF_PROTOCOL": "sk_buff.protocol",
    "NET_DEVICE_ADDRESS": "net_device.dev_addr",
    "NET_DEVICE_IFINDEX": "net_device.ifindex",
    "NET_DEVICE_NET": "net_device.nd_net.net",
    "NET_INUM": "net.ns.inum",
}
_ZERO = bytes(4)
_DEVICE = struct.Struct("=II")

#: What ``ensure`` did: nothing, attached what was loaded before, or loaded it.
Ensured = Literal["", "attached", "loaded"]


class _OpenPins(Struct, frozen=True):
    """Maps and programs by descriptor, which keeps them alive whatever becomes of the pins."""

    directory: Path
    maps: Mapping[str, BpfMap]
    programs: Mapping[Parent, BpfProgram]


class DeviceCounters:
    """The counters of ``device`` (a vxlan device's name; it need not be there) in ``netns``.

    Not for two threads at once, except for ``read``. Equivalent: ``bpftool prog loadall``,
    ``tc filter add ... bpf direct-action pinned ...``, ``bpftool map dump pinned ...``.
    """

    def __init__(
        self,
        device: str,
        netns: NetNS = None,
        *,
        max_peers: int = MAX_PEERS,
        run_dir: str = DEFAULT_DIRECTORY,
    ) -> None:
        self.device, self.netns, self._run_dir = device, netns, run_dir
        self._defines = {
            "MAX_PEERS": max_peers,
            "MAX_DROPS": MAX_DROPS,
            "MAX_REASONS": MAX_REASONS,
        }
        self._held: _OpenPins | None = None
        self._cpus = possible_cpus()
        self._overflow = 0

    def _directory(self, *, create: bool = False) -> Path:
        return pins.pin_directory(self.device, self.netns, create, run_dir=self._run_dir)

    # ---- setting up ------------------------------------------------------------

    def prepare(self) -> bool:
        """Open what is pinned, or load it; whether it had to be loaded.

        The device need not be there. Later calls of ``ensure`` take CAP_NET_ADMIN only.
        Raises Unsupported, Conflict, NotPermitted, KernelError.
        """
        directory = self._directory()
        found = self._open(directory)
        if found is None and self._held is not None and self._restore(self._held):
            return False
        self._held = found or self._held
        if found is not None:
            return False
        self._held = self._load(self._directory(create=True))
        return True

    def compare(self, index: int) -> tuple[str, ...]:
        """Return what ``ensure`` would have to do for the device with ifindex ``index`` (0: it
        is not there yet), in words. Opens what is pinned, and writes nothing.

        Raises Conflict, NotPermitted, KernelError.
        """
        found = self._open(self._directory())
        held = self._held = found or self._held
        if held is None:
            return ("load the programs", *(f"attach to {parent}" for parent in _PROGRAMS))
        words = [] if found is not None else ["pin the programs again"]
        attach = self._not_attached(held, index) if index else [*_PROGRAMS]
        words += [f"attach to {parent}" for parent in attach]
        if index and not self._is_pointed(held, index):
            words.append("count drops of this device")
        return (*words,)

    def ensure(self, index: int) -> Ensured:
        """Make sure that the device with ifindex ``index`` is counted; what had to be done.

        Two messages to the kernel where all is right. Raises as ``prepare``, Conflict where
        another program's filter has our priority, and DeviceGone.
        """
        loaded = self.prepare()
        held = self._held
        assert held is not None
        self._point(held, index)
        attached = self._not_attached(held, index)
        for parent in attached:
            program = held.programs[parent]
            if attach.attach(index, parent, COUNTERS_PRIORITY, program, FILTER, self.netns):
                attach.note_clsact(index, held.directory)
        if loaded or attached:
            log.info(
                "The counters of %(device)s were %(action)s",
                {"device": self.device, "action": "loaded" if loaded else "attached"},
            )
        return "loaded" if loaded else "attached" if attached else ""

    def not_attached(self, index: int) -> bool:
        """Return whether a filter that was attached to this device is not there any more."""
        return self._held is not None and bool(self._not_attached(self._held, index))

    def _not_attached(self, held: _OpenPins, index: int) -> list[Parent]:
        """Return the sides of the device that lack its filter."""
        there = {
            (one.parent, one.priority, one.name, one.program)
            for one in filters.read_filters(index, self.netns)
        }
        return [
            parent
            for parent, program in held.programs.items()
            if (parent, COUNTERS_PRIORITY, FILTER, program.id) not in there
        ]

    def _point(self, held: _OpenPins, index: int) -> None:
        """Write the device into the map of the tracepoint's program."""
        if not self._is_pointed(held, index):
            held.maps["device"].update(_ZERO, self._identity(index))

    def _is_pointed(self, held: _OpenPins, index: int) -> bool:
        return held.maps["device"].lookup(_ZERO) == self._identity(index)

    def _identity(self, index: int) -> bytes:
        """Return the device as the program on the tracepoint knows it."""
        return _DEVICE.pack(index, netns_identity(self.netns)[1])

    def _load(self, directory: Path) -> _OpenPins:
        names = self._names()
        enums = loader.load(
            SOURCE,
            maps={name: MapPin(directory / name, *MAPS[name]) for name in MAPS},
            programs={
                _PROGRAMS[parent]: ProgramPin(directory / names[parent]) for parent in _PROGRAMS
            }
            | {
                _DROPS: ProgramPin(
                    directory / names["drops"], "raw_tracepoint:kfree_skb", needs=_ENUM
                )
            },
            defines=self._defines,
            offsets=_OFFSETS,
            enums=[_ENUM],
        )
        made = self._open(directory)
        if made is None:
            raise KernelError(
                errno.ENOENT, f"find the eBPF programs that were pinned in {directory}"
            )
        name_reasons(made.maps["reasons"], enums[_ENUM])
        # What another version left: its filters are about to be replaced.
        stale = [
            path.name
            for path in directory.iterdir()
            if path.name.startswith(_PREFIXES) and path.name not in names.values()
        ]
        if stale:
            pins.remove(directory, *stale)
        return made

    def _names(self) -> dict[str, str]:
        """Return the names of the programs' pins: those of another source are not found by them."""
        made_of = loader.digest(SOURCE, self._defines)
        return {
            role: f"{prefix}{made_of}"
            for role, prefix in zip(("ingress", "egress", "drops"), _PREFIXES, strict=True)
        }

    def _open(self, directory: Path) -> _OpenPins | None:
        """Return what is pinned, if it is all there and belongs together."""
        names = self._names()
        maps: dict[str, BpfMap] = {}
        for name, spec in MAPS.items():
            found = pins.open_map(directory / name, *spec)
            if found is None:
                return None
            maps[name] = found
        programs: dict[Parent, BpfProgram] = {}
        for parent in _PROGRAMS:
            try:
                programs[parent] = BpfProgram.open(directory / names[parent])
            except KernelError:
                return None
            if maps["peers"].id not in programs[parent].maps:
                return None
        has_drops = os.path.lexists(directory / names["drops"])
        if not has_drops and reason_names(maps["reasons"]):
            return None
        return _OpenPins(directory, maps, programs)

    def _restore(self, held: _OpenPins) -> bool:
        """Pin again what was unpinned and is held here still; whether that made all good."""
        names = self._names()
        try:
            directory = self._directory(create=True)
            for name, held_map in held.maps.items():
                if not os.path.lexists(directory / name):
                    held_map.pin(directory / name)
            for parent, program in held.programs.items():
                if not os.path.lexists(directory / names[parent]):
                    program.pin(directory / names[parent])
            found = self._open(directory)
        except NotPermitted:
            # Without the right to look there (through /proc/1/root) nothing is known to be
            # wrong, and what is held goes on counting.
            return True
        if found is None or found.maps["peers"].id != held.maps["peers"].id:
            return False
        log.info("The counters of %(device)s were pinned again", {"device": self.device})
        self._held = found
        return True

    # ---- taking away -----------------------------------------------------------

    def is_there(self, index: int = 0) -> bool:
        """Return whether ``remove`` would find anything: pins, or filters on the device with
        ifindex ``index`` (0: it has gone). Raises KernelError."""
        if index and any(
            (one.priority, one.name) == (COUNTERS_PRIORITY, FILTER)
            for one in filters.read_filters(index, self.netns)
        ):
            return True
        return bool(self._pins(self._directory()))

    def _pins(self, directory: Path) -> list[str]:
        """Return the names of our pins."""
        try:
            return [path.name for path in directory.iterdir() if is_pin(path.name)]
        except (FileNotFoundError, PermissionError):
            return []

    def remove(self, index: int = 0) -> bool:
        """Detach and unpin all of it; ``index`` is the device's, 0 if it has gone.

        Returns whether there was anything. Raises NotPermitted, KernelError.
        """
        removed = False
        directory = self._directory()
        if index:
            for parent in _PROGRAMS:
                if attach.detach(index, parent, COUNTERS_PRIORITY, FILTER, self.netns):
                    removed = True
            attach.release_clsact(index, directory, self.netns)
        self._held = None
        ours = self._pins(directory)
        return bool(ours and pins.remove(directory, *ours)) or removed

    # ---- reading ---------------------------------------------------------------

    def read(self) -> Reading | None:
        """Return what was counted so far; None where nothing is set up.

        Raises KernelError; NotPermitted without CAP_BPF (or, before Linux 5.8, root).
        """
        held = self._held or self._open_maps()
        if held is None:
            return None
        cpus, maps = self._cpus, held.maps
        _, keys, values = maps["peers"].read(cpus)
        _, drop_keys, drop_values = maps["drops"].read(cpus)
        others = maps["others"].lookup(_ZERO, cpus) or b""
        return Reading(
            time.clock_gettime_ns(time.CLOCK_MONOTONIC),
            keys,
            merge_percpu(values, cpus, TRAFFIC // 8, _LAST),
            drop_keys,
            merge_percpu(drop_values, cpus, TRAFFIC // 8, _LAST),
            others,
            cpus,
            reason_names(maps["reasons"]),
        )

    def _open_maps(self) -> _OpenPins | None:
        """Return the maps alone, whatever version of the programs fills them."""
        directory = self._directory()
        maps: dict[str, BpfMap] = {}
        for name, spec in MAPS.items():
            found = pins.open_map(directory / name, *spec)
            if found is None:
                return None
            maps[name] = found
        return _OpenPins(directory, maps, {})

    def fills_up(self) -> bool:
        """Return whether the map has had no room for peers since ``forget`` last made some."""
        return self.overflow() > self._overflow

    def overflow(self) -> int:
        """Packets of peers that the map had no room for; one look-up."""
        if self._held is None:
            return 0
        raw = self._held.maps["others"].lookup(_ZERO, self._cpus)
        return sum(place.packets for place in merge_others(raw or b"", self._cpus)[9:])

    def forget(self, keep: Iterable[bytes]) -> int:
        """Make room: delete the counts of all MACs (six bytes each) but ``keep``; how many."""
        if self._held is None:
            return 0
        self._overflow = self.overflow()
        kept, peers = {*keep}, self._held.maps["peers"]
        _, keys, _ = peers.read(self._cpus)
        old = [keys[n : n + 8] for n in range(0, len(keys), 8) if keys[n : n + 6] not in kept]
        return sum(peers.delete(key) for key in old)


_PREFIXES = ("count-in-", "count-out-", "count-drop-")


def is_pin(name: str) -> bool:
    """Return whether a pin of this name is one of counters."""
    return name in MAPS or name.startswith(_PREFIXES)
