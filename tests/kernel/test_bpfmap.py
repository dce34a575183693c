"""BPF maps through bpf(2): what is written is read back, and the kernel's refusals are named."""

from __future__ import annotations

import errno
import os
import random
import struct

import pytest

from flannel_dp._core import BpfMap, merge_percpu
from flannel_dp.errors import KernelError

HASH, PERCPU_HASH, LPM_TRIE = 1, 5, 11
NO_PREALLOC = 1


def prefix(number: int) -> bytes:
    return struct.pack("=I", 24) + bytes([10, number >> 8 & 255, number & 255, 0])


@pytest.mark.parametrize("kind", [HASH, LPM_TRIE])
def test_a_batch_is_read_back_as_it_was_written(kind: int) -> None:
    keys = [prefix(number) for number in range(10_000)]
    random.Random(kind).shuffle(keys)
    values = [os.urandom(24) for _ in keys]
    table = BpfMap.create(kind, 8, 24, len(keys), NO_PREALLOC, "pairs")

    assert table.update_many(b"".join(keys), b"".join(values)) == len(keys)

    count, read_keys, read_values = table.read(step=500)
    assert count == len(keys)
    found = {read_keys[8 * i : 8 * i + 8]: read_values[24 * i : 24 * i + 24] for i in range(count)}
    assert found == dict(zip(keys, values, strict=True))
    assert (table.type, table.key_size, table.value_size, table.name) == (kind, 8, 24, "pairs")


def test_an_empty_map_is_read_as_one() -> None:
    assert BpfMap.create(LPM_TRIE, 8, 24, 8, NO_PREALLOC).read() == (0, b"", b"")


def test_a_hash_whose_buckets_are_fuller_than_a_step_is_read_in_whole() -> None:
    table = BpfMap.create(HASH, 4, 4, 4096, NO_PREALLOC)
    keys = b"".join(struct.pack("=I", number) for number in range(4096))
    table.update_many(keys, keys)

    count, read, _ = table.read(step=1)

    assert count == 4096
    assert sorted(struct.iter_unpack("=I", read)) == [(number,) for number in range(4096)]


def test_one_entry_is_written_found_and_deleted() -> None:
    table = BpfMap.create(HASH, 8, 4, 4, NO_PREALLOC)
    assert table.lookup(b"12345678") is None

    table.update(b"12345678", b"abcd")

    assert table.lookup(b"12345678") == b"abcd"
    assert table.delete(b"12345678")
    assert not table.delete(b"12345678")
    with pytest.raises(ValueError, match="8 bytes, not 3"):
        table.lookup(b"123")


def test_a_full_map_says_which_entry_had_no_room() -> None:
    table = BpfMap.create(LPM_TRIE, 8, 4, 3, NO_PREALLOC, "small")
    keys = b"".join(prefix(number) for number in range(5))

    with pytest.raises(KernelError, match="entry 3 to the BPF map small") as caught:
        table.update_many(keys, bytes(20))

    assert caught.value.errno == errno.ENOSPC
    assert table.read()[0] == 3


def test_a_path_where_nothing_is_pinned_is_named() -> None:
    with pytest.raises(KernelError, match="/proc/no/such/pin"):
        BpfMap.open("/proc/no/such/pin")


def test_values_of_all_processors_are_merged() -> None:
    # Two entries, two processors, fields: a sum, a sum, the newest.
    values = struct.pack("=12Q", 1, 2, 30, 4, 5, 6, 0, 0, 0, 7, 8, 9)

    assert [*merge_percpu(values, 2, 3, newest=0b100)] == [5, 7, 30, 7, 8, 9]
    with pytest.raises(ValueError, match="so many processors"):
        merge_percpu(values, 5, 3)
