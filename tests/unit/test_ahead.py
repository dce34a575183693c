"""Two threads that dump: each scope is read once, by whoever comes first."""

from __future__ import annotations

import threading
from typing import Any, cast

from flannel_dp._core import Channel, Pages
from flannel_dp.kernel.ahead import ReadAhead
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import fdb_scope, neighbour_scope, route_scope
from tests.lib.waiting import LIMIT

FDB, NEIGHBOURS, ROUTES = fdb_scope(7), neighbour_scope(7, 4), route_scope(4, device=7)


class Slow:
    """A channel that dumps when it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go_on = threading.Event()
        self.fetched: list[Scope] = []

    def fetch(self, scopes: list[Scope], expected: int) -> list[Pages]:
        self.fetched += scopes
        self.asked.set()
        assert self.go_on.wait(LIMIT)
        return [Pages(scope, expected) for scope in scopes]


def read_ahead(channel: Slow) -> ReadAhead:
    return ReadAhead(lambda: cast(Channel, channel))


def test_what_was_not_begun_is_the_callers_to_read() -> None:
    slow = Slow()
    with read_ahead(slow) as ahead:
        ahead.start([FDB, NEIGHBOURS, ROUTES], 1)
        assert slow.asked.wait(LIMIT)
        assert ahead(ROUTES) is None
        slow.go_on.set()
        found: Any = ahead(FDB)
        assert found.scope == FDB
    assert ROUTES not in slow.fetched
    assert slow.fetched[0] == FDB


def test_what_was_begun_is_waited_for() -> None:
    slow = Slow()
    with read_ahead(slow) as ahead:
        ahead.start([FDB], 1)
        assert slow.asked.wait(LIMIT)
        threading.Timer(0, slow.go_on.set).start()
        found: Any = ahead(FDB)
        assert found.scope == FDB


def test_a_scope_that_nobody_began_to_read_is_the_callers() -> None:
    with read_ahead(Slow()) as ahead:
        assert ahead(FDB) is None


def test_pages_are_handed_over_once() -> None:
    slow = Slow()
    slow.go_on.set()
    with read_ahead(slow) as ahead:
        ahead.start([FDB], 1)
        assert slow.asked.wait(LIMIT)
        assert ahead(FDB) is not None
        assert ahead(FDB) is None
