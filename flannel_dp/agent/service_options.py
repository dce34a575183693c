"""How an agent runs as a service."""

from __future__ import annotations

import time
from typing import Any

from msgspec import Struct

from flannel_dp.agent.grace import Grace
from flannel_dp.agent.probing import ProbeOptions
from flannel_dp.agent.timers import AUDIT_SECONDS
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.sources.base import GRACE_SECONDS


class ServiceOptions(Struct, frozen=True):
    """``audit`` is in seconds; ``healthz_port`` None serves no health, 0 takes any port.
    ``grace`` is for how many seconds a peer stays whose lease became unusable.

    ``keep`` are the capabilities to keep once everything is open; None drops none. ``run_dir`` is
    where the locks are, ``state_dir`` where the history is ("": there, too). ``probe`` is how peers
    are probed, None for not at all.
    """

    audit: float = AUDIT_SECONDS
    healthz_ip: str = "0.0.0.0"
    healthz_port: int | None = None
    keep: frozenset[str] | None = frozenset({"CAP_NET_ADMIN"})
    run_dir: str = DEFAULT_DIRECTORY
    probe: ProbeOptions | None = None
    state_dir: str = ""
    grace: float = GRACE_SECONDS

    def of_agent(self) -> dict[str, Any]:
        """Return what of them is the agent's own, for a new one."""
        return {"audit": self.audit, "grace": Grace(time.monotonic, seconds=self.grace)}
