"""Which leases ``flannel-dp leases`` lists, with and without a word on the node, and its forms."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from flannel_dp.cluster import listings as listings_module
from flannel_dp.cluster.documents import decode_leases
from flannel_dp.cluster.lease import BackendData, Lease, LeaseList
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.look.leases import Listing, list_leases
from flannel_dp.look.terminal import coloured
from flannel_dp.sources import Snapshot

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def config(*families: int) -> NetworkConfig:
    document: dict[str, Any] = {"Backend": {"Type": "vxlan"}, "EnableIPv4": 4 in families}
    if 4 in families:
        document["Network"] = "10.244.0.0/16"
    if 6 in families:
        document |= {"EnableIPv6": True, "IPv6Network": "fd00:10:244::/48"}
    return NetworkConfig.from_json(json.dumps(document))


def lease(number: int, families: tuple[int, ...] = (4, 6), **changes: Any) -> Lease:
    """Node ``number``'s; ``changes`` are fields of Lease."""
    fields: dict[str, Any] = {"name": f"node{number}", "backend_type": "vxlan"}
    if 4 in families:
        fields |= {
            "subnet": f"10.244.{number}.0/24",
            "public_ip": f"192.0.2.{number}",
            "backend_data": BackendData(1, f"02:00:00:00:04:{number:02x}"),
        }
    if 6 in families:
        fields |= {
            "ipv6_subnet": f"fd00:10:244:{number:x}::/64",
            "public_ipv6": f"2001:db8::{number:x}",
            "backend_v6_data": BackendData(1, f"02:00:00:00:06:{number:02x}"),
        }
    return Lease(**(fields | changes))


def listed(conf: NetworkConfig, *leases: Lease, **more: Any) -> Listing:
    return list_leases(conf, Snapshot(LeaseList([*leases], []), "test", 0.0), now=NOW, **more)


def decoded(listing: Listing) -> LeaseList:
    """What ``--leases`` makes of the JSON output."""
    return decode_leases(json.dumps(listing.to_json()).encode(), origin="leases")


# ---- what is believed ------------------------------------------------------------


def test_all_is_well() -> None:
    leases = [lease(9), lease(7), lease(8)]

    listing = listed(config(4, 6), *leases)

    assert listing.leases == tuple(leases)
    assert (len(listing.rejected), listing.own) == (0, None)
    assert listing.to_json()["own"] is None


def test_an_empty_cluster() -> None:
    listing = listed(config(4))

    assert listing.to_json()["leases"] == listing.to_json()["rejected"] == []
    assert list(listing.lines())[-1] == "0 leases accepted, 0 rejected"
    assert decoded(listing) == LeaseList([], [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"subnet": "10.9.1.0/24"}, "outside-network"),
        ({"subnet": "10.244.1.0-24"}, "bad-subnet"),
        ({"public_ip": "224.0.0.1"}, "bad-public-ip"),
        ({"public_ip": "10.244.200.1"}, "endpoint-in-overlay"),
        ({"backend_data": BackendData(2, "02:00:00:00:04:01")}, "wrong-vni"),
        ({"backend_data": BackendData(1, "")}, "bad-mac"),
        ({"backend_type": "host-gw", "backend_data": None}, "wrong-backend"),
        ({"subnet": "10.244.7.128/25", "revision": 9}, "overlap"),
        ({"backend_data": BackendData(1, "02:00:00:00:04:07"), "revision": 9}, "duplicate-mac"),
        ({"subnet": ""}, "bad-claim"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_node_believes(changes: dict[str, Any], reason: str) -> None:
    good, bad = lease(7, (4,)), lease(1, (4,), **changes)

    listing = listed(config(4), bad, good)

    assert listing.leases == (good,)
    (rejection,) = listing.rejected
    assert (rejection.lease, str(rejection.reason)) == ("node1", reason)
    assert rejection.detail in str(listing)
    (said,) = listing.to_json()["rejected"]
    assert said == rejection.to_json()


def test_forms_that_cannot_be_read_are_listed() -> None:
    document = {"leases": [{"Subnet": 5, "Name": "odd"}, {"Subnet": "10.244.7.0/24"}]}
    claims = decode_leases(json.dumps(document).encode(), origin="x")

    listing = list_leases(config(4), Snapshot(claims, "x", 0.0), now=NOW)

    assert [str(one.reason) for one in listing.rejected] == ["bad-claim", "wrong-backend"]
    assert "odd" in str(listing)


def test_a_half_that_is_not_believed_leaves_the_other() -> None:
    half = lease(1, ipv6_subnet="fd00:99::/64")

    listing = listed(config(4, 6), half, lease(7))

    assert listing.leases == (lease(1, (4,)), lease(7))
    (rejection,) = listing.rejected
    assert (rejection.lease, rejection.family) == ("node1", 6)


def test_leases_of_the_other_family_are_counted() -> None:
    both, other = lease(1), lease(7, (6,))

    listing = listed(config(4), both, other)

    assert listing.leases == (both,)
    assert "10.244.1.0/24" in str(listing)
    assert "fd00:" not in str(listing)
    assert not listing.rejected
    assert "1 lease without a subnet of IPv4 left out" in listing.notes


def test_a_listing_without_a_node_says_so() -> None:
    for conf, families in ((config(4), [4]), (config(4, 6), [4, 6]), (config(6), [6])):
        notes = listed(conf, lease(7)).notes
        assert notes == tuple(
            f"IPv{family} leases are validated without regard to this node" for family in families
        )


# ---- when they end ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("expiration", "words"),
    [
        ("2026-03-02T11:59:00Z", "in 23 h 59 min"),
        ("2026-03-01T12:01:00Z", "in 0 h 1 min"),
        ("2026-03-01T12:00:59Z", "in 59 s"),
        ("2026-03-01T12:00:00Z", "expired"),
        ("2026-02-27T00:00:00Z", "expired"),
        ("2026-03-01T14:30:00+02:00", "in 0 h 30 min"),
        ("2026-03-01T13:00:00", "in 1 h 0 min"),
        ("some day", "some day"),
        ("some\x1b[2Jday", "some\\x1b[2Jday"),
        ("", "-"),
    ],
)
def test_the_time_that_is_left(expiration: str, words: str) -> None:
    text = str(listed(config(4), lease(7, (4,), expiration=expiration)))

    head, line = text.splitlines()[:2]
    assert line[head.index("EXPIRES") : head.index("NAME")].strip() == words


