"""Fixtures of the benchmarks, and the table of figures after them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bench import cluster, floors, lab, peers, short
from bench.figures import Figure, Figures

_FIGURES = pytest.StashKey[Figures]()
_QUIET = pytest.StashKey[lab.Quiet]()

#: The longest case (50,000 nodes) takes a minute; on a busy machine, some.
_TIMEOUT = 900


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()
    config.stash[_QUIET] = lab.Quiet()
    config.addinivalue_line("markers", "full: takes minutes; make bench leaves it out")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.timeout(_TIMEOUT))
            if short.is_long(f"{item.path.name}::{item.name}"):
                item.add_marker("full")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What a figure depends on beyond the processor that pytest-benchmark writes down. Whose
    machine it was says nothing about a figure."""
    machine_info.pop("node", None)
    machine_info["kernel"] = platform.release()
    machine_info["processors"] = os.cpu_count()
    machine_info["load_average"] = list(os.getloadavg())
    machine_info["versions"] = {
        name: version(name) for name in ("Cython", "msgspec", "pyroute2", "click", "rich")
    }
    machine_info["peers"] = peers.versions()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    figures = config.stash[_FIGURES]
    if not figures.all:
        return
    terminalreporter.section("figures")
    load = " ".join(f"{one:.2f}" for one in os.getloadavg())
    terminalreporter.write_line(
        f"Linux {platform.release()}, {os.cpu_count()} processors, load average {load}"
    )
    for line in figures.lines():
        terminalreporter.write_line(line)
    for name, found in peers.versions().items():
        if found.startswith(peers.MISSING):
            terminalreporter.write_line(f"{name} took no part: {found}")
    noisy = config.stash[_QUIET].noisy
    if noisy:
        terminalreporter.write_line(
            f"{noisy} rounds began while the machine was busy: repeat this when it is not"
        )


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """All figures of this run."""
    return request.config.stash[_FIGURES]


@pytest.fixture
def figure(figures: Figures, benchmark: Any) -> Callable[..., None]:
    """``figure(name, value, unit, target=None, detail="", least=None)`` records one number."""

    def record(
        name: str,
        value: float,
        unit: str,
        target: float | None = None,
        detail: str = "",
        least: float | None = None,
    ) -> None:
        figures.add(benchmark, Figure(name, value, unit, target, detail, least))

    return record


@pytest.fixture
def quiet(request: pytest.FixtureRequest) -> lab.Quiet:
    """Called, it waits until the machine is quiet, or counts the round as noisy."""
    return request.config.stash[_QUIET]


@pytest.fixture(scope="session", autouse=True)
def floor() -> Path:
    """The floor program, compiled."""
    return floors.build()


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace that is node 0, of the family of the test's ``case``; the test runs in it."""
    case = request.getfixturevalue("case")
    with lab.namespace(case.family) as name:
        if case.layout == "direct":
            far, router = cluster.FAR[case.family], cluster.ROUTER[case.family]
            lab.ip("-n", name, "route", "add", far, "via", router, "dev", "eth0")
        with lab.inside(name):
            yield name
