"""What a source has told and the kernel was not yet brought in line with."""

from __future__ import annotations

from collections import Counter

from flannel_dp.cluster.lease import BadClaim, Lease
from flannel_dp.sources import Change, Delivery, Snapshot


class Backlog:
    """Gathers deliveries until they can be acted upon; the later word about a lease counts.

    ``snapshot`` is one that was not synced yet, and stays until it was: a retry needs it.
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
    def changed(self) -> bool:
        """Whether there are changes to apply."""
        return bool(self._added or self._removed)

    def changes(self) -> tuple[list[Lease], list[Lease | str]]:
        """Take the changes: leases that came or changed, names that left."""
        added, removed = [*self._added.values()], [*self._removed]
        self.drop_changes()
        return added, list(removed)

    def drop_changes(self) -> None:
        """The changes are part of a snapshot that came, or has been asked for."""
        self._added, self._removed = {}, {}

    def synced(self, *, complete: bool) -> bool:
        """The snapshot was synced, unless a family could not be: then it is still needed.
        True when there are changes that came after it."""
        if complete:
            self.snapshot = None
        return self.changed

    def bad_reasons(self) -> dict[str, int]:
        """How many claims are broken in form, by reason."""
        return Counter(claim.reason for claim in self._bad.values())
