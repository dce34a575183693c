"""The packed table against a plain dictionary."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel_dp._core import Table, parse_address, parse_mac, parse_prefix
from flannel_dp.errors import ConfigError, Unsupported
from flannel_dp.tables import columns
from flannel_dp.tables.entries import Fdb, Neighbour, Nexthop, Route
from tests.lib.strategies import KINDS, addresses, entries, key_of, macs, masked

NEIGHBOUR = Neighbour(3, "10.244.7.0", "02:00:00:00:00:07")
PEER = Neighbour(3, "10.244.8.0", "02:00:00:00:00:08")


class Model:
    """A dictionary that keeps the order a table has: a removal moves the last entry."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, int]] = []

    def place(self, entry: Any) -> int:
        keys = [key_of(held) for held, _ in self.rows]
        return keys.index(key_of(entry)) if key_of(entry) in keys else -1

    def put(self, entry: Any, tag: int | None = None) -> None:
        at = self.place(entry)
        if at < 0:
            self.rows.append((entry, len(self.rows) if tag is None else tag))
        else:
            self.rows[at] = entry, at if tag is None else tag

    def discard(self, entry: Any) -> bool:
        at = self.place(entry)
        if at >= 0:
            last = self.rows.pop()
            if at < len(self.rows):
                self.rows[at] = last
        return at >= 0


def content(table: Table) -> list[tuple[Any, int]]:
    return [(entry, table.tag(number)) for number, entry in enumerate(table)]


def build(kind: str, found: list[Any]) -> tuple[Table, Model]:
    table, model = Table(kind), Model()
    for entry in found:
        table.add(entry)
        model.put(entry)
    return table, model


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_any_sequence_of_changes(kind: str, data: st.DataObject) -> None:
    steps = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(("add", "tagged", "discard", "find")),
                entries(kind),
                st.integers(0, 0xFFFFFFFE),
            ),
            max_size=25,
        )
    )
    table, model = Table(kind), Model()
    for step, entry, tag in steps:
        if step == "add":
            table.add(entry)
            model.put(entry)
        elif step == "tagged":
            table.add(entry, tag)
            model.put(entry, tag)
        elif step == "discard":
            assert table.discard(entry) is model.discard(entry)
        assert table.find(entry) == model.place(entry)

    assert content(table) == model.rows
    assert len(table) == len(model.rows)
    assert [table[number] for number in range(-len(table), 0)] == list(table)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_merge_and_subtract(kind: str, data: st.DataObject) -> None:
    lists = st.lists(entries(kind), max_size=15)
    first, second = data.draw(lists), data.draw(lists)
    table, model = build(kind, first)
    other, other_model = build(kind, second)
    numbers = array("I", range(100, 100 + len(other)))

    table.merge(other, numbers)
    for entry, tag in other_model.rows:
        model.put(entry, numbers[tag])
    assert content(table) == model.rows

    table.subtract(other)
    for entry, _ in other_model.rows:
        model.discard(entry)
    assert content(table) == model.rows
    assert content(other) == other_model.rows

    table.merge(other)
    assert {key_of(entry) for entry in table} == {key_of(entry) for entry in first + second}


def test_thousands_of_entries_come_and_go() -> None:
    table = Table("neighbour")
    every = [Neighbour(3, f"10.{n >> 8}.{n & 255}.0", "02:00:00:00:00:01") for n in range(5000)]
    for entry in every:
        table.add(entry)
    assert all(table.find(entry) == number for number, entry in enumerate(every))
    assert table.nbytes > 5000 * 40

    for entry in every[::2]:
        assert table.discard(entry)
    assert set(table) == set(every[1::2])
    assert all(table[table.find(entry)] == entry for entry in every[1::2])


def test_a_table_merged_with_and_subtracted_from_itself() -> None:
    table = Table("neighbour")
    table.add(NEIGHBOUR)
    table.add(PEER)

    table.merge(table)
    assert list(table) == [NEIGHBOUR, PEER]
    table.subtract(table)
    assert list(table) == []


def test_a_replaced_entry_is_tagged_by_its_position() -> None:
    table = Table("neighbour")
    for entry in (NEIGHBOUR, PEER, NEIGHBOUR._replace(mac="02:00:00:00:00:99")):
        table.add(entry)

    assert [table.tag(number) for number in range(2)] == [0, 1]


def test_a_tag_without_a_number_is_refused() -> None:
    table, other = Table("neighbour"), Table("neighbour")
    other.add(NEIGHBOUR, 1)

    with pytest.raises(IndexError):
        table.merge(other, array("I", [7]))
    assert len(table) == 0


