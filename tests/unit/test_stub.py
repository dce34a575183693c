"""The stub of the compiled unit names exactly what the unit has."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import flannel_dp
from flannel_dp import _core

STUB = ast.parse((Path(flannel_dp.__file__).parent / "_core.pyi").read_text())

CLASSES = (
    "Authors",
    "BpfMap",
    "BpfProgram",
    "Channel",
    "Claims",
    "Column",
    "Diff",
    "Events",
    "Pages",
    "PeerChange",
    "Policy",
    "PeerProber",
    "ProbeOrigin",
    "ProbeSocket",
    "Recipe",
    "Roster",
    "Table",
    "Watched",
)
# What a class may do besides its named members. Column's buffer protocol has no
# Python name before 3.12.
SPECIAL = {"__enter__", "__exit__", "__getitem__", "__iter__", "__len__"}


def _names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


IN_STUB = _names(STUB.body)


def _is_public(name: str, value: object) -> bool:
    if name.startswith("_") or inspect.ismodule(value):
        return False
    return getattr(value, "__module__", _core.__name__) == _core.__name__


def _members(name: str) -> dict[str, ast.stmt]:
    node = IN_STUB[name]
    assert isinstance(node, ast.ClassDef)
    return _names(node.body)


def _callables() -> list[str]:
    found = [name for name, node in IN_STUB.items() if isinstance(node, ast.FunctionDef)]
    for cls in CLASSES:
        for name, node in _members(cls).items():
            plain = isinstance(node, ast.FunctionDef) and not node.decorator_list
            if plain and not name.startswith("__"):
                found.append(f"{cls}.{name}")
    return found


def test_stub_and_module_name_the_same_things() -> None:
    public = {name for name, value in vars(_core).items() if _is_public(name, value)}

    assert set(IN_STUB) == public


def test_all_classes_are_looked_at() -> None:
    classes = {name for name, node in IN_STUB.items() if isinstance(node, ast.ClassDef)}

    assert classes == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_stub_and_class_have_the_same_members(cls: str) -> None:
    members = {
        name for name in vars(getattr(_core, cls)) if not name.startswith("_") or name in SPECIAL
    }
    stubbed = {name for name in _members(cls) if not name.startswith("_") or name in SPECIAL}

    assert stubbed == members


@pytest.mark.parametrize("cls", CLASSES)
def test_attributes_are_attributes_and_methods_are_methods(cls: str) -> None:
    for name, node in _members(cls).items():
        if name.startswith("__"):
            continue
        assert isinstance(node, ast.FunctionDef)
        is_property = any(ast.unparse(mark) == "property" for mark in node.decorator_list)
        assert is_property != callable(getattr(getattr(_core, cls), name)), f"{cls}.{name}"


@pytest.mark.parametrize("path", _callables())
def test_parameters_agree(path: str) -> None:
    value: object = _core
    names = IN_STUB
    for part in path.split("."):
        value, node = getattr(value, part), names[part]
        names = _names(node.body) if isinstance(node, ast.ClassDef) else {}
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args.args
    defaults = [None] * (len(arguments) - len(node.args.defaults)) + [
        ast.literal_eval(default) for default in node.args.defaults
    ]
    assert callable(value)
    real = inspect.signature(value).parameters.values()

    assert [argument.arg for argument in arguments] == [one.name for one in real]
    assert defaults == [None if one.default is one.empty else one.default for one in real]
