"""What differs between modes, layouts and kernels is asked in one module each.

The rest of the package is handed a value, or an object that behaves as it has to. A question that
is asked in many places has to be answered again in each of them by whoever adds a mode.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2] / "flannel_dp"

SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


class Question(NamedTuple):
    """``tested`` are names whose truth, or being None, asks it; ``read`` are attributes that ask it
    wherever they are read; ``texts`` are those that something is compared with. ``home`` is the
    module that asks it; where it is "" none does."""

    home: str
    tested: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


QUESTIONS = {
    "does a program forward?": Question(
        "cluster/backend.py", ("collect_metadata",), ("by_program", "uses_ebpf"), ("ebpf",)
    ),
    "which backend is it?": Question("cluster/backend.py", texts=("vxlan", "host-gw")),
    "is there a tunnel?": Question("cluster/backend.py", ("needs_mac",), ("has_tunnel",)),
    "has each peer a path of its own?": Question("", ("paths", "column", "routes_directly")),
    "does a map hold the peers?": Question("resources/peers/ours.py", ("map", "maps")),
    "has the kernel nexthop objects?": Question("kernel/host.py", ("_has_nexthops",)),
    "do routes use nexthop objects?": Question("resources/peers/layouts.py", ("nexthops",)),
}

#: Modules that have a row, or a class, for each mode: a new mode is one more of them.
ROWS = {
    "cluster/backend.py": "the modes themselves",
    "composition.py": "who forwards",
    "node/placing.py": "where a family is",
    "resources/peers/layouts.py": "which tables the peers have",
}

#: Other questions that are asked in the same words.
OTHERS = {
    "kind": "what a device of the kernel is, or what a lease says of itself",
    "vxlan": "how a device of the kernel was made",
    "have": "the same",
    "other": "of two lists of paths that one layout made",
}

#: Modules where a name means something else.
ELSEWHERE = {"tables/columns.py": "its parameter ``nexthops`` is a column of ids"}


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def name_of(node: ast.AST) -> str:
    """The last name of ``a.b.name``."""
    return getattr(node, "attr", None) or getattr(node, "id", None) or ""


def names_in(node: ast.AST) -> set[str]:
    return {name_of(one) for one in ast.walk(node)} - {""}


def conditions(nodes: Iterable[ast.AST]) -> Iterator[ast.expr]:
    """Expressions whose truth, or being None, decides something."""
    for node in nodes:
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node.test
        elif isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Call) and name_of(node.func) == "bool":
            yield from node.args
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            yield node.left


def texts_compared(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Texts that something is compared with, and that something."""
    for node in nodes:
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            for one, other in ((node.left, node.comparators[0]), (node.comparators[0], node.left)):
                if isinstance(one, ast.Constant) and isinstance(one.value, str):
                    yield one.value, other


@cache
def parts_of(
    text: str,
) -> tuple[list[ast.expr], list[ast.Attribute], list[tuple[str, ast.expr]]]:
    """What a module decides by, the attributes that it reads, and the texts that it compares."""
    nodes = [*ast.walk(parsed(text))]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    return [*conditions(nodes)], attributes, [*texts_compared(nodes)]


def asked(question: Question, text: str) -> list[str]:
    """The expressions of a module that ask a question."""
    decided, attributes, compared = parts_of(text)
    found = [one for one in decided if name_of(one) in question.tested]
    found += [node for node in attributes if node.attr in question.read]
    found += [one for text, one in compared if text in question.texts]
    return [ast.unparse(one) for one in found if not names_in(one) & {*OTHERS}]


@pytest.mark.parametrize("what", QUESTIONS)
def test_a_question_is_asked_in_one_module(what: str) -> None:
    question = QUESTIONS[what]
    sources = {name: text for name, text in SOURCES.items() if name not in ELSEWHERE}
    where = {name: asked(question, text) for name, text in sources.items()}

    assert {name: found for name, found in where.items() if found and name != question.home} == {}
    assert bool(question.home) == bool(where.get(question.home))


def keys(tree: ast.AST) -> Iterable[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (one for key in node.keys if key for one in ast.walk(key))


def test_what_there_is_for_each_mode_stands_in_few_modules() -> None:
    found = {
        name
        for name, text in SOURCES.items()
        for one in keys(parsed(text))
        if isinstance(one, ast.Constant) and one.value in ("ebpf", "host-gw")
    }

    assert found <= {*ROWS}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("does a program forward?", "x = 1 if config.backend.uses_ebpf else 2"),
        ("does a program forward?", "if backend.collect_metadata: pass"),
        ("which backend is it?", 'tunnel = config.backend.type == "vxlan"'),
        ("which backend is it?", 'if "host-gw" != backend.mode: pass'),
        ("is there a tunnel?", "need(family.has_tunnel)"),
        ("has each peer a path of its own?", "if state.paths is not None: pass"),
        ("has each peer a path of its own?", "n = sum(one.paths) if one.paths else 0"),
        ("does a map hold the peers?", "found = [a for a in b if not place.map]"),
        ("has the kernel nexthop objects?", "if host._has_nexthops is None: pass"),
        ("do routes use nexthop objects?", "ok = number == 4 and host.nexthops is not None"),
    ],
)
def test_a_question_is_known_as_one(what: str, text: str) -> None:
    assert asked(QUESTIONS[what], text)
