"""``flannel-dp`` as a process on a node of a Kubernetes cluster: nodes that come, move and go,
and a node object that is recreated."""

from __future__ import annotations

import copy

from msgspec.structs import replace

from flannel_dp import __version__
from flannel_dp.cluster.lease import BackendData
from tests.lib.kube import (
    PREFIX,
    beating,
)
from tests.lib.kube_cluster import (
    ELSEWHERE,
    OWN,
    Cluster,
    bare_node,
    kube_node,
    told,
)
from tests.lib.leases import DEVICE, endpoint, mac, peer, subnet
from tests.lib.monitor import Monitor
from tests.lib.service import fetch, free_port

# ---- following ------------------------------------------------------------------


def test_nodes_that_come_move_and_go(cluster: Cluster) -> None:
    cluster.start()
    cluster.await_clean()

    cluster.join(6, 7)
    cluster.await_clean()
    cluster.change(replace(peer(2), public_ip=endpoint(4, 900), public_ipv6=endpoint(6, 900)), 2)
    cluster.await_clean()
    cluster.leave(3)
    cluster.await_clean()
    cluster.join(3)
    cluster.await_clean()


def test_a_change_of_one_family_leaves_the_other_alone(cluster: Cluster, family: int) -> None:
    """flanneld misses such a change where both families are on."""
    cluster.start("--audit-interval", "3600")
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()

    with Monitor(cluster.host) as monitor:
        key = "backend_data" if family == 4 else "backend_v6_data"
        data = BackendData(1, mac(family, 902))
        cluster.change(replace(peer(2), **{key: data}), 2)
        cluster.await_clean()
        keys = set(told(monitor))

    assert mac(family, 902) in keys
    assert keys <= {
        *(mac(family, 2), mac(family, 902)),
        *(subnet(family, 2), subnet(family, 2).partition("/")[0]),
    }


def test_heartbeats_touch_nothing(cluster: Cluster) -> None:
    cluster.start("--audit-interval", "3600")
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()

    with Monitor(cluster.host) as monitor:
        for beat in range(20):
            for number in (1, 2, 3):
                cluster.server.put(beating(kube_node(number), beat))
        cluster.server.bookmark()
        cluster.join(6)
        cluster.await_clean()
        keys = [key for key in told(monitor) if not key.isdecimal()]  # a nexthop's is its number

    both = [(subnet(family, 6), mac(family, 6)) for family in (4, 6)]
    gateways = [subnet.partition("/")[0] for subnet, _ in both]
    assert sorted(keys) == sorted([*gateways, *(key for pair in both for key in pair)])


def test_what_a_lost_watch_did_not_tell_is_found_by_a_list(cluster: Cluster) -> None:
    cluster.start("--audit-interval", "3600")
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()
    lists = cluster.server.count("list")

    moved = replace(peer(1), public_ip=endpoint(4, 901))
    own = cluster.server.nodes[OWN]
    cluster.peers = {1: moved, **{n: peer(n) for n in (3, 4, 5, 6)}}
    cluster.server.replace_all(own, *(kube_node(n, lease) for n, lease in cluster.peers.items()))
    cluster.server.compact()
    cluster.server.cut()
    cluster.await_clean()

    assert cluster.server.count("list") == lists + 1
    cluster.join(7)
    cluster.await_clean()
    assert cluster.server.count("list") == lists + 1


def test_while_the_server_is_away_the_kernel_stays(cluster: Cluster) -> None:
    port = free_port(cluster.host)
    cluster.start("--healthz-port", str(port), "--audit-interval", "0.2")
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()

    cluster.server_down()
    cluster.until(lambda: "degraded" in fetch(cluster.host, port, "/healthz")[1])
    code, text = fetch(cluster.host, port, "/healthz")
    assert (code, cluster.server.url in text) == (200, True), text
    assert fetch(cluster.host, port, "/readyz")[0] == 200
    assert cluster.kernel() == cluster.wanted()
    cluster.host.ip(f"-4 route del {subnet(4, 2)}")  # what drifts is mended all the same
    cluster.await_clean()

    cluster.server_up()
    cluster.join(6)
    cluster.leave(5)
    cluster.await_clean()
    cluster.until(lambda: fetch(cluster.host, port, "/healthz") == (200, "ok\n"))


def test_a_node_that_cannot_be_read_does_not_stop_the_others(cluster: Cluster) -> None:
    cluster.server.put(kube_node(8, backend_data="no JSON", backend_v6_data="neither"))
    cluster.start()
    cluster.await_clean()

    cluster.server.put(kube_node(9, cidrs=[subnet(4, 1), subnet(6, 1)]))  # node 1 was first
    cluster.join(6)
    cluster.await_clean()


# ---- annotations of ours that another program changes --------------------------------


