"""Where tests keep what they share: in tests/lib, and tests/README.md lists all of it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
README = (TESTS / "README.md").read_text()
#: A program, and what is run in one: both belong to one folder's tests alone.
ALLOWED = {
    "tests.adversity.worker",
    "tests.adversity.conftest",
    "tests.fuzz",
    "tests.sources.conftest",
}


def test_the_readme_lists_every_module_and_no_other() -> None:
    table = README.partition("## What tests share")[2]
    listed = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }

    assert listed == {path.stem for path in (TESTS / "lib").glob("*.py")}


#: Also in a program that a test has as text.
IMPORT = r"^ *from (tests\S*) import|^ *import (tests\S*)"


def test_the_readme_lists_every_script_and_no_other() -> None:
    listed = set(re.findall(r"^\| `(\S+\.txt)` ", README, re.MULTILINE))

    assert listed == {str(path.relative_to(TESTS)) for path in TESTS.rglob("*.txt")}


def test_what_is_shared_is_in_lib() -> None:
    """Beside the tests are conftest.py and programs, and no test imports from another test."""
    elsewhere, imported = [], []
    for path in TESTS.rglob("*.py"):
        name = str(path.relative_to(TESTS.parent))
        text = path.read_text()
        is_program = "__main__" in text
        if path.parent.name != "lib" and not re.match("test_|conftest", path.name):
            elsewhere += [] if is_program else [name]
        imported += [(name, one or other) for one, other in re.findall(IMPORT, text, re.M)]

    assert elsewhere == []
    others = [
        (name, module)
        for name, module in imported
        if not module.startswith("tests.lib") and module not in ALLOWED
    ]
    assert others == []
