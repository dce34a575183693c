"""What the counters of a device said at one moment: packets, bytes, drops and their reasons."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple

Direction = Literal["sent", "received", ""]

#: By number, as csrc/bpf/counters.c has them.
DIRECTIONS: Final[tuple[Direction, ...]] = ("sent", "received", "")

#: Bytes of `struct traffic`: packets, bytes, last, tick.
TRAFFIC: Final = 32
_FIELDS = TRAFFIC // 8
PLACES: Final = 17  # of `struct others`: drops, 8 of groups, 8 of overflow
_OTHERS = {0: 0, 4: 2, 6: 3}
_DROP = struct.Struct("=6sBBII")


class Traffic(NamedTuple):
    """``packets`` as they are on the wire, ``bytes`` of their inner Ethernet frames, and when
    the ``last`` one was seen: CLOCK_MONOTONIC in nanoseconds, 0 for never."""

    packets: int = 0
    bytes: int = 0
    last: int = 0

    def __add__(self, other: object) -> Traffic:
        if not isinstance(other, Traffic):
            return NotImplemented
        return Traffic(
            self.packets + other.packets, self.bytes + other.bytes, max(self.last, other.last)
        )


class Drop(NamedTuple):
    """Packets that the kernel dropped on the device for one ``reason``.

    ``mac`` and ``direction`` are empty where the packet had no frame that names a peer.
    """

    mac: str
    family: int
    direction: Direction
    reason: str
    packets: int
    last: int


class Reading:
    """One device's counters. ``at`` is CLOCK_MONOTONIC in nanoseconds.

    ``groups`` are frames to or from group addresses, ``overflow`` those of peers that the map
    had no room for, both by family (0: no IP) and direction. ``drops`` are the most frequent
    first; ``reasons`` is empty on kernels that give none (before Linux 5.17).
    """

    def __init__(
        self,
        at: int,
        keys: bytes,
        values: array[int],
        drop_keys: bytes,
        drop_values: array[int],
        others: bytes,
        cpus: int,
        reasons: Mapping[int, str],
    ) -> None:
        self.at, self.reasons = at, reasons
        self._keys, self._values = keys, values
        self._index: dict[bytes, int] | None = None
        merged = merge_others(others, cpus)
        self.lost_drops = merged[0].packets
        self.groups = _by_family(merged[1:9])
        self.overflow = _by_family(merged[9:])
        self.drops = sorted(
            _drops(drop_keys, drop_values, reasons), key=lambda one: (-one.packets, one.reason)
        )

    def __len__(self) -> int:
        return len(self._keys) // 8

    def __iter__(self) -> Iterator[tuple[str, int, Direction, Traffic]]:
        """MAC, family, direction and traffic of every entry, in the map's order."""
        for number in range(len(self)):
            key = self._keys[8 * number : 8 * number + 8]
            yield _text(key[:6]), key[6], DIRECTIONS[key[7]], self._traffic(number)

    def traffic(self, mac: bytes, family: int, direction: Direction) -> Traffic:
        """Return what one peer, by the six bytes of its MAC, was sent or sent us."""
        if self._index is None:
            self._index = {
                self._keys[8 * number : 8 * number + 8]: number for number in range(len(self))
            }
        key = mac + bytes((family, DIRECTIONS.index(direction)))
        number = self._index.get(key)
        return Traffic() if number is None else self._traffic(number)

    def _traffic(self, number: int) -> Traffic:
        return Traffic(*self._values[_FIELDS * number : _FIELDS * number + 3])

    def seconds_since(self, last: int) -> float | None:
        """Return how long before the reading that was; None for never."""
        return max(0, self.at - last) / 1e9 if last else None


def merge_others(raw: bytes, cpus: int) -> list[Traffic]:
    """`struct others` of all processors in one: drops, then groups, then overflow."""
    raw = raw or bytes(cpus * PLACES * _FIELDS * 8)
    fields = struct.unpack(f"={cpus * PLACES * _FIELDS}Q", raw)
    step = PLACES * _FIELDS
    return [
        sum(
            (Traffic(*fields[cpu * step + at : cpu * step + at + 3]) for cpu in range(cpus)),
            Traffic(),
        )
        for at in range(0, step, _FIELDS)
    ]


def _by_family(places: list[Traffic]) -> dict[tuple[int, Direction], Traffic]:
    return {
        (family, direction): places[4 * number + place]
        for number, direction in enumerate(DIRECTIONS[:2])
        for family, place in _OTHERS.items()
        if places[4 * number + place].packets
    }


def _drops(keys: bytes, values: array[int], reasons: Mapping[int, str]) -> Iterator[Drop]:
    for number, (mac, family, direction, reason, _) in enumerate(_DROP.iter_unpack(keys)):
        packets, _, last = values[_FIELDS * number : _FIELDS * number + 3]
        named: Direction = DIRECTIONS[direction] if direction < len(DIRECTIONS) else ""
        name = reasons.get(reason, f"reason {reason:#x}")
        yield Drop(_text(mac) if any(mac) else "", family, named, name, packets, last)


def _text(mac: bytes) -> str:
    return mac.hex(":")
