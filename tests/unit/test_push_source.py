"""PushSource: what a program puts in is what a follower gets, in order, and only complete lists."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import Change, ConfigError, Inbox, Lease, PushSource, Unavailable
from flannel_dp.sources import Delivery
from tests.lib.leases import peer
from tests.lib.waiting import wait_until


class Follower:
    """A thread that follows a source, and what was delivered to it."""

    def __init__(self, source: PushSource) -> None:
        self.woken = threading.Event()
        self.inbox = Inbox(self.woken.set)
        self._thread = threading.Thread(target=source.follow, args=(self.inbox,))
        self._thread.start()

    def next(self) -> Delivery:
        assert self.woken.wait(60)
        self.woken.clear()
        return self.inbox.take()

    def close(self) -> None:
        self.inbox.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.inbox.close()


@pytest.fixture
def source() -> PushSource:
    return PushSource([peer(1), peer(2)], origin="the store")


@pytest.fixture
def follower(source: PushSource) -> Iterator[Follower]:
    made = Follower(source)
    yield made
    made.close()


def leases_of(delivery: Delivery) -> list[Lease]:
    assert delivery.snapshot is not None
    return delivery.snapshot.claims.leases


def test_a_follower_gets_a_snapshot_and_then_changes(
    source: PushSource, follower: Follower
) -> None:
    assert leases_of(follower.next()) == [peer(1), peer(2)]

    source.put(peer(3), peer(2))  # the second is known as it is
    assert follower.next().changes == [Change(added=(peer(3),))]
    assert source.remove(peer(1), "nobody") == ("nobody",)
    assert follower.next().changes == [Change(removed=(peer(1).key,))]
    source.replace_all([peer(7)])
    assert leases_of(follower.next()) == [peer(7)]
    follower.inbox.refresh()
    assert leases_of(follower.next()) == [peer(7)]


def test_what_is_known_already_is_no_news(source: PushSource, follower: Follower) -> None:
    follower.next()

    source.put(peer(1))
    assert source.remove("nobody") == ("nobody",)

    assert follower.inbox.take() == Delivery()
    assert (len(source), source.snapshot().claims.leases) == (2, [peer(1), peer(2)])


def test_trouble_lasts_until_something_is_put_in(source: PushSource, follower: Follower) -> None:
    follower.next()
    source.trouble(Unavailable("the store is down"))
    assert str(follower.next().error) == "the store is down"

    late = Follower(source)  # gets what is known, and that it may be old
    try:
        assert leases_of(late.next()) == [peer(1), peer(2)]
        wait_until(lambda: late.inbox.take().error is not None)
    finally:
        late.close()

    source.put(peer(1))  # nothing new, and the store answers
    assert follower.next().error is None


def test_a_part_is_no_list() -> None:
    source = PushSource()
    for call in (source.snapshot, lambda: source.put(peer(1)), lambda: source.remove("x")):
        with pytest.raises(Unavailable, match="needs a complete list") as caught:
            call()
        assert "replace_all()" in caught.value.hint
    follower = Follower(source)
    try:
        source.trouble(Unavailable("the store is down"))
        assert str(follower.next().error) == "the store is down"
        source.replace_all([peer(1)])
        delivery = follower.next()
        assert (leases_of(delivery), delivery.error) == ([peer(1)], None)
    finally:
        follower.close()


def test_what_is_no_lease_changes_nothing(source: Any) -> None:
    for call in (
        lambda: source.put(peer(3), 5),
        lambda: source.replace_all([peer(3), "x"]),
    ):
        with pytest.raises(ConfigError, match="a lease is"):
            call()
    assert len(source) == 2
