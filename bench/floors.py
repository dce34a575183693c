"""Give the floor program (floor/floor.c) the very messages that the library sends."""

from __future__ import annotations

import json
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flannel_dp._core import ADD, Table, diff_tables, dump_request
from flannel_dp.resources.peers.place import DesiredTable
from flannel_dp.tables.entries import Scope

#: FDP_BATCH in csrc/rtnl.h: messages in one sendmsg().
BATCH = 128

_NLM_F_ACK = 0x04
_FLAGS = struct.Struct("=H")
_FLAGS_AT = 6
_LENGTH = struct.Struct("=I")

_T = TypeVar("_T")

SOURCE = Path(__file__).parent / "floor"
BINARY = Path(__file__).parent / "build" / "floor"


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock on the wall, and of a processor's work."""

    wall: float
    cpu: float


def build() -> Path:
    """Compile the floor program if it is older than its source. Raises CalledProcessError."""
    subprocess.run(["make", "-s", "-C", str(SOURCE)], check=True)
    return BINARY


def batches(tables: Iterable[Table], op: int = ADD) -> Iterator[bytes]:
    """The messages that write every entry of ``tables``, as the library batches them."""
    sequence = 1
    for table in tables:
        for start in range(0, len(table), BATCH):
            numbers = range(start, min(start + BATCH, len(table)))
            batch = [table.encode(number, op, sequence + number) for number in numbers]
            yield b"".join((*batch[:-1], _asking(batch[-1])))
        sequence += len(table)


def change_batches(before: Iterable[Table], after: Iterable[Table]) -> Iterator[bytes]:
    """The messages that make tables that are as ``before`` as ``after``, for a few entries: what is
    written in the order of the tables, then what is removed, backwards, a batch for each."""
    writes: list[list[bytes]] = []
    removals: list[list[bytes]] = []
    for old, new in zip(before, after, strict=True):
        written: list[bytes] = []
        removed: list[bytes] = []
        diff = diff_tables(new, old)
        for number in range(len(diff)):
            op, wanted, held = diff.operation(number)
            if wanted is None:
                assert held is not None
                removed.append(old.encode(old.find(held), op, number + 1))
            else:
                written.append(new.encode(new.find(wanted), op, number + 1))
        writes.append(written)
        removals.append(removed)
    for batch in (*writes, *reversed(removals)):
        if batch:
            yield b"".join((*batch[:-1], _asking(batch[-1])))


def _asking(message: bytes) -> bytes:
    """A message that asks for an acknowledgement."""
    asking = bytearray(message)
    _FLAGS.pack_into(asking, _FLAGS_AT, _FLAGS.unpack_from(asking, _FLAGS_AT)[0] | _NLM_F_ACK)
    return bytes(asking)


def dumps(scopes: Iterable[Scope]) -> Iterator[bytes]:
    """The dump requests for ``scopes``."""
    for number, scope in enumerate(scopes):
        yield dump_request(scope, number + 1)


def scopes_of(wanted: Iterable[DesiredTable]) -> list[Scope]:
    """What a sync has to read for these tables."""
    return [scope for one in wanted for scope in one.scopes]


def write(path: Path, records: Iterable[bytes]) -> Path:
    """Store records the way the floor program reads them."""
    with path.open("wb") as file:
        for record in records:
            file.write(_LENGTH.pack(len(record)))
            file.write(record)
    return path


def run(mode: str, path: Path, netns: str) -> Taken:
    """Run the floor over a file in namespace ``netns``; the times are by its own clocks.

    ``mode`` is "send" or "dump". Raises RuntimeError with the program's words when the
    kernel refused any message.
    """
    done = subprocess.run(
        [str(BINARY), mode, str(path), f"/run/netns/{netns}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"floor {mode} {path.name}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    return Taken(found["ns"] / 1e9, found["cpu_ns"] / 1e9)


def timed(taken: list[Taken], work: Callable[[], _T]) -> _T:
    """Do ``work`` and append what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    taken.append(Taken(time.perf_counter() - wall, time.process_time() - cpu))
    return result
