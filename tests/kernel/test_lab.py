"""Many data planes in one process: examples/lab.py with a few nodes, on one thread."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import DataPlane, SourceError, watch_all

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("lab", ROOT / "examples/lab.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ip(plane: DataPlane, words: str) -> str:
    command = ["ip", "-n", str(plane.netns), *words.split()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_lab_of_many_nodes_is_one_thread(example: Any) -> None:
    prefix, before = f"fdp{os.getpid()}l", {*threading.enumerate()}
    with example.lab(prefix, 4) as (planes, leases):
        assert all(plane.sync(leases).ok for plane in planes)
        ip(planes[2], "route del 10.244.1.0/24")
        ip(planes[2], "-6 route flush proto 138")
        ip(planes[0], "neigh flush dev flannel.1 nud permanent")

        hurt, seen = {prefix + "3": 4, prefix + "1": 3}, dict[str, int]()
        for plane, repair in watch_all(planes, timeout=60):
            name = str(plane.netns)
            seen[name] = seen.get(name, 0) + sum(repair.counts.values())
            if seen == hurt:
                break

        assert seen == hurt
        assert {*threading.enumerate()} <= before
        assert all(plane.plan(leases).is_empty for plane in planes)
        with pytest.raises(SourceError, match="nothing to watch"):
            next(watch_all([DataPlane(planes[0].config, iface="eth0", netns=prefix + "1")]))
    assert prefix not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
