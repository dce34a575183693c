"""FDB entries in all forms: messages, what a table takes, and what becomes of what."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from flannel_dp import (
    ConfigError,
    Fdb,
    Scope,
    Table,
    Unsupported,
    diff_tables,
    fdb_scope,
    fdb_table,
)
from flannel_dp._core import ADD, REMOVE, REPLACE, Diff, decode
from flannel_dp.kernel.bridge import _vlans
from flannel_dp.kernel.fdb import scopes_of
from flannel_dp.tables.describe import describe
from flannel_dp.tables.entries import NUD_NOARP

ZERO, GROUP, ONE = "00:00:00:00:00:00", "01:00:5e:00:00:01", "02:00:00:00:00:01"
A, B = "192.0.2.1", "192.0.2.2"
ANY = Scope("fdb_any", 7, side="")

NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
LEARNED: dict[str, Any] = {"flags": "extern_learn"}
BRIDGED: dict[str, Any] = {"state": NUD_NOARP, "master": 3}


def table_of(*entries: Fdb) -> Table:
    table = Table("fdb_any")
    for entry in entries:
        table.add(entry)
    return table


def operations(diff: Diff) -> list[tuple[int, Fdb]]:
    found = [diff.operation(number) for number in range(len(diff))]
    return [(op, old if op == REMOVE else new) for op, new, old in found]


@pytest.mark.parametrize(
    ("entry", "flags"),
    [
        (Fdb(7, ONE, A), NLM_F_CREATE | NLM_F_REPLACE),
        (
            Fdb(7, ONE, "2001:db8::1", 9, 4789, 3, src_vni=8, **LEARNED),
            NLM_F_CREATE | NLM_F_REPLACE,
        ),
        (Fdb(7, ZERO, A, vni=9, src_vni=8), NLM_F_CREATE | NLM_F_APPEND),
        (Fdb(7, GROUP, "2001:db8::1", flags="router,sticky"), NLM_F_CREATE | NLM_F_APPEND),
        (Fdb(7, ZERO, nexthop=5), NLM_F_CREATE | NLM_F_EXCL),
        (Fdb(7, ONE, nexthop=5), NLM_F_CREATE | NLM_F_REPLACE),
        (Fdb(7, ONE, vlan=10, **BRIDGED), NLM_F_CREATE | NLM_F_REPLACE),
    ],
)
def test_what_is_written_is_read(entry: Fdb, flags: int) -> None:
    table = table_of(entry)

    sent = table.encode(0, ADD)

    assert struct.unpack_from("=H", sent, 6)[0] == 1 | flags
    ((_, read),) = decode(sent, ANY)
    assert read._replace(master=entry.master) == table[0] == entry  # the kernel says which bridge
    assert decode(sent, ANY._replace(side="self")) == ([] if entry.master else [(1, read)])


def test_what_the_bridge_says_is_read() -> None:
    """A flag, the VLAN, the bridge, and words that nobody sets; what is unknown is not dropped."""
    head = struct.pack("=BxxxIHBB", 7, 7, 0x40, 0x20 | 0x40, 0)
    head += struct.pack("=HH6sxx", 10, 2, bytes.fromhex(ONE.replace(":", "")))
    head += struct.pack("=HHHxxHHI", 6, 5, 10, 8, 9, 3)
    locked, activity = struct.pack("=HHI", 8, 15, 2), struct.pack("=HHHHBxxx", 12, 14, 5, 1, 1)

    def read(more: bytes) -> Fdb:
        body = head + more
        message = struct.pack("=IHHII", 16 + len(body), 28, 2, 1, 0) + body
        ((_, entry),) = decode(message, ANY)
        assert isinstance(entry, Fdb)
        return entry

    expected = Fdb(7, ONE, state=NUD_NOARP, other="offload", flags="sticky", vlan=10, master=3)
    assert read(b"") == expected
    assert read(locked + activity).other == "locked, activity_notify, offload"
    assert "not known" in read(struct.pack("=HHI", 8, 99, 1)).other


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        (Fdb(7, ONE), ConfigError, "leads nowhere"),
        (Fdb(7, ONE, A, nexthop=5), ConfigError, "and elsewhere"),
        (Fdb(7, ONE, nexthop=5, vni=9), ConfigError, "and elsewhere"),
        (Fdb(7, ONE, A, **BRIDGED), ConfigError, "has no tunnels"),
        (Fdb(7, ONE, flags="router", **BRIDGED), ConfigError, "has no routers"),
        (Fdb(7, ONE, master=3), Unsupported, "an address of the bridge itself"),
        (Fdb(7, ONE, A, vlan=10), ConfigError, "a vxlan device has not"),
        (Fdb(7, ONE, A, state=2), Unsupported, "would age by itself"),
        (Fdb(7, ONE, A, other="offload"), Unsupported, "no table can hold"),
        (Fdb(7, ONE, A, flags="learned"), ConfigError, "'learned' is none of extern_learn"),
        (Fdb(7, ONE, A, vni=1 << 24), ConfigError, "too large"),
        (Fdb(7, ONE, vlan=4095, **BRIDGED), ConfigError, "too large"),
        (Fdb(8, ONE, A, flags="router"), ConfigError, "an entry is .* of device 7"),
    ],
)
def test_what_cannot_be_is_named_at_once(entry: Fdb, error: Any, words: str) -> None:
    more = Fdb(7, ZERO, A)  # which makes it a table of all forms
    with pytest.raises(error, match=words):
        fdb_table(7, [more, entry])


def test_destinations_of_one_mac_go_together() -> None:
    with pytest.raises(ConfigError, match="share state, flags and nexthop group"):
        fdb_table(7, [Fdb(7, ZERO, A), Fdb(7, ZERO, B, **LEARNED)])
    with pytest.raises(Unsupported, match="is given twice"):
        fdb_table(7, [Fdb(7, ONE, A, src_vni=8), Fdb(7, ONE, B, src_vni=8)])
    assert len(fdb_table(7, [Fdb(7, ONE, A, src_vni=8), Fdb(7, ONE, B, src_vni=9)])) == 2
    assert [fdb_table(7, {ONE: A}).kind, fdb_table(7, [(ZERO, A)]).kind] == ["fdb", "fdb_any"]


#: Held, wanted, the operations, and whether the kernel takes the writes after the removals alone.
CHANGES: list[tuple[list[Fdb], list[Fdb], list[tuple[int, Fdb]], bool]] = [
    ([Fdb(7, ONE, A)], [Fdb(7, ONE, B)], [(REPLACE, Fdb(7, ONE, B))], False),
    (
        [Fdb(7, ZERO, A)],
        [Fdb(7, ZERO, B)],
        [(ADD, Fdb(7, ZERO, B)), (REMOVE, Fdb(7, ZERO, A))],
        False,
    ),
    (
        [Fdb(7, ONE, A)],
        [Fdb(7, ONE, nexthop=5)],
        [(ADD, Fdb(7, ONE, nexthop=5)), (REMOVE, Fdb(7, ONE, A))],
        True,
    ),
    (
        [Fdb(7, ONE, A)],
        [Fdb(7, ONE, A, **LEARNED)],
        [(ADD, Fdb(7, ONE, A, **LEARNED)), (REMOVE, Fdb(7, ONE, A))],
        True,
    ),
    ([Fdb(7, ONE, A, **LEARNED)], [Fdb(7, ONE, A)], [(REPLACE, Fdb(7, ONE, A))], False),
    (
        [Fdb(7, ZERO, A)],
        [Fdb(7, ZERO, nexthop=5)],
        [(ADD, Fdb(7, ZERO, nexthop=5)), (REMOVE, Fdb(7, ZERO, A))],
        True,
    ),
    (
        [Fdb(7, ZERO, A)],
        [Fdb(7, ZERO, B, **LEARNED)],
        [(ADD, Fdb(7, ZERO, B, **LEARNED)), (REMOVE, Fdb(7, ZERO, A))],
        True,
    ),
    (  # the kernel removes it with those of all VLANs
        [Fdb(7, ONE, **BRIDGED), Fdb(7, ONE, vlan=10, **BRIDGED), Fdb(7, ONE, A)],
        [Fdb(7, ONE, vlan=10, **BRIDGED), Fdb(7, ONE, A)],
        [(ADD, Fdb(7, ONE, vlan=10, **BRIDGED)), (REMOVE, Fdb(7, ONE, **BRIDGED))],
        True,
    ),
]


@pytest.mark.parametrize(("held", "wanted", "expected", "first"), CHANGES)
def test_how_one_becomes_the_other(
    held: list[Fdb], wanted: list[Fdb], expected: list[tuple[int, Fdb]], first: bool
) -> None:
    diff = diff_tables(table_of(*wanted), table_of(*held))

    assert (operations(diff), diff.removes_first, diff.kind) == (expected, first, "fdb")


def test_a_scope_without_an_owner_is_the_kernels() -> None:
    scope = fdb_scope(7)
    assert scopes_of("fdb", [scope], strict=True) == [scope._replace(owner="plain")]
    assert scopes_of("fdb", [scope], strict=False) == [scope]  # as it was read ahead
    assert scopes_of("fdb_any", [scope], strict=False)[0][0] == "fdb_any"
    assert scopes_of("fdb", [fdb_scope(7, owner="all")], strict=True)[0].owner == "all"
    for bad in ({"owner": "x"}, {"side": "x"}, {"src_vnis": (2, 1)}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))} is"):
            fdb_scope(7, **bad)


def test_vlans_of_a_port() -> None:
    info = struct.pack("=HHHH", 8, 2, 6, 1) + struct.pack("=HHHH", 8, 2, 0, 10)
    assert [*_vlans(struct.pack("=HHI", 8, 1, 0) + info)] == [1, 10]
    assert [*_vlans(info + b"\1\0")] == [1, 10]
    assert [*_vlans(struct.pack("=HHI", 3, 2, 0))] == []


def test_entries_in_words() -> None:
    names = {7: "vx7", 3: "br3"}
    assert (
        describe(Fdb(7, ONE, vlan=10, **BRIDGED), names) == f"fdb {ONE} vlan 10 dev vx7 master br3"
    )
    assert describe(Fdb(7, ZERO, A, src_vni=8, flags="extern_learn,router"), names) == (
        f"fdb {ZERO} dst {A} src_vni 8 dev vx7 extern_learn router"
    )
