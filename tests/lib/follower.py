"""A follower of a source, which keeps the leases that an agent would have."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flannel_dp.cluster.lease import BadClaim, Lease
from flannel_dp.errors import SourceError
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.sources import Change, FollowedSource, Inbox
from tests.lib.waiting import LIMIT


@dataclass
class Follower:
    """Follows a source on a thread, in a namespace if one is named."""

    source: FollowedSource
    netns: str = ""
    leases: dict[str, Lease] = field(default_factory=dict)
    bad: dict[str, BadClaim] = field(default_factory=dict)
    snapshots: int = 0
    changes: list[Change] = field(default_factory=list)
    #: All errors that the source has reported; one that is reported again is listed once.
    errors: list[SourceError] = field(default_factory=list)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self._error: SourceError | None = None
        self._news = threading.Condition()
        self.inbox = Inbox(self._wake)
        self.thread = threading.Thread(target=self._run, name="follow")

    def start(self) -> Follower:
        self.thread.start()
        return self

    def stop(self) -> None:
        """End it; raise what ended the thread before."""
        self.inbox.stop()
        self.thread.join(LIMIT)
        alive = self.thread.is_alive()
        self.inbox.close()
        assert not alive
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Follower:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            if self.netns:
                call_in_netns(self.netns, self.source.follow, self.inbox)
            else:
                self.source.follow(self.inbox)
        except BaseException as error:
            self.failure = error

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    @property
    def error(self) -> SourceError | None:
        """The trouble that the source has now."""
        with self._news:
            self._take()
        return self._error

    def until(self, predicate: Callable[[], object]) -> None:
        """Take in news until ``predicate()`` is true."""
        deadline = time.monotonic() + LIMIT
        while True:
            with self._news:
                self._take()
                if predicate():
                    return
                left = deadline - time.monotonic()
                assert left > 0, f"not within {LIMIT} s; error: {self._error}"
                assert self.failure is None, self.failure
                # Not all that is waited for wakes this side.
                self._news.wait(min(left, 0.02))

    def _take(self) -> None:
        delivery = self.inbox.take()
        if delivery.snapshot is not None:
            self.snapshots += 1
            claims = delivery.snapshot.claims
            self.leases = {lease.name: lease for lease in claims.leases}
            self.bad = {claim.name: claim for claim in claims.bad}
        for change in delivery.changes:
            self.changes.append(change)
            added = {lease.name: lease for lease in change.added}
            bad = {claim.name: claim for claim in change.bad}
            for name in (*change.removed, *added, *bad):
                self.leases.pop(name, None)
                self.bad.pop(name, None)
            self.leases |= added
            self.bad |= bad
        if delivery.error is not None and delivery.error is not self._error:
            self.errors.append(delivery.error)
        self._error = delivery.error