def test_expirations_that_the_source_keeps_apart() -> None:
    leases = [lease(7, (4,)), lease(8, (4,), expiration="2020-01-01T00:00:00Z")]

    listing = listed(config(4), *leases, expirations={"node7": "2026-03-01T13:00:00Z"})

    assert [one.expiration for one in listing.leases] == ["2026-03-01T13:00:00Z", ""]
    assert "in 1 h 0 min  node7" in str(listing)
    assert "never         node8" in str(listing)
    assert listing.to_json()["leases"][0]["Expiration"] == "2026-03-01T13:00:00Z"
    assert "Expiration" not in listing.to_json()["leases"][1]


# ---- its forms -----------------------------------------------------------------------


def test_the_text() -> None:
    refused = lease(2, (4,), subnet="10.9.0.0/24")

    lines = str(listed(config(4, 6), lease(1), refused)).splitlines()

    assert lines == [
        "SUBNET              PUBLIC IP    BACKEND  VNI  MAC                EXPIRES  NAME",
        "10.244.1.0/24       192.0.2.1    vxlan    1    02:00:00:00:04:01  -        node1",
        "fd00:10:244:1::/64  2001:db8::1  vxlan    1    02:00:00:00:06:01  -        node1",
        "",
        "rejected leases (1):",
        "  node2  IPv4  outside-network  10.9.0.0/24 is not inside the network 10.244.0.0/16 - "
        "remove the lease, or correct Network in the network configuration",
        "note: IPv4 leases are validated without regard to this node",
        "note: IPv6 leases are validated without regard to this node",
        "1 lease accepted, 1 rejected",
    ]


def test_a_lease_of_the_whole_network() -> None:
    """A node that has all pods' addresses leaves none for the others."""
    text = str(listed(config(4), lease(1, (4,)), lease(2, (4,), subnet="10.244.0.0/16")))

    assert "10.244.0.0/16 is the whole network, of which a node has a smaller part" in text
    assert "not inside" not in text


def test_this_node_is_marked() -> None:
    listing = Listing((lease(1, (4,)), lease(2, (4,))), own=1, now=NOW)

    plain = str(listing).splitlines()
    assert plain[2].endswith("node2 (this node)")
    assert plain[-1] == "2 leases accepted, 0 rejected; node2 is this node's"
    assert listing.to_json()["own"] == "node2"
    painted = list(listing.lines(coloured))
    assert painted[1] == plain[1]
    assert painted[2] == f"\x1b[32m{plain[2]}\x1b[0m"


def test_text_of_claims_cannot_steer_a_terminal() -> None:
    odd = lease(1, (4,), name="a\x1b[2Jb\n", backend_type="vxlan")

    text = str(listed(config(4), odd, lease(2, (4,), name="\x1b]0;x\x07", subnet="1.1.1.0/24")))

    assert all(line.isprintable() for line in text.splitlines())
    assert "a\\x1b[2Jb\\n" in text


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=str)
def test_the_json_is_a_list_of_leases(families: tuple[int, ...]) -> None:
    good = [lease(7, families, revision=3, expiration="2026-03-02T00:00:00Z"), lease(8, families)]
    half = lease(9, families, public_ip="", public_ipv6="")

    listing = listed(config(*families), *good, half)

    found = decoded(listing)
    assert found == LeaseList(good, [])
    again = listed(config(*families), *found.leases)
    assert again.leases == listing.leases
    assert not again.rejected


def test_the_json_is_read_at_full_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the typed decoder: the patient one takes ten times as long."""
    monkeypatch.setattr(listings_module, "decode_patiently", None)
    bad = lease(2, (4,), subnet="10.9.0.0/24")

    assert decoded(listed(config(4), lease(7, (4,)), bad)) == LeaseList([lease(7, (4,))], [])


def test_the_json_is_plain() -> None:
    document = listed(config(4), lease(7, (4,)), lease(2, (4,), subnet="1.0.0.0/24")).to_json()

    assert set(document) == {"schema", "leases", "rejected", "own", "notes"}
    assert document["schema"] == 1
    assert msgspec.json.decode(json.dumps(document)) == document
    assert document["leases"][0] == {
        "Subnet": "10.244.7.0/24",
        "PublicIP": "192.0.2.7",
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:04:07"},
        "Name": "node7",
    }
