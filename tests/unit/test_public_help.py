"""``help`` and ``typing.get_type_hints`` work for each public name and its public members."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import flannel_dp


def annotated() -> Iterator[tuple[str, Any]]:
    """All that has annotations: classes, functions, methods, and what properties return."""
    for name in flannel_dp.__all__:
        value = getattr(flannel_dp, name)
        if inspect.isfunction(value):
            yield name, value
        if not inspect.isclass(value):
            continue
        yield name, value
        for member, held in inspect.getmembers_static(value):
            inner = held.fget if isinstance(held, property) else getattr(held, "__func__", held)
            public = member == "__init__" or not member.startswith("_")
            if public and inspect.isfunction(inner):
                yield f"{name}.{member}", inner


def unresolved() -> list[str]:
    found = []
    for name, value in annotated():
        try:
            typing.get_type_hints(value)
        except Exception as error:
            found.append(f"{name}: {error}")
    return found


def test_type_hints_of_all_public_names_can_be_resolved() -> None:
    assert unresolved() == []


def test_help_is_there_for_all_public_names() -> None:
    names = [name for name in flannel_dp.__all__ if name != "__version__"]

    pages = {name: pydoc.render_doc(getattr(flannel_dp, name)) for name in names}

    assert all(pages.values())
    assert "What was done about drift" in pydoc.plain(pages["Repair"])


def test_help_of_one_name_works_in_a_fresh_process() -> None:
    """Nothing else was imported, so that each name has to find its own types."""
    program = "import flannel_dp, pydoc; print(pydoc.plain(pydoc.render_doc(flannel_dp.View)))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert "class View" in done.stdout
