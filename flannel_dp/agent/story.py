"""What the log tells of an agent's work: the start, peers, rejected leases, and drift.

Each line is a sentence whose parts are fields. Nothing is looked at where the log does not show it,
and nothing before the kernel was written. Of what happens to many at once the first five are
told, and then how many more there were.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from flannel_dp._core import ADD, REMOVE, Claims
from flannel_dp.agent.changes import PeerAt, PeerChanges
from flannel_dp.agent.status import peers_in_words
from flannel_dp.cluster.lease import BadClaim
from flannel_dp.cluster.network import devices_of
from flannel_dp.resources.device.vxlan import overlay_mtu
from flannel_dp.tables.describe import describe

if TYPE_CHECKING:
    from flannel_dp.agent.kept import Kept
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.reconcile.drift import Repair
    from flannel_dp.resources.peers.state import State
    from flannel_dp.tables.results import TableResult

log = logging.getLogger(__name__)

#: So many of one kind are told one by one within so many seconds.
MOST, WINDOW = 5, 10.0

#: What of each kind there were more of.
_MORE = {
    "added": "peers were added",
    "changed": "peers have changed",
    "removed": "peers were removed",
    "rejected": "leases are rejected",
    "drift": "entries were repaired",
    "dead": "peers are unreachable",
    "back": "peers are reachable again",
    "lossy": "peers are not well reachable",
    "steady": "peers are well reachable again",
    "first": "peers are reachable",
}

#: What is counted together: a kind, and the family or 0.
_Kind = tuple[str, int]


class Bursts:
    """How many of each kind may be told now; the rest is counted, and told when a window ends.

    ``clock`` is in seconds and monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends: dict[_Kind, float] = {}
        self._left: dict[_Kind, int] = {}
        self._more: dict[_Kind, int] = {}
        self._opened: set[_Kind] = set()  # windows that the pass being told has opened

    @property
    def due(self) -> float | None:
        """When a count has to be told, by the clock; None where there is none."""
        return min((self._ends[kind] for kind in self._more), default=None)

    def room(self, kind: _Kind, count: int) -> int:
        """Return how many of ``count`` may be told now."""
        now = self._clock()
        self._opened.discard(kind)
        if now >= self._ends.get(kind, now):
            self._tell(kind)
            self._ends[kind], self._left[kind] = now + WINDOW, MOST
            self._opened.add(kind)
        told = min(count, self._left[kind])
        self._left[kind] -= told
        return told

    def more(self, kind: _Kind, count: int) -> None:
        """Count what was not told; tell it where all came at once."""
        if count:
            self._more[kind] = self._more.get(kind, 0) + count
        if kind in self._opened:
            self._opened.discard(kind)
            self._tell(kind)

    def flush(self, *, all: bool = False) -> None:
        """Tell the counts whose windows have ended, or ``all``."""
        now = self._clock()
        for kind in [*self._more]:
            if all or now >= self._ends[kind]:
                self._tell(kind)

    def _tell(self, kind: _Kind) -> None:
        if count := self._more.pop(kind, 0):
            what, family = _MORE[kind[0]], kind[1]
            log.info(
                "... and %(count)d more %(what)s",
                {
                    "count": count,
                    "what": f"IPv{family} {what}" if family else what,
                    "family": family,
                },
            )


