"""Run in a process of its own by test_memory.py: what a data plane keeps in memory.

    python -m bench.memory_probe peers  FAMILY NODES NETNS FILE
    python -m bench.memory_probe growth FAMILY NODES NETNS SYNCS

Prints one JSON object. Memory is the private part of the resident set
(smaps_rollup: shared libraries count once for the machine, not for us).
"""

from __future__ import annotations

import gc
import json
import sys

from bench import cluster, planes
from bench.cluster import Case
from flannel_dp.sources.file import FileSource


def private_bytes() -> int:
    """Bytes of memory that only this process has (proc_pid_smaps(5))."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        lines = [line.split() for line in file if line.startswith("Private_")]
    return sum(int(words[1]) for words in lines) * 1024


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        found = next(line for line in file if line.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peers(case: Case, node: str, path: str) -> dict[str, float]:
    """Sync a few leases, then all of the file; what that added, in bytes a peer."""
    few = [cluster.lease(case.family, number) for number in range(5)]
    with planes.plane(case, node, allow_shrink=True) as dp:
        for _ in range(3):
            dp.sync(few)
        gc.collect()
        _forget_peak()
        before, resident = private_bytes(), _status("VmRSS")
        # As the command does it: nobody keeps the decoded list.
        report = dp.sync(FileSource(path).snapshot().claims)
        assert report.ok
        planes.state(dp, case)
        del report
        gc.collect()
        return {
            "retained": (private_bytes() - before) / case.nodes,
            "peak": (_status("VmHWM") - resident) / case.nodes,
        }


def growth(case: Case, node: str, syncs: int) -> dict[str, float]:
    """Bytes added per sync between the first fifth of ``syncs`` and the last one.

    The leases are made anew for every sync, as a source does. One node in a
    hundred moves each time.
    """
    settled = 0
    with planes.plane(case, node) as dp:
        for number in range(syncs):
            moved = number % 100
            members = [
                cluster.lease(case.family, n, number % 14 if n and n % 100 == moved else 0)
                for n in range(case.nodes + 1)
            ]
            report = dp.sync(members)
            assert report.ok
            if number == syncs // 5:
                gc.collect()
                settled = private_bytes()
        gc.collect()
        return {"per_sync": (private_bytes() - settled) / (syncs - 1 - syncs // 5)}


def main(arguments: list[str]) -> None:
    what, family, nodes, node, last = arguments
    case = Case(int(family), int(nodes))
    found = peers(case, node, last) if what == "peers" else growth(case, node, int(last))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
