"""KubeSource.follow: what the watch of a real HTTP stream makes of a cluster's life."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from flannel_dp.cluster.lease import BackendData
from flannel_dp.errors import Compacted
from tests.lib.apiserver import EXPIRED, GONE, ApiServer, status
from tests.lib.kube import (
    Follow,
    beating,
    hold,
    node,
    started,
)

DUAL: dict[str, Any] = {
    "cidrs": ["10.100.7.0/24", "fd00:10:7::/64"],
    "backend_v6_data": '{"VNI":1,"VtepMAC":"02:00:00:00:06:07"}',
    "public_ipv6": "2001:db8::7",
}


def light(number: int, **notes: object) -> dict[str, Any]:
    """A node without its status, for tests of many."""
    return {**node(number, **notes), "status": {}}


# ---- the cluster's life


def test_list_then_watch(server: ApiServer, follow: Follow) -> None:
    server.put(node(1))
    server.put(node(2))
    follower = started(follow(), server)
    assert set(follower.leases) == {"node-00001", "node-00002"}

    server.put(node(3))
    server.put(node(1, mac="02:00:00:00:00:99"))
    server.delete("node-00002")
    follower.until(lambda: set(follower.leases) == {"node-00001", "node-00003"})

    assert follower.leases["node-00001"].backend_data == BackendData(1, "02:00:00:00:00:99")
    assert follower.snapshots == 1
    assert server.count("list") == server.count("watch") == 1
    query = server.last("watch").query
    assert query["allowWatchBookmarks"] == "true"
    assert 240 <= int(query["timeoutSeconds"]) <= 300


def test_heartbeats_are_no_news(server: ApiServer, follow: Follow) -> None:
    for number in range(5):
        server.put(node(number))
    follower = started(follow(), server)

    for beat in range(20):
        for number in range(5):
            server.put(beating(node(number), beat))
    server.put(node(9))
    follower.until(lambda: "node-00009" in follower.leases)

    assert [change.added[0].name for change in follower.changes] == ["node-00009"]


@pytest.mark.parametrize(
    "change",
    [
        {"backend_data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}'},
        {"backend_v6_data": '{"VNI":1,"VtepMAC":"02:00:00:00:06:99"}'},
        {"public_ip": "192.0.2.99"},
        {"public_ipv6": "2001:db8::99"},
        {"backend_type": "host-gw"},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_change_of_one_family_only_is_noticed(
    server: ApiServer, follow: Follow, change: dict[str, Any]
) -> None:
    server.put(node(7, **DUAL))
    follower = started(follow(), server)
    before = follower.leases["node-00007"]

    server.put(node(7, **(DUAL | change)))
    follower.until(lambda: follower.changes)

    assert follower.leases["node-00007"] != before
    assert follower.changes[0].removed == ()


def test_a_node_that_is_no_lease_any_more_is_a_bad_claim_until_it_is_deleted(
    server: ApiServer, follow: Follow
) -> None:
    without: dict[str, Any] = {"kube_subnet_manager": None}
    server.put(node(1))
    server.put(node(2, **without))
    follower = started(follow(), server)
    assert set(follower.leases) == {"node-00001"}

    server.put(node(1, **without))
    follower.until(lambda: not follower.leases)

    assert follower.changes[0].removed == ()
    assert "kube-subnet-manager is missing" in follower.bad["node-00001"].detail
    server.put(node(3))
    server.compact()
    server.cut()
    follower.until(lambda: "node-00003" in follower.leases)
    assert set(follower.bad) == {"node-00001"}, "neither is it gone in a later list"
    server.delete("node-00001")
    follower.until(lambda: not follower.bad)


def test_a_broken_claim_is_bad_alone_and_can_be_mended(server: ApiServer, follow: Follow) -> None:
    server.put(node(1))
    server.put(node(2, backend_data="{"))
    follower = started(follow(), server)
    assert set(follower.leases) == {"node-00001"}
    assert set(follower.bad) == {"node-00002"}

    server.put(node(1, backend_data='{"VNI": "one"}'))
    server.put(node(2))
    follower.until(lambda: set(follower.leases) == {"node-00002"})
    assert set(follower.bad) == {"node-00001"}

    server.delete("node-00001")
    follower.until(lambda: not follower.bad)
    assert follower.changes[-1].removed == ("node-00001",)


def test_events_of_one_piece_are_one_change_with_the_last_word(
    server: ApiServer, follow: Follow
) -> None:
    server.put(node(1))

    def several(handler: Any) -> None:
        events = [
            {"type": "ADDED", "object": node(2)},
            {"type": "DELETED", "object": node(1)},
            {"type": "MODIFIED", "object": node(2, mac="02:00:00:00:00:77")},
            {"type": "ADDED", "object": node(3)},
            {"type": "DELETED", "object": node(3)},
        ]
        handler.start_stream()
        light_events = [{**e, "object": {**e["object"], "status": {}}} for e in events]
        handler.chunk(b"".join(json_line(event) for event in light_events))
        hold(handler)

    server.fail("watch", several)
    follower = follow()
    follower.until(lambda: follower.changes)

    [change] = follower.changes
    assert change.added[0].backend_data == BackendData(1, "02:00:00:00:00:77")
    assert set(change.removed) == {"node-00001", "node-00003"}
    assert set(follower.leases) == {"node-00002"}


def json_line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


# ---- resuming


def test_a_cut_connection_resumes_from_the_last_bookmark(server: ApiServer, follow: Follow) -> None:
    server.put(node(1))
    follower = started(follow(), server)
    version = server.bookmark()
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)
    later = server.bookmark()
    server.put(node(3))
    follower.until(lambda: "node-00003" in follower.leases)

    server.cut()
    server.put(node(4))
    follower.until(lambda: "node-00004" in follower.leases)

    assert version < later < int(server.last("watch").query["resourceVersion"])
    assert server.count("list") == follower.snapshots == 1
    assert follower.errors == [], "one cut is no trouble"


def test_a_bookmark_moves_the_version(server: ApiServer, follow: Follow) -> None:
    server.put(node(1))
    follower = started(follow(), server)

    version = server.bookmark()
    server.send("end")
    follower.until(lambda: server.count("watch") == 2)

    assert server.last("watch").query["resourceVersion"] == str(version)
    assert follower.errors == []


def test_half_an_event_is_read_again(server: ApiServer, follow: Follow) -> None:
    def half(handler: Any) -> None:
        handler.start_stream()
        handler.chunk(json_line({"type": "ADDED", "object": server.nodes["node-00002"]})[:300])
        handler.connection.shutdown(socket.SHUT_RDWR)

    server.fail("watch", half)
    server.put(node(1))
    follower = follow()
    follower.until(lambda: follower.snapshots)
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)

    assert server.count("list") <= 2
    assert follower.failure is None


@pytest.mark.parametrize("how", ["event", "status"])
def test_compaction_lists_anew_and_a_missed_delete_is_removed(
    server: ApiServer, follow: Follow, how: str
) -> None:
    server.put(node(1))
    server.put(node(2))
    follower = started(follow(), server)

    server.delete("node-00002", silently=True)
    if how == "event":
        server.compact()
    else:
        server.fail("watch", GONE)
    server.cut()
    follower.until(lambda: set(follower.leases) == {"node-00001"})

    assert follower.snapshots == 2
    assert follower.changes == []
    assert not any(isinstance(error, Compacted) for error in follower.errors)


def test_listing_5000_nodes_anew_changes_nothing(server: ApiServer, follow: Follow) -> None:
    server.replace_all(*(light(number) for number in range(5000)))
    follower = started(follow(), server)
    pages = server.count("list")

    server.compact()
    server.cut()
    follower.until(lambda: server.count("list") == 2 * pages and server.watching)
    server.put(light(6000))
    follower.until(lambda: len(follower.leases) == 5001)

    assert pages == 10
    assert follower.snapshots == 1
    assert [len(change.added) for change in follower.changes] == [1]
    assert not any(change.removed or change.bad for change in follower.changes)
    assert follower.errors == []


def test_nothing_is_delivered_while_pages_are_missing(server: ApiServer, follow: Follow) -> None:
    server.replace_all(*(light(number) for number in range(50)))
    follower = started(follow(page_size=10), server)

    server.delete("node-00003", silently=True)
    server.compact()
    server.fail("list", None, None, status(500, "InternalError"), None, b"", None, EXPIRED)
    server.cut()
    follower.until(lambda: len(follower.leases) != 50)

    assert len(follower.leases) == 49
    assert follower.snapshots == 2
    assert follower.changes == []


@pytest.mark.parametrize(
    ("event", "lists"),
    [
        (status(500, "InternalError", "etcdserver: no leader"), 2),
        (status(504, "Timeout", "Too large resource version: 101, current: 50"), 2),
        (status(429, "TooManyRequests"), 1),
    ],
    ids=["500", "504", "429"],
)
def test_error_events(server: ApiServer, follow: Follow, event: dict[str, Any], lists: int) -> None:
    server.put(node(1))
    follower = started(follow(), server)

    server.send({"type": "ERROR", "object": event})
    follower.until(lambda: server.count("watch") == 2 and server.watching)
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)

    assert server.count("list") == lists
    assert follower.snapshots == 1


@pytest.mark.parametrize(
    "line",
    [
        b"<html>busy</html>\n",
        b"\xff\xff\xff\n",
        b"[" * 100_000 + b"\n",
        b'{"type": 3}\n',
        b'{"type":"ADDED"}\n',
        b'{"type":"ADDED","object":7}\n',
        b'{"type":"ADDED","object":{"metadata":{"name":"\xff\xfe"}}}\n',
        b'{"type":"ADDED","object":{"metadata":{"name":"a","annotations":{"b":5}}}}\n',
        b'{"type":"ERROR","object":{"code":"x"}}\n',
        b'{"type":"ERROR","object":{"code":' + b"9" * 5000 + b"}}\n",
        b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"'
        + b"1" * 70_000
        + b'"}}}\n',
    ],
    ids=[
        "html", "noise", "deep", "type", "no object", "object", "name", "annotation", "code",
        "digits", "version",
    ],
)  # fmt: skip
def test_what_is_no_event_makes_it_list_anew(
    server: ApiServer, follow: Follow, line: bytes
) -> None:
    def garbage(handler: Any) -> None:
        handler.start_stream()
        handler.chunk(line)
        hold(handler)

    server.put(node(1))
    server.fail("watch", garbage)
    follower = started(follow(), server)
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)

    assert server.count("list") == 2


def test_an_event_without_end_is_refused(
    server: ApiServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(handler: Any) -> None:
        handler.start_stream()
        handler.chunk(b"x" * 2_000_000)
        hold(handler)

    monkeypatch.setattr("flannel_dp.sources.kube.events.OBJECT_BYTES", 1 << 20)
    server.fail("watch", *[endless] * 2)
    follower = follow()
    follower.until(lambda: follower.error)

    assert f"{server.url}: GET /api/v1/nodes?watch: an event of over 1 MiB" in str(follower.error)
    follower.until(lambda: server.watching and follower.error is None)


@pytest.mark.parametrize("version", [{}, {"resourceVersion": ""}, {"resourceVersion": "0"}])
def test_no_watch_begins_without_a_version(
    server: ApiServer, follow: Follow, version: dict[str, str]
) -> None:
    """Neither after a list without one, nor after an event, nor where the server has lost it."""

    def without(handler: Any) -> None:
        handler.answer(200, {"kind": "NodeList", "metadata": version, "items": []})

    server.put(node(1))
    server.fail("list", *[without] * 3)
    follower = follow()
    follower.until(lambda: follower.error)
    assert "without its version" in str(follower.error)
    assert server.count("watch") == 0
    follower.until(lambda: follower.leases)
    follower.until(lambda: server.watching)

    last = server.version
    gone = {"kind": "Node", "metadata": {"name": "node-00001", **version}}
    server.send({"type": "DELETED", "object": gone})
    server.send({"type": "BOOKMARK", "object": {"kind": "Node", "metadata": version}})
    follower.until(lambda: not follower.leases)
    server.fail("ask", *[without] * 3)
    server.cut()
    follower.until(lambda: server.count("watch") == 2)
    assert server.count("ask") == 4

    watched = [seen.query for seen in server.requests if seen.verb == "watch"]
    assert [int(query["resourceVersion"]) for query in watched] == [last, last]
