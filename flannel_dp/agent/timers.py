"""When the agent's loop has to act without an event: audits, retries, and the pace of repairs.

All times are those of one monotonic clock in seconds; None is "not due".
"""

from __future__ import annotations

import random
from collections.abc import Callable

from flannel_dp.backoff import Backoff, jittered
from flannel_dp.errors import ConfigError, shown

AUDIT_SECONDS = 60.0

#: After an event about devices, what failed before is tried again, but not for each event of
#: a burst.
_SETTLE_SECONDS = 0.02

#: What diverts packets is read once in so many seconds, however often rules change.
_PATH_SECONDS = 1.0


class RepairPace:
    """Keeps two writers from rewriting an entry as fast as they can: a hundred repairs at
    once, ten a second from then on, with all the drift of a tenth of a second in each."""

    def __init__(self, clock: Callable[[], float], burst: int = 100, rate: float = 10.0) -> None:
        self._clock, self._burst, self._rate = clock, burst, rate
        self._credit, self._since = float(burst), clock()

    def spend(self) -> None:
        """Note a repair."""
        self._refill()
        self._credit -= 1.0

    def due(self) -> float | None:
        """Return when the next repair may be made; None: now."""
        self._refill()
        if self._credit >= 1.0:
            return None
        return self._clock() + (1.0 - self._credit) / self._rate

    def _refill(self) -> None:
        now = self._clock()
        self._credit = min(float(self._burst), self._credit + (now - self._since) * self._rate)
        self._since = now


class Timers:
    """The loop's due times.

    ``audit`` is the time between two audits in seconds, varied by a tenth. A retry comes after
    0.1 s, later after up to 30 s. Raises ConfigError for an ``audit`` that is not above 0.
    """

    def __init__(self, audit: float, clock: Callable[[], float], random: random.Random) -> None:
        if not isinstance(audit, (int, float)) or not 0 < audit < float("inf"):
            raise ConfigError(
                f"an audit every {shown(audit)} seconds is not possible", hint="give a time above 0"
            )
        self._audit, self._clock, self._random = audit, clock, random
        self._backoff = Backoff(0.1, 30.0, random)
        self.pace = RepairPace(clock)
        self.retry_at: float | None = None
        self.audit_at: float | None = None
        self.path_at: float | None = None
        self._path_next = clock()

    def due(self, at: float | None) -> bool:
        """Return whether ``at`` has come."""
        return at is not None and self._clock() >= at

    def seconds_left(self, *others: float | None) -> float | None:
        """Return the time until the first of an audit, a retry, the next repair and ``others``;
        None where none is due."""
        times = (self.retry_at, self.audit_at, self.path_at, self.pace.due(), *others)
        due = [at for at in times if at is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    # ---- audits

    @property
    def audit_due(self) -> bool:
        """Whether an audit is due."""
        return self.due(self.audit_at)

    def audit_now(self) -> None:
        """Make an audit due."""
        self.audit_at = self._clock()

    def audit_later(self) -> None:
        """Make the next audit due one interval from now."""
        self.audit_at = self._clock() + self.audit_pause()

    def audit_pause(self) -> float:
        """Return the time to the next audit, another one each time."""
        return jittered(self._audit, 0.1, self._random)

    # ---- what diverts packets

    def path_soon(self) -> None:
        """Have it read: now, or a second after the last time."""
        if self.path_at is None:
            self.path_at = max(self._clock(), self._path_next)

    @property
    def path_due(self) -> bool:
        """Whether it is to be read."""
        return self.due(self.path_at)

    def path_done(self) -> None:
        """Note that it was read."""
        self.path_at, self._path_next = None, self._clock() + _PATH_SECONDS

    # ---- what failed

    @property
    def retry_due(self) -> bool:
        """Whether what failed is to be tried again."""
        return self.due(self.retry_at)

    def retry_now(self) -> None:
        """Try again in the next turn."""
        self.retry_at = self._clock()

    def retry_soon(self) -> None:
        """Try again in a moment, unless that is due earlier anyway."""
        soon = self._clock() + _SETTLE_SECONDS
        self.retry_at = soon if self.retry_at is None else min(self.retry_at, soon)

    def retry_later(self) -> None:
        """Try again after a pause, which grows; a retry that comes earlier stays.

        An address may have come that one family waits for, while the other one was repaired.
        """
        if self.retry_at is None or self.retry_due:
            self.retry_at = self._clock() + self._backoff.next()

    def retry_done(self, *, recovered: bool = False) -> None:
        """Cancel the retry; where all has ``recovered``, the next pause is short."""
        self.retry_at = None
        if recovered:
            self._backoff.reset()
