"""Leases: our own list, documents that cannot be used, keys and attributes."""

from __future__ import annotations

import json
from socket import AF_INET6, inet_ntop
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.cluster.documents import decode_leases
from flannel_dp.cluster.lease import (
    BackendData,
    BadClaim,
    Lease,
    LeaseList,
    lease_attrs_json,
    parse_subnet_key,
    printable,
    subnet_key,
)
from flannel_dp.errors import LeaseRejected, SourceError, Unavailable
from tests.lib.lease_documents import (
    ATTRS,
    DUAL,
    DUAL_DOCUMENT,
    decode,
    etcdctl_output,
    kubectl_node,
    kubectl_nodes,
    unavailable,
)

# Our own list


def test_our_list_and_the_bare_list() -> None:
    assert decode({"leases": [DUAL_DOCUMENT]}) == LeaseList([DUAL], [])
    assert decode([DUAL_DOCUMENT]) == LeaseList([DUAL], [])
    assert decode({"schema": 1, "leases": [DUAL_DOCUMENT]}) == LeaseList([DUAL], [])
    assert decode({"leases": []}) == LeaseList([], [])


def test_a_lease_without_an_address_of_a_family_may_say_null() -> None:
    lease = decode([DUAL_DOCUMENT | {"PublicIPv6": None, "BackendV6Data": None}]).leases[0]

    assert (lease.public_ipv6, lease.backend_v6_data) == ("", None)
    assert lease.backend_data == DUAL.backend_data


def test_name_revision_and_expiration() -> None:
    extra = {"Name": "n7", "CreateRevision": 12, "Expiration": "2031-01-01T00:00:00Z"}
    lease = decode([DUAL_DOCUMENT | extra]).leases[0]

    assert (lease.name, lease.revision, lease.expiration) == ("n7", 12, "2031-01-01T00:00:00Z")
    assert decode(f"[{lease.to_json()}]".encode()).leases == [lease]
    assert lease.label == "n7"


def test_key_and_label() -> None:
    assert DUAL.key == DUAL.label == "10.244.7.0-24&fd00:10:244:7::-64"
    assert Lease(subnet="10.5.34.0/24").key == "10.5.34.0-24"
    assert Lease(ipv6_subnet="fd00::/64").key == "fd00::-64"
    assert Lease(public_ip="192.0.2.7").label == "192.0.2.7"


@pytest.mark.parametrize("keys", [str.lower, str.upper, str.swapcase, str.title])
def test_keys_match_without_case(keys: Any) -> None:
    respelt = {
        keys(key): {keys(k): v for k, v in value.items()} if isinstance(value, dict) else value
        for key, value in DUAL_DOCUMENT.items()
    }

    assert decode({"leases": [respelt]}) == LeaseList([DUAL], [])
    assert decode({keys("leases"): [respelt, DUAL_DOCUMENT]}) == LeaseList([DUAL, DUAL], [])


def test_of_several_keys_the_last_one_wins() -> None:
    same = b'[{"Subnet": "10.0.0.0/24", "Subnet": "10.0.1.0/24"}]'
    other_case = b'[{"Subnet": "10.0.0.0/24", "subnet": "10.0.2.0/24", "Subnet": "10.0.1.0/24"}]'

    assert decode(same) == decode(other_case) == LeaseList([Lease(subnet="10.0.1.0/24")], [])


def test_unknown_keys_do_not_hide_a_lease() -> None:
    assert decode({"leases": [DUAL_DOCUMENT | {"Color": [1]}], "note": 1}) == LeaseList([DUAL], [])


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"Subnet": 5}, "Subnet: expected a string, got a number"),
        ({"PublicIP": ["x"]}, "PublicIP: expected a string, got a list"),
        ({"BackendData": "x"}, "BackendData: expected an object, got a string"),
        ({"BackendV6Data": {"VNI": "1"}}, "BackendV6Data.VNI: Expected `int`, got `str`"),
        ({"BackendData": {"VNI": -1}}, "BackendData.VNI: Expected `int` >= 0"),
        ({"BackendData": {"VNI": 1 << 32}}, "BackendData.VNI: Expected `int` <= 4294967295"),
        ({"BackendData": {"VNI": 1, "VtepMAC": True}}, "BackendData.VtepMAC: expected a string"),
        ({"CreateRevision": 1 << 63}, "CreateRevision: Expected `int`"),
        ({"CreateRevision": 10**30}, "CreateRevision: Expected `int`"),
    ],
)
def test_one_bad_claim_does_not_stop_the_others(change: dict[str, object], detail: str) -> None:
    claims = decode([DUAL_DOCUMENT, DUAL_DOCUMENT | {"Name": "bad"} | change, DUAL_DOCUMENT])

    assert claims.leases == [DUAL, DUAL]
    [bad] = claims.bad
    assert (bad.name, bad.reason) == ("bad", "bad-claim")
    assert bad.detail.startswith(detail)


