"""Deprecated names work, and warn, for one minor version; then they have to go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flannel_dp
from flannel_dp.deprecation import successor, warn_deprecated

PACKAGE = Path(flannel_dp.__file__).parent


def numbers(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def marked() -> Iterator[tuple[str, str]]:
    """Each deprecation in the package: where it is, and since which version."""
    for name, (_, since) in flannel_dp._RENAMED.items():
        yield f"flannel_dp.{name}", since
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "warn_deprecated" in text else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "warn_deprecated":
                given = {one.arg: one.value for one in node.keywords}
                if isinstance(since_of := given["since"], ast.Constant):
                    yield f"{path.name}:{node.lineno}", str(since_of.value)


def overdue(version: str, found: list[tuple[str, str]]) -> list[str]:
    """What warned in an earlier minor version than ``version``."""
    return [where for where, since in found if numbers(since) < numbers(version)]


def test_nothing_is_deprecated_for_longer_than_one_minor_version() -> None:
    assert overdue(flannel_dp.__version__, [*marked()]) == []


def test_one_that_is_overdue_is_found() -> None:
    assert overdue("0.3.1", [("old", "0.2"), ("new", "0.3")]) == ["old"]


def test_a_renamed_name_warns_at_each_use_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flannel_dp._RENAMED, "KernelTables", ("Kernel", "0.2"))
    api: Any = flannel_dp
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match="KernelTables") as caught:
            found = api.KernelTables
        assert found is api.Kernel

    assert str(caught[0].message) == (
        "flannel_dp.KernelTables is deprecated since flannel-dp 0.2 and is removed in 0.3; "
        "use flannel_dp.Kernel"
    )
    assert caught[0].filename == __file__


def test_the_warning_is_about_the_line_of_the_caller() -> None:
    def old() -> None:
        warn_deprecated("old()", "new()", since="0.2")

    with pytest.warns(DeprecationWarning, match=r"removed in 0\.3; use new\(\)") as caught:
        old()

    assert caught[0].filename == __file__
    assert successor("1.9.3") == "1.10"
