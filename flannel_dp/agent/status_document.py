"""The document in which a running agent tells its status: ``flannel-dp status --output json``.

Made on the thread of the socket, of values that other threads replace as a whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.agent.status import Status, StatusBoard, verdict_of
from flannel_dp.agent.story import mtu_of, version

if TYPE_CHECKING:
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.look.events import Event
    from flannel_dp.resources.peers.state import State

_COUNTERS = ("syncs", "updates", "writes", "failures", "overruns", "failing", "conflicts")


def agent_document(
    board: StatusBoard,
    chronicle: Chronicle,
    *,
    devices: Iterable[str],
    config: NetworkConfig | None,
    known: Mapping[int, State],
    run_dir: str,
    audit_interval: float,
    stuck_after: float | None,
    probes: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what an agent says of itself; ``config`` is None before it is known, ``probes`` where
    none are sent."""
    status = board.status
    verdict = verdict_of(status, max(0.0, time.monotonic() - status.heartbeat), stuck_after)
    if verdict == "ok" and not status.serves:
        verdict = "starting"
    return {
        "schema": 1,
        "ok": verdict == "ok",
        "status": verdict,
        "ready": status.ready,
        "awaiting": status.awaiting,
        "version": version(),
        "pid": os.getpid(),
        "started": status.started or None,
        "devices": [*devices],
        "run_dir": run_dir,
        "node": os.uname().nodename,
        "mode": config.backend.mode if config else "",
        "vni": config.backend.vni if config else 0,
        "net_conf": "" if config is None else config.to_json(),
        "families": {} if config is None else _families(known, config),
        "source": {
            "origin": status.origin,
            "ok": status.source_ok,
            "changed": status.source_changed,
        },
        "peers": {} if config is None else _peers(status, config),
        "rejected": {
            "reasons": dict(sorted(status.rejected.items())),
            "leases": [
                {"family": one.family, "lease": one.peer, "reason": one.reason, "detail": one.cause}
                for family in sorted(chronicle.rejected)
                for one in chronicle.rejected[family]
            ],
        },
        "problems": [
            {"problem": about, "text": text, "since": board.since.get(about)}
            for about, text in sorted(status.problems.items())
        ],
        "warnings": [*status.warnings],
        "repairs": [_repair(one) for one in reversed([*chronicle.repairs])],
        "drift": dict(sorted(status.drift.items())),
        "audit": {
            "interval": audit_interval,
            "count": status.audits,
            "last": status.last_audit,
            "written": chronicle.audited,
        },
        "probes": probes,
        "counters": {name: getattr(status, name) for name in _COUNTERS},
    }


def _families(known: Mapping[int, State], config: NetworkConfig) -> dict[str, dict[str, Any]]:
    found = {}
    for number, state in sorted({**known}.items()):
        node = state.family.admission.node
        found[str(number)] = {
            "subnet": str(node.subnet),
            "address": str(node.public_ip),
            "interface": state.family.iface,
            "device": config.backend.device_of(number) if state.index else "",
            "mtu": mtu_of(state, config),
            "network": state.network,
        }
    return found


def _peers(status: Status, config: NetworkConfig) -> dict[str, dict[str, int]]:
    """Return by family how many peers are on which path."""
    by_path = config.backend.peers_by_path
    return {
        str(number): {"total": count, **by_path(count, status.direct.get(number, 0))}
        for number, count in sorted(status.peers.items())
    }


def _repair(one: Event) -> dict[str, Any]:
    return {
        "time": one.time,
        "family": one.family,
        "table": one.table,
        "change": one.change,
        "before": one.before,
        "after": one.after,
        "program": one.program,
    }
