"""Write what the library promises: the record of its public names, and the reference page.

    .venv/bin/python scripts/api.py

The record (tests/compat/documents/api.list) has a line for each public name, each public member,
its signature, and the errors that its docstring says it raises. docs/library/reference.md has the
docstrings as well. tests/compat/test_api_record.py compares both with what this script makes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import flannel_dp

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs/library/reference.md"
RECORD = ROOT / "tests/compat/documents/api.list"

_PACKAGE = flannel_dp.__name__
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SHOWN = {"__enter__", "__exit__", "__iter__", "__len__", "__getitem__", "__aiter__", "__anext__"}

#: What a caller can catch: our own errors, and Python's that docstrings name.
_ERROR = re.compile(r"\b([A-Z][A-Za-z]*Error|[A-Z][A-Za-z]+)\b")


class Member(NamedTuple):
    """One public name of a class: its signature as source text, and its docstring."""

    name: str
    signature: str
    text: str


class Api(NamedTuple):
    """One public name: ``form`` is class, function or value; ``home`` the module that has it."""

    name: str
    form: str
    home: str
    signature: str
    text: str
    members: tuple[Member, ...] = ()


@cache
def _tree(module: str) -> ast.Module:
    path = Path(str(importlib.import_module(module).__file__))
    if path.suffix != ".py":
        path = path.parent / f"{module.rpartition('.')[2]}.pyi"
    return ast.parse(path.read_text())


@cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in _tree(module).body:
        if isinstance(node, (*_DEFINITIONS, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def errors_in(text: str) -> list[str]:
    """Return the exceptions that a docstring says are raised, sorted."""
    names = {name for name in flannel_dp.__all__ if _is_error(getattr(flannel_dp, name))}
    names |= {"ValueError", "TypeError", "BufferError", "OverflowError", "LookupError"}
    said = re.findall(r"Raises?\b.*?(?:\.(?=\s|$)|\bexcept\b|\Z)", text, re.DOTALL)
    return sorted({word for part in said for word in _ERROR.findall(part)} & names)


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _text(value: Any) -> str:
    return inspect.cleandoc(getattr(value, "__doc__", None) or "")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool, module: str) -> str:
    """Return ``(parameters) -> result`` as written; ``**keywords`` of a TypedDict are spelt out."""
    given = ast.unparse(node.args)
    if bound:
        given = re.sub(r"^(self|cls)(, /)?(, )?", "", given)
    if node.args.kwarg and isinstance(node.args.kwarg.annotation, ast.Subscript):
        more = _fields(_typed_dict(ast.unparse(node.args.kwarg.annotation.slice), module))
        given = re.sub(r"\*\*\w+: Unpack\[\w+\]", ", ".join(more), given)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    wait = " awaited" if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"({given}){wait}{result}"


def _typed_dict(name: str, module: str) -> ast.ClassDef:
    home = getattr(importlib.import_module(module), name).__module__
    found = _definitions(home)[name]
    assert isinstance(found, ast.ClassDef)
    return found


def _fields(node: ast.ClassDef) -> list[str]:
    """Return the fields of a class of fields (a Struct, a NamedTuple, a TypedDict)."""
    found = []
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            if one.target.id.startswith("_") or "ClassVar" in ast.unparse(one.annotation):
                continue
            default = f" = {ast.unparse(one.value)}" if one.value else ""
            found.append(f"{one.target.id}: {ast.unparse(one.annotation)}{default}")
    return found


def _has_fields(cls: type) -> bool:
    return hasattr(cls, "__struct_fields__") or hasattr(cls, "_fields")


def _classes(cls: type) -> list[type]:
    """Return the class and its bases that are ours, the class first."""
    return [one for one in cls.__mro__ if one.__module__.startswith(_PACKAGE)]


def _members(cls: type) -> Iterator[Member]:
    seen: set[str] = set()
    for one in _classes(cls):
        node = _definitions(one.__module__)[one.__name__]
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, _DEFINITIONS):
                name = inner.name
                if name in seen or (name.startswith("_") and name not in _SHOWN):
                    continue
                seen.add(name)
                kinds = {ast.unparse(mark) for mark in inner.decorator_list}
                if f"{name}.setter" in kinds:
                    continue
                text = _text(inspect.getattr_static(cls, name))
                if "property" in kinds:
                    value = f": {ast.unparse(inner.returns)}" if inner.returns else ""
                    yield Member(name, value, text)
                    continue
                bound = "staticmethod" not in kinds
                call = _signature(inner, bound=bound, module=one.__module__)
                yield Member(name, call, text)
        for name in sorted({*_attributes(node)} - seen):
            seen.add(name)
            yield Member(name, "", "")


def _attributes(node: ast.stmt) -> Iterator[str]:
    """Yield the public attributes that a class assigns: members of an Enum, and what ``__init__``
    sets on ``self``."""
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(inner, ast.Assign):
            yield from (
                one.id
                for one in inner.targets
                if isinstance(one, ast.Name) and not one.id.startswith("_")
            )
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            for one in ast.walk(inner):
                stored = isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)
                if stored and ast.unparse(one).count(".") == 1:
                    owner, _, name = ast.unparse(one).partition(".")
                    if owner == "self" and not name.startswith("_"):
                        yield name


def _call_of(cls: type) -> str:
    """Return what a class is called with."""
    for one in _classes(cls):
        node = _definitions(one.__module__)[one.__name__]
        assert isinstance(node, ast.ClassDef)
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                call = _signature(inner, bound=True, module=one.__module__)
                return call.removesuffix(" -> None")
        if _has_fields(one) and _fields(node):
            return f"({', '.join(_fields(node))})"
    return "()"


def _api_of(name: str) -> Api:
    home = f"{_PACKAGE}.{flannel_dp._HOME_OF[name]}"
    value = getattr(flannel_dp, name)
    module = getattr(value, "__module__", home)
    module = module if str(module).startswith(_PACKAGE) else home
    node = _definitions(module).get(name) or _definitions(home)[name]
    if inspect.isclass(value):
        bases = [one.__name__ for one in value.__bases__ if one is not object]
        call = f"({', '.join(bases)})" if bases else ""
        if issubclass(value, Exception):
            return Api(name, "error", home, call, _text(value), tuple(_members(value)))
        call = _call_of(value)
        return Api(name, "class", home, call, _text(value), tuple(_members(value)))
    if isinstance(node, _DEFINITIONS):
        call = _signature(node, bound=False, module=module)
        return Api(name, "function", home, call, _text(value))
    if isinstance(node, ast.AnnAssign):
        return Api(name, "value", home, f": {ast.unparse(node.annotation)}", "")
    assert isinstance(node, ast.Assign)
    return Api(name, "value", home, f" = {ast.unparse(node.value)}", "")


@cache
def public() -> tuple[Api, ...]:
    """Return all public names but ``__version__``, in the order of ``__all__``."""
    return tuple(_api_of(name) for name in flannel_dp.__all__ if name != "__version__")


def _raising(text: str) -> str:
    found = errors_in(text)
    return f"  ! {' '.join(found)}" if found else ""


def record() -> str:
    """Return the record: what a program may rely on, a line each."""
    lines = []
    for one in public():
        lines.append(f"{one.form} {one.name}{one.signature}{_raising(one.text)}")
        for member in sorted(one.members):
            lines.append(f"    {one.name}.{member.name}{member.signature}{_raising(member.text)}")
    for old, (new, since) in sorted(flannel_dp._RENAMED.items()):
        lines.append(f"deprecated {old} -> {new} since {since}")
    return "\n".join(lines) + "\n"


_HEAD = """\
# Reference

Made by scripts/api.py from the code: every public name with its signature, its docstring and its
public members. `!` is followed by the errors that it says it raises.
"""


def _paragraphs(text: str) -> Iterator[str]:
    """Yield a docstring as Markdown: roles and double backquotes are code, literal blocks stay."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text.replace("``", "`"))
    yield text.replace("<", "&lt;")
    yield ""


def reference() -> str:
    """Return the reference page."""
    lines = [_HEAD]
    for one in public():
        lines += [f"## {one.name}", "", f"`{one.form} {one.name}{one.signature}`", ""]
        if raised := errors_in(one.text):
            lines += [f"! {', '.join(raised)}", ""]
        if one.form != "value":
            lines += _paragraphs(one.text)
        for member in sorted(one.members):
            said = (
                " ".join(_paragraphs(member.text.partition("\n\n")[0])).replace("\n", " ").strip()
            )
            raised = errors_in(member.text)
            errors = f" ! {', '.join(raised)}" if raised else ""
            lines.append(f"* `{member.name}{member.signature}`{': ' if said else ''}{said}{errors}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write the files."""
    RECORD.write_text(record())
    REFERENCE.write_text(reference())


if __name__ == "__main__":
    main()
