"""The state of an agent: one value that health checks, metrics and logs are made from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from flannel_dp.errors import require

#: Upper bounds in seconds of the buckets of apply durations.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Durations(Struct, frozen=True):
    """A histogram: ``counts[i]`` durations were at most ``BUCKETS[i]``, the last ones longer."""

    counts: tuple[int, ...] = (0,) * (len(BUCKETS) + 1)
    total: float = 0.0

    def with_one(self, seconds: float) -> Durations:
        """Return this histogram and one duration more."""
        place = next((i for i, most in enumerate(BUCKETS) if seconds <= most), len(BUCKETS))
        counts = tuple(n + (i == place) for i, n in enumerate(self.counts))
        return Durations(counts, self.total + seconds)


class Status(Struct, frozen=True):
    """The state of a running agent; every change makes a new value.

    Times are seconds since the epoch, None for never; ``heartbeat`` is a monotonic
    clock's. ``problems`` say why the agent is degraded, by what they are about
    ("source", "lease", "kernel", "entries", "firewall", "subnet file", "forwarding",
    "shrink", "unusable", "config", ..), {} when it is not. ``ready`` is True once all accepted
    peers were programmed, and firewall rules and subnet.env written, for the first time. ``ended``
    names threads that ended for good and why, by their names ("source", "lease", "health"): only a
    restart brings them back. ``diversions`` are what of other programs diverts packets of pods
    (:class:`flannel_dp.node.path.Diversion`), in words among the problems "path4" and "path6".
    ``lives`` are the numbers of peers that are "new", "alive", "lossy" and "dead" by their probes
    (:class:`flannel_dp.PeerLife`), by family, {} where they are not probed; ``awaiting`` is what
    the node waits for before it is called ready although its peers are programmed, "" for nothing.
    Counters only grow.
    """

    started: float = 0.0
    ready: bool = False
    heartbeat: float = 0.0
    origin: str = ""
    source_ok: bool = False
    source_changed: float | None = None
    problems: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    peers: dict[int, int] = field(default_factory=dict)  # by family
    direct: dict[int, int] = field(default_factory=dict)  # of them, without the tunnel
    accepted: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # by reason
    warnings: tuple[str, ...] = ()  # of the last pass that read everything
    entries: dict[str, int] = field(default_factory=dict)  # by table
    unusable: int = 0  # leases that cannot be used, of peers that are kept for a while
    failing: int = 0  # entries that are not in the kernel and retried
    conflicts: int = 0
    diversions: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # by family
    drift: dict[str, int] = field(default_factory=dict)  # repaired, by kind (see reconcile.watch)
    writes: int = 0
    syncs: int = 0
    updates: int = 0
    failures: int = 0
    overruns: int = 0
    audits: int = 0
    last_audit: float | None = None
    last_sync: float | None = None
    apply: Durations = field(default_factory=Durations)
    lives: dict[int, dict[str, int]] = field(default_factory=dict)
    awaiting: str = ""

    @property
    def serves(self) -> bool:
        """Whether the node is called ready."""
        return self.ready and not self.awaiting

    @property
    def degraded(self) -> bool:
        return bool(self.problems)


#: What a restart helps against.
UNHEALTHY = ("stuck", "ended")


def verdict_of(status: Status, age: float, stuck_after: float | None) -> str:
    """Return ``ok``, ``degraded``, or of UNHEALTHY what it is, ``age`` seconds after the last sign
    of life."""
    if status.ended:
        return "ended"
    if stuck_after is not None and age > stuck_after:
        return "stuck"
    return "degraded" if status.degraded else "ok"


def peers_in_words(peers: dict[int, int]) -> str:
    """Return numbers of peers by family as text: ``2 IPv4 peers, 2 IPv6 peers``."""
    return ", ".join(
        f"{count} IPv{family} peer{'' if count == 1 else 's'}"
        for family, count in sorted(peers.items())
    )


class StatusBoard:
    """Holds the current Status. Problems and ended threads may come from any thread, the rest
    is one thread's."""

    def __init__(self, status: Status | None = None) -> None:
        require(status is None or isinstance(status, Status), "status", status, "a Status")
        self._status = status or Status()
        self._lock = threading.Lock()
        #: When each problem began (CLOCK_MONOTONIC), for those who log its end.
        self.began: dict[str, float] = {}
        #: When each problem began (seconds since the epoch), for those who ask.
        self.since: dict[str, float] = {}
        #: Called when a problem begins, with its text, and when it ends, with None.
        self.on_problem: Callable[[str, str | None], object] = lambda about, text: None
        self.on_change: Callable[[Status], None] = lambda status: None

    @property
    def status(self) -> Status:
        return self._status

    def problem(self, about: str, text: str | None) -> bool:
        """Note a problem, or with None its end. Return False when that was known."""
        with self._lock:
            problems = {k: v for k, v in self._status.problems.items() if k != about}
            if text is not None:
                problems[about] = text
            if problems == self._status.problems:
                return False
            turned = (about in problems) != (about in self._status.problems)
            since = {k: v for k, v in self.since.items() if k in problems}
            self.since = since | ({about: since.get(about, time.time())} if text else {})
            self._status = replace(self._status, problems=problems)
        self.on_change(self._status)
        if turned:
            self.on_problem(about, text)
        return True

    def end(self, thread: str, why: str) -> None:
        """Note that a thread ended for good. From any thread."""
        with self._lock:
            self._status = replace(self._status, ended={**self._status.ended, thread: why})
        self.problem(f"{thread}-thread", f"it ended: {why} - restart the service")

    def set(self, **changes: object) -> Status:
        """Replace fields by name."""
        with self._lock:
            self._status = replace(self._status, **changes)
        self.on_change(self._status)
        return self._status
