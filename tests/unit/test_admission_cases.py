"""Which of many leases are accepted: cases of people's reports and of hostile input, by number."""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import Any

import pytest

from flannel_dp.cluster import admission
from flannel_dp.cluster.admission import Admission, Node
from flannel_dp.cluster.lease import Lease
from flannel_dp.cluster.network import NetworkConfig
from tests.lib.packed_claims import FAMILIES, lease, pack


def config(family: int, network: str, **more: Any) -> NetworkConfig:
    prefix = "" if family == 4 else "IPv6"
    document = {
        "EnableIPv4": family == 4,
        "EnableIPv6": family == 6,
        f"{prefix}Network": network,
        "Backend": {"Type": "vxlan"},
        **{f"{prefix}{key}": value for key, value in more.items()},
    }
    return NetworkConfig.from_json(json.dumps(document))


def judged(
    family: int,
    network: str,
    own: str,
    leases: list[Lease],
    *,
    at: str = "",
    name: str = "",
    **more: Any,
) -> Admission:
    """What a node with the subnet ``own`` and the public address ``at`` makes of the leases, of
    which its own is not one but for its ``name``."""
    public = at or {4: "203.0.113.1", 6: "2001:db8:1::1"}[family]
    node = Node(
        family,
        network,
        public,
        subnet=own,
        mac="02:00:00:ff:00:00",
        pods=admission.pod_range(config(family, network, **more), family),
    )
    mine = admission.OwnLease(name, own, "") if name else None
    return admission.validate(pack(family, leases), node, own=mine)


def node_lease(family: int, number: int, subnet: str, at: str = "", name: str = "") -> Lease:
    mac = f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"
    near = f"192.0.{2 + (number >> 8)}.{number & 255}" if family == 4 else f"2001:db8::{number:x}"
    return lease(family, subnet, at or near, mac, name or f"n{number}")


def names(found: Admission) -> list[str]:
    return [found.accepted.name(n) for n in range(len(found.accepted))]


def reasons(found: Admission) -> dict[str, str]:
    return {one.lease: str(one.reason) for one in found.rejected}


# ---- honest claims and wide or narrow ones -----------------------------------------------

WIDE = {
    "class1-3 a /13 with the lowest name": {4: ("10.240.0.0/13",), 6: ("fd00:10::/37",)},
    "one bit wider": {4: ("10.240.4.0/23",), 6: ("fd00:10:4::/63",)},
    "one bit narrower": {4: ("10.240.4.0/25",), 6: ("fd00:10:4::/65",)},
    "single addresses": {
        4: ("10.240.4.1/32", "10.240.5.9/32"),
        6: ("fd00:10:4::1/128", "fd00:10:5::9/128"),
    },
}


@FAMILIES
@pytest.mark.parametrize("evil", WIDE.values(), ids=WIDE)
def test_an_odd_claim_displaces_no_ordinary_one(family: int, evil: dict[int, Any]) -> None:
    own, network = {
        4: ("10.240.200.0/24", "10.240.0.0/12"),
        6: ("fd00:10:c8::/64", "fd00:10::/32"),
    }[family]
    subnets = [f"10.240.{n}.0/24" if family == 4 else f"fd00:10:{n:x}::/64" for n in range(1, 101)]
    honest = [node_lease(family, n, subnet) for n, subnet in enumerate(subnets, 1)]
    odd = [
        node_lease(family, 300 + n, subnet, name=f"a-evil{n}")
        for n, subnet in enumerate(evil[family])
    ]

    found = judged(family, network, own, [*odd, *honest])

    assert sorted(names(found)) == sorted(one.name for one in honest)
    assert set(reasons(found)) == {one.name for one in odd}
    for one in found.rejected:
        assert str(one.reason) in ("overlap", "own-subnet")
        assert "another subnet" in one.detail


@FAMILIES
def test_an_odd_claim_that_overlaps_nothing_is_accepted(family: int) -> None:
    """fr17: podCIDRs of /26, /28 and /30 in one cluster, and a larger one."""
    subnets = {
        4: ["10.244.1.64/26", "10.244.1.128/28", "10.244.1.144/30", "10.244.8.0/22"],
        6: ["fd00:10:1::/66", "fd00:10:2::/72", "fd00:10:3::/126", "fd00:10:8::/48"],
    }[family]
    own, network = {
        4: ("10.244.0.0/24", "10.244.0.0/16"),
        6: ("fd00:10::/64", "fd00:10::/32"),
    }[family]

    found = judged(family, network, own, [node_lease(family, n, s) for n, s in enumerate(subnets)])

    assert len(found.accepted) == len(subnets)


