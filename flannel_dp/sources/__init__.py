"""Where leases come from. A source hands over complete snapshots, then what changed.

A source never returns a part of a cluster: what cannot be read whole, or
cannot be trusted to be whole, is an error of the SourceError family.
"""

from __future__ import annotations

from typing import Protocol

from flannel_dp.sources.base import Call, Delivery, Inbox
from flannel_dp.sources.base import Change, Snapshot

__all__ = ["Call", "Change", "Delivery", "FollowedSource", "Inbox", "Snapshot", "Source"]


class Source(Protocol):
    """Anything that can be asked for the leases of a cluster."""

    @property
    def origin(self) -> str:
        """The name of this source in messages."""
        ...

    def snapshot(self) -> Snapshot:
        """Read everything now.

        Raises SourceError when the claims cannot be had or not be trusted.
        """
        ...


class FollowedSource(Source, Protocol):
    """A source that can be followed as it changes."""

    def follow(self, inbox: Inbox) -> None:
        """Deliver a snapshot, then all that changes, until ``inbox`` says to stop.

        Runs on a thread of its own. A snapshot comes first, and again after
        ``Call.REFRESH`` and whenever changes may have been missed. Trouble is
        told (``inbox.trouble``) and retried for ever with a capped, jittered
        pause, and does not end the following; it returns within half a second of
        ``Call.STOP``.
        """
        ...
