"""Views take what differs between layouts as a value, and do not ask which layout it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flannel_dp

LOOK = Path(flannel_dp.__file__).parent / "look"

#: Questions that layouts, the device's view or the configuration answer by a value.
QUESTIONS = (
    r"\bby_program\b",
    r"\buses_ebpf\b",
    r"\bhas_tunnel\b",
    r"\b(paths|map|maps|nexthops|device)(\.column)? is (not )?None\b",
    r"\btype [!=]= \"(vxlan|host-gw)\"",
    r"\bmode [!=]= \"",
)

#: Scopes of the kernel's tables are said beside the tables, and read by held.py.
SCOPES = r"\b(fdb|neighbour|nexthop|route|peer)_scope\b"


@pytest.mark.parametrize("path", sorted(LOOK.glob("*.py")), ids=lambda path: path.name)
def test_a_view_asks_no_layout(path: Path) -> None:
    asked = [line for line in path.read_text().splitlines() if re.search("|".join(QUESTIONS), line)]

    assert asked == []


@pytest.mark.parametrize("path", sorted(LOOK.glob("*.py")), ids=lambda path: path.name)
def test_a_view_says_no_scope(path: Path) -> None:
    said = [line for line in path.read_text().splitlines() if re.search(SCOPES, line)]

    assert said == []


@pytest.mark.parametrize("path", sorted(LOOK.glob("*.py")), ids=lambda path: path.name)
def test_views_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "line",
    [
        "if overlay.config.backend.by_program:",
        "if paths is not None and paths[number] == DIRECT:",
        'tunnel = backend.type == "vxlan"',
        "device is None",
    ],
)
def test_a_question_is_known_as_one(line: str) -> None:
    assert re.search("|".join(QUESTIONS), line)
