"""The watch asks for the nodes' metadata alone, and for a node where that lacks its pod CIDRs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lib.apiserver import ApiServer, status
from tests.lib.follower import Follower
from tests.lib.kube import Follow, beating, node, started
from tests.lib.waiting import wait_until

NEW: dict[str, Any] = {"backend_data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}'}
UNMARKED: dict[str, Any] = {"kube_subnet_manager": None}


def gets(server: ApiServer) -> list[str]:
    return [seen.path for seen in list(server.requests) if seen.verb == "get"]


def subnets(follower: Follower) -> set[str]:
    return {lease.subnet for lease in follower.leases.values()}


def accepted(server: ApiServer) -> list[str]:
    """What the watches so far asked for: "metadata" or "whole"."""
    asked = [seen.headers["Accept"] for seen in list(server.requests) if seen.verb == "watch"]
    return ["metadata" if "as=PartialObjectMetadata;" in one else "whole" for one in asked]


def test_a_node_that_is_known_is_never_asked_for(server: ApiServer, follow: Follow) -> None:
    """Neither for heartbeats, of other programs' annotations, nor for a new address."""
    server.put(node(1))
    follower = started(follow(), server)
    for beat in range(5):
        server.put(beating(node(1), beat))
    other = node(1)
    other["metadata"]["annotations"]["example.org/csi"] = "{}"
    server.put(other)
    server.put(node(1, **NEW))
    follower.until(lambda: follower.changes)

    (lease,) = follower.leases.values()
    assert lease.backend_data.vtep_mac == "02:00:00:00:00:99"
    assert lease.subnet == "10.100.1.0/24"
    assert len(follower.changes) == 1
    assert accepted(server) == ["metadata"]
    assert gets(server) == []


def test_a_new_node_is_asked_for_once(server: ApiServer, follow: Follow) -> None:
    follower = started(follow(), server)
    server.put(node(1, cidrs=[], **UNMARKED))
    server.put(node(1, **UNMARKED))
    server.put(node(1))
    follower.until(lambda: follower.leases)
    for beat in range(3):
        server.put(beating(node(1), beat))
    server.put(node(1, **NEW))
    follower.until(lambda: len(follower.changes) == 2)

    assert follower.leases["node-00001"].subnet == "10.100.1.0/24"
    assert gets(server) == ["/api/v1/nodes/node-00001"]


def test_a_node_that_is_marked_before_it_has_pod_cidrs(server: ApiServer, follow: Follow) -> None:
    follower = started(follow(), server)
    server.put(node(1, cidrs=[]))
    wait_until(lambda: len(gets(server)) == 1)
    server.put(node(1))
    follower.until(lambda: follower.leases)

    assert len(gets(server)) == 2


@pytest.mark.parametrize("gap", ["", "cut", "compact"])
def test_a_node_made_again_with_other_pod_cidrs(
    server: ApiServer, follow: Follow, gap: str
) -> None:
    """Within a watch, between two of them, and where its events are gone and all is listed."""
    server.put(node(1))
    server.put(node(2))
    follower = started(follow(), server)
    again = node(1, cidrs=["10.100.77.0/24"])
    if gap == "compact":
        server.replace_all(again, node(2))
        server.compact()
    else:
        if gap:
            server.cut()
        server.delete("node-00001")
        server.put(again)
    if gap:
        server.cut()
    follower.until(lambda: "10.100.77.0/24" in subnets(follower))
    server.put(beating(again, 1))
    server.put(node(1, cidrs=["10.100.77.0/24"], **NEW))
    follower.until(lambda: follower.leases["node-00001"].backend_data.vtep_mac.endswith("99"))

    assert follower.leases["node-00001"].subnet == "10.100.77.0/24"
    assert len(gets(server)) == (gap != "compact")
    server.delete("node-00001")
    follower.until(lambda: set(follower.leases) == {"node-00002"})


@pytest.mark.parametrize("server_is", ["old", "picky", "forbidding"])
def test_a_server_that_gives_whole_objects_only(
    server: ApiServer, follow: Follow, caplog: pytest.LogCaptureFixture, server_is: str
) -> None:
    """It does not know the form, rejects it, or does not let us read single nodes."""
    server.metadata_only, server.picky = server_is == "forbidding", server_is == "picky"
    if server_is == "forbidding":
        server.fail("get", status(403, "Forbidden", "nodes is forbidden"))
    server.put(node(1))
    follower = started(follow(), server)
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)
    server.put(beating(node(2), 1))
    server.put(node(2, **NEW))
    server.delete("node-00001")
    follower.until(lambda: set(follower.leases) == {"node-00002"})

    assert follower.leases["node-00002"].backend_data.vtep_mac == "02:00:00:00:00:99"
    assert follower.errors == []
    assert (
        accepted(server)
        == {
            "old": ["metadata"],
            "picky": ["metadata", "whole"],
            "forbidding": ["metadata", "whole"],
        }[server_is]
    )
    assert len(gets(server)) == (server_is == "forbidding")
    told = [one for one in caplog.messages if "whole objects" in one]
    assert len(told) == (server_is != "old")


def test_credentials_that_expire_for_a_moment(server: ApiServer, follow: Follow) -> None:
    """A 401 says nothing of what the account may read: metadata is asked for afterwards, too."""
    server.fail("get", status(401, "Unauthorized", "the token has expired"))
    follower = started(follow(), server)
    server.put(node(1))
    follower.until(lambda: "node-00001" in follower.leases)

    assert "renew the credentials" in str(follower.errors[0])
    assert set(accepted(server)) == {"metadata"}
    assert len(gets(server)) == 2


def test_a_node_that_is_gone_when_it_is_asked_for(server: ApiServer, follow: Follow) -> None:
    """And one that cannot be read: the watch goes on where it was, and asks again."""
    follower = started(follow(), server)
    server.fail("get", status(404, "NotFound"), status(500, "InternalError"))
    server.put(node(1))
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)
    server.put(beating(node(1), 1))
    follower.until(lambda: set(follower.leases) == {"node-00001", "node-00002"})


def test_bookmarks_and_the_end_of_a_watch(server: ApiServer, follow: Follow) -> None:
    server.put(node(1))
    follower = started(follow(), server)
    version = server.bookmark()
    server.send("end")
    wait_until(lambda: server.count("watch") == 2)
    server.put(node(2))
    follower.until(lambda: "node-00002" in follower.leases)

    assert int(server.last("watch").query["resourceVersion"]) == version
    assert server.count("list") == 1
    assert follower.errors == []