def test_annotations_are_restored_one_by_one(cluster: Cluster) -> None:
    """Those that are missing and those that differ; others are left alone."""
    cluster.start("--audit-interval", "3600")
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()
    before, patches = cluster.notes, len(cluster.server.patches)

    damaged = copy.deepcopy(cluster.server.nodes[OWN])
    notes = damaged["metadata"]["annotations"]
    del notes[f"{PREFIX}public-ip"]
    notes |= {f"{PREFIX}backend-v6-data": "null", f"{PREFIX}other": "theirs"}
    with Monitor(cluster.host) as monitor:
        cluster.server.put(damaged)
        cluster.until(lambda: cluster.notes == before | {"other": "theirs"})
        assert told(monitor) == []

    (patch,) = cluster.server.patches[patches:]
    assert set(patch.annotations) == {"public-ip", "backend-v6-data"}
    assert patch.conditions == []
    cluster.until(lambda: f"again: {PREFIX}public-ip, {PREFIX}backend-v6-data" in cluster.said())


def test_a_start_asks_for_the_node_once(cluster: Cluster) -> None:
    """It says who asks, and who has written what."""
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")

    assert cluster.server.count("get") == 1
    assert {seen.headers["User-Agent"] for seen in cluster.server.requests} == {
        f"flannel-dp/{__version__}"
    }
    managers = {s.query.get("fieldManager") for s in cluster.server.requests if s.verb == "patch"}
    assert managers == {"flannel-dp"}


# ---- a node object that is made anew ------------------------------------------------


def test_a_node_that_is_made_anew_is_published_again(cluster: Cluster) -> None:
    """A kubelet that registers again has no annotations, and flanneld's stay away until it is
    started again."""
    cluster.start("--audit-interval", "3600")
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()
    before = cluster.notes

    with Monitor(cluster.host) as monitor:
        cluster.server.delete(OWN)
        cluster.server.put(bare_node())
        cluster.until(lambda: cluster.condition == "False")
        assert cluster.notes == before
        cluster.until(lambda: "published again" in cluster.said())
        assert told(monitor) == []
    cluster.join(6)
    cluster.await_clean()


def test_a_node_that_is_away_for_a_while(cluster: Cluster) -> None:
    port = free_port(cluster.host)
    cluster.start("--healthz-port", str(port))
    cluster.until(lambda: cluster.condition == "False")

    cluster.server.delete(OWN)
    cluster.until(lambda: "lease" in fetch(cluster.host, port, "/healthz")[1])
    assert f"/api/v1/nodes/{OWN}: 404" in fetch(cluster.host, port, "/healthz")[1]
    cluster.server.put(bare_node())

    cluster.until(lambda: cluster.notes.get("public-ip") == cluster.host.ipv4)
    cluster.until(lambda: cluster.condition == "False")
    cluster.until(lambda: fetch(cluster.host, port, "/healthz") == (200, "ok\n"))
    assert cluster.kernel() == cluster.wanted()


def test_a_node_that_got_other_pod_cidrs_joins_again_with_them(cluster: Cluster) -> None:
    port = free_port(cluster.host)
    cluster.start("--healthz-port", str(port))
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()
    before = cluster.notes

    cluster.server.delete(OWN)
    cluster.until(lambda: "cannot refresh this node's lease" in cluster.said())
    cluster.server.put(bare_node(cidrs=[subnet(4, 50), subnet(6, 50)]))
    cluster.until(lambda: "not its pod CIDR any more" in cluster.said())
    cluster.until(lambda: cluster.condition == "False")

    assert cluster.notes == before
    cluster.await_clean()
    assert "FLANNEL_SUBNET=10.240.50.1/24\n" in cluster.subnet_file.read_text()
    for family in (4, 6):
        (link,) = cluster.host.ip_json(f"-{family} address show dev {DEVICE[family]} scope global")
        assert link["addr_info"][0]["local"] == subnet(family, 50).partition("/")[0]
    cluster.until(lambda: fetch(cluster.host, port, "/healthz") == (200, "ok\n"))
    cluster.join(6)
    cluster.await_clean()


def test_a_node_that_is_made_anew_with_a_broken_annotation(cluster: Cluster) -> None:
    port = free_port(cluster.host)
    cluster.start("--healthz-port", str(port))
    cluster.until(lambda: cluster.condition == "False")

    cluster.server.delete(OWN)
    cluster.server.put(bare_node(public_ip_overwrite="nowhere"))
    cluster.until(
        lambda: "'nowhere' is no IPv4 address" in fetch(cluster.host, port, "/healthz")[1]
    )
    cluster.server.put(bare_node(public_ip_overwrite=ELSEWHERE))

    cluster.until(lambda: cluster.notes.get("public-ip") == ELSEWHERE)
    cluster.until(lambda: fetch(cluster.host, port, "/healthz") == (200, "ok\n"))
