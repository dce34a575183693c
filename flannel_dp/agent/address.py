"""Whether this node still has the public address that its lease was published with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

from flannel_dp.backoff import Backoff
from flannel_dp.errors import FlannelDPError

if TYPE_CHECKING:
    from flannel_dp.node.view import Resolver


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

    def changes(
        self, synced: Mapping[int, str], node: Resolver, *, troubled: bool
    ) -> list[AddressChange]:
        """Return the addresses that changed, and those of a family that had none so far, as at
        boot. An address that is gone without a successor is no change: the lease stays. A virtual
        address that is left is no successor.

        ``synced`` are the addresses by family that the last sync worked with. ``node`` is only
        read when the agent has a problem (``troubled``) or when such an address is not the
        published one.
        """
        if not self._published or self._clock() < self._not_before:
            return []
        other = any(
            address != self._published.get(family, "") for family, address in synced.items()
        )
        if not (troubled or other):
            return []
        try:
            now = node.public_addresses(self._published)
        except FlannelDPError:  # none at all: the sync that fails reports it
            return []
        return [
            AddressChange(family, old, now[family][0])
            for family in node.families
            for old in (self._published.get(family, ""),)
            if family in now and old not in now[family]
        ]

    def failed(self) -> None:
        """Note that the lease could not be published; the next comparison comes after a pause."""
        self._not_before = self._clock() + self._pause.next()

    @property
    def due(self) -> float:
        """When ``changes`` has something to say again after ``failed``, by the clock; infinite
        when it may be asked at any time."""
        return self._not_before if self._clock() < self._not_before else math.inf
