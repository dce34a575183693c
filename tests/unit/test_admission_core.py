"""Admission of packed claims in C, against a model that knows only ``ipaddress``."""

from __future__ import annotations

import random
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel_dp import _core
from flannel_dp.cluster.lease import Lease
from flannel_dp.tables.columns import route_table
from tests.lib.admission_model import claims_of, model, parsed, subnets
from tests.lib.packed_claims import (
    FAMILIES,
    NETWORK,
    OWN_ADDRESSES,
    OWN_MAC,
    OWN_SUBNET,
    RULES,
    UNDERLAY,
    admit,
    lease,
    pack,
    peer,
    reason,
)


@FAMILIES
@pytest.mark.parametrize("need_mac", [True, False])
@pytest.mark.parametrize("ruled", [True, False])
@settings(max_examples=150)
@given(data=st.data())
def test_admission_is_that_of_the_model(
    family: int, need_mac: bool, ruled: bool, data: st.DataObject
) -> None:
    rules = RULES[family] if ruled else {}
    leases = data.draw(claims_of(family))
    claims = pack(family, leases, need_mac)
    winners, reasons = model(family, leases, need_mac, **rules)

    accepted, rejected = admit(claims, need_mac, **rules)

    assert [accepted.subnet(n) for n in range(len(accepted))] == [str(w.subnet) for w in winners]
    found = {accepted.origin(n): "accepted" for n in range(len(accepted))}
    found |= {rejected.origin(n): reason(rejected.reason(n)) for n in range(len(rejected))}
    # Of claims that are equal in everything any one may be taken for the winner.
    assert sorted(found.values()) == sorted(reasons.values())
    twins: dict[Any, list[int]] = {}
    for origin, one in enumerate(leases):
        twins.setdefault(parsed(family, origin, one, need_mac).priority, []).append(origin)
    for origins in twins.values():
        assert sorted(found[o] for o in origins) == sorted(reasons[o] for o in origins)
    assert len(accepted) + len(rejected) == len(leases)


def test_random_floods_agree_with_the_model() -> None:
    """Larger than what is searched for above, and from a fixed seed."""
    chance = random.Random(1)
    for family in (4, 6):
        leases = []
        for number in range(400):
            third = chance.randrange(4, 40)
            length = chance.choice((21, 22, 23, 24, 24, 25)) + (0 if family == 4 else 40)
            raw = f"10.244.{third}.0" if family == 4 else f"fd00:10:244:{third:x}::"
            subnet = str(ip_network(f"{raw}/{length}", strict=False))
            leases.append(
                peer(
                    family,
                    number % 200 + 4,
                    subnet=subnet,
                    name=f"n{number}",
                    mac=f"02:00:00:00:01:{chance.randrange(100):02x}",
                    revision=chance.randrange(4),
                    moved=chance.randrange(6),
                )
            )
        winners, reasons = model(family, leases, True)

        accepted, rejected = admit(pack(family, leases))

        assert [accepted.origin(n) for n in range(len(accepted))] == [w.origin for w in winners]
        assert {rejected.origin(n): reason(rejected.reason(n)) for n in range(len(rejected))} == {
            origin: why for origin, why in reasons.items() if why != "accepted"
        }


@FAMILIES
@settings(max_examples=60)
@given(data=st.data())
def test_every_node_comes_to_the_same_winners(family: int, data: st.DataObject) -> None:
    leases = data.draw(claims_of(family))
    shuffled = data.draw(st.permutations(leases))

    def verdict(found: list[Lease]) -> tuple[list[Any], list[Any]]:
        accepted, rejected = admit(pack(family, found))
        return described(accepted), sorted(described(rejected))

    assert verdict(leases) == verdict(shuffled)


def described(claims: _core.Claims) -> list[tuple[Any, ...]]:
    return [
        (
            claims.subnet(n),
            claims.endpoint(n),
            claims.mac(n),
            claims.name(n),
            claims.revision(n),
            claims.reason(n),
        )
        for n in range(len(claims))
    ]


