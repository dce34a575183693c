"""A data plane is put together, called and closed, and is handed to no function that wants a
part of it: that function takes the part."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import flannel_dp

ROOT = Path(flannel_dp.__file__).parent

#: Names that a parameter for a data plane goes by.
NAMES = {"plane", "dataplane", "data_plane", "dp"}

WORDS = re.compile(rf"\b({'|'.join(NAMES)}|DataPlane)\b")

#: The library's own constructor of an agent, which works with the whole of one.
ALLOWED = {("agent/agent.py", "Agent.__init__")}


def takers(tree: ast.AST, inside: str = "") -> Iterator[str]:
    """The functions, with the classes that they are in, that take a data plane."""
    for node in ast.iter_child_nodes(tree):
        name = f"{inside}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            args = node.args
            every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            if any(one and (one.arg in NAMES or is_data_plane(one.annotation)) for one in every):
                yield name or "lambda"
        scope = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from takers(node, f"{name}." if scope else inside)


def is_data_plane(annotation: ast.expr | None) -> bool:
    """Whether an annotation is, or mentions, the class."""
    found = ast.walk(annotation) if annotation else ()
    return any(
        "DataPlane" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in found
    ) or (isinstance(annotation, ast.Constant) and "DataPlane" in str(annotation.value))


def test_no_function_takes_a_data_plane() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in ROOT.rglob("*.py")
        if path != ROOT / "dataplane.py"
        if WORDS.search(text := path.read_text())
        for name in takers(ast.parse(text))
    }

    assert found == ALLOWED


def test_every_form_is_seen() -> None:
    text = """
class A:
    def one(self, plane): ...
    async def two(self, *, x: tuple[DataPlane, int]): ...
    def three(self, *dp): ...
def four(x: "DataPlane", /):
    def five(**data_plane): ...
    return lambda plane: 0
def none(x: Plane) -> DataPlane: ...
"""

    found = [*takers(ast.parse(text))]

    assert found == ["A.one", "A.two", "A.three", "four", "four.five", "four."]
