"""Subnets that a node cannot have, because they overlap what is connected to it.

Asked before a lease is published: afterwards other nodes would send to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flannel_dp.cluster.admission import Protected
from flannel_dp.errors import NotYet

#: Says what overlaps subnets, by family; with True, of subnets that this node never had.
Collides = Callable[[Mapping[int, str], bool], Mapping[int, Protected]]


def no_collision(subnets: Mapping[int, str], fresh: bool) -> Mapping[int, Protected]:
    """For a caller that knows nothing of the node."""
    return {}


def check_collision(subnets: Mapping[int, str], collides: Collides) -> None:
    """Raise NotYet where subnets that this node has overlap what is connected to it."""
    for family, met in collides(subnets, False).items():
        raise NotYet(
            f"this node's subnet {subnets[family]} overlaps {met.what}: nothing was published",
            hint=met.remedy,
        )
