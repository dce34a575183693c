"""Resources that fail alone know neither the data plane nor each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "flannel_dp"
APART = [
    ROOT / "resources/firewall",
    ROOT / "resources/counters",
    ROOT / "resources/subnet_file.py",
]
ABOVE = ("dataplane", "look", "agent", "command")


def modules(resource: Path) -> list[Path]:
    return sorted(resource.glob("*.py")) if resource.is_dir() else [resource]


def imports(path: Path) -> set[str]:
    """What a module imports of the package, for type checkers too, as ``kernel.host``."""
    return {
        node.module.removeprefix("flannel_dp.")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and "flannel_dp" in node.module
    }


@pytest.mark.parametrize("resource", APART, ids=lambda path: path.stem)
def test_a_resource_imports_no_other_one_and_nothing_above(resource: Path) -> None:
    own = f"resources.{resource.stem}"
    found = {name for path in modules(resource) for name in imports(path)}

    assert found
    assert not [one for one in found if one.startswith("resources.") and not one.startswith(own)]
    assert not [one for one in found if one.split(".")[0] in ABOVE]


@pytest.mark.parametrize("name", ["firewall.resource", "counters.resource", "subnet_file"])
def test_a_resource_that_is_composed_loads_nothing_before_it_is_used(name: str) -> None:
    script = (
        f"import sys, flannel_dp.resources.{name}\n"
        "heavy = {'subprocess', 'tempfile', 'pyroute2', 'flannel_dp.bpf.loader',"
        " 'flannel_dp.resources.firewall.engine'}\n"
        "print(*sorted(heavy & {*sys.modules}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT.parent, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == []
