"""Where leases come from. A source delivers complete snapshots, then what changed.

A source never returns a part of a cluster: what cannot be read whole, or
cannot be trusted to be whole, is an error of the SourceError family.
"""

from __future__ import annotations

from flannel_dp.sources.base import (
    Call,
    Change,
    Delivery,
    FollowedSource,
    Inbox,
    Snapshot,
    Source,
)

__all__ = ["Call", "Change", "Delivery", "FollowedSource", "Inbox", "Snapshot", "Source"]
