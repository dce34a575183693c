"""``flannel-dp`` on a node of a Kubernetes cluster: what stands in the way of a start, and
commands that run once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.lib.apiserver import OVERLOADED, Certificates, status
from tests.lib.kernel import expected, has_device
from tests.lib.kube import (
    PREFIX,
)
from tests.lib.kube_cluster import (
    OWN,
    Cluster,
    bare_node,
    device_mac,
    kube_node,
)
from tests.lib.leases import mac, peer, subnet
from tests.lib.waiting import LIMIT

NOTHING = expected((), 4)


# ---- what stands in the way of a start --------------------------------------------


@pytest.mark.parametrize("cidrs", [[], [subnet(4, 0)], [subnet(6, 0)]], ids=["none", "v4", "v6"])
def test_a_node_without_its_pod_cidrs(cluster: Cluster, cidrs: list[str]) -> None:
    cluster.server.make_again(bare_node(cidrs=cidrs))

    missing = 6 if cidrs == [subnet(4, 0)] else 4
    said = cluster.waiting(f"node {OWN}: pod cidr not assigned for IPv{missing}")

    assert "--allocate-node-cidrs=true" in said
    assert untouched(cluster)

    cluster.server.make_again(bare_node())  # kube-controller-manager has come
    cluster.await_clean()


def test_pod_cidrs_of_another_network(cluster: Cluster) -> None:
    cluster.server.make_again(bare_node(cidrs=["10.9.0.0/24", subnet(6, 0)]))

    code, said = cluster.refused()

    assert code == 2, said
    assert "10.9.0.0/24 is not inside Network 10.240.0.0/12" in said
    assert untouched(cluster)


def test_a_broken_annotation_of_this_node(cluster: Cluster) -> None:
    """It is corrected in the cluster, and no node has to be visited for that."""
    node = bare_node()
    node["metadata"]["annotations"][f"{PREFIX}node-public-ip"] = "eth0"
    cluster.server.put(node)

    said = cluster.waiting("'eth0' is no IPv4 address")

    assert "node-public-ip" in said
    assert untouched(cluster)
    cluster.server.put(bare_node())
    cluster.await_clean()


def test_a_kubeconfig_that_is_half_written(cluster: Cluster) -> None:
    whole = cluster.kubeconfig.read_text()
    cluster.kubeconfig.write_text("apiVersion: v1\nkind: Config\n")

    cluster.waiting("not usable as a kubeconfig")

    assert untouched(cluster)
    cluster.kubeconfig.write_text(whole)
    cluster.await_clean()


def test_a_node_that_nobody_knows(cluster: Cluster) -> None:
    said = cluster.waiting("/api/v1/nodes/somebody: 404", NODE_NAME="somebody")

    assert "NODE_NAME" in said
    assert untouched(cluster)


def test_a_nameless_node(cluster: Cluster) -> None:
    code, said = cluster.refused(POD_NAME="", POD_NAMESPACE="")

    assert code == 2, said
    assert "set NODE_NAME" in said
    assert untouched(cluster)


def test_a_server_that_does_not_answer(cluster: Cluster) -> None:
    cluster.server_down()

    said = cluster.waiting(f"GET /api/v1/nodes/{OWN}: cannot connect")

    assert cluster.server.url in said
    assert "check the server's address" in said
    assert untouched(cluster)

    cluster.server_up()
    cluster.await_clean()


@pytest.mark.parametrize("verb", ["get", "patch"])
def test_a_server_that_is_young_or_busy(cluster: Cluster, verb: str) -> None:
    """Its authorizer knows no roles yet, it sheds load, its etcd has no leader."""
    refusals = [
        status(403, "Forbidden", "RBAC: not found"),
        OVERLOADED,
        status(500, "Error", "no leader"),
    ]
    cluster.server.fail(verb, *refusals)

    cluster.start()

    cluster.await_clean()
    cluster.until(lambda: cluster.condition == "False")
    lines = [line for line in cluster.said().splitlines() if "Waiting before the start" in line]
    assert [re.findall(r"\b(403|429|500)\b", line)[0] for line in lines] == ["403", "429", "500"]
    assert "429: Too many requests, please try again later." in lines[1]


@pytest.mark.parametrize("late", [4, 6])
def test_a_family_without_an_address_is_published_when_it_has_one(
    cluster: Cluster, late: int
) -> None:
    other, host = 10 - late, cluster.host
    host.ip(f"-{late} address flush dev eth0")
    key = {4: "public-ip", 6: "public-ipv6"}

    cluster.start()
    cluster.until(lambda: cluster.kernel()[other] == cluster.wanted()[other])
    assert cluster.notes[key[other]] == host.underlay(other)
    assert key[late] not in cluster.notes
    assert not has_device(host, late)

    prefix = f"{host.ipv4}/24" if late == 4 else f"{host.ipv6}/64 nodad"
    host.ip(f"address add {prefix} dev eth0")
    cluster.await_clean()
    cluster.until(lambda: cluster.notes.get(key[late]) == host.underlay(late))
    assert cluster.notes[key[other]] == host.underlay(other)
    cluster.until(lambda: cluster.condition == "False")


def test_fr27_a_virtual_address_that_is_left_is_not_published(
    cluster: Cluster, family: int
) -> None:
    """The DHCP address is gone, keepalived's is left, with the agent running and without one."""
    host = cluster.host
    old, new, bits = (
        (host.ipv4, "192.0.2.77", 24) if family == 4 else (host.ipv6, "2001:db8::77", 64)
    )
    virtual = {4: "192.0.2.99/32", 6: "2001:db8::99/128 nodad"}[family]
    key = {4: "public-ip", 6: "public-ipv6"}[family]
    said = f"{old}, which this node was reached at, is gone"
    cluster.configure(family)
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")

    host.ip(f"address add {virtual} dev eth0")
    host.ip(f"address del {old}/{bits} dev eth0")
    cluster.until(lambda: said in cluster.said())
    assert cluster.end() == 0
    cluster.start()  # with a new log
    cluster.until(lambda: said in cluster.said())
    assert cluster.notes[key] == old

    host.ip(f"address add {new}/{bits} dev eth0 {'nodad' if family == 6 else ''}")
    cluster.until(lambda: cluster.notes[key] == new)
    cluster.await_clean()


