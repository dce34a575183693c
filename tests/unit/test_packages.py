"""What is installed: every folder of flannel_dp that holds modules."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    elsewhere = set(setuptools["package-dir"])
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in (ROOT / "flannel_dp").rglob("*.py")
    }

    assert {*setuptools["packages"]} - elsewhere == folders
