"""The difference of two tables against a plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel_dp._core import ADD, REMOVE, REPLACE, Diff, Table, diff_tables
from flannel_dp.errors import ConfigError
from flannel_dp.tables.entries import Neighbour
from tests.lib.strategies import KINDS, entries, key_of


def build(kind: str, found: list[Any]) -> Table:
    table = Table(kind)
    for entry in found:
        table.add(entry, 1000 + len(table))
    return table


def by_key(found: Any) -> dict[Any, Any]:
    """In the order in which the keys first came, with the last value of each."""
    rows: dict[Any, Any] = {}
    for entry in found:
        rows[key_of(entry)] = entry
    return rows


def operations(diff: Diff) -> list[tuple[int, Any, Any]]:
    return [diff.operation(number) for number in range(len(diff))]


def model(wanted: dict[Any, Any], held: dict[Any, Any]) -> list[tuple[int, Any, Any]]:
    found: list[tuple[int, Any, Any]] = []
    for key, entry in wanted.items():
        if key not in held:
            found.append((ADD, entry, None))
        elif held[key] != entry:
            found.append((REPLACE, entry, held[key]))
    return found + [(REMOVE, None, entry) for key, entry in held.items() if key not in wanted]


@st.composite
def pairs(draw: st.DrawFn, kind: str) -> tuple[list[Any], list[Any]]:
    """What is wanted and what is held, which often have entries and keys in common."""
    wanted = draw(st.lists(entries(kind), max_size=12))
    held = draw(
        st.lists(entries(kind) | st.sampled_from(wanted or [draw(entries(kind))]), max_size=12)
    )
    return wanted, held


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_operations_are_those_of_the_model(kind: str, data: st.DataObject) -> None:
    wanted, held = data.draw(pairs(kind))
    desired = build(kind, wanted)
    diff = diff_tables(desired, build(kind, held))
    expected = model(by_key(wanted), by_key(held))

    assert operations(diff) == expected
    kinds = [op for op, _, _ in expected]
    assert diff.added == kinds.count(ADD)
    assert diff.replaced == kinds.count(REPLACE)
    assert diff.removed == kinds.count(REMOVE)
    assert diff.writes == kinds.count(ADD) + kinds.count(REPLACE)
    assert diff.unchanged == len(desired) - diff.writes
    assert diff.observed == diff.ours == len(by_key(held))
    assert diff.conflicts() == []
    assert diff.kind == kind
    assert diff.table is desired


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_carrying_it_out_leads_to_what_is_wanted(kind: str, data: st.DataObject) -> None:
    wanted, held = data.draw(pairs(kind))
    desired, table = build(kind, wanted), build(kind, held)

    for op, new, old in operations(diff_tables(desired, table)):
        if op == REMOVE:
            assert table.discard(old)
        else:
            table.add(new)

    assert len(diff_tables(desired, table)) == 0
    assert set(table) == set(desired)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_order_is_that_of_the_desired_table(kind: str, data: st.DataObject) -> None:
    """Whatever order the kernel shows its entries in, writes come in ours."""
    wanted, held = data.draw(pairs(kind))
    shuffled = data.draw(st.permutations(list(by_key(held).values())))
    desired = build(kind, wanted)
    first, second = (
        diff_tables(desired, build(kind, held)),
        diff_tables(desired, build(kind, shuffled)),
    )

    assert operations(first)[: first.writes] == operations(second)[: second.writes]
    assert set(operations(first)) == set(operations(second))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_tags_are_those_of_the_wanted_entries(kind: str, data: st.DataObject) -> None:
    wanted, held = data.draw(pairs(kind))
    desired = build(kind, wanted)
    diff = diff_tables(desired, build(kind, held))

    for number, (op, new, _) in enumerate(operations(diff)):
        expected = -1 if op == REMOVE else desired.tag(desired.find(new))
        assert diff.tag(number) == expected


def test_the_tag_is_not_part_of_the_value() -> None:
    wanted, held = Table("neighbour"), Table("neighbour")
    entry = Neighbour(1, "10.244.7.0", "02:00:00:00:00:07")
    wanted.add(entry, 5)
    held.add(entry, 6)

    assert len(diff_tables(wanted, held)) == 0


def test_a_large_difference_is_whole() -> None:
    def rows(first: int, last: int, mac: str) -> list[Neighbour]:
        return [Neighbour(1, f"10.{n >> 8}.{n & 255}.0", mac) for n in range(first, last)]

    old, new = "02:00:00:00:00:01", "02:00:00:00:00:02"
    wanted = build("neighbour", rows(1000, 5000, old) + rows(5000, 9000, new))
    diff = diff_tables(wanted, build("neighbour", rows(0, 8000, old)))

    counts = diff.added, diff.replaced, diff.removed, diff.unchanged
    assert counts == (1000, 3000, 1000, 4000)


def test_tables_of_two_kinds() -> None:
    with pytest.raises(ValueError, match="a fdb table cannot become a route table"):
        diff_tables(Table("route"), Table("fdb"))


def test_operations_outside_a_difference() -> None:
    diff = diff_tables(Table("route"), Table("route"))

    with pytest.raises(IndexError):
        diff.operation(0)
    with pytest.raises(IndexError):
        diff.tag(0)


# ---- what a caller may do wrong ---------------------------------------------------------


CHANGES: dict[str, Callable[[Table], object]] = {
    "add": lambda table: table.add(Neighbour(7, "10.244.9.0", MAC)),
    "discard": lambda table: table.discard(Neighbour(7, "10.244.1.0", MAC)),
    "merge": lambda table: table.merge(_neighbours(9)),
    "subtract": lambda table: table.subtract(_neighbours(1)),
    "subtract itself": lambda table: table.subtract(table),
    "extend": lambda table: table.extend_neighbours(
        7, memoryview(bytes(8)).cast("B", (2, 4)), memoryview(bytes(12)).cast("B", (2, 6))
    ),
}
USES: dict[str, Callable[[Diff], object]] = {
    "operation": lambda diff: diff.operation(0),
    "tag": lambda diff: diff.tag(0),
    "conflicts": lambda diff: diff.conflicts(),
    "conflicting": lambda diff: diff.conflicting,
    "misfit": lambda diff: diff.misfit(),
    "adopt": lambda diff: diff.adopt(lambda tag, foreign: True),
}
MAC = "02:00:00:00:00:07"


def _neighbours(*numbers: int) -> Table:
    table = Table("neighbour")
    for number in numbers:
        table.add(Neighbour(7, f"10.244.{number}.0", MAC))
    return table


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_diff_of_a_table_that_was_changed_is_not_used(change: str, use: str) -> None:
    table = _neighbours(1, 2)
    diff = diff_tables(table, _neighbours(2, 3))
    USES[use](diff)

    CHANGES[change](table)

    with pytest.raises(BufferError, match="the neighbour table was changed after this Diff"):
        USES[use](diff)
    assert diff_tables(table, _neighbours()).added == len(table)


def test_a_table_without_itself_is_empty() -> None:
    table = _neighbours(*range(100))
    table.subtract(table)
    assert len(table) == 0
    assert table.find(Neighbour(7, "10.244.1.0", MAC)) == -1


def test_adopt_notices_that_its_caller_changed_the_table() -> None:
    table = _neighbours(1, 2)
    diff = diff_tables(table, _neighbours(1))

    def change(tag: int, foreign: object) -> bool:
        table.add(Neighbour(7, "10.244.9.0", MAC))
        return True

    assert diff.adopt(change) == 0  # nothing of another program is in the way
    assert diff.operation(0)


@pytest.mark.parametrize(
    "entry",
    [
        Neighbour(7, "nonsense", MAC),
        Neighbour(-1, "10.244.1.0", MAC),
        Neighbour(2**40, "10.244.1.0", MAC),
        (7, None, MAC),
        (7, "10.244.1.0\udcff", MAC),
        (7,),
        (1, 2, 3, 4, 5, 6, 7, 8, 9),
        5,
        None,
        Table,
    ],
    ids=str,
)
def test_what_is_no_entry_is_named_and_changes_nothing(entry: Any) -> None:
    table = _neighbours(1)
    for method in (table.add, table.find, table.discard):
        with pytest.raises(ConfigError, match="this cannot be a neighbour entry: ") as caught:
            method(entry)
        assert ascii(entry)[:4] in ascii(caught.value)
    assert len(table) == 1
