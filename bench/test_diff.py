"""The difference of two tables in memory, by kind and share of changed entries."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest

from bench.figures import times
from flannel_dp._core import Diff, Table, diff_tables
from flannel_dp.tables import columns

_TARGET_NS = 30.0
_ENTRIES = 100_000
_DEVICE = 7


def _addresses(order: list[int], first: int) -> bytes:
    return b"".join((first + number * 256).to_bytes(4, "big") for number in order)


def _macs(order: list[int], changed: frozenset[int]) -> bytes:
    return b"".join(
        (0x02_00_00_00_00_00 + (number in changed) * 0x01_00_00_00_00 + number).to_bytes(6, "big")
        for number in order
    )


def _table(kind: str, order: list[int], changed: frozenset[int]) -> Table:
    """Entries 0 .. n-1 in ``order``; those in ``changed`` lead elsewhere."""
    moved = [number + _ENTRIES * (number in changed) for number in order]
    prefixes = _addresses(order, 0x0A000000)
    if kind == "neighbour":
        return columns.neighbour_columns(_DEVICE, 4, prefixes, _macs(order, changed))
    if kind == "fdb":
        return columns.fdb_columns(
            _DEVICE, 4, _macs(order, frozenset()), _addresses(moved, 0xAC100000)
        )
    if kind == "nexthop":
        ids = columns.ids_of(0x50000000 + number for number in order)
        return columns.nexthop_columns(_DEVICE, 4, ids, _addresses(moved, 0x0A000000))
    ids = columns.ids_of(0x50000000 + number for number in moved)
    return columns.route_columns(4, prefixes, bytes([24]) * _ENTRIES, nexthops=ids)


@pytest.mark.benchmark(group="diff")
@pytest.mark.smoke
@pytest.mark.parametrize("percent", [0, 1])
@pytest.mark.parametrize("shuffled", [False, True], ids=["in-order", "shuffled"])
@pytest.mark.parametrize("kind", ["neighbour", "fdb", "nexthop", "route"])
def test_diff(
    benchmark: Any, kind: str, shuffled: bool, percent: int, figure: Callable[..., None]
) -> None:
    """``diff_tables``, with the kernel's side in the order of ours (routes come sorted by
    prefix, nexthops by id) or in none (neighbours and FDB entries come by their hash)."""
    rng = random.Random(kind)
    order = list(range(_ENTRIES))
    desired = _table(kind, order, frozenset())
    changed = frozenset(rng.sample(order, _ENTRIES * percent // 100))
    if shuffled:
        rng.shuffle(order)
    held = _table(kind, order, changed)

    diff: Diff = benchmark.pedantic(diff_tables, args=(desired, held), rounds=31, warmup_rounds=2)

    assert (diff.replaced, diff.unchanged) == (len(changed), _ENTRIES - len(changed))
    per_entry = median(times(benchmark)) / _ENTRIES * 1e9
    name = f"diff, {kind}, {_ENTRIES:,} entries {'shuffled' if shuffled else 'in order'}"
    figure(f"{name}, {percent} % changed", per_entry, "ns/entry", _TARGET_NS)