class Story:
    """Tells what became of what is ``kept`` in sync. For the agent's thread."""

    def __init__(self, kept: Kept, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept, self._clock = kept, clock
        self._bursts = Bursts(clock)
        #: The rejected leases that were told: by family (0: unreadable), name and reason.
        self._rejected: dict[int, dict[str, str]] = {}
        #: The rejected claims of each family as they were read last, and their number.
        self._read: dict[int, tuple[Claims, int]] = {}
        self._began = clock()

    @property
    def due(self) -> float | None:
        """When ``flush`` has something to tell, by the clock; None where it has not."""
        return self._bursts.due

    def flush(self, *, all: bool = False) -> None:
        """Tell how many more there were, of bursts that have ended (or of ``all``)."""
        self._bursts.flush(all=all)

    def started(self, source: str, peers: dict[int, int]) -> None:
        """Tell once that the node is ready: who it is, and what was programmed in how long."""
        if not log.isEnabledFor(logging.INFO):
            return
        config, states = self._kept.config, [*self._kept.known.values()]
        nodes = [state.family.admission.node for state in states]
        log.info(
            "flannel-dp %(version)s is ready on node %(node)s (%(subnets)s): interface "
            "%(interface)s, addresses %(addresses)s, mode %(mode)s, VNI %(vni)s, MTU %(mtu)s, "
            "leases from %(source)s; %(peers)s programmed in %(seconds)s s",
            {
                "version": _version(),
                "node": os.uname().nodename,
                "subnets": _each(node.subnet for node in nodes),
                "interface": _each(state.family.iface for state in states),
                "addresses": _each(node.public_ip for node in nodes),
                "mode": config.backend.mode,
                "vni": config.backend.vni,
                "mtu": _each(_mtu(state, config) for state in states),
                "source": source,
                "peers": peers_in_words(peers) or "no peers",
                "peers4": peers.get(4, 0),
                "peers6": peers.get(6, 0),
                "seconds": f"{self._clock() - self._began:.3f}",
            },
        )

    def peers(self, before: Mapping[int, Claims], after: Mapping[int, Claims]) -> None:
        """Tell which peers came, changed and went, by the accepted leases of each family."""
        if not log.isEnabledFor(logging.INFO):
            return
        for family, new in after.items():
            old = before.get(family)
            if old is new:
                continue
            changes = PeerChanges(Claims(family) if old is None else old, new)
            for kind, count in changes.counts.items():
                if not count:
                    continue
                told = changes.first(kind, self._bursts.room((kind, family), count))
                for change in told:
                    self._tell_peer(family, change.before, change.after, change.described)
                self._bursts.more((kind, family), count - len(told))

    def _tell_peer(
        self, family: int, before: PeerAt | None, after: PeerAt | None, changes: str
    ) -> None:
        one = after or before
        assert one is not None
        fields = {
            "peer": one.name,
            "family": family,
            "subnet": one.subnet,
            "endpoint": one.endpoint,
            "mac": one.mac,
            "where": one.described,
            "changes": changes,
        }
        if before is None:
            log.info("Peer %(peer)s was added: %(where)s", fields)
        elif after is None:
            log.info("Peer %(peer)s was removed: %(where)s", fields)
        else:
            log.info("Peer %(peer)s has changed: %(changes)s", fields)

    def rejections(self, unreadable: Mapping[str, BadClaim], *, again: bool = True) -> None:
        """Tell which leases are rejected that were not before, or for another reason.

        Those of a family are read where their number or the set itself is another one, or
        ``again``.
        """
        if not log.isEnabledFor(logging.WARNING):
            return
        bad: dict[str, str] = {name: one.reason for name, one in unreadable.items()}
        for name in self._told(0, bad):
            one = unreadable[name]
            _tell_rejected(0, one.name, one.reason, one.detail)
        for family, state in self._kept.known.items():
            rejected = state.family.admission.rejected
            claims, count = rejected.claims, len(rejected)
            if not again and self._read.get(family) == (claims, count):
                continue
            self._read[family] = claims, count
            numbers = {claims.name(number): number for number in range(count)}
            reasons = {name: str(claims.reason(number)) for name, number in numbers.items()}
            for name in self._told(family, reasons):
                told = rejected[numbers[name]]
                _tell_rejected(family, told.lease, str(told.reason), told.detail)

    def _told(self, family: int, reasons: dict[str, str]) -> Iterator[str]:
        """Yield which of these are to be told, and then count those that are new besides."""
        before = self._rejected.get(family, {})
        self._rejected[family] = reasons
        fresh = [name for name, reason in reasons.items() if before.get(name) != reason]
        if not fresh:
            return
        room = self._bursts.room(("rejected", family), len(fresh))
        yield from fresh[:room]
        self._bursts.more(("rejected", family), len(fresh) - room)

    def repaired(self, repair: Repair) -> None:
        """Tell which entries of ours another program had changed, and that they are as before."""
        if not repair.counts or not log.isEnabledFor(logging.INFO):
            return
        told = 0
        names = _names(self._kept.known.values(), self._kept.config)
        total = sum(repair.counts.values())
        room = self._bursts.room(("drift", 0), total)
        for family, result in repair.results:
            for number in range(min(len(result), room - told)):
                told += _tell_drift(family, result, number, names, repair.seconds)
        if not repair.results:
            for (table, change), count in sorted(repair.counts.items()):
                log.info(
                    "Drift repaired: %(count)d entries of table %(table)s, which another program "
                    "had %(change)s; found by reading all again",
                    {
                        "count": count,
                        "table": table,
                        "change": change,
                        "seconds": f"{repair.seconds:.4f}",
                    },
                )
            return
        self._bursts.more(("drift", 0), total - told)


def _tell_rejected(family: int, lease: str, reason: str, detail: str) -> None:
    log.warning(
        "Lease %(lease)s is rejected (%(reason)s): %(detail)s",
        {"lease": lease, "family": family, "reason": reason, "detail": detail},
    )


def _tell_drift(
    family: int, result: TableResult, number: int, names: dict[int, str], seconds: float
) -> bool:
    """Tell of one entry; return False for one that could not be repaired."""
    if result.results[number] > 0:
        return False
    op, new, old = result.diff.operation(number)
    fields = {
        "before": describe(old, names) if old is not None else "none",
        "after": "none" if op == REMOVE else describe(new, names),
        "table": result.kind,
        "family": family,
        "change": {ADD: "deleted", REMOVE: "added"}.get(op, "changed"),
        "seconds": f"{seconds:.4f}",
    }
    if op == REMOVE:
        log.info("Drift repaired: removed %(before)s, which another program had added", fields)
    elif op == ADD:
        log.info("Drift repaired: restored %(after)s, which another program had deleted", fields)
    else:
        log.info(
            "Drift repaired: restored %(after)s; another program had made it %(before)s", fields
        )
    return True


def _names(states: Iterable[State], config: NetworkConfig) -> dict[int, str]:
    """Return the names of the devices that entries are on, by ifindex."""
    devices = devices_of(config)
    found: dict[int, str] = {}
    for state in states:
        found[state.uplink] = state.family.iface
        found[state.index] = devices.get(state.number, "")
    return {index: name for index, name in found.items() if index and name}


def _mtu(state: State, config: NetworkConfig) -> int:
    """Return the MTU of pods' packets: the vxlan device's, or the external interface's."""
    room = config.backend.mtu or state.family.uplink_mtu
    return overlay_mtu(room, 6 if ":" in state.family.local else 4) if state.family.local else room


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("flannel-dp")
    except PackageNotFoundError:
        return "(not installed)"


def _each(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
