"""After any changes, events say what reading the tables says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flannel_dp._core import ADD, REMOVE, REPLACE
from flannel_dp.tables.entries import Fdb, Neighbour, Route
from tests.lib.hosts import Lab
from tests.lib.kernel_events import Followed, Hand, operations
from tests.lib.leases import address, endpoint, mac, subnet


def hostile(chance: random.Random, family: int, index: int) -> tuple[Any, int]:
    """One change to one of a few keys, half of which are wanted."""
    number, other = chance.choice((1, 2, 11, 12)), chance.choice((1, 2, 12))
    op = chance.choice((ADD, REPLACE, REPLACE, REMOVE, REMOVE))
    kind = chance.choice(("neighbour", "fdb", "route", "route"))
    if kind == "neighbour":
        return Neighbour(index, address(family, number), mac(family, other)), op
    if kind == "fdb":
        return Fdb(index, mac(family, number), endpoint(family, other)), op
    metric = chance.choice((0, 0, 0, 9))
    route = Route(
        subnet(family, number), metric=metric, protocol=chance.choice((138, 138, 3)), device=index
    )
    if family == 4 and chance.random() < 0.6:
        return route._replace(nexthop=other, device=0), op
    return route._replace(gateway=address(family, other), onlink=True), op


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[int, Followed]]:
    with Lab() as lab:
        made = {family: Followed(lab.host(), family) for family in (4, 6)}
        yield made
        for one in made.values():
            one.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 40), cuts=st.integers(1, 4))
def test_events_say_what_reading_the_tables_says(
    shared: dict[int, Followed], family: int, seed: int, count: int, cuts: int
) -> None:
    """After any changes, whenever they are read, in the kernel's own words."""
    followed, chance = shared[family], random.Random(seed)
    with Hand(followed.host) as hand:
        for turn in range(count):
            hand.write(*hostile(chance, family, followed.overlay.index))
            if turn % cuts == 0:
                followed.read()
    followed.read()
    for kind, view in followed.tables.items():
        assert operations(view.take()) == followed.truth(kind), kind
    followed.overlay.sync(followed.wanted)
    followed.read()
    for view in followed.tables.values():
        view.forget()
