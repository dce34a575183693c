"""Answers of etcd that are no answers: each is an error, and never an empty list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flannel_dp.errors import Unavailable
from flannel_dp.sources.etcd import messages as pb
from flannel_dp.sources.etcd.client import EtcdClient
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.source import EtcdSource
from tests.lib.etcd import PREFIX, attrs
from tests.lib.grpc_server import HEADERS, OK, Server, serve_fixture

__all__ = ["serve_fixture"]

HEADER = {"cluster_id": 1, "revision": 7}
START = f"{PREFIX}/subnets/"


def pair(name: str, value: str = "") -> Any:
    return {"key": name.encode(), "create_revision": 5, "value": value.encode()}


def one(number: int, value: str | None = None) -> Any:
    return pair(f"{START}10.5.{number}.0-24", attrs(number) if value is None else value)


def answering(*messages: bytes) -> Callable[[Server, int, bytes], None]:
    """Answers the requests with these, one after the other."""
    left = list(messages)

    def answer(server: Server, stream: int, message: bytes) -> None:
        server.reply(stream, left.pop(0) if len(left) > 1 else left[0])

    return answer


def response(**fields: Any) -> bytes:
    return bytes(pb.RangeResponse(**fields).SerializeToString())


def options(*servers: Server) -> EtcdOptions:
    urls = tuple(f"http://127.0.0.1:{server.endpoint.port}" for server in servers)
    return EtcdOptions(endpoints=urls, prefix=PREFIX)


BROKEN = {
    "a zero-length message": (b"", "revision 0"),
    "no header": (response(kvs=[one(1)], count=1), "with revision 0"),
    "no revision": (response(header={"cluster_id": 1}), "with revision 0"),
    "a count of one without keys": (response(header=HEADER, count=1), "it counts 1 key and has 0"),
    "a count without keys": (response(header=HEADER, count=3), "it counts 3 keys and has 0"),
    "keys and no count": (response(header=HEADER, kvs=[one(1)]), "counts 0 keys and has 1"),
    "more without keys": (response(header=HEADER, more=True), "counts 0 keys and has 0"),
    "more than there are": (
        response(header=HEADER, more=True, kvs=[one(1)], count=1),
        "counts 1 key and has 1",
    ),
    "keys of others": (
        response(header=HEADER, kvs=[pair("/a")], count=1),
        "key /a out of its place",
    ),
    "keys in disorder": (
        response(header=HEADER, kvs=[one(2), one(1)], count=2),
        "key /coreos.com/network/subnets/10.5.1.0-24 out of its place",
    ),
    "keys without values": (
        response(header=HEADER, kvs=[one(1, ""), one(2, "")], count=2),
        "none of its 2 leases can be read",
    ),
}


@pytest.mark.parametrize(("message", "reason"), BROKEN.values(), ids=BROKEN)
def test_rejects_a_list_that_is_not_whole(
    serve: Callable[..., Server], message: bytes, reason: str
) -> None:
    source = EtcdSource(options(serve(answering(message))), timeout=60)

    with pytest.raises(Unavailable) as caught:
        source.snapshot()

    assert reason in caught.value.message
    assert caught.value.hint


def test_rejects_an_answer_without_a_message(serve: Callable[..., Server]) -> None:
    def answer(server: Server, stream: int, message: bytes) -> None:
        server.http.send_headers(stream, HEADERS)
        server.http.send_headers(stream, OK, end_stream=True)

    with pytest.raises(Unavailable, match="OK with 0 messages"):
        EtcdSource(options(serve(answer)), timeout=60).snapshot()


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (response(header=HEADER, more=True, kvs=[one(1)], count=2), "out of its place"),
        (response(header={"cluster_id": 1, "revision": 6}), "revision 6 where 7 was asked for"),
    ],
    ids=["the same page again", "an earlier revision"],
)
def test_rejects_pages_that_do_not_go_on(
    serve: Callable[..., Server], second: bytes, reason: str
) -> None:
    first = response(header=HEADER, more=True, kvs=[one(1)], count=2)

    with pytest.raises(Unavailable, match=reason):
        EtcdSource(options(serve(answering(first, second))), timeout=60).snapshot()


def test_asks_the_next_member_when_an_answer_is_not_whole(serve: Callable[..., Server]) -> None:
    good = serve(answering(response(header=HEADER, kvs=[one(1)], count=1)))
    bad = serve(answering(response(header=HEADER, count=3)))

    [lease] = EtcdSource(options(bad, good), timeout=60).snapshot().claims.leases

    assert lease.subnet == "10.5.1.0/24"


def test_rejects_a_single_key_that_is_not_whole(serve: Callable[..., Server]) -> None:
    server = serve(answering(b""))

    with EtcdClient(options(server), timeout=60) as client, pytest.raises(Unavailable):
        client.get(b"/key")
