"""What the kernel holds, as ``ip`` and ``bridge`` see it, in a form that compares.

A route by a nexthop object and a route with a gateway are the same here: both lead a
prefix by a gateway out of a device, which is what ``ip -j route`` shows of either.
Who wrote an entry (its protocol) and its metric are left out.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from bench.job import NETWORK, Job

Entries = frozenset[tuple[str, ...]]


@dataclass(frozen=True)
class State:
    """Routes (prefix, gateway, device), neighbours (address, MAC), FDB (MAC, address)."""

    routes: Entries
    neighbours: Entries
    fdb: Entries

    def difference(self, other: State) -> str:
        """What one has and the other has not, some of it, in words; "" if they agree."""
        return "; ".join(
            f"{kind}: {len(mine - theirs)} only here, {len(theirs - mine)} only there, such as "
            f"{', '.join(' '.join(entry) for entry in sorted(mine ^ theirs)[:3])}"
            for kind, mine, theirs in (
                ("routes", self.routes, other.routes),
                ("neighbours", self.neighbours, other.neighbours),
                ("fdb", self.fdb, other.fdb),
            )
            if mine != theirs
        )


NOTHING = State(frozenset(), frozenset(), frozenset())


def wanted(job: Job) -> State:
    """What the kernel should hold when the job is done, from the leases alone."""
    return State(
        frozenset((node.subnet, node.gateway, job.device) for node in job.nodes),
        frozenset((node.gateway, node.mac) for node in job.nodes if job.tunnelled),
        frozenset((node.mac, node.endpoint) for node in job.nodes if job.tunnelled),
    )


def read(job: Job) -> State:
    """What the kernel holds, in the namespace that this thread is in."""
    family = f"-{job.case.family}"
    routes = _json("ip", family, "-j", "route", "show", "root", NETWORK[job.case.family])
    neighbours: list[dict[str, Any]] = []
    fdb: list[dict[str, Any]] = []
    if job.tunnelled:
        neighbours = _json("ip", family, "-j", "neigh", "show", "dev", job.device)
        fdb = _json("bridge", "-j", "fdb", "show", "dev", job.device)
    return State(
        frozenset(
            (str(ip_network(one["dst"])), one["gateway"], one["dev"])
            for one in routes
            if "gateway" in one  # else it is the device's own prefix
        ),
        frozenset(
            (one["dst"], one["lladdr"]) for one in neighbours if one.get("state") == ["PERMANENT"]
        ),
        frozenset((one["mac"], one["dst"]) for one in fdb if one.get("state") == "permanent"),
    )


def _json(*command: str) -> list[dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    return found