@pytest.mark.parametrize(
    ("verb", "rule"), [("get", '"get" of "nodes"'), ("patch", '"patch" of "nodes/status"')]
)
def test_a_right_that_is_missing(cluster: Cluster, verb: str, rule: str) -> None:
    refusal = status(403, "Forbidden", "User cannot do that")
    cluster.server.fail(verb, *[refusal] * 999)

    cluster.waiting(f"a ClusterRole bound to this account has to allow {rule}")

    assert not any(has_device(cluster.host, family) for family in (4, 6))


def test_a_token_that_has_expired(cluster: Cluster) -> None:
    cluster.server.tokens = {"another one"}

    said = cluster.waiting(f"renew the credentials in {cluster.kubeconfig}")

    assert "secret" not in said
    assert untouched(cluster)


def test_an_authority_that_is_not_the_servers(cluster: Cluster, tmp_path: Path) -> None:
    other = Certificates(tmp_path / "other")
    document = json.loads(cluster.kubeconfig.read_text())
    document["clusters"][0]["cluster"]["certificate-authority"] = str(other.ca)
    cluster.kubeconfig.write_text(json.dumps(document))

    said = cluster.waiting("the server's certificate is not trusted")

    assert "certificate-authority" in said
    assert untouched(cluster)


def untouched(cluster: Cluster) -> bool:
    """Neither kernel nor node object has been written to."""
    devices = any(has_device(cluster.host, family) for family in (4, 6))
    return not devices and not cluster.server.patches and not cluster.subnet_file.exists()


# ---- once -----------------------------------------------------------------------


def test_commands_that_run_once(cluster: Cluster) -> None:
    """A node that has published itself before; none of them publishes anything."""
    own = replace(peer(0), public_ip=cluster.host.ipv4, public_ipv6=cluster.host.ipv6)
    cluster.server.put(kube_node(0, own))
    cluster.server.put(kube_node(8, backend_type="host-gw"))

    code, planned, said = cluster.run("plan")
    assert code == 0, said
    added = {one["table"] for one in planned["operations"] if one["op"] == "add"}
    assert added == {"neighbour", "fdb", "nexthop", "route"}
    assert not has_device(cluster.host, 4)

    code, report, said = cluster.run("sync")
    assert code == 0, said
    assert report["tables"]["route"]["added"] == 2 * len(cluster.peers)
    assert {one["reason"] for one in report["rejected"]} == {"wrong-backend"}
    assert cluster.kernel() == cluster.wanted()
    assert device_mac(cluster, 4) == mac(4, 0)

    code, again, said = cluster.run("sync")
    assert code == 0, said
    counts = again["tables"]["route"]
    assert (counts["unchanged"], counts["added"]) == (2 * len(cluster.peers), 0)

    code, overview, said = cluster.run("show")
    assert code == 0, said
    shown = {view["family"]: {one["subnet"] for one in view["peers"]}
             for view in overview["families"]}  # fmt: skip
    assert shown == {f: {subnet(f, number) for number in cluster.peers} for f in (4, 6)}
    assert cluster.server.count("patch") == 0


