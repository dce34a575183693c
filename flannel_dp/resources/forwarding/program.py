"""Forwarding by a program: its maps, its filters on the device, and what it knows of this node.

Two tc programs on a vxlan device in collect-metadata mode (csrc/bpf/forward.c) take the
place of a route, a neighbour and an FDB entry for each peer. The peers are a table like any
other (``Peer``), in a map for each family. Maps and programs are pinned: they go on without
us, and a new process finds them.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from flannel_dp._core import (
    BpfMap,
    BpfProgram,
    merge_percpu,
    parse_address,
    parse_mac,
    possible_cpus,
)
from flannel_dp.bpf import attach, filters, loader, pins
from flannel_dp.bpf.filters import FORWARDING_PRIORITY, Parent
from flannel_dp.errors import ConfigError, Conflict, KernelError, Unsupported, require
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS, check_netns
from flannel_dp.resources.forwarding.pinned import PREFIX, SUPERSEDED

log = logging.getLogger(__name__)

#: Why packets were dropped, in the order of ``enum reason`` in csrc/bpf/forward.c.
REASONS = ("no_peer", "not_ip", "foreign_vni", "unknown_source", "spoofed", "no_tunnel")

_HASH, _ARRAY, _PERCPU_ARRAY = 1, 2, 6
_OWN = struct.Struct("=I4x6s2x6s2x16s16s16s16s")
#: Where in it the MAC, the source and the lengths of a family are.
_FIELDS_OF = {4: (1, 3, 5), 6: (2, 4, 6)}

#: So many lengths of prefixes may be in use at a time; each is a look-up for every packet.
LENGTHS = 16
_NO_LENGTH = b"\xff"

#: A map that has yet to be made has room for this many peers, or for more than there are.
_LEAST_ROOM = 1024
_COUNT = 16
_ZERO = bytes(4)

#: A program's name in the source and on the device, and where it sees packets.
_PROGRAMS: Mapping[str, Parent] = {"forward_out": "egress", "forward_in": "ingress"}

#: Bytes of struct bpf_tunnel_key without the local address, which came with Linux 6.0.
_TUNNEL_KEY, _TUNNEL_KEY_LOCAL = 28, 44


class NodeState(Struct, frozen=True):
    """What the program has to know of this node, beside its peers.

    ``macs`` are the inner source MACs, ``sources`` the tunnel's own addresses, and ``lengths``
    the lengths of peers' prefixes, by family (4, 6); a family that is missing has none.
    """

    vni: int
    macs: Mapping[int, str]
    sources: Mapping[int, str]
    lengths: Mapping[int, Collection[int]]

    def packed(self) -> bytes:
        """As the map ``own`` holds it. Raises ConfigError for more lengths than there is
        room for."""
        lengths = [bytes(sorted(self.lengths.get(n, ()), reverse=True)) for n in (4, 6)]
        for family, found in zip((4, 6), lengths, strict=True):
            if len(found) > LENGTHS:
                raise ConfigError(
                    f"IPv{family} subnets have {len(found)} different lengths, and a program looks "
                    f"for {LENGTHS} at most",
                    hint="use '--forwarding kernel', or subnets of fewer lengths",
                )
        mac = [parse_mac(self.macs[n]) if n in self.macs else bytes(6) for n in (4, 6)]
        source = [parse_address(self.sources[n])[1] if n in self.sources else b"" for n in (4, 6)]
        padded = [found.ljust(LENGTHS, _NO_LENGTH) for found in lengths]
        return _OWN.pack(self.vni, *mac, *source, *padded)


class Dropped(Struct, frozen=True):
    """Packets and bytes that the program dropped since it was loaded, for one of REASONS."""

    reason: str
    packets: int
    bytes: int


class Forwarding:
    """The program of one device, named ``device``, in ``netns``.

    ``open`` finds what is pinned or loads it, ``look`` only finds; then ``maps`` has the
    descriptors that peer tables take. ``room`` is how many peers of a family a map that has
    yet to be made will hold (default: as many as there are, and some). For one thread at a
    time.
    """

    def __init__(
        self,
        device: str,
        netns: NetNS = None,
        *,
        room: int = 0,
        run_dir: str = DEFAULT_DIRECTORY,
    ) -> None:
        require(isinstance(device, str), "device", device, "the name of a device")
        require(isinstance(room, int) and room >= 0, "room", room, "a number of peers")
        check_netns(netns)
        self.device, self.netns, self.room, self.run_dir = device, netns, room, run_dir
        self._maps: dict[str, BpfMap] = {}
        self._programs: dict[str, BpfProgram] = {}
        self._directory: Path | None = None

    def close(self) -> None:
        """Close the descriptors. The programs go on."""
        for held in self._maps.values():
            held.close()
        for program in self._programs.values():
            program.close()
        self._maps, self._programs = {}, {}

    @property
    def is_open(self) -> bool:
        """Whether ``maps`` are there to be written."""
        return bool(self._programs)

    def maps(self, family: int) -> int:
        """Return the descriptor of a family's map; 0 where nothing was opened."""
        found = self._maps.get(f"peers{family}")
        return found.fileno() if found else 0

    def open(self, peers: Mapping[int, int] | None = None) -> None:
        """Have maps and programs, loading what is missing (0.5 s and bcc, the first time).

        ``peers`` is how many of each family (4, 6) there will be: maps that have yet to be
        made have room for them.

        Raises Unsupported, which says what is missing, Conflict where something that is not
        ours is pinned in our place, NotPermitted, KernelError.
        """
        if not self.is_open and not self.open_pinned():
            self._load(peers or {})

    def is_too_small(self, peers: Mapping[int, int]) -> bool:
        """Return whether so many peers of each family are more than the open maps have room for."""
        return not self.room and any(self.room_in(n) < count for n, count in peers.items())

    def grow(self, peers: Mapping[int, int]) -> None:
        """Have larger maps, with all that is in the present ones. Who is attached goes on by
        those until the new programs are attached.

        Raises as ``open``; then everything is as it was.
        """
        log.info(
            "The maps of peers of %(device)s are replaced by larger ones", {"device": self.device}
        )
        _need_batches()
        directory = self._pin_directory()
        names = (
            "forward-peers4",
            "forward-peers6",
            *(p.name for p in self._paths(directory).values()),
        )
        fresh = Forwarding(self.device, self.netns, run_dir=self.run_dir)
        try:
            with _set_aside(directory, names):
                fresh._load(peers)
            for name in ("peers4", "peers6"):
                _, keys, values = self._maps[name].read()
                fresh._maps[name].update_many(keys, values)
        except BaseException:
            fresh.close()
            raise
        self._maps, fresh._maps = fresh._maps, self._maps
        self._programs, fresh._programs = fresh._programs, self._programs
        fresh.close()

    def _load(self, peers: Mapping[int, int]) -> None:
        """Compile, load and pin what is missing, and open it."""
        _need_batches()
        directory = self._pin_directory(create=True)
        self._directory = directory
        loader.load(
            "forward",
            maps=self._map_pins(directory),
            programs={
                name: loader.ProgramPin(path) for name, path in self._paths(directory).items()
            },
            defines=self._defines()
            | {f"MAX_PEERS{family}": self._room_for(peers.get(family, 0)) for family in (4, 6)},
        )
        if not self.open_pinned():
            raise KernelError(2, f"find what was pinned in {directory}")
        self._forget_old(directory)

    def check(self) -> str:
        """Return whether ``open`` would work here, in words; nothing is loaded or pinned.

        Raises Unsupported, which says what is missing, and Conflict as ``open``.
        """
        if self.open_pinned():
            return "the program is loaded"
        _need_batches()
        return f"the program can be loaded on Linux {os.uname().release} ({loader.check()})"

    def open_pinned(self) -> bool:
        """Open what is pinned, if all of it is. Raises Conflict for what is not ours."""
        if self.is_open:
            return True
        directory = self._pin_directory()
        self._directory = directory
        found: dict[str, BpfMap] = {}
        for name, pin in self._map_pins(directory).items():
            opened = pins.open_map(pin.path, pin.type, pin.key_size, pin.value_size)
            if opened is not None:
                found[name] = opened
        if len(found) < 4:
            return False
        self._maps = found
        paths = self._paths(directory)
        if not all(os.path.lexists(path) for path in paths.values()):
            return False
        programs = {name: BpfProgram.open(path) for name, path in paths.items()}
        used = {number for program in programs.values() for number in program.maps}
        if not {one.id for one in found.values()} <= used:
            return False  # a map was unpinned and recreated: what runs looks at another one
        self._programs = programs
        return True

    def room_in(self, family: int) -> int:
        """Return how many peers of a family the open map has room for."""
        return self._maps[f"peers{family}"].max_entries

    def count(self, family: int) -> int:
        """Return how many peers of a family are in the open map."""
        return self._maps[f"peers{family}"].read()[0]

    def _room_for(self, peers: int) -> int:
        """Return a power of two with a quarter to spare: its memory is taken at once."""
        return self.room or max(_LEAST_ROOM, 1 << (peers * 5 // 4).bit_length())

    def write_node_state(self, own: NodeState, keep: Collection[int] = ()) -> bool:
        """Write the facts of this node into the program's map; whether that differed. Of the
        families ``keep``, of which ``own`` has nothing, the former values stay."""
        packed, before = own.packed(), self._maps["own"].lookup(_ZERO)
        if keep and before and any(before):
            fields, held = list(_OWN.unpack(packed)), _OWN.unpack(before)
            for family in keep:
                for field in _FIELDS_OF[family]:
                    fields[field] = held[field]
            packed = _OWN.pack(*fields)
        if before == packed:
            return False
        self._maps["own"].update(_ZERO, packed)
        return True

    def missing(self, index: int) -> list[Parent]:
        """Return where on the device with this ifindex the program is not, and should be."""
        there = {
            one.parent
            for one in filters.read_filters(index, self.netns)
            if one.priority == FORWARDING_PRIORITY and one.program in self._ids()
        }
        return [parent for parent in _PROGRAMS.values() if parent not in there]

    def attach(self, index: int, where: Iterable[Parent] | None = None) -> None:
        """Put the program on the device. A filter of ours is replaced without a gap.

        Raises Conflict where another program's filter has our priority. ``tc filter replace
        dev NAME egress prio 13800 handle 1 protocol all bpf direct-action pinned PATH``.
        """
        chosen = [*_PROGRAMS.values()] if where is None else [*where]
        for name, parent in _PROGRAMS.items():
            if parent in chosen:
                attach.attach(
                    index, parent, FORWARDING_PRIORITY, self._programs[name], name, self.netns
                )

    def dropped(self) -> list[Dropped]:
        """Return what was dropped so far, a number for each of REASONS."""
        drops = self._maps.get("drops")
        if drops is None:
            return []
        cpus = possible_cpus()
        _, keys, values = drops.read(cpus)
        sums = merge_percpu(values, cpus, 2)
        numbers = struct.unpack(f"={len(keys) // 4}I", keys)
        found = {number: (sums[2 * at], sums[2 * at + 1]) for at, number in enumerate(numbers)}
        return [
            Dropped(reason, *found.get(number, (0, 0))) for number, reason in enumerate(REASONS)
        ]

    def remove(self) -> list[str]:
        """Unpin everything: what no device uses any more is gone. Returns the pins' names.

        Raises Conflict where something that is not ours is pinned; that stays.
        """
        self.close()
        directory = self._pin_directory()
        if not os.path.isdir(directory):
            return []
        foreign: dict[str, Conflict] = {}
        for pin in self._map_pins(directory).values():
            try:
                pins.open_map(pin.path, pin.type, pin.key_size, pin.value_size)
            except Conflict as error:
                foreign[pin.path.name] = error
        every = {path.name for path in directory.iterdir() if path.name.startswith(PREFIX)}
        names = every - {*foreign}
        gone = pins.remove(directory, *names) if names else []
        if foreign:
            raise next(iter(foreign.values()))
        return gone

    # ---- pins

    def _pin_directory(self, *, create: bool = False) -> Path:
        return pins.pin_directory(self.device, self.netns, create, run_dir=self.run_dir)

    def _map_pins(self, directory: Path) -> dict[str, loader.MapPin]:
        made = {
            "peers4": (_HASH, 8, 24),
            "peers6": (_HASH, 20, 24),
            "own": (_ARRAY, 4, _OWN.size),
            "drops": (_PERCPU_ARRAY, 4, _COUNT),
        }
        return {
            name: loader.MapPin(directory / f"{PREFIX}{name}", *shape)
            for name, shape in made.items()
        }

    def _paths(self, directory: Path) -> dict[str, Path]:
        """Return where the programs are pinned: another source, another name."""
        mark = loader.digest("forward", self._defines())
        return {name: directory / f"{PREFIX}{parent}-{mark}" for name, parent in _PROGRAMS.items()}

    def _defines(self) -> dict[str, str | int]:
        local = _release() >= (6, 0)
        defines: dict[str, str | int] = {"TUNNEL_KEY": _TUNNEL_KEY}
        return defines | ({"TUNNEL_KEY": _TUNNEL_KEY_LOCAL, "TUNNEL_LOCAL": 1} if local else {})

    def _forget_old(self, directory: Path) -> None:
        """Programs of another version, and maps that were outgrown: who is attached stays
        until it is replaced."""
        current = {path.name for path in self._paths(directory).values()}
        current |= {one.path.name for one in self._map_pins(directory).values()}
        old = [
            path.name
            for path in directory.iterdir()
            if path.name.startswith(("forward-egress-", "forward-ingress-", "forward-peers"))
            and path.name not in current
        ]
        if old:
            pins.remove(directory, *old)

    def _ids(self) -> set[int]:
        return {program.id for program in self._programs.values()}


def _need_batches() -> None:
    """Raise Unsupported where the kernel does not read maps in batches, or not for us."""
    loader.need_capabilities()
    trial = BpfMap.create(_HASH, 8, 4, 1, 1, "trial")
    try:
        trial.read()
    except KernelError as error:
        raise Unsupported(
            f"this kernel, Linux {os.uname().release}, does not read BPF maps in batches",
            hint="this takes Linux 5.6 or later",
        ) from error
    finally:
        trial.close()


@contextmanager
def _set_aside(directory: Path, names: Iterable[str]) -> Iterator[None]:
    """Free the names of pins for their successors; without those they get them back."""
    moved = [directory / name for name in names if os.path.lexists(directory / name)]
    for path in moved:
        path.rename(f"{path}{SUPERSEDED}")
    try:
        yield
    except BaseException:
        for path in moved:
            Path(f"{path}{SUPERSEDED}").rename(path)
        raise


def _release() -> tuple[int, int]:
    numbers = os.uname().release.split(".")
    return int(numbers[0]), int("".join(c for c in numbers[1] if c.isdigit()) or 0)