@FAMILIES
@settings(max_examples=150)
@given(data=st.data())
def test_no_accepted_set_draws_the_underlay_into_the_overlay(
    family: int, data: st.DataObject
) -> None:
    leases = data.draw(claims_of(family))
    accepted, _ = admit(pack(family, leases))
    routed: list[Any] = [ip_network(accepted.subnet(n)) for n in range(len(accepted))]
    kept = [ip_network(text) for text in (*UNDERLAY[family], OWN_SUBNET[family])]
    addresses = [ip_address(text) for text in OWN_ADDRESSES[family]]
    addresses += [ip_address(accepted.endpoint(n)) for n in range(len(accepted))]
    macs = [accepted.mac(n) for n in range(len(accepted))]

    assert not [(a, b) for a in routed for b in kept if a.overlaps(b)]
    assert not [(a, b) for a in addresses for b in routed if a in b]
    assert all(net.subnet_of(ip_network(NETWORK[family])) for net in routed)
    assert not [(a, b) for i, a in enumerate(routed) for b in routed[i + 1 :] if a.overlaps(b)]
    assert len(set(macs)) == len(macs)
    assert OWN_MAC not in macs
    assert not [mac for mac in macs if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00"]


@FAMILIES
@settings(max_examples=60)
@given(data=st.data())
def test_a_loser_knows_an_accepted_rival(family: int, data: st.DataObject) -> None:
    accepted, rejected = admit(pack(family, data.draw(claims_of(family))))
    lost_to = set()
    for number in range(len(rejected)):
        rival = rejected.rival(number)
        why = reason(rejected.reason(number))
        if why == "overlap":
            mine: Any = ip_network(rejected.subnet(number))
            assert mine.overlaps(ip_network(accepted.subnet(rival)))
        elif why == "duplicate-mac":
            assert rejected.mac(number) == accepted.mac(rival)
        else:
            assert rival == -1
        lost_to.add(rival)

    winners = {number for number in range(len(accepted)) if accepted.is_winner(number)}
    assert winners == lost_to - {-1}
    assert {accepted.rival(number) for number in range(len(accepted))} <= {-1}


def flood(family: int, spread: str, count: int) -> list[Lease]:
    """Claims of ``count`` nodes that all want the same, each in a way of its own."""
    bits = 32 if family == 4 else 128
    widths = range(17, 33) if family == 4 else range(96, 129)
    leases = []
    for number in range(count):
        subnet, mac = ("10.244.5.0" if family == 4 else "fd00:10:244:5::"), f"{number:08x}"
        length = {"nested": widths[number % len(widths)], "one subnet": bits - 8}.get(spread, bits)
        high, low = number >> 16, number & 0xFFFF
        if spread == "distinct":
            near = number % 50_000
            v4 = f"10.244.{near >> 8}.{near & 255}"
            subnet = v4 if family == 4 else f"fd00:10:244::{high:x}:{low:x}"
        if spread == "one MAC":
            mac = "00000001"
        v4 = f"198.{18 + high}.{low >> 8}.{low & 255}"
        octets = ":".join(mac[i : i + 2] for i in range(0, 8, 2))
        leases.append(
            lease(
                family,
                f"{subnet}/{length}",
                v4 if family == 4 else f"2001:db9::{high:x}:{low:x}",
                f"06:00:{octets}",
                f"n{number}",
                number % 7,
            )
        )
    return leases


@FAMILIES
@pytest.mark.parametrize("spread", ["one subnet", "nested", "one MAC", "distinct"])
def test_a_flood_of_claims(family: int, spread: str) -> None:
    """60,000 claims that all contend."""
    count = 60_000
    claims = _core.Claims(family)
    claims.extend(flood(family, spread, count), "vxlan", 1, True)

    accepted, rejected = claims.admit(NETWORK[family], [], [])

    expected = {"distinct": 50_000 if family == 4 else count}.get(spread, 1)
    assert len(accepted) == expected
    assert len(accepted) + len(rejected) == count
    if spread != "distinct":
        assert accepted.name(0) == min(f"n{n}" for n in range(0, count, 7))


MAC = "02:00:00:00:00:11"


def one_mac(family: int, *moves: tuple[int, int]) -> tuple[str, list[str]]:
    """Nodes a, b, ... with one MAC, each made and last written at these revisions: who is
    accepted, and what the others are told."""
    leases = [
        peer(family, 4 + n, mac=MAC, name="abcd"[n], revision=made, moved=moved)
        for n, (made, moved) in enumerate(moves)
    ]
    verdicts = set()
    for turned in (leases, leases[::-1]):
        accepted, rejected = admit(pack(family, turned))
        lost = sorted(
            f"{rejected.name(n)}: {reason(rejected.reason(n))} {accepted.name(rejected.rival(n))}"
            for n in range(len(rejected))
        )
        verdicts.add((accepted.name(0), tuple(lost)))
    ((winner, said),) = verdicts
    return winner, [*said]


@FAMILIES
def test_of_one_mac_the_lease_that_still_moves_is_accepted(family: int) -> None:
    """A lease that was not written since another one with its MAC was made is left behind by its
    node. Age alone decides nothing: one that is written again is accepted again."""
    assert one_mac(family, (10, 10), (20, 20)) == ("b", ["a: duplicate-mac b"])
    assert one_mac(family, (10, 19), (20, 20)) == ("b", ["a: duplicate-mac b"])
    assert one_mac(family, (10, 21), (20, 20)) == ("a", ["b: duplicate-mac a"])
    assert one_mac(family, (10, 21), (20, 22)) == ("a", ["b: duplicate-mac a"])
    third = one_mac(family, (10, 10), (20, 20), (30, 30))
    assert third == ("c", ["a: duplicate-mac c", "b: duplicate-mac c"])
    assert one_mac(family, (10, 10), (20, 31), (30, 30))[0] == "b"


@FAMILIES
def test_without_a_last_write_the_older_lease_is_accepted(family: int) -> None:
    """A list that does not say when a lease was last written is no evidence."""
    assert one_mac(family, (10, 0), (20, 0)) == ("a", ["b: duplicate-mac a"])
    assert one_mac(family, (0, 0), (0, 0)) == ("a", ["b: duplicate-mac a"])


@FAMILIES
def test_accepted_claims_come_by_subnet(family: int) -> None:
    rng = random.Random(family)
    nets: list[Any] = []
    for net in ip_network(NETWORK[family]).subnets(new_prefix=24 if family == 4 else 60):
        nets += net.subnets(rng.choice([0, 1, 3]))
        if len(nets) > 700:
            break
    leases = []
    for n, net in enumerate(nets):
        endpoint = f"198.18.{n >> 8}.{n & 255}" if family == 4 else f"2001:db9::{n + 1:x}"
        mac = f"06:00:00:00:{n >> 8:02x}:{n & 255:02x}"
        leases.append(lease(family, str(net), endpoint, mac, f"n{n}"))
    rng.shuffle(leases)
    claims = _core.Claims(family)
    claims.extend(leases, "vxlan", 1, True)

    accepted, rejected = claims.admit(NETWORK[family], [], [])

    assert len(rejected) == 0
    assert [accepted.subnet(n) for n in range(len(accepted))] == [str(net) for net in sorted(nets)]


def test_a_duplicate_mac_frees_the_subnet_it_wanted() -> None:
    """Who loses by its MAC holds nothing: the next one in line gets the subnet."""
    leases = [
        peer(4, 5, name="a", mac="02:00:00:00:00:05"),
        peer(4, 6, name="b", mac="02:00:00:00:00:05"),
        peer(4, 6, name="c", mac="02:00:00:00:00:06"),
    ]
    accepted, rejected = admit(pack(4, leases))

    assert [accepted.name(n) for n in range(2)] == ["a", "c"]
    assert [(rejected.name(0), reason(rejected.reason(0)))] == [("b", "duplicate-mac")]


# ---- the own lease, a second judgement, rivals among routes ----------------------


@FAMILIES
def test_own_lease_is_neither_peer_nor_refused(family: int) -> None:
    claims = pack(family, [peer(family, 3), peer(family, 5)])
    claims.mark_own(0)

    accepted, rejected = admit(claims)

    assert [accepted.name(n) for n in range(len(accepted))] == ["node5"]
    assert len(rejected) == 0


@FAMILIES
def test_judgement_can_be_repeated(family: int) -> None:
    """Once the winner has left, the others are judged anew; broken text stays broken."""
    claims = pack(
        family,
        [
            peer(family, 5, name="a", mac="02:00:00:00:00:11"),
            peer(family, 5, name="b", mac="02:00:00:00:00:12"),
            peer(family, 7, name="c", mac="x"),
        ],
    )
    first = admit(claims)
    claims.swap_remove(0)
    claims.reopen()
    second = admit(claims)

    assert [accepted.name(0) for accepted, _ in (first, second)] == ["a", "b"]
    assert [described(rejected)[-1][3] for _, rejected in (first, second)] == ["c", "c"]
    assert [len(rejected) for _, rejected in (first, second)] == [2, 1]


@FAMILIES
@settings(max_examples=60)
@given(data=st.data())
def test_rivals_among_routes(family: int, data: st.DataObject) -> None:
    texts = data.draw(st.lists(subnets(family), unique=True, max_size=8))
    routes = route_table(dict.fromkeys(texts, 7))
    lengths = bytes({int(text.split("/")[1]) for text in texts})
    claims = pack(family, [peer(family, 5, subnet=data.draw(subnets(family)))])
    mine: Any = ip_network(claims.subnet(0))

    same, others = claims.rivals(0, routes, lengths)

    expected = texts.index(str(mine)) if str(mine) in texts else -1
    assert same == expected
    assert others == any(mine.overlaps(ip_network(text)) for text in texts if text != str(mine))