@pytest.mark.parametrize("item", [None, 5, "x", [], True])
def test_a_claim_that_is_no_object(item: object) -> None:
    claims = decode({"leases": [DUAL_DOCUMENT, item]})

    assert claims.leases == [DUAL]
    assert [(bad.name, bad.reason) for bad in claims.bad] == [("leases[1]", "bad-claim")]


def test_data_of_another_backend_is_no_error() -> None:
    wireguard = {"BackendType": "wireguard", "BackendData": {"PublicKey": "k", "Port": 51820}}
    other = {"BackendType": "extension", "BackendData": "anything", "BackendV6Data": [1]}

    claims = decode([{**DUAL_DOCUMENT, **wireguard}, {**DUAL_DOCUMENT, **other}, DUAL_DOCUMENT])

    assert claims.bad == []
    assert [lease.backend_type for lease in claims.leases] == ["wireguard", "extension", "vxlan"]
    assert [lease.backend_data for lease in claims.leases] == [None, None, DUAL.backend_data]


def test_a_zero_public_ip_without_an_ipv4_subnet_is_none() -> None:
    v6 = {"IPv6Subnet": "fd00::/64", "PublicIP": "0.0.0.0", "PublicIPv6": "2001:db8::7"}
    expected = Lease(ipv6_subnet="fd00::/64", public_ipv6="2001:db8::7")
    with_v4 = DUAL_DOCUMENT | {"PublicIP": "0.0.0.0"}

    assert decode([v6]).leases == [expected]
    assert decode([v6 | {"other": 1}]).leases == [expected]
    assert decode([v6, with_v4]).leases[1].public_ip == "0.0.0.0"


def test_lone_surrogates_become_replacement_characters() -> None:
    [lease] = decode(b'[{"Name": "a\\ud800"}]').leases

    assert lease.name == "a\ufffd"
    assert lease.to_json() == '{"Name":"a\ufffd"}'


# Documents that cannot be used


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", "it is empty"),
        (b"\n \t", "it is empty"),
        (b"{}", "not a list of leases (its keys: none)"),
        (b'{"Network": "10.0.0.0/8"}', "its keys: Network"),
        (b"5", "neither an object nor a list"),
        (b"null", "neither an object nor a list"),
        (b'{"leases": {}}', "leases: expected a list"),
        (b'{"kvs": {}}', "kvs: expected a list"),
        (b'{"items": null}', "items: expected a list"),
        (b'{"kvs": [], "more": 7}', "more: Expected `bool`"),
        (b'{"items": [], "metadata": 7}', "metadata: Expected `object`"),
        (b'{"leases": [\n {"Subnet": }]}', "line 2, column 13: "),
        (b'{"leases": [', "line 1, column 13 (the end, so it is cut short)"),
        (b'{"leases": []} x', "line 1, column 16: Extra data"),
        (b'{"leases":\n [\xff]}', "line 2, column 3: not UTF-8"),
        (b"\xef\xbb\xbf[]", "BOM"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"leases":' * 100_000, "nested too deeply"),
        (b"[NaN]", "NaN"),
    ],
)
def test_unusable_documents_say_where_and_why(document: bytes, said: str) -> None:
    assert said in unavailable(document).message


@pytest.mark.parametrize(
    "document",
    [{"leases": [DUAL_DOCUMENT]}, etcdctl_output(("/x", b"")), kubectl_nodes(kubectl_node())],
)
def test_every_truncation_is_refused(document: object) -> None:
    data = json.dumps(document).encode()

    for cut in range(len(data)):
        with pytest.raises(Unavailable):
            decode_leases(data[:cut], origin="f")


def test_ten_megabytes_are_fine() -> None:
    many = [DUAL_DOCUMENT | {"Subnet": f"10.{i >> 8}.{i & 255}.0/24"} for i in range(40_000)]
    data = json.dumps({"leases": many}).encode()

    assert len(data) > 10_000_000
    assert len(decode_leases(data, origin="f").leases) == len(many)
    assert len(decode([{"Name": "x" * 10_000_000}]).leases) == 1


# Keys and attributes of one lease


