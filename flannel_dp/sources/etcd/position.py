"""Moments of an etcd cluster's history."""

from __future__ import annotations

from typing import Self

from flannel_dp.sources.history import Moment


class Position(Moment, frozen=True):
    """A moment in a cluster's history: all changes up to ``revision`` are known."""

    revision: int
    cluster: int

    def breaks_with(self, before: Self) -> str:
        """Return why this is another cluster than ``before``, or an earlier state; "" if it is
        neither.

        A new data directory of the same members has the same cluster ID; its revisions begin
        at 1.
        """
        if self.cluster != before.cluster:
            return (
                f"its cluster ID is {self.cluster:x} and was {before.cluster:x}: another cluster "
                "answers, or it was restored"
            )
        if self.revision < before.revision:
            return (
                f"its revision is {self.revision} and was {before.revision}: it started empty, "
                "or an earlier state was restored"
            )
        return ""
