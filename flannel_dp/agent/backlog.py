"""What a source has delivered and the kernel does not have yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from flannel_dp.cluster.lease import BadClaim, Lease
from flannel_dp.sources import Change, Delivery, Snapshot


class PendingChanges(NamedTuple):
    """New and changed leases, names of those that are gone, and of these the ones that cannot be
    read any more."""

    added: list[Lease]
    removed: list[str]
    bad: list[BadClaim]


class Backlog:
    """Gather deliveries until they are applied; the last one about a lease counts.

    ``snapshot`` is one that is not synced yet, and stays until it is: a retry needs it.
    """

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        #: Whether the source has ever delivered.
        self.heard = False
        self._added: dict[str, Lease] = {}
        self._removed: dict[str, None] = {}
        self._bad: dict[str, BadClaim] = {}

    def add(self, delivery: Delivery) -> None:
        """Add what was delivered."""
        if delivery.snapshot is not None:
            self.heard = True
            self.snapshot = delivery.snapshot
            self.drop_changes()
            self._bad = {claim.name: claim for claim in delivery.snapshot.claims.bad}
        for change in delivery.changes:
            self._merge(change)

    def _merge(self, change: Change) -> None:
        for name in change.removed:
            self._added.pop(name, None)
            self._bad.pop(name, None)
            self._removed[name] = None
        for lease in change.added:
            self._removed.pop(lease.label, None)
            self._bad.pop(lease.label, None)
            self._added[lease.label] = lease
        for claim in change.bad:
            self._added.pop(claim.name, None)
            self._removed[claim.name] = None
            self._bad[claim.name] = claim

    @property
    def unreadable(self) -> Mapping[str, BadClaim]:
        """The leases that cannot be read, by name."""
        return self._bad

    @property
    def changed(self) -> bool:
        """Whether there are changes to apply."""
        return bool(self._added or self._removed)

    def changes(self) -> PendingChanges:
        """Take the changes."""
        removed = [*self._removed]
        bad = [self._bad[name] for name in removed if name in self._bad]
        taken = PendingChanges([*self._added.values()], removed, bad)
        self.drop_changes()
        return taken

    def drop_changes(self) -> None:
        """Drop the changes: a snapshot that came, or was asked for, has them."""
        self._added, self._removed = {}, {}

    def synced(self, *, complete: bool) -> bool:
        """Note that the snapshot was synced; it is kept unless all families were (``complete``).
        Return whether there are changes that came after it."""
        if complete:
            self.snapshot = None
        return self.changed

    def bad_reasons(self) -> dict[str, int]:
        """Return the number of leases that cannot be read, by reason."""
        return Counter(claim.reason for claim in self._bad.values())
