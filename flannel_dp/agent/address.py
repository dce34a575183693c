"""Whether this node still has the public address that its lease was published with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Struct

from flannel_dp.backoff import Backoff
from flannel_dp.errors import FlannelDPError

if TYPE_CHECKING:
    from flannel_dp.dataplane import DataPlane


class AddressChange(Struct, frozen=True):
    """A public address of one family that changed; ``old`` is "" where there was none."""

    family: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"IPv{self.family} {self.old or 'none'} -> {self.new}"


class AddressWatch:
    """Compares ``published``, the public addresses of this node's lease by family, with the
    node's own. A lease that another program publishes has none here, and nothing is compared.

    For the agent's thread alone.
    """

    def __init__(
        self, published: dict[int, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._published, self._clock = published, clock
        self._pause = Backoff(first=1.0, most=30.0)
        self._not_before = 0.0

    def changes(self, plane: DataPlane, *, troubled: bool) -> list[AddressChange]:
        """Return the addresses that changed, and those of a family that had none so far, as at
        boot. An address that is gone without another one in its place is no change: the lease
        stays.

        The node is only read when the agent has a problem (``troubled``) or the data plane was
        synced with another address than the published one.
        """
        if not self._published or self._clock() < self._not_before:
            return []
        known = plane.known.values()
        other = any(
            state.family.admission.node.public_ip != self._published.get(state.number, "")
            for state in known
        )
        if not (troubled or other):
            return []
        try:
            now = plane.resolver.public_addresses()
        except FlannelDPError:  # none at all: the sync that fails reports it
            return []
        return [
            AddressChange(family, old, now[family][0])
            for family in plane.families
            for old in (self._published.get(family, ""),)
            if family in now and old not in now[family]
        ]

    def failed(self) -> None:
        """Note that the lease could not be published; the next comparison comes after a pause."""
        self._not_before = self._clock() + self._pause.next()
