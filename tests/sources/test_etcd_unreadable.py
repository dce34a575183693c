"""Answers of a real etcd that are garbled on their way: each is an error of that member, told
and retried, and none ends who asked."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp.cluster.lease import Identity
from flannel_dp.errors import Unavailable
from flannel_dp.sources import Inbox
from flannel_dp.sources.etcd import messages as pb
from flannel_dp.sources.etcd.lease import EtcdLease
from flannel_dp.sources.etcd.source import EtcdSource, open_client
from tests.lib.etcd import CONFIG, QUICK, EtcdServer, attrs, subnet_name
from tests.lib.etcd_garbler import (
    Change,
    Garbler,
    WithMore,
    cut_short,
    edited,
    empty,
    in_range,
    in_watch,
    noise,
)
from tests.lib.follower import Follower
from tests.lib.waiting import LIMIT, wait_until


@pytest.fixture(name="garbler")
def garbler_fixture(etcd: EtcdServer) -> Iterator[Garbler]:
    made = Garbler(etcd)
    yield made
    made.close()


def without_header(message: Any) -> None:
    message.ClearField("header")


def revision(number: int) -> Callable[[Any], None]:
    def edit(message: Any) -> None:
        message.header.revision = number

    return edit


def created(number: int) -> Callable[[Any], None]:
    def edit(message: Any) -> None:
        message.kvs[0].create_revision = number

    return edit


def no_key(message: Any) -> None:
    message.kvs[0].key = b""


RANGES: dict[str, Change] = {
    "noise": noise,
    "empty": empty,
    "cut": cut_short,
    "no header": in_range(without_header),
    "negative revision": in_range(revision(-5)),
    "huge revision": in_range(revision(2**63 - 1)),
    "negative create_revision": in_range(created(-1)),
    "huge create_revision": in_range(created(2**63 - 1)),
    "no key": in_range(no_key),
}


@pytest.mark.parametrize("change", RANGES.values(), ids=RANGES.keys())
def test_an_unreadable_list_is_unavailable_and_names_the_member(
    etcd: EtcdServer, garbler: Garbler, change: Change
) -> None:
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    garbler.fail("Range", change)

    with pytest.raises(Unavailable, match="unreadable answer: RangeResponse") as caught:
        EtcdSource(etcd.options(endpoints=(garbler.url,)), timeout=LIMIT).snapshot()
    assert garbler.url in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("change", RANGES.values(), ids=RANGES.keys())
def test_the_next_member_is_asked_for_an_unreadable_list(
    etcd: EtcdServer, garbler: Garbler, change: Change
) -> None:
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    garbler.fail("Range", change)

    source = EtcdSource(etcd.options(endpoints=(garbler.url, etcd.url)), timeout=LIMIT)
    (lease,) = source.snapshot().claims.leases

    assert lease.name == subnet_name(1)
    assert not garbler.left("Range")


def of_type(number: int) -> Callable[[Any], None]:
    def edit(message: Any) -> None:
        for event in message.events:
            event.type = number

    return edit


def event_created(number: int) -> Callable[[Any], None]:
    def edit(message: Any) -> None:
        message.events[0].kv.create_revision = number

    return edit


def event_without_key(message: Any) -> None:
    message.events[0].kv.key = b""


def canceled(message: Any) -> None:
    message.canceled, message.cancel_reason = True, b"\xff\xfe"


def event_of_the_future(message: Any) -> None:
    message.events[0].kv.mod_revision = message.header.revision + 1


WATCHES: dict[str, Change] = {
    "noise": noise,
    "empty": empty,
    "event of the future": in_watch(event_of_the_future),
    "cut": cut_short,
    "unknown type": in_watch(of_type(7)),
    "negative create_revision": in_watch(event_created(-1)),
    "huge create_revision": in_watch(event_created(2**63 - 1)),
    "no key": in_watch(event_without_key),
    "huge revision": in_watch(revision(2**63 - 1)),
    "canceled for a reason that is no text": in_watch(canceled),
}


@pytest.mark.parametrize("change", WATCHES.values(), ids=WATCHES.keys())
def test_a_watch_goes_on_after_an_unreadable_message(
    etcd: EtcdServer, garbler: Garbler, change: Change
) -> None:
    """From where it was: what the garbled message would have said is not lost."""
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    source = EtcdSource(etcd.options(endpoints=(garbler.url,)), timeout=LIMIT, keepalive=QUICK)
    with Follower(source) as follower:
        follower.until(lambda: set(follower.leases) == {subnet_name(1)})
        etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
        follower.until(lambda: len(follower.leases) == 2)

        garbler.fail("Watch", change)
        etcd.put(f"subnets/{subnet_name(3)}", attrs(3))
        follower.until(lambda: len(follower.leases) == 3 and not follower.error)
        etcd.delete(f"subnets/{subnet_name(1)}")
        follower.until(lambda: len(follower.leases) == 2)

    assert set(follower.leases) == {subnet_name(2), subnet_name(3)}
    assert not garbler.left("Watch")


def part_of_more(message: Any) -> None:
    message.header.revision += 5


def test_a_watch_is_resumed_after_the_last_event_that_came(
    etcd: EtcdServer, garbler: Garbler
) -> None:
    """Not after the cluster's revision: etcd sends long histories in parts."""
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    source = EtcdSource(etcd.options(endpoints=(garbler.url,)), timeout=LIMIT, keepalive=QUICK)
    with Follower(source) as follower:
        follower.until(lambda: len(follower.leases) == 1)
        garbler.fail("Watch", in_watch(part_of_more), noise)
        etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
        follower.until(lambda: len(follower.leases) == 2)
        etcd.put(f"subnets/{subnet_name(3)}", attrs(3))
        follower.until(lambda: len(follower.leases) == 3 and not follower.error)

    assert follower.snapshots == 1
    assert not garbler.left("Watch")