def test_bad_keys_name_the_key_and_a_remedy() -> None:
    with pytest.raises(LeaseRejected, match=r"nonsense") as caught:
        parse_subnet_key("nonsense")

    assert caught.value.reason == "bad-key"
    assert "10.5.34.0-24" in caught.value.hint


def test_attributes_of_both_families_and_of_neither() -> None:
    assert json.loads(lease_attrs_json(DUAL)) == ATTRS
    assert lease_attrs_json(Lease()) == b'{"PublicIP":"0.0.0.0","PublicIPv6":null}'


def test_printable_escapes_and_cuts() -> None:
    assert printable("node-7") == "node-7"
    assert printable("a\x1b[2J\n") == "a\\x1b[2J\\n"
    assert len(printable("x" * 1000)) == 100


subnets = st.builds("{}/{}".format, st.ip_addresses(v=4), st.integers(0, 32))
subnets6 = st.builds(
    "{}/{}".format,
    st.ip_addresses(v=6).map(lambda address: inet_ntop(AF_INET6, address.packed)),
    st.integers(0, 128),
)


@given(st.just("") | subnets, st.just("") | subnets6)
def test_subnet_keys_round_trip(subnet: str, ipv6_subnet: str) -> None:
    key = subnet_key(subnet, ipv6_subnet)
    if not key:
        with pytest.raises(LeaseRejected):
            parse_subnet_key(key)
        return

    assert parse_subnet_key(key) == (subnet, ipv6_subnet)


@given(st.text() | st.text("0123456789abcdef.:-&", max_size=40))
def test_any_key_is_read_or_rejected(key: str) -> None:
    try:
        again = subnet_key(*parse_subnet_key(key))
    except LeaseRejected as rejected:
        again = rejected.reason

    assert again == "bad-key" or parse_subnet_key(again) == parse_subnet_key(key)


text = st.text(max_size=8)
data = st.none() | st.builds(BackendData, st.integers(0, 2**32 - 1), text)
leases = st.builds(
    Lease,
    subnet=text,
    ipv6_subnet=text,
    public_ip=text,
    public_ipv6=text,
    backend_type=st.just("vxlan"),
    backend_data=data,
    backend_v6_data=data,
    name=text,
    revision=st.integers(0, 2**63 - 1),
    expiration=text,
)


@given(st.lists(leases), st.randoms())
def test_leases_round_trip_in_any_spelling(wanted: list[Lease], rng: Any) -> None:
    def respelt(value: Any) -> Any:
        if isinstance(value, list):
            return [respelt(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            "".join(rng.choice((c.lower(), c.upper())) for c in key): respelt(item)
            for key, item in value.items()
        }

    document = [json.loads(lease.to_json()) for lease in wanted]

    assert decode(document) == LeaseList(wanted, [])
    assert decode({"leases": respelt(document)}) == LeaseList(wanted, [])


@given(leases.map(lambda lease: (lease, lease_attrs_json(lease))))
def test_attributes_round_trip_through_etcd(pair: tuple[Lease, bytes]) -> None:
    lease, attrs = pair
    [read] = decode(etcdctl_output(("/x/subnets/10.0.1.0-24", attrs))).leases

    assert lease_attrs_json(read) == attrs
    assert read.backend_data == lease.backend_data


def outcome(document: bytes) -> str:
    try:
        claims = decode_leases(document, origin="f")
    except SourceError as error:
        return error.hint
    assert all(isinstance(lease, Lease) for lease in claims.leases)
    assert all(isinstance(bad, BadClaim) for bad in claims.bad)
    return "read"


@given(st.binary(max_size=300))
def test_garbage_is_a_source_error(document: bytes) -> None:
    assert outcome(document)


KEYS = ["leases", "kvs", "items", "kind", "metadata", "spec", "key", "value", "more", "header"]
KEYS += ["podCIDR", "podCIDRs", "name", "annotations", "continue", "Subnet", "BackendData"]
KEYS += ["BackendType", "VNI", "PublicIP", "Name"]
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(_json)
def test_any_json_is_read_or_a_source_error(document: object) -> None:
    assert outcome(json.dumps(document).encode())


@given(
    st.sampled_from(
        [
            {"leases": [DUAL_DOCUMENT]},
            etcdctl_output(("/x/subnets/a", b"{}")),
            kubectl_nodes(kubectl_node()),
        ]
    ),
    st.data(),
)
def test_damaged_documents_are_read_or_a_source_error(
    document: object, draw: st.DataObject
) -> None:
    damaged = bytearray(json.dumps(document).encode())
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))

    assert outcome(bytes(damaged))