def test_once_without_its_name(cluster: Cluster) -> None:
    """Who runs it by hand has neither NODE_NAME nor a pod's name set."""
    own = replace(peer(0), public_ip=cluster.host.ipv4, public_ipv6=cluster.host.ipv6)
    cluster.server.put(kube_node(0, own))

    code, _, said = cluster.run("sync", POD_NAME="", POD_NAMESPACE="")

    assert code == 0, said
    assert cluster.kernel() == cluster.wanted()


def test_the_node_object_is_evidence_of_who_this_node_is(cluster: Cluster) -> None:
    """``explain --self``: the name from NODE_NAME, and what that node has published."""
    here = {"public_ip": cluster.host.ipv4, "public_ipv6": cluster.host.ipv6}
    cluster.server.put(kube_node(0, replace(peer(0), **here)))

    code, answer, said = cluster.run("explain", "--self")

    assert (code, answer["ok"]) == (0, True), said
    for one in answer["families"]:
        assert (one["subnet"], one["lease"]) == (subnet(one["family"], 0), OWN)
        assert one["said_by"] == f"node {OWN}"
        evidence = {item["source"]: item for item in one["evidence"]}
        assert evidence["the node's name"] == {
            "source": "the node's name",
            "says": OWN,
            "agrees": True,
        }
        assert evidence[f"lease {OWN}"]["agrees"] is True
    assert untouched(cluster)


def test_the_node_s_name_tells_its_lease_from_an_impostor_s(cluster: Cluster) -> None:
    """Nodes carry no revision, and a name that sorts first is anybody's to choose."""
    here = {"public_ip": cluster.host.ipv4, "public_ipv6": cluster.host.ipv6}
    cluster.server.put(kube_node(0, replace(peer(0), **here)))
    evil = kube_node(99, replace(peer(99), **here))
    evil["metadata"]["name"] = "a-evil"
    cluster.server.put(evil)

    code, answer, _ = cluster.run("sync", POD_NAME="", POD_NAMESPACE="")
    assert (code, answer["error"]["exit_code"]) == (4, 4)
    assert all(name in answer["error"]["message"] for name in ("a-evil", OWN))
    assert cluster.kernel() == {4: NOTHING, 6: NOTHING}

    code, answer, said = cluster.run("sync")
    assert code == 0, said
    assert {(one["lease"], one["reason"]) for one in answer["rejected"]} == {
        ("a-evil", "own-public-ip")
    }
    assert cluster.kernel() == cluster.wanted()


def test_leases_are_listed_and_can_be_fed_back(cluster: Cluster, tmp_path: Path) -> None:
    own = replace(peer(0), public_ip=cluster.host.ipv4, public_ipv6=cluster.host.ipv6)
    cluster.server.put(kube_node(0, own))

    code, listed, said = cluster.run("leases")
    assert code == 0, said
    names = {lease["Name"] for lease in listed["leases"]}
    assert names == {OWN, *(f"node-{number:05}" for number in cluster.peers)}

    path = tmp_path / "leases.json"
    path.write_text(json.dumps(listed))
    command = cluster.command("sync", "--leases", str(path))
    command.remove("--kube-subnet-mgr")
    at = command.index("--kubeconfig-file")
    del command[at : at + 2]
    cluster.spawn(command)
    assert cluster.process is not None
    assert cluster.process.wait(LIMIT) == 0, cluster.said()
    assert cluster.kernel() == cluster.wanted()


def test_clean_does_without_the_server(cluster: Cluster) -> None:
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    cluster.end()
    cluster.server_down()

    code, _, said = cluster.run("clean")

    assert code == 0, said
    assert cluster.kernel() == {4: NOTHING, 6: NOTHING}


@pytest.mark.parametrize("command", ["sync", "plan", "show", "leases"])
def test_once_without_the_server(cluster: Cluster, command: str) -> None:
    cluster.server_down()

    code, answer, said = cluster.run(command)

    assert code == 4, said
    assert answer["error"]["exit_code"] == 4
    assert cluster.server.url in answer["error"]["message"]
    assert untouched(cluster)
