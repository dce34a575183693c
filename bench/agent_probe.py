"""An agent in a process of its own, for the benchmarks that look at it from outside.

    python -m bench.agent_probe FAMILY LEASES AUDIT

It follows the file LEASES as node 0 of a cluster of FAMILY, with an audit every AUDIT
seconds. A line of JSON on standard output says that it is ready, and another answers each
line on standard input; its end is the end of the agent. Between them nothing runs here
but the agent.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from bench import cluster
from flannel_dp import DataPlane
from flannel_dp.agent.agent import Agent
from flannel_dp.sources.file import FileSource

_READY_SECONDS = 60.0


def answer(agent: Agent) -> dict[str, Any]:
    """What the agent says of itself: "events" were read, and of "drift" so much repaired."""
    status, watch = agent.status, agent._watch
    return {
        "events": watch.seen if watch else 0,
        "overruns": watch.overruns if watch else 0,
        "audits": status.audits,
        "writes": status.writes,
        "drift": sum(status.drift.values()),
        "peers": sum(status.peers.values()),
        "problems": status.problems,
    }


def main(arguments: list[str]) -> None:
    family, leases, audit = arguments
    logging.getLogger("flannel_dp").addHandler(logging.NullHandler())
    plane = DataPlane(cluster.config(int(family)), iface="eth0")
    with plane, Agent(plane, FileSource(leases), audit=float(audit)) as agent:
        if not agent.wait_ready(_READY_SECONDS):
            raise SystemExit(f"not ready: {agent.status}")
        print(json.dumps(answer(agent)), flush=True)
        for _ in sys.stdin:
            print(json.dumps(answer(agent)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