@pytest.mark.parametrize("method", ["merge", "subtract"])
def test_tables_of_two_kinds_do_not_mix(method: str) -> None:
    with pytest.raises(ValueError, match="a fdb table does not fit into a route table"):
        getattr(Table("route"), method)(Table("fdb"))


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown kind of table: 'mdb'"):
        Table("mdb")


def test_entries_outside_a_table() -> None:
    table = Table("neighbour")
    table.add(NEIGHBOUR)

    for number in (1, -2, 1 << 32):
        with pytest.raises(IndexError):
            table[number]
    with pytest.raises(IndexError):
        table.tag(1)
    with pytest.raises(IndexError):
        table.encode(1, 1)
    with pytest.raises(IndexError):
        table.encode(0, 4)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Neighbour(1, "10.244.7", "02:00:00:00:00:07"), "not an IP address: '10.244.7'"),
        (Neighbour(1, "10.244.7.0\0", "02:00:00:00:00:07"), "not an IP address"),
        (Neighbour(1, "", "02:00:00:00:00:07"), "not an IP address: ''"),
        (Neighbour(1, "10.244.7.0", "02:00:00:00:07"), "not a MAC address: '02:00:00:00:07'"),
        (Fdb(1, "02-00:00-00-00-07", "192.0.2.7"), "not a MAC address"),
        (Fdb(1, "02:00:00:00:00:07", "node7"), "not an IP address: 'node7'"),
        (Nexthop(0, "10.244.7.0", 1), "a nexthop's id is 1 or more"),
        (Route("10.244.7.0"), "not a prefix"),
        (Route("10.244.7.0/33"), "not a prefix"),
        (Route("10.244.7.0/024"), "not a prefix"),
        (Route("10.244.7.0/"), "not a prefix"),
        (Route("fd00::/129"), "not a prefix"),
    ],
)
def test_bad_text_is_named(entry: Any, message: str) -> None:
    table = Table(type(entry).__name__.lower())

    with pytest.raises(ValueError, match=message):
        table.add(entry)
    assert len(table) == 0


@settings(max_examples=60)
@given(family=st.sampled_from((4, 6)), data=st.data())
def test_columns_equal_entries(family: int, data: st.DataObject) -> None:
    lengths_of = st.integers(0, 32 if family == 4 else 128)
    drawn = data.draw(
        st.lists(
            st.tuples(addresses(family), addresses(family), macs(), lengths_of),
            min_size=1,
            max_size=20,
            unique_by=(lambda row: row[0], lambda row: row[2], lambda row: masked(row[0], row[3])),
        )
    )
    rows, lengths = [row[:3] for row in drawn], [row[3] for row in drawn]
    cuts = [masked(row[0], length) for row, length in zip(rows, lengths, strict=True)]
    overlay = b"".join(parse_address(row[0])[1] for row in rows)
    underlay = b"".join(parse_address(row[1])[1] for row in rows)
    mac = b"".join(parse_mac(row[2]) for row in rows)
    prefix = b"".join(parse_prefix(text)[1] for text in cuts)
    ids = array("I", range(1, len(rows) + 1))

    built = [
        columns.neighbour_columns(3, family, overlay, mac),
        columns.fdb_columns(3, family, mac, underlay),
        columns.nexthop_columns(3, family, ids, overlay),
        columns.route_columns(family, prefix, bytes(lengths), nexthops=ids),
        columns.route_columns(family, prefix, bytes(lengths), gateways=overlay, device=3),
    ]
    expected = [
        columns.neighbour_table(3, [(row[0], row[2]) for row in rows]),
        columns.fdb_table(3, [(row[2], row[1]) for row in rows]),
        columns.nexthop_table(3, [(i, row[0]) for i, row in zip(ids, rows, strict=True)]),
        columns.route_table([(text, i) for i, text in zip(ids, cuts, strict=True)]),
        columns.route_table(
            [(text, row[0]) for text, row in zip(cuts, rows, strict=True)], device=3
        ),
    ]
    assert [list(table) for table in built] == [list(table) for table in expected]


def _column(*texts: str) -> bytes:
    """Addresses and MACs one after the other."""
    return b"".join(parse_mac(t) if t.count(":") == 5 else parse_address(t)[1] for t in texts)


A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"

#: Per kind: two keys, two values, tables from pairs and from columns, and the error.
TWICE: list[Any] = (
    [
        ("fdb", (A, B), family, values, Unsupported)
        for family, values in ((4, ("192.0.2.1", "192.0.2.2")), (6, ("2001:db8::1", "2001:db8::2")))
    ]
    + [
        ("neighbour", keys, family, (A, B), ConfigError)
        for family, keys in ((4, ("10.244.1.0", "10.244.2.0")), (6, ("fd00:1::", "fd00:2::")))
    ]
    + [
        ("route", keys, family, values, Unsupported)
        for family, keys, values in (
            (4, ("10.244.1.0/24", "10.244.2.0/24"), ("10.244.1.0", "10.244.2.0")),
            (6, ("fd00:1::/64", "fd00:2::/64"), ("fd00:1::", "fd00:2::")),
        )
    ]
)


