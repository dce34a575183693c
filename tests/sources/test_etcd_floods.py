"""Members that send without end, too much, or nothing of use: they hold nobody up, and the next
member is asked."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial

import pytest

from flannel_dp.errors import Unavailable
from flannel_dp.sources import Call, Change, Inbox, limits
from flannel_dp.sources.etcd import client as etcd_client
from flannel_dp.sources.etcd import grpc
from flannel_dp.sources.etcd import messages as pb
from flannel_dp.sources.etcd.grpc import Connection
from flannel_dp.sources.etcd.options import Endpoint, EtcdOptions
from flannel_dp.sources.etcd.socket import Deadline, Lost
from flannel_dp.sources.etcd.source import EtcdSource
from flannel_dp.sources.etcd.trouble import Trouble
from flannel_dp.sources.limits import Allowance
from tests.lib.etcd import PATIENT, PREFIX, EtcdServer, Follower, attrs, subnet_name
from tests.lib.etcd_garbler import Flooder, Garbler, WithMore, after_the_first, frame, noise
from tests.lib.waiting import LIMIT, NEVER, wait_until


@pytest.fixture(name="garbler")
def garbler_fixture(etcd: EtcdServer) -> Iterator[Garbler]:
    made = Garbler(etcd)
    yield made
    made.close()


#: HPACK: ":status: 200".
STATUS = b"\x88"
HEADERS = frame(1, 4, 1, STATUS)
#: Its stream is the first one of a client.
FLOODS: dict[str, tuple[bytes, bytes]] = {
    "PING": (frame(6, 0, 0, b"12345678"), b""),
    "PING that was not asked for": (frame(6, 1, 0, b"12345678"), b""),
    "SETTINGS": (frame(4, 0, 0, b""), b""),
    "SETTINGS with a value": (frame(4, 0, 0, b"\x00\x04\x00\x00\xff\xff"), b""),
    "WINDOW_UPDATE": (frame(8, 0, 0, b"\0\0\0\1"), b""),
    "PRIORITY": (frame(2, 0, 1, b"\0\0\0\0\1"), b""),
    "unknown": (frame(0xFA, 0, 0, b""), b""),
    "large and unknown": (frame(0xFA, 0, 0, bytes(16384)), b""),
    "empty DATA": (frame(0, 0, 1, b""), HEADERS),
    "DATA of one byte": (frame(0, 0, 1, b"\0"), HEADERS + frame(0, 0, 1, b"\0\0\xff\xff\xff")),
    "padding": (frame(0, 8, 1, b"\x04" + bytes(4)), HEADERS),
    "empty messages": (frame(0, 0, 1, bytes(5)), HEADERS),
    "CONTINUATION": (frame(9, 0, 1, b""), frame(1, 0, 1, STATUS)),
    "informational headers": (frame(1, 4, 1, b"\x08\x03103"), b""),
    "DATA of a stream that ended": (frame(0, 0, 1, b"x"), HEADERS + frame(3, 0, 1, b"\0\0\0\0")),
    "a message without end": (
        frame(0, 0, 1, bytes(16384)),
        HEADERS + frame(0, 0, 1, b"\0\x03\xff\xff\xff"),
    ),
}


@pytest.mark.parametrize(("flood", "first"), FLOODS.values(), ids=FLOODS.keys())
def test_the_next_member_is_asked_after_a_flood(
    etcd: EtcdServer, flood: bytes, first: bytes
) -> None:
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    with Flooder(flood, first) as flooder:
        # Half of the timeout is the first member's: a limit ends it, not that.
        source = EtcdSource(etcd.options(endpoints=(flooder.url, etcd.url)), timeout=2 * LIMIT)
        (lease,) = source.snapshot().claims.leases

        assert lease.name == subnet_name(1)
        assert flooder.asked == 1


@pytest.mark.parametrize("kind", ["PING", "SETTINGS", "unknown", "large and unknown"])
def test_a_flood_holds_nobody_beyond_the_deadline(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no limit of frames ends it."""
    monkeypatch.setattr(grpc, "IDLE_FRAMES", 1 << 40)
    with Flooder(*FLOODS[kind]) as flooder:
        endpoint = Endpoint("127.0.0.1", int(flooder.url.rpartition(":")[2]), False)
        connection = Connection(endpoint, None, Deadline(time.monotonic() + LIMIT, lambda: False))
        deadline = Deadline(time.monotonic() + 0.3, lambda: False)
        try:
            with pytest.raises(Lost, match="does not answer"):
                connection.unary("/a/b", [b"x"], (), deadline)
        finally:
            connection.close()


@pytest.mark.parametrize("kind", ["PING", "unknown"])
def test_a_follower_stops_in_the_middle_of_a_flood(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc, "IDLE_FRAMES", 1 << 40)
    with Flooder(*FLOODS[kind]) as flooder:
        options = EtcdOptions(endpoints=(flooder.url,), prefix=PREFIX)
        inbox = Inbox()
        follow = EtcdSource(options, timeout=NEVER).follow
        thread = threading.Thread(target=follow, args=(inbox,), name="follow")
        thread.start()
        wait_until(lambda: flooder.asked)
        inbox.stop()
        thread.join(LIMIT)
        assert not thread.is_alive()
        inbox.close()


@pytest.mark.parametrize("kind", ["PING", "SETTINGS", "WINDOW_UPDATE", "unknown"])
def test_a_watch_goes_on_at_the_next_member_after_a_flood(
    etcd: EtcdServer, garbler: Garbler, kind: str
) -> None:
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    garbler.flood("Watch", FLOODS[kind][0])
    options = etcd.options(endpoints=(garbler.url, etcd.url))
    with Follower(EtcdSource(options, timeout=LIMIT, keepalive=PATIENT)) as follower:
        follower.until(lambda: set(follower.leases) == {subnet_name(1)})
        etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
        follower.until(lambda: len(follower.leases) == 2 and not follower.error)

    assert not garbler.floods


def test_answers_of_a_watch_that_say_nothing(etcd: EtcdServer, garbler: Garbler) -> None:
    def with_many_more(message: bytes) -> bytes:
        idle = pb.WatchResponse(watch_id=1, header={"revision": 1}).SerializeToString()
        return WithMore(message, idle, limits.IDLE_ANSWERS + 1)

    garbler.fail("Watch", with_many_more)
    options = etcd.options(endpoints=(garbler.url, etcd.url))
    with Follower(EtcdSource(options, timeout=LIMIT, keepalive=PATIENT)) as follower:
        wait_until(lambda: not garbler.left("Watch"))
        etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
        follower.until(lambda: set(follower.leases) == {subnet_name(2)} and not follower.error)


def test_the_limit_of_answers_without_an_event_is_told(etcd: EtcdServer, garbler: Garbler) -> None:
    """Where there is no other member."""
    idle = pb.WatchResponse(watch_id=1, header={"revision": 1}).SerializeToString()
    many = limits.IDLE_ANSWERS + 1
    garbler.fail("Watch", *[lambda message: WithMore(message, idle, many)] * 3)
    source = EtcdSource(etcd.options(endpoints=(garbler.url,)), timeout=LIMIT, keepalive=PATIENT)
    with Follower(source) as follower:
        follower.until(lambda: follower.errors)
        assert "answers without an event" in follower.errors[0].message
        assert garbler.url in follower.errors[0].message
        etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
        follower.until(lambda: set(follower.leases) == {subnet_name(2)} and not follower.error)


def test_a_watch_that_is_garbled_goes_on_at_the_next_member(
    etcd: EtcdServer, garbler: Garbler
) -> None:
    """Not at the one that accepts it and then sends what cannot be read, again and again."""
    garbler.fail("Watch", *[after_the_first(noise)] * 50)
    options = etcd.options(endpoints=(garbler.url, etcd.url))
    with Follower(EtcdSource(options, timeout=LIMIT, keepalive=PATIENT)) as follower:
        follower.until(lambda: follower.snapshots)
        for number in (1, 2, 3):
            etcd.put(f"subnets/{subnet_name(number)}", attrs(number))
            name = subnet_name(number)
            follower.until(partial(lambda name: name in follower.leases, name))

    assert garbler.left("Watch") >= 48


@pytest.mark.parametrize("code", [1, 2, 4, 6, 8, 10, 12, 13, 14, 15, 17, 999_999_999])
def test_the_next_member_is_asked_after_a_status(etcd: EtcdServer, code: int) -> None:
    """But for those that speak of the request, also after one that gRPC does not know."""
    first = frame(1, 5, 1, STATUS + b"\0\x0bgrpc-status" + hpack_text(str(code)))
    etcd.put(f"subnets/{subnet_name(1)}", attrs(1))
    with Flooder(b"", first) as member:
        options = etcd.options(endpoints=(member.url, etcd.url))
        (lease,) = EtcdSource(options, timeout=LIMIT).snapshot().claims.leases

    assert lease.name == subnet_name(1)


def test_a_watch_that_is_over_at_once_begins_at_the_next_member(etcd: EtcdServer) -> None:
    """With status OK, and without a message."""
    first = frame(1, 5, 1, STATUS + b"\0\x0bgrpc-status" + hpack_text("0"))
    with Flooder(b"", first) as member:
        options = etcd.options(endpoints=(member.url, etcd.url))
        with Follower(EtcdSource(options, timeout=LIMIT, keepalive=PATIENT)) as follower:
            follower.until(lambda: follower.snapshots)
            etcd.put(f"subnets/{subnet_name(2)}", attrs(2))
            follower.until(lambda: set(follower.leases) == {subnet_name(2)})

    assert member.asked


def hpack_text(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


# ---- listings


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LISTING_PAGES", 2, "after 2 answers"),
        ("LISTING_BYTES", 200, "over 0 MiB"),
        ("LISTING_SECONDS", 0.0, "after 0 s"),
    ],
)
def test_a_listing_has_an_end(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch, name: str, value: float, said: str
) -> None:
    for number in range(1, 6):
        etcd.put(f"subnets/{subnet_name(number)}", attrs(number))
    monkeypatch.setattr(etcd_client, "_PAGE", 2)
    source = EtcdSource(etcd.options(), timeout=LIMIT)
    assert len(source.snapshot().claims.leases) == 5

    monkeypatch.setattr(etcd_client, name, value)
    with pytest.raises(Unavailable, match=said) as caught:
        source.snapshot()
    assert etcd.url in caught.value.message


def test_a_million_leases_pass_the_limits() -> None:
    leases, lease, node = 1_000_000, 500, 30_000

    assert 10 * leases <= limits.LISTING_PAGES * etcd_client._PAGE
    assert leases * lease <= limits.LISTING_BYTES
    assert etcd_client._PAGE * lease <= limits.MESSAGE_BYTES
    assert leases <= limits.LIST_PAGES * 500
    assert leases * node <= limits.ALL_PAGES_BYTES
    assert 500 * node <= limits.PAGE_BYTES


def test_an_allowance_is_refilled_and_given_back() -> None:
    now = 0.0
    left = Allowance(10, 2, lambda: now)

    assert left.spend(10)
    assert not left.spend()
    now = 3.0
    assert left.spend(5)
    assert not left.spend()
    left.earn(100)
    assert left.spend(10)
    assert not left.spend()


# ---- pauses


class Waits(Inbox):
    """Notes how long it is asked to wait, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None, fds: Iterable[int] = ()) -> Call:
        self.pauses.append(timeout or 0.0)
        return Call.TIMEOUT


@pytest.fixture(name="waits")
def waits_fixture() -> Iterator[Waits]:
    made = Waits()
    yield made
    made.close()


GONE = Unavailable("gone", hint="wait")


def test_pauses_grow_while_watches_only_begin(
    waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection, a login, a watch that was accepted: nothing of that is of use by itself.

    The log is left to those who follow the source."""
    caplog.set_level("INFO")
    trouble = Trouble(waits)
    for _ in range(12):
        trouble.began()
        trouble.report(GONE)
        trouble.pause()

    assert max(waits.pauses[:2]) < 0.5
    assert min(waits.pauses[7:]) >= 3.0
    assert waits.take().error is GONE

    trouble.began()
    trouble.useful()
    assert waits.take().error is None
    trouble.report(GONE)
    trouble.pause()
    assert waits.pauses[-1] < 0.5
    assert caplog.records == []


def test_a_watch_is_healthy_when_it_has_stood_as_long_as_the_pause(waits: Waits) -> None:
    now = 0.0
    trouble = Trouble(waits, lambda: now)
    trouble.began()
    assert trouble.seconds_left == math.inf
    for _ in range(8):
        trouble.report(GONE)
        trouble.pause()

    trouble.began()
    assert trouble.seconds_left == waits.pauses[-1]
    trouble.check()
    assert waits.take().error is GONE
    now += waits.pauses[-1]
    trouble.check()
    assert waits.take().error is None
    assert trouble.seconds_left == math.inf


def test_a_quiet_watch_makes_the_next_pause_short(waits: Waits) -> None:
    now = 0.0
    trouble = Trouble(waits, lambda: now)
    for _ in range(8):
        trouble.report(GONE)
        trouble.pause()
    trouble.began()
    now += 31.0
    trouble.report(GONE)
    trouble.pause()

    assert waits.pauses[-1] < 0.5


def test_the_same_error_after_a_listing_is_told_again(waits: Waits) -> None:
    trouble = Trouble(waits)
    trouble.report(GONE)
    waits.put(Change())  # as a listing does
    trouble.delivered()
    assert waits.take().error is None
    trouble.report(GONE)

    assert waits.take().error is GONE
