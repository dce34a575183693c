"""Where leases come from. Every source hands over complete snapshots.

A source never returns a part of a cluster: what cannot be read whole, or
cannot be trusted to be whole, is an error of the SourceError family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from flannel_dp.lease import Claims


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All claims a source knew at one moment.

    ``origin`` names the source in messages; ``seconds`` is the time it took
    to read and decode them.
    """

    claims: Claims
    origin: str
    seconds: float


class Source(Protocol):
    """Anything that can be asked for the leases of a cluster."""

    def snapshot(self) -> Snapshot:
        """Read everything now.

        Raises SourceError when the claims cannot be had or not be trusted.
        """
        ...
