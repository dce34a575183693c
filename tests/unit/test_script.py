"""Scripts of tests: what is read of them, and that mistakes in them are not passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lib.script import Script, load

TEXT = """\
What the file is about.

=== First

-- before --
# a comment
peers  a  1

-- table --
name    result      because of
device  left alone  a failure
peers

=== Second

What it is about.

-- before --
nothing
"""


@pytest.fixture(name="scripts")
def scripts_fixture(tmp_path: Path) -> list[Script]:
    path = tmp_path / "some.txt"
    path.write_text(TEXT)
    return load(path)


def test_sections_and_tables_are_read(scripts: list[Script]) -> None:
    first, second = scripts
    assert (first.title, first.origin, first.names) == ("First", "some.txt:3", ["before", "table"])
    assert first.lines("before") == ["peers  a  1"]
    assert first["table"].table() == [
        {"name": "device", "result": "left alone", "because of": "a failure"},
        {"name": "peers", "result": "", "because of": ""},
    ]
    assert (second.lines("before"), second.lines("after")) == ([], [])


def test_unknown_sections_fail(scripts: list[Script]) -> None:
    with pytest.raises(AssertionError, match=r"some\.txt:3: unknown sections"):
        scripts[0].check_names("before")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=== One\n-- before --\n\n-- after --\nx\n", "section before is empty"),
        ("=== One\nx\n", "no sections"),
        ("=== One\n-- a --\nx\n=== One\n-- a --\nx\n", "some.txt"),
    ],
    ids=["empty", "none", "twice"],
)
def test_mistakes_fail(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "some.txt"
    path.write_text(text)
    with pytest.raises(AssertionError, match=message):
        load(path)


def test_a_word_beside_its_column_fails(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("=== One\n-- a --\nname  result\ndevice  done\n")
    with pytest.raises(AssertionError, match="not below its column"):
        load(path)[0]["a"].table()
