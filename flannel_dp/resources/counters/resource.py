"""The traffic counters of a node as a resource: attached to its devices, or removed.

Importing this loads nothing of eBPF: a sync that has nothing to do with counters does not
pay for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from flannel_dp._core import Claims
from flannel_dp.errors import Unsupported
from flannel_dp.reconcile.resource import Done, FiltersChanged, Resource, Result
from flannel_dp.resources.counters.store import Counters

if TYPE_CHECKING:
    from flannel_dp.kernel.host import Host
    from flannel_dp.reconcile.report import Report

log = logging.getLogger(__name__)

NAME = "counters"

_MAC_BYTES = 6


class DesiredCounters(Struct, frozen=True):
    """Counters on all devices. Where a map is full, those of ``peers`` are kept; None where not
    all peers are known now."""

    peers: tuple[Claims, ...] | None


class CountersChange(Struct, frozen=True):
    """What has to be done: ``attach`` in words by device, ``remove`` the devices that have
    counters, ``full`` those that had no room for a peer.

    ``indexes`` are the devices' ifindexes, 0 for one that is not made yet; ``peers`` as in
    DesiredCounters.
    """

    attach: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    indexes: Mapping[str, int] = field(default_factory=dict)
    peers: tuple[Claims, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be done."""
        return not (self.attach or self.remove or self.full)

    def lines(self) -> Iterator[str]:
        """Yield one line for each device and what is done to its counters."""
        for name, words in self.attach.items():
            yield f"+ counters of {name}: {', '.join(words)}"
        yield from (f"~ counters of {name}: forget former peers" for name in self.full)
        yield from (f"- counters of {name}" for name in self.remove)


class CountersResource(Resource[DesiredCounters, CountersChange]):
    """Counters on the devices of ``store`` if they are ``wanted``; else they are removed.

    One that neither counts nor removes is not composed: existing counters stay.
    """

    name = NAME
    after = ("device4", "device6")

    def __init__(self, store: Counters, *, wanted: bool) -> None:
        self.store, self.wanted = store, wanted
        self._indexes: Mapping[str, int] = {}

    def prepare(self) -> None:
        """Do what takes more rights than a sync does. Raises as ``Counters.prepare``."""
        if self.wanted:
            self.store.prepare()

    def desired(self, view: Any) -> DesiredCounters | None:
        """Counters on all devices, for the peers of the view; None where they are to go."""
        if not self.wanted:
            return None
        if view.errors:
            return DesiredCounters(None)
        return DesiredCounters(tuple(family.peers for family in view.families))

    def compare(self, host: Host, desired: DesiredCounters | None, done: Done) -> CountersChange:
        """Read pins, filters and whether the maps are full.

        Raises Unsupported where no device can be counted (host-gw), KernelError.
        """
        if desired is None:
            return CountersChange(remove=self.store.to_remove())
        if not self.store.devices:
            raise Unsupported(
                "host-gw has no vxlan device, so nothing can be counted",
                hint="leave --counters out",
            )
        indexes = self._find_devices(done)
        attach = self.store.compare(indexes)
        full = self.store.full() if desired.peers is not None else ()
        return CountersChange(attach, (), full, indexes, desired.peers or ())

    def _find_devices(self, done: Done) -> dict[str, int]:
        """Return the ifindexes of the devices by name: those that were compared or made in this
        pass, else as the kernel has them."""
        facts = [outcome.facts for name, outcome in done.items() if name in self.after]
        found = {one["name"]: one["index"] for one in facts if one.get("name")}
        known = {name: found[name] for name in self.store.devices if name in found}
        if len(known) < len(self.store.devices):
            known = self.store.indexes() | known
        self._indexes = known
        return known

    def apply(self, host: Host, change: CountersChange) -> Result:
        """Load, pin and attach what is missing, and make room; or remove all of it.

        Where one device fails the others are done first. Raises as ``Counters.ensure``.
        """
        if change.remove:
            self._indexes = {}
            return _did(dict.fromkeys(self.store.remove(), "removed"))
        there = {name: index for name, index in change.indexes.items() if index}
        done = self.store.ensure(there) if change.attach else {}
        if change.full:
            gone = self.store.make_room(mac for peers in change.peers for mac in _macs(peers))
            log.info("The counters of %(entries)d former peers were removed", {"entries": gone})
        return _did({name: what for name, what in done.items() if what})

    def concerns(self, event: Any) -> bool:
        """Return whether the filters that count are missing on a device whose filters changed."""
        return isinstance(event, FiltersChanged) and self.is_detached(event.index)

    def is_detached(self, index: int) -> bool:
        """Return whether the device with this ifindex has lost what counts on it.

        Raises KernelError.
        """
        return self.wanted and any(
            self.store.not_attached(name, index)
            for name, one in self._indexes.items()
            if one == index
        )

    def record(self, report: Report, change: CountersChange | None, outcome: Result) -> None:
        """Name what was done for each device; see ``Resource.record``."""
        super().record(report, change, outcome)
        if outcome.skipped:
            return
        report.looked.add(self.name)
        report.counters = dict(outcome.facts.get("counters", {}))
        if outcome.error is not None:
            log.debug("Counters: %(error)s", {"error": outcome.error})


def _did(what: Mapping[str, str]) -> Result:
    return Result(facts={"counters": what})


def _macs(peers: Claims) -> Iterator[bytes]:
    """Return the six bytes of each peer's MAC."""
    column = memoryview(peers.macs).tobytes()
    return (column[at : at + _MAC_BYTES] for at in range(0, len(column), _MAC_BYTES))
