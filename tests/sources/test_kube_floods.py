"""API servers that answer without end, too much, too slowly or with nothing of use."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp.errors import Unavailable
from flannel_dp.sources import limits
from flannel_dp.sources.kube import nodes as kube_nodes
from flannel_dp.sources.kube import source as kube_source
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import ApiServer
from tests.lib.kube import (
    Follower,
    node,
)
from tests.lib.waiting import LIMIT, wait_until

Follow = Callable[..., Follower]
Options = Callable[..., KubeOptions]

#: One byte each so often, in seconds: well within the timeout of a read.
DRIP = 0.02


@pytest.fixture(name="small", autouse=True)
def small_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test reaches."""
    for module in ("api", "events"):
        monkeypatch.setattr(f"flannel_dp.sources.kube.{module}.OBJECT_BYTES", 1 << 20)
    monkeypatch.setattr(kube_nodes, "PAGE_BYTES", 2 << 20)
    monkeypatch.setattr(kube_nodes, "LIST_BYTES", 3 << 20)


def within(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Answers and events have to be complete within so many seconds."""
    for module in ("api", "events"):
        monkeypatch.setattr(f"flannel_dp.sources.kube.{module}.ANSWER_SECONDS", seconds)


@pytest.fixture(name="over")
def over_fixture() -> Iterator[threading.Event]:
    """Set at the end of the test, for handlers that go on without end."""
    made = threading.Event()
    yield made
    made.set()


def refused(options: KubeOptions) -> str:
    source = KubeSource(options)
    try:
        with pytest.raises(Unavailable) as caught:
            source.snapshot()
    finally:
        source.close()
    assert caught.value.hint
    return caught.value.message


def without_end(handler: Any, over: threading.Event) -> None:
    handler.start_stream()
    while not over.is_set():
        handler.chunk(b" " * 65536)


#: 64 MiB in 64 KiB.
BOMB = gzip.compress(bytes(64 << 20), 1)


def bomb(handler: Any, over: threading.Event) -> None:
    handler.answer(200, BOMB, Content_Encoding="gzip")


def drip(handler: Any, over: threading.Event) -> None:
    handler.start_stream()
    while not over.wait(DRIP):
        handler.chunk(b" ")


def drip_of_headers(handler: Any, over: threading.Event) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not over.wait(DRIP):
        handler.wfile.write(b"x")


def without_end_rejected(handler: Any, over: threading.Event) -> None:
    handler.send_response(401)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not over.is_set():
        handler.chunk(b" " * 65536)


def other_coding(handler: Any, over: threading.Event) -> None:
    handler.answer(200, b"x" * 100, Content_Encoding="br")


@pytest.mark.parametrize(
    ("fault", "says", "seconds"),
    [
        (without_end, "longer than 2 MiB", LIMIT),
        (bomb, "longer than 2 MiB", LIMIT),
        (drip, "in time", 1.0),
        (drip_of_headers, "in time", 1.0),
        (without_end_rejected, "longer than 2 MiB", LIMIT),
        (other_coding, "compressed by 'br'", LIMIT),
    ],
)
def test_a_listing_of_which_there_is_too_much(
    server: ApiServer,
    options: Options,
    over: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    says: str,
    seconds: float,
) -> None:
    within(monkeypatch, seconds)
    server.fail("list", *[lambda handler: fault(handler, over)] * 2)

    message = refused(options(request_timeout=LIMIT))

    assert says in message
    assert server.url in message
    assert "GET /api/v1/nodes" in message


@pytest.mark.parametrize("fault", [without_end, bomb, drip, drip_of_headers])
def test_it_is_followed_again_afterwards(
    server: ApiServer,
    follow: Follow,
    over: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
) -> None:
    within(monkeypatch, 2.0)
    server.put(node(1))
    server.fail("list", lambda handler: fault(handler, over))
    follower = follow()
    follower.until(lambda: follower.leases and not follower.error)


def test_a_whole_list_may_be_longer_than_a_page(server: ApiServer, options: Options) -> None:
    document = {"kind": "NodeList", "metadata": {"resourceVersion": "5"}, "items": [node(1)]}
    long = json.dumps(document).encode() + b" " * (2 << 20) + b"\n"

    server.fail("list", lambda handler: handler.answer(200, long))
    assert "longer than 2 MiB" in refused(options())

    expired = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired"}
    server.fail("list", *[lambda handler: handler.answer(410, expired)] * 2)
    server.fail("list", lambda handler: handler.answer(200, long))
    source = KubeSource(options())
    assert len(source.snapshot().claims.leases) == 1
    source.close()


def test_a_compressed_listing_is_read(server: ApiServer, options: Options) -> None:
    """As API servers send it from 128 KiB on, and in the form that they are asked for."""
    document = {
        "kind": "NodeList",
        "metadata": {"resourceVersion": "5"},
        "items": [node(number) for number in range(1, 200)],
    }
    packed = gzip.compress(json.dumps(document).encode())
    asked: list[str] = []

    def answer(handler: Any) -> None:
        asked.append(handler.headers["Accept-Encoding"])
        handler.answer(200, packed, Content_Encoding="gzip")

    server.fail("list", answer)
    source = KubeSource(options())

    assert len(source.snapshot().claims.leases) == 199
    assert asked == ["gzip"]
    source.close()


class Pages:
    """Answers with pages that go on for ever, each with another token."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, handler: Any) -> None:
        self.count += 1
        meta = {"resourceVersion": "5", "continue": f"page {self.count}"}
        handler.answer(200, {"kind": "NodeList", "metadata": meta, "items": []})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("LIST_PAGES", 3, "not complete after 3 pages"),
        ("ALL_PAGES_BYTES", 300, "not complete after 0 MiB"),
        ("LIST_SECONDS", 0.0, "not complete after 0 s"),
    ],
)
def test_pages_without_end(
    server: ApiServer,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
    says: str,
) -> None:
    pages = Pages()
    server.fail("list", *[pages] * 50)
    monkeypatch.setattr(kube_nodes, name, value)

    assert says in refused(options())
    assert pages.count < 20


def test_a_token_as_long_as_a_book(server: ApiServer, options: Options) -> None:
    meta = {"resourceVersion": "5", "continue": "x" * 100_000}
    document = {"kind": "NodeList", "metadata": meta, "items": []}
    server.fail("list", lambda handler: handler.answer(200, document))

    assert "continue of 100000 characters" in refused(options())


# ---- watches


def hold(handler: Any, over: threading.Event) -> None:
    handler.connection.settimeout(None)
    while not over.is_set() and handler.connection.recv(1):
        pass


def test_half_an_event_for_ever(
    server: ApiServer, follow: Follow, over: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    within(monkeypatch, 1.0)
    server.fail("watch", *[lambda handler: drip(handler, over)] * 2)
    follower = follow()
    late = f"{server.url}: GET /api/v1/nodes?watch: an event that was not complete after 1 s"
    follower.until(lambda: late in str(follower.error))

    server.put(node(2))
    follower.until(lambda: follower.leases and not follower.error)


@pytest.mark.parametrize(
    "event",
    [
        b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"101"}}}\n',
        b'{"type":"OTHER","object":{}}\n',
        b'{"type":"DELETED","object":{}}\n',
        b"\n",
    ],
)
def test_events_that_say_nothing(
    server: ApiServer, follow: Follow, over: threading.Event, event: bytes
) -> None:
    def flood(handler: Any) -> None:
        handler.start_stream()
        while not over.is_set():
            handler.chunk(event * 100)

    server.fail("watch", *[flood] * 2)
    follower = follow()
    follower.until(lambda: follower.error)
    assert "say nothing of a node" in str(follower.error)

    server.put(node(2))
    follower.until(lambda: follower.leases and not follower.error)


def test_a_minute_of_a_busy_cluster_is_no_flood(server: ApiServer, follow: Follow) -> None:
    """Heartbeats of 5,000 nodes, which change no lease."""
    server.put(node(1))
    follower = follow()
    follower.until(lambda: follower.snapshots and server.watching)
    beat = {"type": "MODIFIED", "object": server.nodes["node-00001"]}
    for _ in range(limits.IDLE_EVENTS + 500):
        server.send(beat)
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)

    assert not any(follower.errors)
    assert server.count("watch") == 1


def test_a_watch_that_cannot_be_read_is_no_recovery(
    server: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is accepted each time: the pauses grow nevertheless, and it is not called healthy."""

    def garbage(handler: Any) -> None:
        handler.start_stream()
        handler.chunk(b"garbage\n")
        handler.end_stream()

    pauses: list[float] = []
    real = kube_source._NodeFollower._pause

    def pause(self: Any, error: Any) -> None:
        pauses.append(self._backoff.attempts)
        real(self, error)

    monkeypatch.setattr(kube_source._NodeFollower, "_pause", pause)
    server.fail("watch", *[garbage] * 100)
    follower = follow(retry_seconds=0.5)
    follower.until(lambda: len(pauses) >= 6)

    assert pauses[:6] == [0, 1, 2, 3, 4, 5]
    assert "not an event" in str(follower.error)
    server.faults["watch"].clear()
    server.put(node(2))
    follower.until(lambda: follower.leases and not follower.error)


def test_a_quiet_watch_is_healthy_after_a_while(server: ApiServer, follow: Follow) -> None:
    """Nothing happens in it, and that is no reason to say that it does not work."""
    server.fail("watch", b"", b"", b"")
    follower = follow(retry_seconds=0.5)
    follower.until(lambda: follower.error)
    wait_until(lambda: server.watching)

    follower.until(lambda: not follower.error)


def test_it_ends_in_the_middle_of_a_flood(
    server: ApiServer, options: Options, over: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flannel_dp.sources import Inbox

    for module, name in ((kube_nodes, "PAGE_BYTES"), (kube_nodes, "LIST_BYTES")):
        monkeypatch.setattr(module, name, 1 << 50)
    monkeypatch.setattr("flannel_dp.sources.kube.api.ANSWER_SECONDS", 5.0)
    begun = threading.Event()

    def flood(handler: Any) -> None:
        begun.set()
        drip(handler, over)

    server.fail("list", flood)
    source, inbox = KubeSource(options()), Inbox()
    thread = threading.Thread(target=source.follow, args=(inbox,))
    thread.start()
    assert begun.wait(LIMIT)
    inbox.stop()
    thread.join(LIMIT)
    assert not thread.is_alive()
    inbox.close()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "kube-watch"])
