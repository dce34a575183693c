"""Run in a process of its own by test_memory.py: what a data plane keeps in memory.

    python -m bench.memory_probe peers  FAMILY NODES NETNS FILE
    python -m bench.memory_probe growth FAMILY NODES NETNS SYNCS

Prints one JSON object. Memory is the private part of the resident set
(smaps_rollup: shared libraries count once for the machine, not for us).
"""

from __future__ import annotations

import gc
import json
import statistics
import sys

from bench import cluster, planes
from bench.cluster import Case
from flannel_dp.sources.file import FileSource

_SYNCS = 6
_SAMPLE = 20


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
    """Sync a few leases, then all of the file six times; what that added, in bytes a peer.

    The first sync has room to itself. Later ones build the new state beside the old,
    and what the allocators do not give back afterwards counts: it is "retained".
    """
    few = [cluster.lease(case.family, number) for number in range(5)]
    with planes.plane(case, node, allow_shrink=True) as dp:
        for _ in range(3):
            dp.sync(few)
        gc.collect()
        _forget_peak()
        before, resident = private_bytes(), _status("VmRSS")
        after = []
        for _ in range(_SYNCS):
            # As the command does it: nobody keeps the decoded list.
            report = dp.sync(FileSource(path).snapshot().claims)
            assert report.ok
            planes.state(dp, case)
            del report
            gc.collect()
            after.append((private_bytes() - before) / case.nodes)
        return {
            "retained": after[-1],
            "first": after[0],
            "peak": (_status("VmHWM") - resident) / case.nodes,
        }


def growth(case: Case, node: str, syncs: int) -> dict[str, float]:
    """KiB and Python objects added between the second and the last fifth of ``syncs``.

    Medians within each fifth, because allocators breathe. The leases are made anew for
    every sync, as a source does; one node in a hundred moves each time.
    """
    samples: list[tuple[int, int]] = []
    with planes.plane(case, node) as dp:
        for number in range(syncs):
            moved = number % 100
            members = [
                cluster.lease(case.family, n, number % 14 if n and n % 100 == moved else 0)
                for n in range(case.nodes + 1)
            ]
            report = dp.sync(members)
            assert report.ok
            if number % _SAMPLE == _SAMPLE - 1:
                gc.collect()
                samples.append((private_bytes(), sys.getallocatedblocks()))
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    found = [
        statistics.median(one[column] for one in late)
        - statistics.median(one[column] for one in early)
        for column in (0, 1)
    ]
    return {"kib": found[0] / 1024, "objects": found[1]}


def main(arguments: list[str]) -> None:
    what, family, nodes, node, last = arguments
    case = Case(int(family), int(nodes))
    found = peers(case, node, last) if what == "peers" else growth(case, node, int(last))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