def test_fr03_the_mask_of_podcidrs_decides_and_not_subnetlen() -> None:
    """Kubernetes gives /24 where SubnetLen is 26: an odd /26 displaces nobody."""
    honest = [node_lease(4, n, f"10.244.{n}.0/24") for n in range(1, 5)]
    evil = node_lease(4, 99, "10.244.2.64/26", name="a-evil")

    found = judged(4, "10.244.0.0/16", "10.244.0.0/24", [evil, *honest], SubnetLen=26)

    assert names(found) == ["n1", "n2", "n3", "n4"]
    assert reasons(found) == {"a-evil": "overlap"}


@FAMILIES
@pytest.mark.parametrize("order", [1, -1], ids=["", "reversed"])
def test_nodes_whose_subnets_differ_in_length_decide_alike(family: int, order: int) -> None:
    """Most leases say which length is the ordinary one: each node sees the same."""
    long, short = {4: (26, 24), 6: (66, 64)}[family]
    base = {4: "10.244.{}.0/{}", 6: "fd00:10:{}::/{}"}[family]
    network = {4: "10.244.0.0/16", 6: "fd00:10::/32"}[family]
    subnets = [base.format(n, short) for n in (1, 2, 3)] + [base.format(n, long) for n in (4, 5)]
    leases = [node_lease(family, n, subnet) for n, subnet in enumerate(subnets, 1)]
    leases.append(node_lease(family, 8, base.format(1, long), name="a-narrow"))
    leases.append(node_lease(family, 9, base.format(4, short), name="a-wide"))
    leases = leases[::order]

    decided = []
    for own in (subnets[1], subnets[2], subnets[4]):
        mine = next(one for one in leases if own in (one.subnet, one.ipv6_subnet))
        rest = [one for one in leases if one is not mine]
        found = judged(family, network, own, rest, name=mine.name)
        assert found.node.ordinary == short
        decided.append({*names(found)} & {"n1", "n4", "a-narrow", "a-wide"})
    assert decided == [{"n1", "a-wide"}] * 3


@pytest.mark.parametrize(
    ("lengths", "own", "ordinary"),
    [
        pytest.param("", "", 0, id="none"),
        pytest.param("24", "", 24, id="one"),
        pytest.param("24 24 26", "", 24, id="most"),
        pytest.param("26 26 24", "", 26, id="most are longer"),
        pytest.param("24 13", "", 24, id="of as many the longer one"),
        pytest.param("24 26", "24", 24, id="this node's own counts"),
        pytest.param("26", "24", 26, id="it is one of them"),
    ],
)
@FAMILIES
def test_the_ordinary_length_of_subnets(family: int, lengths: str, own: str, ordinary: int) -> None:
    more = 0 if family == 4 else 40
    base = {4: "10.{}.0.0/{}", 6: "fd00:{}::/{}"}[family]
    subnets = [base.format(n, int(length) + more) for n, length in enumerate(lengths.split(), 1)]
    claims = pack(family, [node_lease(family, n, subnet) for n, subnet in enumerate(subnets, 1)])
    mine = admission.OwnLease("own", base.format(99, int(own) + more), "") if own else None
    assert admission.ordinary_length(claims, mine) == (ordinary + more if ordinary else 0)


@FAMILIES
def test_a_subnet_of_subnetlen_is_an_ordinary_one_where_leases_go_by_their_subnets(
    family: int,
) -> None:
    """As in etcd, whatever most of them are; in Kubernetes nobody knows."""
    texts = {4: ("10.244.1.0/26", "10.244.2.0/26"), 6: ("fd00:1::/66", "fd00:2::/66")}[family]
    by_name = pack(family, [node_lease(family, n, text) for n, text in enumerate(texts, 1)])
    by_subnet = pack(
        family, [node_lease(family, n, t, name=t.replace("/", "-")) for n, t in enumerate(texts, 1)]
    )
    network = {4: "10.244.0.0/16", 6: "fd00::/32"}[family]
    length = {4: 24, 6: 64}[family]
    for more in ({}, {"SubnetLen": length}):
        known = config(family, network, **more)
        assert admission.known_length(known, by_subnet, None) == length
        assert admission.known_length(known, by_name, None) == 0
        own = admission.OwnLease(texts[0].replace("/", "-"), texts[0], "")
        assert admission.known_length(known, by_name, own) == length


# ---- nodes with addresses inside the network ------------------------------------------------

EXAMPLE = {"SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0"}


def example(leases: list[Lease], **more: Any) -> Admission:
    return judged(4, "10.0.0.0/8", "10.10.0.0/20", leases, at="10.128.0.1", **(EXAMPLE | more))


def test_fr15_the_documented_example_with_nodes_in_the_network() -> None:
    found = example(
        [
            node_lease(4, 2, "10.10.16.0/20", "10.128.0.2"),
            node_lease(4, 3, "10.99.0.0/20", "10.18.221.107"),
            node_lease(4, 4, "10.99.16.0/20", "10.9.255.255"),
        ],
    )

    assert names(found) == ["n2", "n4"]
    assert reasons(found) == {"n3": "endpoint-in-overlay"}  # from SubnetMin to SubnetMax
    [one] = found.rejected
    assert "10.18.221.107 is inside the pods' addresses 10.10.0.0 to 10.99.15.255" in one.detail
    assert "SubnetMin and SubnetMax" in one.detail


