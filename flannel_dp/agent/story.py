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
from itertools import islice
from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp._core import Claims
from flannel_dp.agent.bursts import Bursts
from flannel_dp.agent.changes import NOWHERE, PeerAt, PeerChanges
from flannel_dp.agent.chronicle import MOST_DETAILS, MOST_KEPT, MOST_REJECTED, Chronicle
from flannel_dp.agent.repairs import Repairs
from flannel_dp.agent.status import peers_in_words
from flannel_dp.cluster.lease import BadClaim, printable
from flannel_dp.look.events import Event
from flannel_dp.resources.device.vxlan import overlay_mtu

if TYPE_CHECKING:
    from flannel_dp.agent.kept import Kept
    from flannel_dp.cluster.admission import Rejections
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.cluster.rejections import Rejection
    from flannel_dp.reconcile.drift import Repair
    from flannel_dp.resources.peers.state import State

log = logging.getLogger(__name__)


class Story:
    """Tells what became of what is ``kept`` in sync. For the agent's thread."""

    def __init__(
        self,
        kept: Kept,
        clock: Callable[[], float] = time.monotonic,
        chronicle: Chronicle | None = None,
    ) -> None:
        self._kept, self._clock = kept, clock
        self._chronicle = chronicle or Chronicle()
        self._bursts = Bursts(clock)
        self._repairs = Repairs(kept, self._bursts, self._chronicle)
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

    def began(self) -> None:
        """Note that leases have come and are to be programmed."""
        self._began = self._clock()

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
                "version": version(),
                "node": os.uname().nodename,
                "subnets": _each(node.subnet for node in nodes),
                "interface": _each(state.family.iface for state in states),
                "addresses": _each(node.public_ip for node in nodes),
                "mode": config.backend.mode,
                "vni": config.backend.vni,
                "mtu": _each(mtu_of(state, config) for state in states),
                "source": source,
                "peers": peers_in_words(peers) or "no peers",
                "peers4": peers.get(4, 0),
                "peers6": peers.get(6, 0),
                "seconds": f"{self._clock() - self._began:.3f}",
            },
        )

    def peers(self, before: Mapping[int, Claims], after: Mapping[int, Claims]) -> None:
        """Tell which peers came, changed and went, by the accepted leases of each family."""
        told = log.isEnabledFor(logging.INFO)
        if not (told or self._chronicle.history):
            return
        for family, new in after.items():
            old = before.get(family)
            if old is new:
                continue
            changes = PeerChanges(Claims(family) if old is None else old, new)
            self._keep_peers(changes, is_first=old is None)
            for kind, count in changes.counts.items() if told else ():
                if not count:
                    continue
                some = changes.first(kind, self._bursts.room((kind, family), count))
                for change in some:
                    self._tell_peer(family, change.before, change.after, change.described)
                self._bursts.more((kind, family), count - len(some))

    def _keep_peers(self, changes: PeerChanges, *, is_first: bool) -> None:
        """Have the history keep changes one by one; the list of all peers where there are many."""
        if not self._chronicle.history:
            return
        family, now = changes.family, self._chronicle.clock()
        admission = self._kept.known[family].family.admission
        if is_first or len(changes) > MOST_KEPT:
            self._chronicle.peers(self._kept.known[family].peers, "start" if is_first else "")
            return
        for kind, count in changes.counts.items():
            for change in changes.first(kind, count):
                one = change.after or change.before or NOWHERE
                cause = change.described if kind == "changed" else ""
                if kind == "removed":
                    rejected = admission.rejected.claims.find_name(one.name) >= 0
                    cause = "its lease is rejected" if rejected else "its lease is gone"
                self._chronicle.note(
                    Event(
                        now,
                        kind,
                        family,
                        one.name,
                        one.subnet,
                        cause,
                        before=change.before.described if change.before else "",
                        after=change.after.described if change.after else "",
                    )
                )

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
        if not (log.isEnabledFor(logging.WARNING) or self._chronicle.history):
            return
        now = self._chronicle.clock()
        bad: dict[str, str] = {name: one.reason for name, one in unreadable.items()}
        self._note_rejected(0, islice(unreadable.values(), MOST_REJECTED))
        for name in self._told(0, bad, lambda name: _rejected(now, 0, unreadable[name])):
            one = unreadable[name]
            _tell_rejected(0, one.name, one.reason, one.detail)
        for family, state in self._kept.known.items():
            rejected = state.family.admission.rejected
            claims, count = rejected.claims, len(rejected)
            if not again and self._read.get(family) == (claims, count):
                continue
            first = (rejected[number] for number in range(min(count, MOST_REJECTED)))
            self._note_rejected(family, first)
            self._read[family] = claims, count
            numbers = {claims.name(number): number for number in range(count)}
            reasons = {name: str(claims.reason(number)) for name, number in numbers.items()}

            def event(
                name: str,
                family: int = family,
                rejected: Rejections = rejected,
                numbers: dict[str, int] = numbers,
            ) -> Event:
                number = numbers[name]
                made = _rejected(now, family, rejected[number])
                return replace(made, subnet=rejected.claims.subnet(number))

            for name in self._told(family, reasons, event):
                told = rejected[numbers[name]]
                _tell_rejected(family, told.lease, str(told.reason), told.detail)

    def _note_rejected(self, family: int, found: Iterable[BadClaim | Rejection]) -> None:
        """Have the chronicle know the first leases of a family that are rejected now."""
        now = self._chronicle.clock()
        self._chronicle.rejections(family, tuple(_rejected(now, family, one) for one in found))

    def _told(
        self, family: int, reasons: dict[str, str], event: Callable[[str], Event]
    ) -> Iterator[str]:
        """Yield which of these are to be told, and then count those that are new besides; have the
        history keep what ``event`` makes of each, and those that are not rejected any more."""
        before = self._rejected.get(family, {})
        self._rejected[family] = reasons
        fresh = [name for name, reason in reasons.items() if before.get(name) != reason]
        if self._chronicle.history:
            self._keep_rejected(family, fresh, reasons, event)
            now = self._chronicle.clock()
            for name in islice((one for one in before if one not in reasons), MOST_KEPT):
                self._chronicle.note(Event(now, "accepted", family, printable(name)))
        if not fresh:
            return
        room = self._bursts.room(("rejected", family), len(fresh))
        yield from fresh[:room]
        self._bursts.more(("rejected", family), len(fresh) - room)

    def _keep_rejected(
        self,
        family: int,
        fresh: list[str],
        reasons: dict[str, str],
        event: Callable[[str], Event],
    ) -> None:
        for name in fresh[:MOST_DETAILS]:
            self._chronicle.note(event(name))
        now = self._chronicle.clock()
        for name in fresh[MOST_DETAILS:MOST_KEPT]:
            self._chronicle.note(
                Event(now, "rejected", family, printable(name), reason=reasons[name])
            )
        if left := len(fresh[MOST_KEPT:]):
            self._chronicle.note(
                Event(now, "rejected", family, cause=f"{left} more leases are rejected")
            )

    def repaired(self, repair: Repair) -> None:
        """Tell which entries of ours another program had changed, and that they are as before."""
        self._repairs.tell(repair)


def _rejected(now: float, family: int, one: BadClaim | Rejection) -> Event:
    name = printable(one.name if isinstance(one, BadClaim) else one.lease)
    return Event(now, "rejected", family, name, reason=str(one.reason), cause=printable(one.detail))


def _tell_rejected(family: int, lease: str, reason: str, detail: str) -> None:
    log.warning(
        "Lease %(lease)s is rejected (%(reason)s): %(detail)s",
        {"lease": lease, "family": family, "reason": reason, "detail": detail},
    )


def mtu_of(state: State, config: NetworkConfig) -> int:
    """Return the MTU of pods' packets: the vxlan device's, or the external interface's."""
    room = config.backend.mtu or state.family.uplink_mtu
    return overlay_mtu(room, 6 if ":" in state.family.local else 4) if state.family.local else room


def version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("flannel-dp")
    except PackageNotFoundError:
        return "(not installed)"


def _each(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
