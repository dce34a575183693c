"""Leases as etcdctl and kubectl print them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flannel_dp.cluster.documents import decode_leases
from flannel_dp.cluster.lease import BackendData, LeaseList
from flannel_dp.errors import ConfigError
from tests.lib.lease_documents import (
    ATTRS,
    DUAL,
    DUAL_DOCUMENT,
    PREFIX,
    decode,
    etcdctl_output,
    kubectl_node,
    kubectl_nodes,
    unavailable,
)

# etcdctl


def test_etcd_dual_stack() -> None:
    key = "/coreos.com/network/subnets/10.244.7.0-24&fd00:10:244:7::-64"
    [lease] = decode(etcdctl_output((key, ATTRS))).leases

    assert lease.name == "10.244.7.0-24&fd00:10:244:7::-64" == lease.key
    assert lease.revision == 5
    assert (lease.subnet, lease.ipv6_subnet) == (DUAL.subnet, DUAL.ipv6_subnet)
    assert (lease.public_ip, lease.public_ipv6) == (DUAL.public_ip, DUAL.public_ipv6)
    assert (lease.backend_data, lease.backend_v6_data) == (DUAL.backend_data, DUAL.backend_v6_data)


def test_etcd_value_with_other_spelling_and_null() -> None:
    value = {"publicip": "192.0.2.7", "PublicIPv6": None, "backendtype": "vxlan"}
    value["BackendData"] = {"vni": 3, "vtepmac": "m"}  # type: ignore[assignment]
    [lease] = decode(etcdctl_output(("/x/subnets/10.0.1.0-24", value))).leases

    assert (lease.public_ip, lease.backend_data) == ("192.0.2.7", BackendData(3, "m"))


def test_etcd_keys_of_other_kinds_are_passed_over() -> None:
    config = ("/coreos.com/network/config", {"Network": "10.0.0.0/8"})

    assert (
        decode(etcdctl_output(config, ("/subnets", b"x"), ("/a/subnets/10.0.1.0-24", ATTRS))).bad
        == []
    )
    assert decode(etcdctl_output(config)) == LeaseList([], [])


def test_etcd_without_keys_is_an_empty_cluster() -> None:
    assert decode(etcdctl_output()) == LeaseList([], [])
    assert decode({"header": {"revision": 7}, "kvs": None, "count": 0}) == LeaseList([], [])
    assert decode({"header": {"revision": "7"}, "KVS": [], "count": "0"}) == LeaseList([], [])


HEADER = {"cluster_id": 1, "member_id": 1, "revision": 99, "raft_term": 2}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"header": HEADER, "count": 3}, "etcd counts 3 keys, and 0 are in the list"),
        ({"header": HEADER, "count": 1}, "etcd counts 1 key, and 0 are in the list"),
        ({"header": HEADER, "count": "3"}, "etcd counts 3 keys, and 0 are in the list"),
        ({"header": HEADER, "kvs": [], "Count": 3}, "etcd counts 3 keys, and 0 are in the list"),
        ({**etcdctl_output(("/x/subnets/10.0.1.0-24", ATTRS)), "count": 2}, "2 keys, and 1 is"),
        ({"header": {}, "kvs": None, "count": 0}, "a header without a revision"),
        ({"header": None}, "a header without a revision"),
        ({"kvs": []}, "a header without a revision"),
        ({"header": {"revision": 0}}, "a header without a revision"),
        (
            {"header": HEADER, "kvs": [{"key": "L3gvc3VibmV0cy8xMC4wLjEuMC0yNA=="}]},
            "without values",
        ),
    ],
)
def test_rejects_an_answer_of_etcd_that_contradicts_itself(
    document: dict[str, object], message: str
) -> None:
    error = unavailable(document)

    assert message in error.message
    assert error.hint


@pytest.mark.parametrize(
    "document",
    [
        etcdctl_output(("/x/subnets/10.0.1.0-24", b"?"), ("/x/subnets/10.0.2.0-24", b"{")),
        kubectl_nodes(kubectl_node(public_ip=5), kubectl_node("b", backend_data="{")),
        {"leases": [{"Subnet": 1}, {"Subnet": []}]},
    ],
    ids=["etcdctl", "kubectl", "ours"],
)
def test_rejects_a_list_in_which_nothing_is_readable(document: dict[str, object]) -> None:
    assert "none of its 2 leases can be read" in unavailable(document).message


def test_the_only_lease_is_named_in_the_singular() -> None:
    error = unavailable({"leases": [{"Subnet": 1}]})

    assert "its only lease cannot be read: " in error.message


def test_etcd_result_with_more_to_come_is_refused() -> None:
    assert (
        "a part"
        in unavailable(etcdctl_output(("/x/subnets/10.0.1.0-24", ATTRS), more=True)).message
    )
    assert "a part" in unavailable({"kvs": [{"key": "eA=="}, 5], "more": True}).message


@pytest.mark.parametrize(
    "name",
    [
        "../../config",
        "10.0.1.0-24/..",
        "10.0.1.0-24\0",
        "\0",
        "",
        "x" * 9999,
        b"\xff\xfe",
        "\x1b[2J",
    ],
)
def test_hostile_etcd_keys_are_bad_keys(name: str | bytes) -> None:
    raw = name.encode() if isinstance(name, str) else name
    good = ("/x/subnets/10.0.1.0-24", ATTRS)
    claims = decode(etcdctl_output(good, (b"/x/subnets/" + raw, ATTRS), good))

    assert len(claims.leases) == 2
    [bad] = claims.bad
    assert bad.reason == "bad-key"
    assert bad.name.isprintable()
    assert len(bad.name) <= 100
    assert bad.detail.isprintable()


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"null", b"[]", b"\xff", b'{"PublicIP": 5}', b"[" * 100_000, b'{"PublicIP"'],
)
def test_bad_etcd_values_are_bad_claims(value: bytes) -> None:
    good = ("/x/subnets/10.0.1.0-24", ATTRS)
    claims = decode(etcdctl_output(good, ("/x/subnets/10.0.2.0-24", value)))

    assert len(claims.leases) == 1
    assert [(bad.name, bad.reason) for bad in claims.bad] == [("10.0.2.0-24", "bad-claim")]


def test_bad_kvs_are_bad_claims_and_numbers_may_be_strings() -> None:
    document = etcdctl_output(("/x/subnets/10.0.1.0-24", ATTRS))
    kvs: Any = document["kvs"]
    gateway = {**kvs[0], "create_revision": "77"}
    document["kvs"], document["count"] = [gateway, {"key": "@@"}, 7], "3"
    claims = decode(document)

    assert [lease.revision for lease in claims.leases] == [77]
    assert [bad.name for bad in claims.bad] == ["kvs[1]", "kvs[2]"]


# kubectl


def test_kube_nodes() -> None:
    dual = kubectl_node(
        spec={"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24", "fd00:10:244:7::/64"]},
        public_ipv6="2001:db8::7",
        backend_v6_data='{"VNI":1,"VtepMAC":"02:00:00:00:06:07"}',
    )
    old = kubectl_node("old", spec={"podCIDR": "10.244.8.0/24"})
    claims = decode(kubectl_nodes(dual, old))

    assert claims.bad == []
    assert claims.leases[0] == decode([DUAL_DOCUMENT | {"Name": "node-7"}]).leases[0]
    assert (claims.leases[1].name, claims.leases[1].subnet) == ("old", "10.244.8.0/24")


def test_nodes_that_are_not_flannels_are_passed_over() -> None:
    claims = decode(
        kubectl_nodes(
            kubectl_node("off", kube_subnet_manager="false"),
            kubectl_node("unset", kube_subnet_manager=None),
            kubectl_node("no-cidr", spec={"unschedulable": True}),
            {"metadata": {"name": "bare"}},
            {},
        )
    )

    assert claims == LeaseList([], [])


def test_bad_nodes_are_bad_claims() -> None:
    claims = decode(
        kubectl_nodes(
            kubectl_node("good"),
            kubectl_node("json", backend_data="{"),
            kubectl_node("vni", backend_v6_data='{"VNI":"x"}'),
            kubectl_node("twice", spec={"podCIDRs": ["10.0.0.0/24", "10.0.1.0/24"]}),
            kubectl_node("type", spec={"podCIDR": 5}),
            {"metadata": 5},
            "text",
        )
    )

    assert [lease.name for lease in claims.leases] == ["good"]
    names = [(bad.name, bad.reason) for bad in claims.bad]
    expected = ["type", "items[5]", "items[6]", "json", "vni", "twice"]
    assert sorted(names) == sorted((name, "bad-claim") for name in expected)


def test_annotated_data_of_other_backends_and_spellings() -> None:
    claims = decode(
        kubectl_nodes(
            kubectl_node(backend_type="host-gw", backend_data=None),
            kubectl_node(backend_type="host-gw", backend_data="null"),
            kubectl_node(backend_type="wireguard", backend_data='{"PublicKey":"k","Port":51820}'),
            kubectl_node(backend_data='{"vtepmac":"m"}'),
        )
    )

    assert claims.bad == []
    data = [lease.backend_data for lease in claims.leases]
    assert data == [None, None, None, BackendData(0, "m")]


def test_a_custom_annotation_prefix() -> None:
    document = json.dumps(kubectl_nodes(kubectl_node())).replace(PREFIX, "org.com/x-").encode()

    assert len(decode_leases(document, origin="f", annotation_prefix="org.com/x").leases) == 1
    assert decode_leases(document, origin="f").leases == []
    with pytest.raises(ConfigError, match="prefix 'a/b/c'"):
        decode_leases(b"[]", origin="f", annotation_prefix="a/b/c")


def test_kube_lists_that_are_not_whole_or_not_of_nodes_are_refused() -> None:
    partial = kubectl_nodes(kubectl_node(), metadata={"continue": "abc", "remainingItemCount": 1})

    assert "a part" in unavailable(partial).message
    assert "a part" in unavailable({**partial, "items": [5]}).message
    for items in ([kubectl_node()], [5]):
        left = kubectl_nodes(*items, metadata={"remainingItemCount": 2})
        assert "remainingItemCount is 2" in unavailable(left).message
    assert "not a Node" in unavailable(kubectl_nodes(kubectl_node() | {"kind": "Pod"})).message
    assert "PodList" in unavailable(kubectl_nodes(kind="PodList")).message
    assert "single node" in unavailable(kubectl_node()).message
    assert decode(kubectl_nodes(kind="NodeList")) == LeaseList([], [])
