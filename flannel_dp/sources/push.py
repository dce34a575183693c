"""Leases that a program puts in itself: the source of an agent with a store of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from flannel_dp.cluster.lease import Lease, LeaseList
from flannel_dp.errors import SourceError, Unavailable, require
from flannel_dp.sources.base import Call, Change, Inbox, Snapshot


class PushSource:
    """A source that the program fills, for an ``Agent`` or for ``DataPlane.sync``.

    ``replace_all`` gives the complete list; then ``put`` and ``remove`` tell what changes, and the
    agent applies each at a cost that follows the change. ``PushSource(leases)`` begins with a
    complete list. Leases go by their name (``Lease.label``: the name, else the subnet's key).
    ``origin`` names the source in messages. ::

        source = PushSource()
        with Agent(dataplane, source):
            source.replace_all(store.leases())
            for event in store.follow():
                source.put(event.lease) if event.alive else source.remove(event.lease)

    All methods may be called from any thread and return at once. Raises ConfigError for what is no
    lease.
    """

    def __init__(
        self, leases: Iterable[Lease] | None = None, *, origin: str = "this program"
    ) -> None:
        self._origin, self._lock = origin, threading.Lock()
        self._known: dict[str, Lease] | None = None
        self._error: SourceError | None = None
        self._inboxes: list[Inbox] = []
        if leases is not None:
            self.replace_all(leases)

    @property
    def origin(self) -> str:
        """The name of this source in messages."""
        return self._origin

    def __len__(self) -> int:
        return len(self._known or ())

    # ---- the program's side

    def replace_all(self, leases: Iterable[Lease]) -> None:
        """Give the complete list: leases that it lacks are gone."""
        require(isinstance(leases, Iterable), "leases", leases, "leases")
        known = {_checked(lease).label: lease for lease in leases}
        with self._lock:
            self._known, self._error = known, None
            for inbox in self._inboxes:
                inbox.put(self._snapshot(known))

    def put(self, *leases: Lease) -> None:
        """Tell of leases that are new or changed. One that is known as it is makes no work.

        Raises SourceError before the first ``replace_all``: a part of a cluster is no list.
        """
        with self._lock:
            known = self._complete("put")
            news = [one for one in leases if known.get(_checked(one).label) != one]
            known.update((one.label, one) for one in news)
            self._tell(Change(added=tuple(news)) if news else None)

    def remove(self, *leases: Lease | str) -> tuple[str, ...]:
        """Tell of leases that are gone, by themselves or their names; return the names that were
        not known. Raises SourceError as ``put``."""
        for one in leases:
            require(isinstance(one, (Lease, str)), "a lease", one, "a Lease or its name")
        names = [one if isinstance(one, str) else one.label for one in leases]
        with self._lock:
            known = self._complete("remove")
            gone = [name for name in dict.fromkeys(names) if name in known]
            for name in gone:
                del known[name]
            self._tell(Change(removed=tuple(gone)) if gone else None)
        return tuple(name for name in names if name not in gone)

    def trouble(self, error: SourceError) -> None:
        """Tell that the store cannot be read now: health and logs say so, and what was put in
        stays. The next ``put``, ``remove`` or ``replace_all`` ends it."""
        require(isinstance(error, SourceError), "error", error, "a SourceError")
        with self._lock:
            self._error = error
            for inbox in self._inboxes:
                inbox.trouble(error)

    # ---- the agent's side

    def snapshot(self) -> Snapshot:
        """Return all leases that are known. Raises Unavailable before the first ``replace_all``."""
        with self._lock:
            return self._snapshot(self._complete("snapshot"))

    def follow(self, inbox: Inbox) -> None:
        """Deliver a snapshot, then what is put in, until ``inbox`` says to stop; see
        FollowedSource."""
        with self._lock:
            self._inboxes.append(inbox)
            self._deliver(inbox)
        try:
            while (call := inbox.wait()) is not Call.STOP:
                if call is Call.REFRESH:
                    with self._lock:
                        self._deliver(inbox)
        finally:
            with self._lock:
                self._inboxes.remove(inbox)

    def _deliver(self, inbox: Inbox) -> None:
        if self._known is not None:
            inbox.put(self._snapshot(self._known))
        if self._error is not None:
            inbox.trouble(self._error)

    def _tell(self, change: Change | None) -> None:
        self._error = None
        for inbox in self._inboxes:
            if change is None:
                inbox.healthy()
            else:
                inbox.put(change)

    def _complete(self, what: str) -> dict[str, Lease]:
        if self._known is None:
            raise self._incomplete(f"{what}()")
        return self._known

    def _incomplete(self, what: str) -> Unavailable:
        return Unavailable(
            f"{self._origin}: {what} needs a complete list of leases, and none was given yet",
            hint="call replace_all() with the leases of all nodes first",
        )

    def _snapshot(self, known: dict[str, Lease]) -> Snapshot:
        return Snapshot(LeaseList([*known.values()], []), self._origin, 0.0)


def _checked(lease: Lease) -> Lease:
    require(isinstance(lease, Lease), "a lease", lease, "a Lease")
    return lease
