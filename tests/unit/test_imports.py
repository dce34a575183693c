"""The shape of the package: which module may import which, how long one may be, what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flannel_dp

ROOT = Path(__file__).resolve().parents[2] / "flannel_dp"

#: The packages and modules of the package, lower ones first. What stands on a line may import what
#: stands on a line before it, and the rest of its own package; packages of one line do not import
#: each other.
PACKAGES: tuple[tuple[str, ...], ...] = (
    ("wording",),
    ("backoff", "deprecation", "errors", "later", "threads"),
    ("_core",),
    ("tables", "cluster"),
    ("sources", "kernel"),
    ("bpf", "node", "probe"),
    ("reconcile",),
    ("resources",),
    ("options",),
    ("look", "composition", "handover", "notices", "leftovers"),
    ("updates",),
    ("passes", "locks"),
    ("dataplane",),
    ("agent",),
    ("command",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(PACKAGES) for name in names}

#: Imports that the packages alone do not explain, each with its reason.
ALSO = {
    ("_core", "tables"): "the compiled unit makes the entries, which are plain tuples",
    ("_core", "cluster"): "and reads the fields of leases",
    ("tables", "kernel"): "names of devices are looked up in a namespace, where one is given",
}

#: Parts of a package that do not import each other.
APART = {
    "resources": ("counters", "device", "firewall", "forwarding", "path", "peers", "subnet_file"),
    "sources": ("etcd", "kube", "file", "push"),
}

#: No module is longer than this; one compiled class is in one file, and may be longer.
LINES = {".py": 400, ".pyx": 400, ".pxi": 600}


def modules() -> list[Path]:
    parts = (ROOT.parent / "csrc/cython").glob("*.pxi")  # included by _core.pyx
    return sorted([*ROOT.rglob("*.py"), *ROOT.glob("*.pyx"), *parts])


def name_of(path: Path) -> str:
    """``flannel_dp/kernel/links.py`` is ``kernel.links``, a package's ``__init__`` its name."""
    if path.suffix == ".pxi":
        return "_core"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name: str) -> str:
    """The layer's name for a module: ``kernel`` for ``kernel.links``."""
    return name.partition(".")[0]


NAMES = {name_of(path) for path in modules()}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements of a module, also those inside of others; ``ast.walk`` goes into expressions,
    which takes several times as long."""
    left = [tree]
    while left:
        node = left.pop()
        yield node
        for inside in ("body", "orelse", "finalbody", "handlers", "cases"):
            found = getattr(node, inside, None)
            left += found if isinstance(found, list) else ()


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a module imports, anywhere in it; "" is the package itself."""
    for node in statements(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"line {node.lineno}: a relative import")
            # `from flannel_dp import tables` is a module, `... import Lease` the package.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [
                name if name.removeprefix("flannel_dp.") in NAMES else str(node.module)
                for name in inside
            ]
        else:
            continue
        for name in found:
            if name == "flannel_dp" or name.startswith("flannel_dp."):
                yield name.removeprefix("flannel_dp").removeprefix(".")


@cache
def imports_of(path: Path) -> set[str]:
    text = path.read_text()
    if path.suffix == ".py":
        return set(imported(ast.parse(text)))
    # Cython is not Python to `ast`; its import lines are.
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line.startswith(("from flannel_dp", "import flannel_dp"))]
    return set(imported(ast.parse("\n".join(found))))


def upward(path: Path) -> Iterator[str]:
    """What is wrong with the imports of a module."""
    name = name_of(path)
    if not name:
        return  # the package's own __init__ offers all of it
    part = part_of(name)
    if part not in LEVEL:
        yield f"{name} is in no package: give it its place in PACKAGES"
        return
    for other in imports_of(path):
        target = part_of(other)
        if not target:
            yield f"{name} imports the package instead of a module of it"
        elif target not in LEVEL:
            yield f"{name} imports {other}, which is in no package"
        elif not (LEVEL[target] < LEVEL[part] or target == part or (part, target) in ALSO):
            yield f"{name} may not import {other}"


def test_imports_point_downwards() -> None:
    """What only type checkers read counts as well."""
    assert [wrong for path in modules() for wrong in upward(path)] == []


def sideways(path: Path) -> Iterator[str]:
    package, _, rest = name_of(path).partition(".")
    apart = APART.get(package, ())
    own = rest.partition(".")[0]
    for other in imports_of(path) if own in apart else ():
        if other.startswith(f"{package}."):
            part = other.split(".")[1]
            if part != own and part in apart:
                yield f"{name_of(path)} may not import {other}"


def test_parts_of_a_package_stand_apart() -> None:
    """No resource imports another, and no source another."""
    assert [wrong for path in modules() for wrong in sideways(path)] == []


def test_no_circle_of_imports() -> None:
    """Not even one that only type checkers see."""
    graph: dict[str, set[str]] = {}
    for path in modules():
        if name_of(path):  # the package's own __init__ offers all of it
            graph.setdefault(name_of(path), set()).update(imports_of(path) - {name_of(path)})

    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_nobody_imports_the_command() -> None:
    others = [path for path in modules() if part_of(name_of(path)) not in ("__main__", "command")]
    wrong = {name_of(path): [part_of(one) for one in imports_of(path)] for path in others}

    assert {name for name, parts in wrong.items() if "command" in parts} == set()


def test_modules_are_of_a_size_to_be_read() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in modules()}

    assert {path.name: n for path, n in lines.items() if n > LINES[path.suffix]} == {}


def test_import_test_sees_every_form() -> None:
    text = """
import flannel_dp.reconcile.plan
from flannel_dp import Lease, tables
def inside():
    from flannel_dp.kernel import tables
    from flannel_dp.kernel.links import LinkReader
"""

    found = sorted(imported(ast.parse(text)))

    assert found == ["", "kernel.links", "kernel.tables", "reconcile.plan", "tables"]


def test_public_names_are_sorted_once_each_and_there() -> None:
    names = flannel_dp.__all__
    order = sorted(names, key=lambda n: (not n.isupper(), n.lstrip("_")[0].islower(), n))

    assert names == order
    assert len(set(names)) == len(names)
    assert set(names) - {"__version__"} == set(flannel_dp._HOME_OF)
    for name in names:
        assert getattr(flannel_dp, name) is not None
        assert name in dir(flannel_dp)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    seen = {
        (node.module or "").removeprefix("flannel_dp."): {alias.name for alias in node.names}
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flannel_dp.")
    }
    del seen["deprecation"]  # what a former name is imported for

    assert seen == {home: set(names.split()) for home, names in flannel_dp._HOMES.items()}


def test_unknown_name_is_an_attribute_error() -> None:
    misspelt = "Dataplane"

    with pytest.raises(AttributeError, match="has no attribute 'Dataplane'"):
        getattr(flannel_dp, misspelt)


def test_importing_the_package_loads_nothing_else() -> None:
    script = (
        "import sys; before = set(sys.modules); import flannel_dp; "
        "print(*sorted(set(sys.modules) - before))"
    )

    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    )

    assert set(done.stdout.split()) <= {"__future__", "flannel_dp"}


def test_the_public_names_do_not_load_pyroute2() -> None:
    script = (
        "import sys; from flannel_dp import *; "
        "print('pyroute2' in sys.modules, 'asyncio' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT.parent, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["False", "False"]