def test_a_deletion_that_was_compacted_before_it_was_read_is_not_lost(
    etcd: EtcdServer, garbler: Garbler
) -> None:
    """etcd forgets it where the compaction is at its very revision, and its watch says nothing."""
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    source = EtcdSource(etcd.options(endpoints=(garbler.url,)), timeout=LIMIT, keepalive=QUICK)
    unread = threading.Event()
    compacted = threading.Event()

    def held_back(data: bytes) -> bytes:
        unread.set()
        compacted.wait(LIMIT)
        return noise(data)

    with Follower(source) as follower:
        follower.until(lambda: len(follower.leases) == 1)
        garbler.fail("Watch", held_back)
        etcd.delete(f"subnets/{subnet_name(1)}")
        assert unread.wait(LIMIT)
        etcd.compact()
        compacted.set()
        follower.until(lambda: not follower.leases and not follower.error)


def test_a_range_that_is_agreed_to_twice_is_one(etcd: EtcdServer, garbler: Garbler) -> None:
    garbler.fail("Watch", lambda data: WithMore(data, data, 20))
    source = EtcdSource(
        etcd.options(endpoints=(garbler.url,)),
        timeout=LIMIT,
        keepalive=QUICK,
        on_config=lambda config: None,
    )
    etcd.put("config", CONFIG)
    with Follower(source) as follower:
        follower.until(lambda: follower.snapshots)
        etcd.put(f"subnets/{subnet_name(3)}", attrs(3))
        follower.until(lambda: set(follower.leases) == {subnet_name(3)})
    assert not follower.errors


def test_a_configuration_that_changed_while_a_watch_broke_is_told(
    etcd: EtcdServer, garbler: Garbler
) -> None:
    """Its change did not come, that of a lease after it did, and then the watch broke."""
    told: list[Any] = []
    options = etcd.options(endpoints=(garbler.url,))
    source = EtcdSource(options, timeout=LIMIT, keepalive=QUICK, on_config=told.append)
    etcd.put("config", CONFIG)
    etcd.put(f"subnets/{subnet_name(4)}", attrs(4))  # what came last is asked for again
    with Follower(source) as follower:
        follower.until(lambda: follower.snapshots)
        etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
        follower.until(lambda: len(follower.leases) == 2)
        garbler.fail("Watch", in_watch(without_events), bytes, noise)
        etcd.put("config", CONFIG.replace("10.5", "10.6"))
        wait_until(lambda: garbler.left("Watch") == 2)
        etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
        follower.until(lambda: len(follower.leases) == 3)
        etcd.put(f"subnets/{subnet_name(3)}", attrs(3))
        follower.until(lambda: len(follower.leases) == 4)
        wait_until(lambda: told)
        etcd.put("config", CONFIG.replace("10.5", "10.7"))
        wait_until(lambda: len(told) == 2)
    assert [str(config.network) for config in told] == ["10.6.0.0/16", "10.7.0.0/16"]


@pytest.mark.parametrize("change", [noise, cut_short, in_watch(revision(2**63 - 1))])
def test_a_watch_whose_beginning_is_unreadable_is_begun_again(
    etcd: EtcdServer, garbler: Garbler, change: Change
) -> None:
    garbler.fail("Watch", change, change)
    source = EtcdSource(etcd.options(endpoints=(garbler.url,)), timeout=LIMIT, keepalive=QUICK)
    with Follower(source) as follower:
        follower.until(lambda: follower.errors)
        assert "unreadable answer: WatchResponse" in follower.errors[0].message
        assert garbler.url in follower.errors[0].message
        follower.until(lambda: follower.snapshots and not follower.error)
        etcd.put(f"subnets/{subnet_name(3)}", attrs(3))
        follower.until(lambda: set(follower.leases) == {subnet_name(3)})


