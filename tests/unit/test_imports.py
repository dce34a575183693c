"""The shape of the package: which module may import which, how long one may be, what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flannel_dp

ROOT = Path(__file__).resolve().parents[2] / "flannel_dp"

#: Lower layers first. A module may import those of lower layers and of its own; a name
#: stands for a module or for all of a package.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("backoff", "entries", "errors", "output", "status"),
    ("_core", "config", "lease"),
    ("sources", "subnet_env", "tables"),
    ("admission", "identity"),
    ("backends", "masquerade"),
    ("plan",),
    ("explanation", "render", "report"),
    ("kernel",),
    ("bpf",),
    (
        "advice",
        "brake",
        "cleaning",
        "converge",
        "counters",
        "counting",
        "dataplane",
        "deviceview",
        "evidence",
        "explain",
        "explanation",
        "forwarding",
        "hostrules",
        "incremental",
        "listing",
        "mapped",
        "pending",
        "planning",
        "prefetch",
        "program",
        "resolve",
        "show",
        "stats",
        "watching",
    ),
    (
        "agent",
        "health",
        "holding",
        "ledger",
        "live",
        "livestats",
        "logs",
        "membership",
        "metrics",
        "moving",
        "notify",
        "onlooker",
        "service",
        "starting",
        "supervise",
    ),
    ("__main__", "cli", "flags", "wiring"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

#: Where less is allowed than the layers say.
ONLY = {
    "sources": {"backoff", "config", "errors", "lease", "sources"},
    "config": {"config", "errors"},
    "subnet_env": {"config", "errors"},
    "tables": {"_core", "entries", "errors"},
}

#: No module is longer than this.
LINES = 600


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


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a module imports, anywhere in it; "" is the package itself."""
    for node in ast.walk(tree):
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


def imports_of(path: Path) -> set[str]:
    text = path.read_text()
    if path.suffix == ".py":
        return set(imported(ast.parse(text)))
    # Cython is not Python to `ast`; its import lines are.
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line.startswith(("from flannel_dp", "import flannel_dp"))]
    return set(imported(ast.parse("\n".join(found))))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_imports_point_downwards(path: Path) -> None:
    """errors <- config, lease <- admission <- backends <- plan <- kernel <- bpf <- ... <- cli."""
    name = name_of(path)
    if not name:
        return  # the package's own __init__ offers all of it
    part = part_of(name)

    assert part in LEVEL, f"{name} is in no layer: give it its place in LAYERS"
    for other in imports_of(path):
        target = part_of(other)
        assert target, f"{name} imports the package instead of a module of it"
        assert target in LEVEL, f"{name} imports {other}, which is in no layer"
        assert LEVEL[target] <= LEVEL[part], f"{name} may not import {other}"
        assert target in ONLY.get(part, {target}), f"{name} may import {sorted(ONLY[part])} only"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_nobody_imports_the_command(path: Path) -> None:
    if name_of(path) not in ("__main__", "cli"):
        assert "cli" not in imports_of(path)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_modules_are_of_a_size_to_be_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES


def test_import_test_sees_every_form() -> None:
    text = """
import flannel_dp.reconcile.plan
from flannel_dp import Lease, tables
def inside():
    from flannel_dp.kernel import devices
    from flannel_dp.kernel.links import LinkReader
"""

    found = sorted(imported(ast.parse(text)))

    assert found == ["", "kernel.devices", "kernel.links", "plan", "tables"]


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


def test_writing_to_devices_is_what_loads_pyroute2() -> None:
    script = (
        "import sys; from flannel_dp import *; "
        "print('pyroute2' in sys.modules, 'asyncio' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT.parent, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["False", "False"]