def _from_pairs(kind: str, family: int, pairs: list[tuple[str, str]]) -> Table:
    if kind == "route":
        return columns.route_table(pairs, device=1)
    return {"fdb": columns.fdb_table, "neighbour": columns.neighbour_table}[kind](1, pairs)


def _from_columns(kind: str, family: int, pairs: list[tuple[str, str]]) -> Table:
    keys, values = [key for key, _ in pairs], _column(*[value for _, value in pairs])
    if kind == "route":
        lengths = bytes(int(key.partition("/")[2]) for key in keys)
        prefixes = _column(*[key.partition("/")[0] for key in keys])
        return columns.route_columns(family, prefixes, lengths, gateways=values, device=1)
    build = {"fdb": columns.fdb_columns, "neighbour": columns.neighbour_columns}[kind]
    return build(1, family, _column(*keys), values)


@pytest.mark.parametrize("build", [_from_pairs, _from_columns])
@pytest.mark.parametrize(("kind", "keys", "family", "values", "error"), TWICE)
def test_two_values_of_one_key_are_named(
    build: Any, kind: str, keys: Any, family: int, values: Any, error: Any
) -> None:
    """A table holds one; the other would be lost without a word."""
    pairs = [(keys[0], values[0]), (keys[1], values[0]), (keys[0], values[1])]

    with pytest.raises(error) as caught:
        build(kind, family, pairs)

    for text in (keys[0], *values):
        assert text in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("build", [_from_pairs, _from_columns])
@pytest.mark.parametrize(("kind", "keys", "family", "values", "error"), TWICE)
def test_the_same_entry_twice_is_one(
    build: Any, kind: str, keys: Any, family: int, values: Any, error: Any
) -> None:
    pairs = [(keys[0], values[0]), (keys[1], values[1]), (keys[0], values[0])]

    assert list(build(kind, family, pairs)) == list(build(kind, family, pairs[:2]))


def test_the_same_entry_in_another_spelling_is_one() -> None:
    zero = [("00:00:00:00:00:0A", "2001:DB8::1"), ("00-00-00-00-00-0a", "2001:db8:0::1")]

    assert len(columns.fdb_table(1, zero)) == 1


def test_columns_may_be_strided() -> None:
    """One field of wider records is a column, without a copy."""
    records = bytes(range(64))
    view = memoryview(records).cast("B", (4, 16))
    macs_of = memoryview(records[10:16] + records[26:32]).cast("B", (2, 6))

    table = Table("neighbour")
    table.extend_neighbours(1, view[::2], macs_of)

    assert [entry.address for entry in table] == [
        "1:203:405:607:809:a0b:c0d:e0f",
        "2021:2223:2425:2627:2829:2a2b:2c2d:2e2f",
    ]


@pytest.mark.parametrize(
    ("build_columns", "message"),
    [
        (lambda: columns.neighbour_columns(1, 4, bytes(8), bytes(6)), "different length: 2, 1"),
        (lambda: columns.fdb_columns(1, 4, bytes(6), bytes(8)), "different length"),
        (lambda: columns.nexthop_columns(1, 4, array("I", [1]), bytes(8)), "different length"),
        (lambda: columns.route_columns(4, bytes(8), bytes(1), nexthops=array("I", [1])), "length"),
        (lambda: columns.route_columns(4, bytes(4), bytes(1)), "give one of them"),
        (
            lambda: columns.route_columns(
                4, bytes(4), bytes(1), nexthops=array("I", [1]), gateways=bytes(4)
            ),
            "give one of them",
        ),
        (
            lambda: columns.neighbour_columns(
                1, 4, memoryview(bytes(5)).cast("B", (1, 5)), bytes(6)
            ),
            "4 or 16 bytes, the column 5",
        ),
        (
            lambda: columns.neighbour_columns(
                1, 4, bytes(4), memoryview(bytes(5)).cast("B", (1, 5))
            ),
            "a MAC has 6 bytes, the column 5",
        ),
        (
            lambda: Table("route").extend_neighbours(
                1, memoryview(bytes(4)).cast("B", (1, 4)), memoryview(bytes(6)).cast("B", (1, 6))
            ),
            "this is a route table",
        ),
    ],
)
def test_columns_that_do_not_fit(build_columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_columns()


def test_empty_columns() -> None:
    assert len(columns.neighbour_columns(1, 4, b"", b"")) == 0
    assert len(columns.route_columns(6, b"", b"", nexthops=array("I"))) == 0
