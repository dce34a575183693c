"""Which interface and which addresses a node publishes and sends from."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp.lease import Identity
from tests.support import DEVICE, lease_of, peer, plane, stranger

SECOND = {4: "192.0.2.101", 6: "2001:db8::101"}
LENGTH = {4: 24, 6: 64}


@pytest.fixture
def two(host: Any) -> Any:
    """A host with a second address of each family."""
    for family, address in SECOND.items():
        nodad = "nodad" if family == 6 else ""
        host.ip(f"-{family} address add {address}/{LENGTH[family]} dev eth0 {nodad}")
    # Of IPv6 addresses the kernel shows the youngest first.
    host.ip(f"address del {host.ipv6}/64 dev eth0")
    host.ip(f"address add {host.ipv6}/64 dev eth0 nodad")
    return host


def published(host: Any, *families: int, **choice: Any) -> dict[int, str]:
    with plane(host, *families, **({"iface": None} | choice)) as dp:
        identity: Identity = dp.identity()
    return identity.public


def local(host: Any, family: int) -> tuple[str, str]:
    """The interface below the vxlan device, and the address that its packets leave from."""
    info = host.ip_json(f"link show {DEVICE[family]}")[0]["linkinfo"]["info_data"]
    return info["link"], info["local" if family == 4 else "local6"]


# ---- a named address is the published one ---------------------------------------------


def test_publishes_and_sends_from_the_address_that_iface_names(two: Any, family: int) -> None:
    second = SECOND[family]
    assert published(two, family, iface=two.underlay(family)) == {family: two.underlay(family)}
    assert published(two, family, iface=second) == {family: second}
    own = peer(0, public_ip=SECOND[4], public_ipv6=SECOND[6])
    with plane(two, family, iface=second) as dp:
        assert dp.sync([own, peer(1)]).ok

    assert local(two, family) == ("eth0", second)


def test_iface_names_an_address_of_each_family(two: Any) -> None:
    assert published(two, iface=SECOND[4]) == {4: SECOND[4], 6: two.ipv6}
    assert published(two, iface=SECOND[6]) == {4: two.ipv4, 6: SECOND[6]}
    assert published(two, iface=[SECOND[4], SECOND[6]]) == SECOND
    assert published(two, iface=[SECOND[6], "198.51.100.1", SECOND[4]]) == SECOND


def test_an_interface_that_is_named_first_keeps_its_first_addresses(two: Any) -> None:
    """Several --iface are alternatives: what comes after the first that is there is not used."""
    assert published(two, iface=["eth0", SECOND[4]]) == {4: two.ipv4, 6: two.ipv6}


def test_publishes_the_address_that_a_pattern_matches(two: Any, family: int) -> None:
    pattern = {4: r"\.101$", 6: "::101$"}[family]
    assert published(two, family, iface_regex=[pattern]) == {family: SECOND[family]}
    assert published(two, family, iface_regex=["^nope$", pattern]) == {family: SECOND[family]}
    assert published(two, family, iface_regex=["^eth0$"]) == {family: two.underlay(family)}


def test_a_pattern_may_match_an_address_of_each_family(two: Any) -> None:
    assert published(two, iface_regex=["101$"]) == SECOND
    assert published(two, iface_regex=[r"^192.*\.101$"]) == {4: SECOND[4], 6: two.ipv6}


def test_a_pattern_prefers_an_interface_with_both_families(two: Any) -> None:
    stranger(two, "aaa0")
    two.ip("address add 198.51.100.101/24 dev aaa0")

    assert published(two, iface_regex=["101$"]) == SECOND


def test_a_pattern_matches_none_of_our_own_devices(two: Any, family: int) -> None:
    """The overlay's addresses are in the same private range as many an underlay."""
    with plane(two, family) as dp:
        assert dp.sync([lease_of(two), peer(1)]).ok
    prefix = {4: r"^10\.|\.101$", 6: "^fd00:|::101$"}[family]

    assert published(two, family, iface_regex=[prefix]) == {family: SECOND[family]}
    assert published(two, family, iface_regex=["^flannel|^eth"]) == {family: two.underlay(family)}


def test_an_address_given_as_public_wins_over_the_named_one(two: Any, family: int) -> None:
    flag = {4: "public_ip", 6: "public_ipv6"}[family]
    choice = {"iface": SECOND[family], flag: two.underlay(family)}

    assert published(two, family, **choice) == {family: two.underlay(family)}


def test_publishes_what_the_kernel_sends_from_to_the_address_to_reach(
    two: Any, family: int
) -> None:
    target = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    bits = {4: 32, 6: 128}[family]
    assert published(two, family, iface_can_reach=target) == {family: two.underlay(family)}
    two.ip(f"-{family} route add {target}/{bits} dev eth0 src {SECOND[family]}")

    assert published(two, family, iface_can_reach=target) == {family: SECOND[family]}
