"""Packed claims: what cannot be read of a lease, the columns, and changes of the rows."""

from __future__ import annotations

from array import array
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flannel_dp import _core
from flannel_dp.cluster.lease import BackendData, Lease
from tests.lib.packed_claims import FAMILIES, NETWORK, admit, lease, pack, peer, reason

# ---- what cannot be read -----------------------------------------------------------

BAD = [
    ({"subnet": "10.244.5.0"}, "bad-subnet", "'10.244.5.0' is not a prefix"),
    ({"subnet": "10.244.5.0/33"}, "bad-subnet", "not a prefix"),
    ({"subnet": "10.244.5.0/-1"}, "bad-subnet", "not a prefix"),
    ({"subnet": "fd00::/64"}, "bad-subnet", "not a prefix"),
    ({"endpoint": ""}, "bad-public-ip", "not an address of this family"),
    ({"endpoint": "2001:db8::5"}, "bad-public-ip", "not an address of this family"),
    ({"endpoint": "192.0.2.5\0"}, "bad-public-ip", "not an address"),
    ({"endpoint": "192.0.2.05"}, "bad-public-ip", "not an address"),
    ({"mac": ""}, "bad-mac", "VtepMAC '' is not a MAC address"),
    ({"mac": "02:00:00:00:00"}, "bad-mac", "not a MAC address"),
    ({"mac": "02:00:00:00:00:0g"}, "bad-mac", "not a MAC address"),
    ({"backend_type": "host-gw"}, "wrong-backend", "'host-gw', this network runs 'vxlan'"),
    ({"backend_type": ""}, "wrong-backend", "''"),
    ({"backend_data": BackendData(2, "02:00:00:00:00:05")}, "wrong-vni", "VNI is 2"),
    ({"backend_data": None}, "bad-mac", "no VtepMAC was published"),
]


@pytest.mark.parametrize(("fields", "why", "detail"), BAD)
def test_one_claim_that_cannot_be_read(fields: dict[str, Any], why: str, detail: str) -> None:
    good = {"subnet": "10.244.5.0/24", "endpoint": "192.0.2.5", "mac": "02:00:00:00:00:05"}
    base = lease(4, **{key: fields.get(key, value) for key, value in good.items()})
    values = {name: getattr(base, name) for name in Lease.__struct_fields__}
    values |= {key: value for key, value in fields.items() if key not in good}
    accepted, rejected = admit(pack(4, [Lease(**values), peer(4, 6)]))

    assert [accepted.name(n) for n in range(len(accepted))] == ["node6"]
    assert [reason(rejected.reason(n)) for n in range(len(rejected))] == [why]
    assert detail in rejected.detail(0)


@pytest.mark.parametrize("vni", [0, 1, 0x10001])
def test_vni_may_be_left_out_or_cut_to_16_bits(vni: int) -> None:
    claims = _core.Claims(4)
    data = BackendData(vni=vni & 0xFFFF, vtep_mac="02:00:00:00:00:05")
    one = Lease(
        subnet="10.244.5.0/24", public_ip="192.0.2.5", backend_type="VXLAN", backend_data=data
    )
    claims.extend([one], "vxlan", vni or 1, True)

    assert reason(claims.reason(0)) == "accepted"


def test_leases_without_this_family_are_no_claims() -> None:
    claims = pack(6, [peer(4, 5), peer(6, 6)])

    assert [(claims.name(n), claims.origin(n)) for n in range(len(claims))] == [("node6", 1)]


def test_a_claim_without_a_name_has_flannels_key() -> None:
    both = Lease(subnet="10.244.5.0/24", ipv6_subnet="fd00:10:244:5::/64")
    for family in (4, 6):
        assert pack(family, [both]).name(0) == both.key
    assert pack(4, [peer(4, 5, name="")]).name(0) == "10.244.5.0-24"
    assert pack(6, [peer(6, 5, name="")]).name(0) == "fd00:10:244:5::-64"


@given(name=st.text(min_size=1, max_size=300))
@example(name="x" * 0xFFFF)
@example(name="\u00e9" * 0x8000)
def test_names_are_kept(name: str) -> None:
    claims = pack(4, [peer(4, 5, name=name), peer(4, 6)])

    kept = name.encode() if len(name.encode()) <= 0xFFFF else name.encode()[:255]
    assert claims.name(0) == kept.decode(errors="replace")
    assert claims.name(1) == "node6"


def test_host_bits_are_dropped() -> None:
    claims = pack(4, [peer(4, 5, subnet="10.244.5.77/24")])

    assert claims.subnet(0) == "10.244.5.0/24"


def test_only_the_first_refusals_are_described() -> None:
    claims = pack(4, [peer(4, 5, subnet="x") for _ in range(1500)])

    assert len(claims.details) == _core.DEF_DETAILS < len(claims)


# ---- columns and changes -----------------------------------------------------------


