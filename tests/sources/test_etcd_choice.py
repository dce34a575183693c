"""Which subnet a node takes: one of the configuration that overlaps with nobody's."""

from __future__ import annotations

import json
from ipaddress import ip_network
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import Unavailable
from flannel_dp.sources.etcd.choice import Taken, compatible, name_of, subnets_of


def config(**how: Any) -> NetworkConfig:
    document = {"Network": "10.5.0.0/24", "SubnetLen": 28, "Backend": {"Type": "vxlan"}} | how
    return NetworkConfig.from_json(json.dumps(document))


DUAL = config(EnableIPv6=True, IPv6Network="fd00:5::/48")
V6 = config(EnableIPv4=False, EnableIPv6=True, IPv6Network="fd00:5::/60")


@pytest.mark.parametrize(
    ("wanted", "subnets", "fits"),
    [
        (config(), {4: "10.5.0.16/28"}, True),
        (config(), {4: "10.5.0.240/28"}, True),
        (config(), {4: "10.5.0.0/28"}, False),  # the first is left out
        (config(), {4: "10.5.1.0/28"}, False),
        (config(), {4: "10.5.0.16/29"}, False),
        (config(), {4: "10.5.0.17/28"}, False),
        (config(), {4: "10.5.0.16/28", 6: "fd00:5:0:1::/64"}, False),
        (config(), {}, False),
        (config(SubnetMin="10.5.0.32", SubnetMax="10.5.0.64"), {4: "10.5.0.16/28"}, False),
        (config(SubnetMin="10.5.0.32", SubnetMax="10.5.0.64"), {4: "10.5.0.64/28"}, True),
        (config(SubnetMin="10.5.0.32", SubnetMax="10.5.0.64"), {4: "10.5.0.80/28"}, False),
        (DUAL, {4: "10.5.0.16/28", 6: "fd00:5:0:1::/64"}, True),
        (DUAL, {4: "10.5.0.16/28"}, False),
        (DUAL, {4: "10.5.0.16/28", 6: "fd00:5:0:1::/65"}, False),
        (V6, {6: "fd00:5:0:1::/64"}, True),
    ],
)
def test_compatible(wanted: NetworkConfig, subnets: dict[int, str], fits: bool) -> None:
    """flannel's isSubnetConfigCompat and isIPv6SubnetConfigCompat."""
    assert compatible(wanted, subnets) is fits


def test_every_free_subnet_is_chosen_and_no_other() -> None:
    random = Random(1)
    taken = Taken([{4: "10.5.0.32/28"}, {4: "10.5.0.64/27"}, {4: "10.9.0.0/16"}, {}])

    chosen = {taken.choose(config(), random)[4] for _ in range(500)}

    free = [f"10.5.0.{16 * i}/28" for i in range(1, 16) if i not in (2, 4, 5)]
    assert chosen == set(free)


def test_until_there_is_none() -> None:
    random, have = Random(2), []
    for _ in range(15):
        subnet = Taken(have).choose(config(), random)
        assert Taken(have).free(subnet)
        have.append(subnet)

    with pytest.raises(Unavailable, match=r"all /28 of Network 10\.5\.0\.0/24") as caught:
        Taken(have).choose(config(), random)
    assert "SubnetLen" in caught.value.hint


def test_out_of_ipv6_subnets() -> None:
    full = [{6: "fd00:5::/60"}]

    with pytest.raises(Unavailable, match=r"all /64 of IPv6Network fd00:5::/60"):
        Taken(full).choose(V6, Random(3))


def test_of_a_large_network_any_subnet_may_come() -> None:
    wide = config(EnableIPv4=False, EnableIPv6=True, IPv6Network="fd00::/16")
    random = Random(4)

    chosen = [Taken([]).choose(wide, random)[6] for _ in range(50)]

    assert len(set(chosen)) == 50
    assert all(compatible(wide, {6: subnet}) for subnet in chosen)


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(24, 32)), max_size=40), st.integers(0, 99)
)
def test_no_choice_overlaps(others: list[tuple[int, int]], seed: int) -> None:
    taken = [
        {4: str(ip_network(f"10.5.0.{address}/{length}", strict=False))}
        for address, length in others
    ]
    free = [
        subnet
        for subnet in ip_network("10.5.0.0/24").subnets(new_prefix=28)
        if subnet.network_address != ip_network("10.5.0.0/24").network_address
        and not any(subnet.overlaps(ip_network(one[4])) for one in taken)
    ]
    try:
        chosen = Taken(taken).choose(config(), Random(seed))
    except Unavailable:
        assert free == []
    else:
        assert ip_network(chosen[4]) in free


@pytest.mark.parametrize(
    ("name", "subnets"),
    [
        ("10.5.0.16-28", {4: "10.5.0.16/28"}),
        ("10.5.0.16-28&fd00:5:0:1::-64", {4: "10.5.0.16/28", 6: "fd00:5:0:1::/64"}),
        ("fd00:5:0:1::-64", {6: "fd00:5:0:1::/64"}),
        ("nonsense", {}),
    ],
)
def test_names(name: str, subnets: dict[int, str]) -> None:
    assert subnets_of(name) == subnets
    assert name_of(subnets) == ("" if name == "nonsense" else name)