def test_fr15_the_last_address_of_subnetmax_is_a_pods() -> None:
    found = example(
        [
            node_lease(4, 2, "10.10.16.0/20", "10.99.15.255"),
            node_lease(4, 3, "10.10.32.0/20", "10.99.16.1"),
            node_lease(4, 4, "10.10.48.0/20", "10.10.0.0"),
            node_lease(4, 5, "10.10.64.0/20", "10.9.255.254"),
        ]
    )

    assert names(found) == ["n3", "n5"]
    assert set(reasons(found).values()) == {"endpoint-in-overlay"}


def test_fr15_without_a_range_of_pods_no_node_is_in_the_network() -> None:
    found = judged(
        4,
        "10.0.0.0/8",
        "10.10.0.0/24",
        [node_lease(4, 2, "10.10.16.0/24", "10.128.0.2")],
        at="192.0.2.1",
    )

    assert reasons(found) == {"n2": "endpoint-in-overlay"}


def test_fr15_a_subnet_outside_the_range_takes_no_node() -> None:
    """Whatever its name: no set of accepted claims routes a node's address into the overlay."""
    honest = [node_lease(4, n, f"10.10.{16 * n}.0/20", f"10.129.0.{n}") for n in range(2, 9)]
    for evil in ("10.129.0.0/20", "10.129.0.2/32", "10.128.0.0/9", "10.129.0.0/24"):
        found = example([node_lease(4, 99, evil, "10.130.0.1", "a-evil"), *honest])

        assert names(found) == [one.name for one in honest]
        [one] = found.rejected
        assert (one.lease, str(one.reason)) in {("a-evil", "holds-nodes"), ("a-evil", "underlay")}
        assert "SubnetMin" in one.detail or "this node" in one.detail


def test_fr15_a_subnet_outside_the_range_is_accepted_where_no_node_is() -> None:
    """With Kubernetes flannel does not look at SubnetMin and SubnetMax."""
    assert names(example([node_lease(4, 2, "10.200.0.0/20", "10.128.0.2")])) == ["n2"]


def test_a_range_of_pods_in_ipv6() -> None:
    range_ = {"SubnetMin": "fd00:10:10::", "SubnetMax": "fd00:10:99::"}
    leases = [
        node_lease(6, 2, "fd00:10:11::/64", "fd00:10:f000::2"),
        node_lease(6, 3, "fd00:10:12::/64", "fd00:10:99:0:ffff::"),
        node_lease(6, 4, "fd00:10:f000::/64", "fd00:10:f001::4"),
    ]

    found = judged(6, "fd00:10::/32", "fd00:10:10::/64", leases, at="fd00:10:f000::1", **range_)

    assert names(found) == ["n2"]
    assert reasons(found) == {"n3": "endpoint-in-overlay", "n4": "underlay"}


# ---- unusual addresses that people use ---------------------------------------------------------

UNUSUAL = {
    "100.64/10 for nodes": ("10.244.0.0/16", "10.244.1.0/24", "100.64.0.1", "100.64.0.2"),
    "100.64/10 for pods": ("100.64.0.0/12", "100.64.1.0/24", "192.0.2.1", "192.0.2.2"),
    "100.64/10 for both": ("100.96.0.0/12", "100.96.1.0/24", "100.64.0.1", "100.64.0.2"),
    "240/4 for nodes": ("10.244.0.0/16", "10.244.1.0/24", "240.0.0.1", "255.255.255.254"),
    "240/4 for pods": ("240.0.0.0/12", "240.0.1.0/24", "192.0.2.1", "192.0.2.2"),
    "240/4 for both": ("250.0.0.0/12", "250.0.1.0/24", "240.0.0.1", "240.0.0.2"),
    "link-local where all nodes are": (
        "10.244.0.0/16",
        "10.244.1.0/24",
        "169.254.3.1",
        "169.254.3.2",
    ),
}


@pytest.mark.parametrize(("network", "own", "at", "other"), UNUSUAL.values(), ids=UNUSUAL)
def test_accepts_addresses_that_the_kernel_takes(
    network: str, own: str, at: str, other: str
) -> None:
    net: Any = ip_network(own)
    peer = node_lease(4, 2, f"{net.network_address + 256}/24", other)

    assert names(judged(4, network, own, [peer], at=at)) == ["n2"]


@pytest.mark.parametrize("at", ["255.255.255.255", "224.0.0.1", "239.255.255.255", "169.254.0.2"])
def test_rejects_addresses_of_no_host(at: str) -> None:
    found = judged(4, "10.244.0.0/16", "10.244.1.0/24", [node_lease(4, 2, "10.244.2.0/24", at)])

    assert reasons(found) == {"n2": "bad-public-ip"}