def without_events(message: Any) -> None:
    del message.events[:]


def of_another_lease(message: Any) -> None:
    message.ID += 1


def for_ever(message: Any) -> None:
    message.TTL = 2**62


KEPT = pb.LeaseKeepAliveResponse
KEEP_ALIVES: dict[str, Change] = {
    "noise": noise,
    "empty": empty,
    "of another lease": edited(KEPT, of_another_lease),
    "TTL out of range": edited(KEPT, for_ever),
}


@pytest.mark.parametrize("change", KEEP_ALIVES.values(), ids=KEEP_ALIVES.keys())
def test_a_lease_is_renewed_after_unreadable_answers(
    etcd: EtcdServer, garbler: Garbler, change: Change
) -> None:
    """The keeper tells it, goes on, and the key keeps its etcd lease."""
    from flannel_dp.cluster.network import NetworkConfig

    held = EtcdLease(
        etcd.options(endpoints=(garbler.url,)),
        ttl=600,
        margin=599.0,
        timeout=LIMIT,
        keepalive=QUICK,
        rng=random.Random(1),
    )
    identity = Identity({4: "192.0.2.7"}, {4: "02:00:00:00:00:07"}, "vxlan", 1)
    name = held.acquire(identity, NetworkConfig.from_json(CONFIG), {}).name
    key = etcd.leases()[name]
    told: list[str] = []
    inbox = Inbox(lambda: told.extend([str(error)] if (error := inbox.take().error) else []))
    garbler.fail("LeaseKeepAlive", *[change] * 3)
    keeper = threading.Thread(target=held.keep, args=(inbox,), name="keep")
    keeper.start()
    try:
        wait_until(lambda: not garbler.left("LeaseKeepAlive"))
        with open_client(etcd.options()) as client:  # the fourth answer was the first readable
            etcd_lease = key["lease"]
            wait_until(lambda: client.times_to_live([etcd_lease])[etcd_lease] >= 599)
        wait_until(lambda: inbox.take().error is None)
        assert keeper.is_alive()
    finally:
        inbox.stop()
        keeper.join(LIMIT)
        inbox.close()

    assert any("unreadable answer: LeaseKeepAliveResponse" in text for text in told)
    assert any(garbler.url in text for text in told)
    assert etcd.leases()[name] == key


def no_id(message: Any) -> None:
    message.ID = 0


def negative_id(message: Any) -> None:
    message.ID = -1


@pytest.mark.parametrize(
    ("method", "change", "ask"),
    [
        ("LeaseGrant", noise, lambda client: client.grant(60)),
        ("LeaseGrant", empty, lambda client: client.grant(60)),
        ("LeaseGrant", edited(pb.LeaseGrantResponse, no_id), lambda client: client.grant(60)),
        ("LeaseGrant", edited(pb.LeaseGrantResponse, negative_id), lambda client: client.grant(60)),
        ("Txn", noise, lambda client: client.create(b"/k", b"v", 0)),
        ("Txn", empty, lambda client: client.create(b"/k", b"v", 0)),
        ("LeaseTimeToLive", noise, lambda client: client.times_to_live([5])),
        ("LeaseTimeToLive", empty, lambda client: client.times_to_live([5])),
        (
            "LeaseTimeToLive",
            edited(pb.LeaseTimeToLiveResponse, for_ever),
            lambda client: client.times_to_live([5]),
        ),
    ],
)
def test_other_unreadable_answers_are_unavailable(
    etcd: EtcdServer, garbler: Garbler, method: str, change: Change, ask: Any
) -> None:
    garbler.fail(method, change)

    with (
        open_client(etcd.options(endpoints=(garbler.url,)), timeout=LIMIT) as client,
        pytest.raises(Unavailable, match=f"unreadable answer: {method}Response") as caught,
    ):
        ask(client)
    assert garbler.url in caught.value.message


def no_token(message: Any) -> None:
    message.token = b""


def token_of_bytes(message: Any) -> None:
    message.token = b"\xff\xfe"


@pytest.mark.parametrize(
    "change",
    [
        noise,
        empty,
        edited(pb.AuthenticateResponse, no_token),
        edited(pb.AuthenticateResponse, token_of_bytes),
    ],
)
def test_an_unreadable_login_is_unavailable(
    etcd: EtcdServer, garbler: Garbler, change: Change
) -> None:
    etcd.enable_auth()
    garbler.fail("Authenticate", change)
    options = etcd.options(endpoints=(garbler.url,), username="node", password="pw")

    with pytest.raises(Unavailable, match="unreadable answer: AuthenticateResponse"):
        EtcdSource(options, timeout=LIMIT).snapshot()
    assert EtcdSource(options, timeout=LIMIT).snapshot().claims.leases == []
