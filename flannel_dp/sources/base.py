"""What a source of leases is, what it delivers, and the inbox that it delivers into.

A source is read on a thread of its own and its deliveries are applied on the agent's
thread. The inbox lies between the two: everything that came together is taken together,
and either side waits on a descriptor instead of a timer.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Protocol

from msgspec import Struct, field
from msgspec.structs import replace

from flannel_dp.cluster.lease import BadClaim, Lease, LeaseList
from flannel_dp.errors import SourceError, require

#: How long peers are kept after a store started afresh, in seconds.
GRACE_SECONDS = 600.0


class Snapshot(Struct, frozen=True):
    """All claims a source knew at one moment.

    ``origin`` names the source in messages; ``seconds`` is the time it took
    to read and decode them. ``consistent`` is True for a store's complete list
    as of one revision, which may be asked for again. ``afresh`` says why the
    store is another one than before, or at an earlier state: "" when it is not.
    """

    claims: LeaseList
    origin: str
    seconds: float
    consistent: bool = False
    afresh: str = ""


class Change(Struct, frozen=True):
    """What changed since the snapshot or change before it.

    ``added`` are new and changed leases, ``removed`` the names of those that
    are gone (``Lease.name``, or the subnet key where they have none), ``bad``
    claims whose new form is broken: they are no leases any more.
    """

    added: tuple[Lease, ...] = ()
    removed: tuple[str, ...] = ()
    bad: tuple[BadClaim, ...] = ()


class Call(Enum):
    """Why ``Inbox.wait`` returned."""

    STOP = "stop"
    REFRESH = "refresh"
    READY = "ready"
    TIMEOUT = "timeout"


class Delivery(Struct):
    """All that came since the last one: a snapshot (None: none came), and the changes after
    it, in their order. ``error`` is why the source cannot be followed now, None when it can."""

    snapshot: Snapshot | None = None
    changes: list[Change] = field(default_factory=list)
    error: SourceError | None = None


class Inbox:
    """One source's letter box. ``wake()`` is called, on the source's thread, when
    something came into it. Thread-safe."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        require(callable(wake), "wake", wake, "a function")
        self._wake = wake
        self._lock = threading.Lock()
        self._delivery = Delivery()
        self._stop = self._refresh = False
        self._calls = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close the descriptor; after the source's thread has ended."""
        if self._calls >= 0:
            os.close(self._calls)
            self._calls = -1

    # ---- the source's side

    def put(self, news: Snapshot | Change) -> None:
        """Deliver a snapshot, which stands for all that came before it, or a change.

        The source counts as healthy from then on.
        """
        with self._lock:
            self._delivery.error = None
            if isinstance(news, Snapshot):
                before = self._delivery.snapshot
                if before is not None and before.afresh and not news.afresh:
                    news = replace(news, afresh=before.afresh)
                self._delivery.snapshot = news
                self._delivery.changes = []
            else:
                self._delivery.changes.append(news)
        self._wake()

    def trouble(self, error: SourceError) -> None:
        """The source cannot be followed now; what was delivered stays true as far as known."""
        with self._lock:
            self._delivery.error = error
        self._wake()

    def healthy(self) -> None:
        """Note that the source can be read again, and that nothing has changed meanwhile."""
        with self._lock:
            if self._delivery.error is None:
                return
            self._delivery.error = None
        self._wake()

    @property
    def stopping(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stop

    def wait(self, timeout: float | None = None, fds: Iterable[int] = ()) -> Call:
        """Wait until the agent calls, a descriptor of ``fds`` can be read, or the timeout.

        STOP goes before REFRESH, which is reported once, before READY.
        ``timeout`` is in seconds, None for ever.
        """
        poller = select.poll()
        for fd in (self._calls, *fds):
            poller.register(fd, select.POLLIN)
        ready = poller.poll(None if timeout is None else max(0.0, timeout) * 1000)
        if self._stop:
            return Call.STOP
        with self._lock:
            if self._refresh:
                self._refresh = False
                os.eventfd_read(self._calls)
                return Call.REFRESH
        return Call.READY if ready else Call.TIMEOUT

    # ---- the agent's side

    def take(self) -> Delivery:
        """Take all that came since the last time; an error stays until the source recovers."""
        with self._lock:
            taken = self._delivery
            self._delivery = Delivery(error=taken.error)
            return taken

    def refresh(self) -> None:
        """Ask the source for a new snapshot."""
        with self._lock:
            if not self._refresh and not self._stop:
                self._refresh = True
                os.eventfd_write(self._calls, 1)

    def stop(self) -> None:
        """Tell the source to come to its end; ``wait`` says so from now on."""
        with self._lock:
            if not self._stop:
                self._stop = True
                os.eventfd_write(self._calls, 1)


class Source(Protocol):
    """Anything that can be asked for the leases of a cluster."""

    @property
    def origin(self) -> str:
        """The name of this source in messages."""
        ...

    def snapshot(self) -> Snapshot:
        """Read everything now.

        Raises SourceError when leases are unavailable or not trustworthy.
        """
        ...


class FollowedSource(Source, Protocol):
    """A source that can be followed as it changes."""

    def follow(self, inbox: Inbox) -> None:
        """Deliver a snapshot, then all that changes, until ``inbox`` says to stop.

        Runs on a thread of its own. A snapshot comes first, and again after
        ``Call.REFRESH`` and whenever changes may have been missed. Errors go to
        ``inbox.trouble`` and are retried for ever with a capped, jittered pause;
        they do not end it. Returns within half a second of ``Call.STOP``.
        """
        ...