@FAMILIES
def test_columns_are_the_fields(family: int) -> None:
    leases = [peer(family, n) for n in (5, 6, 7)]
    claims = pack(family, leases)
    width = 4 if family == 4 else 16

    assert [bytes(row) for row in memoryview(claims.subnets).tolist()] == [
        ip_network(claims.subnet(n)).network_address.packed for n in range(3)
    ]
    assert [bytes(row) for row in memoryview(claims.endpoints).tolist()] == [
        ip_address(claims.endpoint(n)).packed for n in range(3)
    ]
    assert [bytes(row).hex(":") for row in memoryview(claims.macs).tolist()] == [
        claims.mac(n) for n in range(3)
    ]
    assert bytes(claims.lengths) == bytes([24 if family == 4 else 64]) * 3
    assert memoryview(claims.subnets).shape == (3, width)
    assert claims.nbytes >= 3 * 64


def test_columns_of_nothing() -> None:
    claims = _core.Claims(4)

    assert memoryview(claims.subnets).shape == (0, 4)
    assert bytes(claims.lengths) == b""
    assert claims.nexthop_ids(0x50000000) == array("I")
    with pytest.raises(BufferError):
        memoryview(_core.Column())


def test_claims_do_not_change_under_a_column() -> None:
    claims, more = pack(4, [peer(4, 5), peer(4, 6)]), pack(4, [peer(4, 7)])

    with memoryview(claims.macs):
        for change in (
            lambda: claims.take(more, 0),
            lambda: claims.swap_remove(0),
            lambda: claims.extend([peer(4, 8)], "vxlan", 1, True),
        ):
            with pytest.raises(BufferError, match="while a column is in use"):
                change()
        assert len(claims) == 2
    claims.swap_remove(0)
    assert [claims.name(n) for n in range(len(claims))] == ["node6"]


def test_columns_are_read_only() -> None:
    claims = pack(4, [peer(4, 5)])

    with pytest.raises(TypeError):
        memoryview(claims.macs)[0, 0] = 1
    with pytest.raises((BufferError, TypeError)):
        array("B", bytes(6)).frombytes(claims.macs)


def test_nexthop_ids_are_the_low_bits_of_the_subnet() -> None:
    claims = pack(4, [peer(4, 7), peer(4, 8, subnet="192.168.1.0/24")])

    assert list(claims.nexthop_ids(0x50000000)) == [0x5AF40700, 0x50A80100]


def test_finding_claims() -> None:
    claims = pack(4, [peer(4, 5), peer(4, 6), peer(4, 7, endpoint="192.0.2.5")])

    assert claims.find_subnet("10.244.6.0/24") == 1
    assert claims.find_subnet("10.244.6.0/25") == -1
    assert claims.find_subnet("fd00::/64") == -1
    assert claims.find_endpoint(bytes([192, 0, 2, 5])) == [0, 2]
    assert claims.find_endpoint(bytes(4)) == []
    with pytest.raises(ValueError, match="other family"):
        claims.find_endpoint(bytes(16))
    with pytest.raises(ValueError, match="not a prefix"):
        claims.find_subnet("10.244.6.0")
    for method in (claims.name, claims.mac, claims.rival, claims.mark_own, claims.swap_remove):
        with pytest.raises(IndexError, match="there are 3 claims, not 3"):
            method(3)


def test_taking_claims_from_others_and_from_themselves() -> None:
    claims = _core.Claims(4)
    source = pack(4, [*(peer(4, n) for n in range(4, 9)), peer(4, 9, subnet="x")])

    for number in reversed(range(len(source))):
        assert claims.take(source, number) == len(claims) - 1
    for number in range(50):  # grows, so the rows move
        claims.take(claims, number)

    assert [claims.name(n) for n in range(6)] == [f"node{n}" for n in (9, 8, 7, 6, 5, 4)]
    assert {claims.name(n) for n in range(len(claims))} == {f"node{n}" for n in range(4, 10)}
    assert "'x' is not a prefix" in claims.detail(0)


def test_removing_moves_the_last_one() -> None:
    claims = pack(4, [peer(4, n) for n in range(5, 9)])

    claims.swap_remove(1)
    claims.swap_remove(2)

    assert [claims.name(n) for n in range(len(claims))] == ["node5", "node8"]


def test_replacing_keeps_the_name_and_the_number() -> None:
    claims = pack(4, [peer(4, n) for n in (5, 6)])
    newer = pack(4, [peer(4, 9, name="another", revision=7)])

    claims.replace(0, newer, 0)

    assert (claims.name(0), claims.subnet(0), claims.revision(0)) == ("node5", "10.244.9.0/24", 7)
    assert claims.name(1) == "node6"


def test_addresses_of_the_other_family_are_refused() -> None:
    claims = _core.Claims(4)

    with pytest.raises(ValueError, match="2001:db8::/64 is of the other family"):
        claims.admit(NETWORK[4], [], ["2001:db8::/64"])
    with pytest.raises(ValueError, match="family is 4 or 6"):
        _core.Claims(5)
