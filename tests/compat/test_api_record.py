"""The public names stay: documents/api.list has each with its signature and its errors.

A change of it is a decision, and CHANGELOG.md names it. A name that goes warns for one minor
version first (docs/library/stability.md).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from tests.lib.scripts import load_script

RECORD = Path(__file__).parent / "documents/api.list"

AGAIN = (
    "the public names differ from the record. Where that is meant, write it anew with\n"
    "    .venv/bin/python scripts/api.py\n"
    "and name the change in CHANGELOG.md"
)


def difference(script: Any) -> str:
    """What differs from the record, and what to do; nothing where it is the same."""
    now, then = script.record(), RECORD.read_text()
    lines = difflib.unified_diff(then.splitlines(), now.splitlines(), "recorded", "now", "", "", 0)
    found = "\n".join(lines)
    return f"{AGAIN}\n{found}" if found else ""


def test_public_names_signatures_and_errors_are_as_recorded() -> None:
    assert not difference(load_script("api"))


def test_the_reference_page_is_what_the_docstrings_say() -> None:
    script = load_script("api")

    assert script.REFERENCE.read_text() == script.reference(), AGAIN
    assert all(one.text for one in script.public() if one.form != "value")


def test_a_changed_signature_a_lost_error_and_a_lost_name_are_seen() -> None:
    script = load_script("api")
    names = {one.name: one for one in script.public()}
    read = names["fdb_table"]
    changed = read._replace(signature="()", text="")
    script.public = lambda: (changed,)

    found = difference(script)

    assert AGAIN in found
    assert "+function fdb_table()" in found
    assert "-class DataPlane" in found
    assert any(
        line.startswith("-function fdb_table") and "Unsupported" in line
        for line in found.splitlines()
    )


def test_errors_are_read_from_the_docstring() -> None:
    errors_in = load_script("api").errors_in

    assert errors_in(
        "Raises ConfigError for a\nbad Table, KernelError. Busy is no error here."
    ) == [
        "ConfigError",
        "KernelError",
    ]
    assert errors_in("Raises as ``sync``, except Busy.") == []
