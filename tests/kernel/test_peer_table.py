"""The table of peers: a BPF map as one more table, with the same diff, plan and apply."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from flannel_dp import Kernel, Plan, TablePlan
from flannel_dp._core import ADD, BpfMap, decode, dump_request
from flannel_dp.tables.columns import peer_table
from flannel_dp.tables.entries import Peer
from flannel_dp.tables.scopes import peer_scope

LPM_TRIE, NO_PREALLOC = 11, 1


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with Kernel() as opened:
        yield opened


def trie(family: int, room: int = 4096) -> BpfMap:
    return BpfMap.create(LPM_TRIE, 8 if family == 4 else 20, 24, room, NO_PREALLOC, "peers")


def peers(family: int, numbers: range, move: int = 0) -> list[tuple[str, str, str]]:
    """Peers of these numbers, ``move`` addresses further on."""
    mac = "02:00:00:00:{:02x}:{:02x}"
    return [
        (
            f"10.{n >> 8}.{n & 255}.0/24" if family == 4 else f"fd00:10:{n + 1:x}::/64",
            f"192.0.{2 + (n + move >> 8)}.{n + move & 255}"
            if family == 4
            else f"2001:db8::{n + move + 1:x}",
            mac.format(n >> 8, n & 255),
        )
        for n in numbers
    ]


@pytest.mark.parametrize("family", [4, 6])
def test_a_map_becomes_what_is_wanted(kernel: Kernel, family: int) -> None:
    held = trie(family)
    scope = peer_scope(held.fileno(), family)
    first = peer_table(held.fileno(), peers(family, range(3000)))

    (result,) = kernel.apply(kernel.diff(first, scope))
    assert result.counts()["added"] == 3000
    assert {entry.prefix for entry in kernel.read("peer", scope)} == {e.prefix for e in first}

    second = peer_table(
        held.fileno(), [*peers(family, range(10), move=9), *peers(family, range(10, 2990))]
    )
    diff = kernel.diff(second, scope)
    assert (diff.added, diff.replaced, diff.removed, diff.unchanged) == (0, 10, 10, 2980)
    (result,) = kernel.apply(diff)
    assert not [*result.failures()]

    again = kernel.diff(second, scope)
    assert (len(again), again.unchanged) == (0, 2990)
    assert {*kernel.read("peer", scope)} == {*second}


@pytest.mark.parametrize("family", [4, 6])
def test_prefixes_inside_each_other_are_two_entries(kernel: Kernel, family: int) -> None:
    held = trie(family)
    wide, narrow = ("10.1.0.0/16", "10.1.2.0/24") if family == 4 else ("fd00::/48", "fd00::/64")
    end = "192.0.2.1" if family == 4 else "2001:db8::1"
    table = peer_table(
        held.fileno(), [(wide, end, "02:00:00:00:00:01"), (narrow, end, "02:00:00:00:00:02")]
    )

    kernel.apply(kernel.diff(table, peer_scope(held.fileno(), family)))

    assert {*kernel.read("peer", peer_scope(held.fileno(), family))} == {*table}


@pytest.mark.parametrize("family", [4, 6])
def test_a_full_map_fails_for_those_that_found_no_room(kernel: Kernel, family: int) -> None:
    held = trie(family, room=5)
    table = peer_table(held.fileno(), peers(family, range(8)))

    (result,) = kernel.apply(kernel.diff(table, peer_scope(held.fileno(), family)))

    failures = [*result.failures()]
    assert result.counts() | {"unchanged": 0} == {
        "added": 5,
        "replaced": 0,
        "removed": 0,
        "unchanged": 0,
        "failed": 3,
    }
    assert {failure.error for failure in failures} == {errno.ENOSPC}
    assert "the map of peers is full" in failures[0].message()


def test_deleting_what_is_gone_is_a_success(kernel: Kernel) -> None:
    held = trie(4)
    scope = peer_scope(held.fileno(), 4)
    kernel.apply(kernel.diff(peer_table(held.fileno(), peers(4, range(3))), scope))
    diff = kernel.diff(peer_table(held.fileno(), []), scope)
    assert held.delete(b"\x18\0\0\0\x0a\0\1\0")

    (result,) = kernel.apply(diff)

    assert result.counts()["failed"] == 0
    assert len(kernel.read("peer", scope)) == 0


def test_it_looks_like_any_other_table() -> None:
    table = peer_table(0, [("10.1.2.0/24", "192.0.2.7", "02:00:00:00:00:07")])
    with Kernel() as kernel:
        plan = Plan((TablePlan(kernel.diff(table), ()),))

    assert table[0] == Peer("10.1.2.0/24", "192.0.2.7", "02:00:00:00:00:07")
    assert "+ peer 10.1.2.0/24 behind 192.0.2.7 lladdr 02:00:00:00:00:07" in str(plan)
    assert plan.to_json()["operations"][0]["table"] == "peer"


def test_netlink_does_not_know_it(kernel: Kernel) -> None:
    table = peer_table(0, peers(4, range(1)))
    for call in (
        lambda: table.encode(0, 1),
        lambda: kernel.channel.fetch([peer_scope(0, 4)]),
        lambda: kernel.get(peer_scope(0, 4), table[0]),
        lambda: kernel.channel.look_up(table, peer_scope(0, 4)),
    ):
        with pytest.raises(ValueError, match="BPF map"):
            call()


@pytest.mark.parametrize("family", [4, 6])
def test_peers_have_no_netlink_messages(kernel: Kernel, family: int) -> None:
    held = trie(family)
    scope = peer_scope(held.fileno(), family)
    table = peer_table(held.fileno(), peers(family, range(1)))

    for ask in (
        lambda: table.encode(0, ADD),
        lambda: table.encoded_size(ADD),
        lambda: dump_request(scope),
        lambda: decode(b"", scope),
        lambda: kernel.channel.get(scope, table[0]),
        lambda: kernel.channel.look_up(table, scope),
    ):
        with pytest.raises(ValueError, match="BPF map"):
            ask()
