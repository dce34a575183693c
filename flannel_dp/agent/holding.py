"""When an agent removes peers that a list of leases lacks and the brake holds back.

The list of a store that is complete as of one moment (etcd, an API server) is not a
truncated file: peers that a second one, begun some time later, lacks as well are removed.
For a file that takes a person. After a store started afresh or went back to an older state,
no peer is removed for a grace period: nodes publish their leases again one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from flannel_dp.errors import ShrinkRefused
from flannel_dp.sources import Snapshot
from flannel_dp.sources.base import GRACE_SECONDS

#: Between a list that lacks peers and the list that confirms it, in seconds.
CONFIRM_SECONDS = 15.0


class Holding:
    """What is held back, since when, and when the source has to be asked again. ``due`` is
    that time by ``clock``, None while nothing is to be asked."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        confirm: float = CONFIRM_SECONDS,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._clock, self._confirm, self._grace = clock, confirm, grace
        self._since: dict[tuple[int, str], float] = {}
        self._listed = clock()
        self._consistent = self._asked = False
        self._afresh, self._until = "", 0.0
        self.due: float | None = None

    def arrived(self, snapshot: Snapshot) -> None:
        """Note a list, which is synced next."""
        self._listed = self._clock() - snapshot.seconds
        self._consistent, self._asked = snapshot.consistent, False
        if snapshot.afresh:
            self._until = self._clock() + self._grace
            over = time.strftime("%H:%M:%S", time.localtime(time.time() + self._grace))
            self._afresh = f"{snapshot.afresh}; no peer is removed before {over}: "

    @property
    def keep(self) -> bool:
        """Whether the list that came last may remove no peer at all."""
        return self._listed < self._until

    @property
    def confirmed(self) -> dict[int, set[str]]:
        """Peers that the list that came last may remove: one long enough before it lacked them,
        too. By family and name."""
        names: dict[int, set[str]] = {}
        if self._consistent and not self.keep:
            for (family, name), since in self._since.items():
                if since + self._confirm <= self._listed:
                    names.setdefault(family, set()).add(name)
        return names

    def update(self, held: Mapping[int, Collection[str]]) -> bool:
        """After a sync or a change: ``held`` is what is held back now. Return whether there
        is any."""
        now = {(family, name) for family, names in held.items() for name in names}
        self._since = {one: self._since.get(one, self._clock()) for one in now}
        if not now:
            self._afresh, self._until = "", 0.0
        first = min(self._since.values(), default=0.0) + self._confirm
        wanted = bool(now) and self._consistent and not self._asked
        self.due = max(first, self._until) if wanted else None
        return bool(now)

    def mark_asked(self) -> None:
        """Note that the source was asked for a list."""
        self._asked, self.due = True, None

    def explain(self, error: ShrinkRefused) -> ShrinkRefused:
        """Return the error for health: with what happens next."""
        if not self._consistent:
            return error
        again = "" if self.keep else f"; removed if a list {self._confirm:g} s later lacks them too"
        return ShrinkRefused(
            f"{self._afresh if self.keep else ''}{error.message}{again}", hint=error.hint
        )
