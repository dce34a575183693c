"""No decision depends on the clock of the wall, which people and NTP set."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import flannel_dp

ROOT = Path(flannel_dp.__file__).parent

#: Who may read it, and why: nothing is waited for or compared by it.
READERS = {
    "agent/agent.py": "the times in the status are for people",
    "agent/work.py": "and so are these",
    "agent/status.py": "and since when there is a problem",
    "agent/history.py": "when something happened is kept for people",
    "agent/chronicle.py": "and so it is here",
    "command/asking.py": "tells a person how long ago that was",
    "agent/grace.py": "says until when peers are kept, in local time",
    "agent/holding.py": "says until when peers are kept, in local time",
    "agent/metrics.py": "Prometheus wants seconds since the epoch",
    "look": "shows times to people",
    "sources/kube/credentials.py": "a credential names its end in RFC 3339, as client-go takes it",
    "sources/etcd/source.py": "when leases expire is shown in RFC 3339",
    "sources/kube/own.py": "the time in a condition of the node",
}

CALLS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("time", "gmtime"),
         ("datetime", "utcnow"), ("time", "localtime")}  # fmt: skip

MODULES = re.compile(r"\b(time|datetime)\.")


@cache
def readers() -> set[str]:
    found = set()
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if not MODULES.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in CALLS
            ):
                found.add(str(path.relative_to(ROOT)))
    return found


def test_the_clock_of_the_wall_is_for_people_alone() -> None:
    unknown = {
        name for name in readers() if name not in READERS and name.partition("/")[0] not in READERS
    }

    assert unknown == set()


def test_every_reader_that_is_named_is_one() -> None:
    found = readers()
    assert {name for name in READERS if name.endswith(".py")} <= found
