"""One lease in the three documents that leases come in: our own list, and what etcdctl and
kubectl print."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from flannel_dp.cluster.documents import decode_leases
from flannel_dp.cluster.lease import BackendData, Lease, LeaseList
from flannel_dp.errors import Unavailable

PREFIX = "flannel.alpha.coreos.com/"
DUAL = Lease(
    subnet="10.244.7.0/24",
    ipv6_subnet="fd00:10:244:7::/64",
    public_ip="192.0.2.7",
    public_ipv6="2001:db8::7",
    backend_type="vxlan",
    backend_data=BackendData(vni=1, vtep_mac="02:00:00:00:00:07"),
    backend_v6_data=BackendData(vni=1, vtep_mac="02:00:00:00:06:07"),
)
DUAL_DOCUMENT: dict[str, Any] = {
    "Subnet": "10.244.7.0/24",
    "IPv6Subnet": "fd00:10:244:7::/64",
    "PublicIP": "192.0.2.7",
    "PublicIPv6": "2001:db8::7",
    "BackendType": "vxlan",
    "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:07"},
    "BackendV6Data": {"VNI": 1, "VtepMAC": "02:00:00:00:06:07"},
}
ATTRS = {key: value for key, value in DUAL_DOCUMENT.items() if "Subnet" not in key}


def decode(document: object) -> LeaseList:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return decode_leases(data, origin="some.json")


def unavailable(document: object) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        decode(document)

    assert caught.value.message.startswith("some.json: ")
    assert caught.value.hint
    return caught.value


def etcdctl_output(*pairs: tuple[str | bytes, object], **more: object) -> dict[str, object]:
    """What ``etcdctl get --prefix -w json`` prints; the first revision is 5."""

    def b64(value: object) -> str:
        if isinstance(value, str):
            value = value.encode()
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.b64encode(raw).decode()

    kvs = [
        {
            "key": b64(key),
            "create_revision": 5 + index,
            "mod_revision": 90,
            "version": 2,
            "value": b64(value),
            "lease": 7587863094360404226,
        }
        for index, (key, value) in enumerate(pairs)
    ]
    header = {"cluster_id": 14841639068965178418, "member_id": 1, "revision": 99, "raft_term": 2}
    document: dict[str, object] = {"header": header, **more}
    return {**document, "kvs": kvs, "count": len(kvs)} if kvs else document


def kubectl_node(
    name: str = "node-7", *, spec: object = None, **notes: object
) -> dict[str, object]:
    annotations = {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:07"}',
        "public-ip": "192.0.2.7",
    } | {key.replace("_", "-"): value for key, value in notes.items()}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": "1",
            "annotations": {PREFIX + k: v for k, v in annotations.items() if v is not None}
            | {"node.alpha.kubernetes.io/ttl": "0"},
        },
        "spec": spec or {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]},
        "status": {"conditions": [], "images": [{"names": ["a"]}]},
    }


def kubectl_nodes(*items: object, **more: object) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "items": list(items),
        "kind": "List",
        "metadata": {"resourceVersion": ""},
        **more,
    }
