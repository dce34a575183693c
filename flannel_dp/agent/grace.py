"""How long a peer stays that has a lease, and not one that can be used.

A lease that became unreadable or incomplete is more often a mistake of the hand or the program
that wrote it than the end of its node: flanneld ignores it. The peer keeps what it had for a
grace period. One whose lease is deleted is removed at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from flannel_dp.errors import SourceError
from flannel_dp.sources.base import GRACE_SECONDS


class Grace:
    """The leases that cannot be used, since when, and what they lack. ``due`` is when the source
    has to be asked again because a period ends, by ``clock``; None where none runs."""

    def __init__(self, clock: Callable[[], float], *, seconds: float = GRACE_SECONDS) -> None:
        self._clock, self._seconds = clock, seconds
        self._since: dict[str, float] = {}
        self._lacking: dict[str, str] = {}
        self._asked: set[str] = set()

    @property
    def due(self) -> float | None:
        """When the first period ends that the source was not asked after."""
        since = [at for name, at in self._since.items() if name not in self._asked]
        return min(since) + self._seconds if since else None

    @property
    def over(self) -> set[str]:
        """The names of leases whose period has ended."""
        now = self._clock()
        return {name for name, at in self._since.items() if at + self._seconds <= now}

    @property
    def kept(self) -> int:
        """How many leases cannot be used and have a peer that is kept."""
        return len({*self._since} - self.over)

    def mark_asked(self) -> None:
        """Note that the source was asked for a list, which is what removes those of ``over``."""
        self._asked = self.over

    def listed(self, lacking: Mapping[str, str]) -> None:
        """Note what leases of a whole list lack, by their names."""
        self._since = {name: self._since.get(name, self._clock()) for name in lacking}
        self._lacking = dict(lacking)
        self._asked &= {*lacking}

    def changed(self, names: Iterable[str], lacking: Mapping[str, str]) -> None:
        """Note what changed leases lack; others of ``names`` are good now, or gone."""
        rest = {name: text for name, text in self._lacking.items() if name not in {*names}}
        self.listed({**rest, **lacking})

    def explain(self) -> SourceError | None:
        """Return the error for health, None where no peer is kept."""
        over = self.over
        kept = {name: at for name, at in self._since.items() if name not in over}
        if not kept:
            return None
        first = min(kept, key=lambda name: (kept[name], name))
        ends = time.time() + kept[first] + self._seconds - self._clock()
        until = time.strftime("%H:%M:%S", time.localtime(ends))
        text = (
            "1 lease of a known peer cannot be used"
            if len(kept) == 1
            else f"{len(kept)} leases of known peers cannot be used, the first"
        )
        return SourceError(
            f"{text}: {first}: {self._lacking[first]}; its entries are kept until {until}",
            hint="publish the lease again: restart flannel on that node",
        )
