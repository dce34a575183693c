"""What flannel's own tests and checks expect holds here as well: a table of inputs and outputs.

The facts are those of flannel's own tests: pkg/subnet/subnet_test.go,
pkg/subnet/config_test.go, pkg/subnet/etcd/registry_test.go and
pkg/subnet/kube/annotations_test.go; the checks of net-conf.json are those of
CheckNetworkConfig in pkg/subnet/config.go.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest

from flannel_dp.cluster.documents import decode_leases
from flannel_dp.cluster.lease import (
    BackendData,
    Lease,
    annotation_keys_prefix,
    lease_attrs_json,
    parse_subnet_key,
    subnet_key,
)
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, LeaseRejected

VALID_KEYS = [
    ("10.12.13.0-24", "10.12.13.0/24", ""),
    ("10.12.13.0-24&fd00:12:13::-56", "10.12.13.0/24", "fd00:12:13::/56"),
]

# flannel's parser has too few bits for these prefix lengths; here they are read.
WIDER_KEYS = [
    ("10.12.13.14-32", "10.12.13.14/32", ""),
    ("10.12.13.14-32&fd00::1-128", "10.12.13.14/32", "fd00::1/128"),
    ("fd00:12:13::-56", "", "fd00:12:13::/56"),
]

INVALID_KEYS = [
    "10",
    "10.12.13.0",
    "10.12.13-24",
    "10.12.13.300-24",
    "10.12.13.0-24hi",
    "&2001::-56",
    "10.12.13.0-24&:12:13:-56",
    "10.12.13.0-24&20011::-56",
    "10.12.13.0-24&2001-56",
    "10.12.13.0-24&2001::",
    "10.12.13.0-24&2001::-56hi",
]

# flannel takes the first, because its expression is not anchored at the left.
STRICTER_KEYS = ["hi10.12.13.0-24", "10.12.13.0-33", "10.12.13.0-24&fd00::-129", ""]

# (document without Backend, length, first and last subnet)
CONFIGS = [
    ('{ "network": "10.3.0.0/16" }', 24, "10.3.1.0", "10.3.255.0"),
    (
        '{ "Network": "10.3.0.0/16", "SubnetMin": "10.3.5.0", "SubnetMax": "10.3.8.0",'
        ' "SubnetLen": 28 }',
        28,
        "10.3.5.0",
        "10.3.8.0",
    ),
    ('{ "Network": "10.3.0.0/22" }', 24, "10.3.1.0", "10.3.3.0"),
    ('{ "Network": "10.3.0.0/23" }', 25, "10.3.0.128", "10.3.1.128"),
    ('{ "Network": "10.3.0.0/28" }', 30, "10.3.0.4", "10.3.0.12"),
]

V6_CONFIGS = [
    (
        '{ "enableIPv6": true, "ipv6Network": "fc00::/48", "enableIPv4": false }',
        64,
        "fc00:0:0:1::",
        "fc00:0:0:ffff::",
    ),
    (
        '{ "EnableIPv6": true, "IPv6Network": "fc00::/48", "IPv6SubnetMin": "fc00:0:0:1::",'
        ' "IPv6SubnetMax": "fc00:0:0:f::", "IPv6SubnetLen": 124, "enableIPv4": false }',
        124,
        "fc00:0:0:1::",
        "fc00:0:0:f::",
    ),
    (
        '{ "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fc00::/62" }',
        64,
        "fc00:0:0:1::",
        "fc00:0:0:3::",
    ),
    (
        '{ "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fc00::/63" }',
        65,
        "fc00::8000:0:0:0",
        "fc00:0:0:1:8000::",
    ),
    (
        '{ "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fc00::/124" }',
        126,
        "fc00::4",
        "fc00::c",
    ),
]

# (IPv4 keys, IPv6 keys, the key that is blamed, without its family prefix)
REFUSED_RANGES: list[tuple[dict[str, object], dict[str, object], str]] = [
    ({}, {}, "Network"),
    (
        {"Network": "10.3.0.0/16", "SubnetLen": 31},
        {"IPv6Network": "fc00::/48", "IPv6SubnetLen": 127},
        "SubnetLen",
    ),
    (
        {"Network": "10.3.0.0/16", "SubnetLen": 17},
        {"IPv6Network": "fc00::/48", "IPv6SubnetLen": 49},
        "SubnetLen",
    ),
    ({"Network": "10.3.0.0/29"}, {"IPv6Network": "fc00::/125"}, "Network"),
    (
        {"Network": "10.3.0.0/16", "SubnetMin": "10.4.0.0"},
        {"IPv6Network": "fc00::/48", "IPv6SubnetMin": "fc00:0:1::"},
        "SubnetMin",
    ),
    (
        {"Network": "10.3.0.0/16", "SubnetMax": "10.2.255.0"},
        {"IPv6Network": "fc00::/48", "IPv6SubnetMax": "fc00:0:1::"},
        "SubnetMax",
    ),
    (
        {"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.128"},
        {"IPv6Network": "fc00::/48", "IPv6SubnetMin": "fc00::1"},
        "SubnetMin",
    ),
    (
        {"Network": "10.3.0.0/16", "SubnetMax": "10.3.255.1"},
        {"IPv6Network": "fc00::/48", "IPv6SubnetMax": "fc00:0:0:5:8000::"},
        "SubnetMax",
    ),
]

MINIMAL_ATTRS = b'{"PublicIP":"1.2.3.4","PublicIPv6":null}'
VXLAN_ATTRS = (
    b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
    b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
)

# (prefix, the name of the backend-type annotation; None: refused)
ANNOTATION_PREFIXES = [
    ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/backend-type"),
    ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/backend-type"),
    ("flannel.alpha.coreos.com/prefix", "flannel.alpha.coreos.com/prefix-backend-type"),
    ("flannel.alpha.coreos.com/prefix-", "flannel.alpha.coreos.com/prefix-backend-type"),
    ("org.com", "org.com/backend-type"),
    ("org9.com", "org9.com/backend-type"),
    ("org.com/9", "org.com/9-backend-type"),
    ("org", None),
    ("org/", None),
    ("org/prefix", None),
    ("org.COM", None),
    ("org.com/PREFIX", None),
]


def with_backend(document: str) -> NetworkConfig:
    return NetworkConfig.from_json(
        json.dumps({**json.loads(document), "Backend": {"Type": "vxlan"}})
    )


@pytest.mark.parametrize(("key", "subnet", "ipv6_subnet"), VALID_KEYS + WIDER_KEYS)
def test_keys_are_read_and_made_again(key: str, subnet: str, ipv6_subnet: str) -> None:
    assert parse_subnet_key(key) == (subnet, ipv6_subnet)
    assert subnet_key(subnet, ipv6_subnet) == key


@pytest.mark.parametrize("key", INVALID_KEYS + STRICTER_KEYS)
def test_invalid_keys_are_rejected(key: str) -> None:
    with pytest.raises(LeaseRejected) as caught:
        parse_subnet_key(key)

    assert caught.value.reason == "bad-key"


@pytest.mark.parametrize(("document", "length", "first", "last"), CONFIGS)
def test_ipv4_ranges(document: str, length: int, first: str, last: str) -> None:
    config = with_backend(document)

    assert config.subnet_len == length
    assert (str(config.subnet_min), str(config.subnet_max)) == (first, last)


@pytest.mark.parametrize(("document", "length", "first", "last"), V6_CONFIGS)
def test_ipv6_ranges(document: str, length: int, first: str, last: str) -> None:
    config = with_backend(document)

    assert config.ipv6_subnet_len == length
    assert (str(config.ipv6_subnet_min), str(config.ipv6_subnet_max)) == (first, last)


def refused_documents() -> Iterator[tuple[dict[str, object], str]]:
    for v4, v6, key in REFUSED_RANGES:
        yield v4, key
        yield {"EnableIPv4": False, "EnableIPv6": True, **v6}, f"IPv6{key}"


@pytest.mark.parametrize(("document", "key"), list(refused_documents()))
def test_ranges_flannel_refuses(document: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_backend(json.dumps(document))

    assert caught.value.message.startswith(f"net-conf.json: {key}: ")


def test_attributes_have_flannels_bytes() -> None:
    assert lease_attrs_json(Lease(public_ip="1.2.3.4")) == MINIMAL_ATTRS
    lease = Lease(
        public_ip="192.168.64.3",
        backend_type="vxlan",
        backend_data=BackendData(vni=1, vtep_mac="c6:d2:32:6f:8f:44"),
    )
    assert lease_attrs_json(lease) == VXLAN_ATTRS


@pytest.mark.parametrize("attrs", [MINIMAL_ATTRS, VXLAN_ATTRS])
@pytest.mark.parametrize(("key", "subnet", "ipv6_subnet"), VALID_KEYS)
def test_etcd_content_is_read_back(attrs: bytes, key: str, subnet: str, ipv6_subnet: str) -> None:
    kv = {
        "key": base64.b64encode(b"/coreos.com/network/subnets/" + key.encode()).decode(),
        "value": base64.b64encode(attrs).decode(),
        "create_revision": 3,
    }
    document = json.dumps({"header": {}, "kvs": [kv], "count": 1}).encode()

    [lease] = decode_leases(document, origin="etcdctl").leases

    assert lease_attrs_json(lease) == attrs
    assert (lease.subnet, lease.ipv6_subnet, lease.revision) == (subnet, ipv6_subnet, 3)


@pytest.mark.parametrize(("prefix", "annotation"), ANNOTATION_PREFIXES)
def test_annotation_prefixes(prefix: str, annotation: str | None) -> None:
    if annotation is None:
        with pytest.raises(ConfigError, match="annotation prefix"):
            annotation_keys_prefix(prefix)
    else:
        assert f"{annotation_keys_prefix(prefix)}backend-type" == annotation
