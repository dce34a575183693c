"""Peers of one family as the compiled unit finds and follows them, and the rows made of them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from flannel_dp import _core
from flannel_dp._core import Policy, Recipe, Roster, Table
from flannel_dp.cluster.lease import Lease
from tests.lib.one_family import NETWORK
from tests.lib.packed_claims import FAMILIES, OWN_ADDRESSES, OWN_MAC, OWN_SUBNET, pack, peer

BASE, PROTOCOL = 0x50000000, 138


def by_columns(kind: str, claims: _core.Claims, ways: bytes) -> Table:
    """The table of a layout with both paths, from the columns of the claims."""
    table, ids = Table(kind), claims.nexthop_ids(BASE)
    if kind == "neighbour":
        table.extend_neighbours(7, claims.subnets, claims.macs, ways, 0)
    elif kind == "fdb":
        table.extend_fdb(7, claims.macs, claims.endpoints, ways, 0)
    elif kind == "nexthop":
        table.extend_nexthops(7, ids, claims.subnets, PROTOCOL, True, ways, 0)
        table.extend_nexthops(9, ids, claims.endpoints, PROTOCOL, False, ways, 1)
    elif kind == "route":
        wide: dict[str, Any] = {"ways": ways}
        subnets, lengths = claims.subnets, claims.lengths
        table.extend_routes(subnets, lengths, PROTOCOL, None, subnets, 7, way=0, **wide)
        table.extend_routes(
            subnets, lengths, PROTOCOL, None, claims.endpoints, 9, False, way=1, **wide
        )
    else:
        table.extend_peers(5, claims.subnets, claims.lengths, claims.macs, claims.endpoints)
    return table


@FAMILIES
@pytest.mark.parametrize("kind", [one for one in _core.KINDS if one != "fdb_any"])
def test_a_recipe_makes_the_rows_that_columns_make(kind: str, family: int) -> None:
    claims, ways = pack(family, [peer(family, n) for n in range(5, 17)]), bytes([0, 1, 1] * 4)
    legs: dict[str, int] = {"tunnel": 7} if kind in ("neighbour", "fdb") else {}
    legs = legs or {"tunnel": 7, "direct": 9}
    base = BASE if kind == "nexthop" else 0
    recipe = Recipe(kind, family, **legs, protocol=PROTOCOL, base=base, map=5)

    made, wanted = recipe.table(claims, ways), by_columns(kind, claims, ways)

    assert recipe.kind == made.kind == kind
    assert {made.tag(n): entry for n, entry in enumerate(made)} == {
        wanted.tag(n): entry for n, entry in enumerate(wanted)
    }
    ids = {*claims.nexthop_ids(BASE)} if kind == "nexthop" else range(12)  # IPv4 peers' alone
    assert [len(recipe.table(claims)), len(recipe.table(pack(family, [])))] == [len(ids), 0]


@FAMILIES
def test_a_route_names_the_object_of_its_peer_whatever_its_path(family: int) -> None:
    claims = pack(family, [peer(family, 5), peer(family, 6)])
    recipe = Recipe("route", family, tunnel=7, direct=9, protocol=PROTOCOL, base=BASE)

    ids = [entry.nexthop for entry in recipe.table(claims, b"\0\1")]

    assert ids == [*claims.nexthop_ids(BASE)]
    only_direct = Recipe("route", family, direct=9, protocol=PROTOCOL, base=BASE)
    assert len(only_direct.table(claims, b"\0\1")) == 1
    assert len(Recipe("route", family).table(claims)) == 0


def test_a_recipe_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="family is 4 or 6"):
        Recipe("route", 5)
    with pytest.raises(ValueError, match="one destination"):
        Recipe("fdb_any", 4)
    with pytest.raises(ValueError, match="the other family"):
        Recipe("route", 4, tunnel=7).table(pack(6, [peer(6, 5)]))
    with pytest.raises(ValueError, match="columns of different length"):
        Recipe("route", 4, tunnel=7).table(pack(4, [peer(4, 5)]), b"\0\0")
    with pytest.raises(ValueError, match="a policy of the other family"):
        pack(4, [peer(4, 5)]).admit_by(Policy(6, NETWORK[6], [], []))


def roster_of(family: int, leases: list[Lease]) -> Roster:
    peers = pack(family, leases)
    recipes = [Recipe("fdb", family, tunnel=7), Recipe("route", family, tunnel=7)]
    tables = [one.table(peers) for one in recipes]
    policy = Policy(family, NETWORK[family], OWN_ADDRESSES[family], [], OWN_SUBNET[family], OWN_MAC)
    own = OWN_SUBNET[family]
    return Roster(peers, _core.Claims(family), policy, tables, recipes, 1, 0, "me", own)


def follow(roster: Roster, added: list[Lease], removed: list[Lease | str]) -> bool:
    """Whether a change could be followed; it is made."""
    packed = pack(roster.peers.family, added)
    change = roster.follow(packed, added, removed)
    if change is not None:
        roster.store(change, None, None)
    return change is not None


def names(roster: Roster) -> list[str]:
    return [roster.peers.name(n) for n in range(len(roster.peers))]


@FAMILIES
def test_peers_are_found_by_their_names_whatever_came_and_went(family: int) -> None:
    chance = random.Random(family)
    there = {n: peer(family, n) for n in range(5, 105)}
    roster = roster_of(family, list(there.values()))
    for _ in range(400):
        number = chance.randrange(5, 160)
        if number in there:
            del there[number]
            assert follow(roster, [], [f"node{number}"])
        else:
            there[number] = peer(family, number)
            assert follow(roster, [there[number]], [])
        assert len(roster.peers) == len(there)
    assert sorted(names(roster)) == sorted(one.name for one in there.values())

    for number in there:  # a node that comes with another subnet is met by its name
        moved = peer(family, 170, name=f"node{number}", mac="02:00:00:00:99:99")
        assert not follow(roster, [moved], [])
    for number in {*range(5, 160)} - {*there}:
        assert follow(roster, [], [f"node{number}"])
    assert len(roster.peers) == len(there)


@FAMILIES
def test_names_of_any_length_are_told_apart(family: int) -> None:
    long = ["n" * size for size in (1, 8, 55, 56, 57, 112, 113, 255, 4000)]
    leases = [peer(family, 5 + n, name=name) for n, name in enumerate(long)]
    roster = roster_of(family, leases)

    for name in long[::2]:
        assert follow(roster, [], [name])

    assert sorted(names(roster)) == sorted(long[1::2])


@FAMILIES
def test_of_two_peers_with_one_name_the_first_is_meant(family: int) -> None:
    leases = [peer(family, n, name="twin" if n in (6, 8) else f"node{n}") for n in range(5, 10)]
    roster = roster_of(family, leases)

    assert follow(roster, [], ["twin"])
    assert roster.peers.find_subnet(leases[1].subnet or leases[1].ipv6_subnet) == -1
    assert names(roster).count("twin") == 1

    assert follow(roster, [], ["twin", "node5"])
    assert sorted(names(roster)) == ["node7", "node9"]


@FAMILIES
def test_a_renewal_is_told_from_a_change(family: int) -> None:
    leases = [peer(family, n) for n in range(5, 9)]
    roster = roster_of(family, leases)

    def follows(*added: Lease) -> _core.PeerChange:
        packed = pack(family, list(added))
        change = roster.follow(packed, list(added), [])
        assert change is not None
        return change

    renewed = follows(peer(family, 6, revision=9))
    assert renewed.renews
    assert roster.store(renewed, None, None) == ([], [])
    assert roster.peers.revision(renewed.numbers[0]) == 9
    moved = follows(peer(family, 6, mac="02:00:00:00:99:99"))
    assert not moved.renews
    before, after = roster.store(moved, None, None)
    assert [len(one) for one in (*before, *after)] == [1, 1, 1, 1]
    assert not follows(peer(family, 90)).renews


@FAMILIES
def test_what_concerns_this_node_itself(family: int) -> None:
    roster = roster_of(family, [peer(family, 5)])

    def concerns(*added: Lease, removed: tuple[Lease | str, ...] = ()) -> bool:
        return roster.concerns_own(pack(family, list(added)), removed)

    assert not concerns(peer(family, 6), removed=(peer(family, 5), "node5"))
    assert concerns(peer(family, 6, subnet=OWN_SUBNET[family]))
    for address in OWN_ADDRESSES[family]:
        assert concerns(peer(family, 6), peer(family, 7, endpoint=address))
    assert concerns(peer(family, 6, name="me"))
    assert concerns(removed=("node5", "me"))
    assert concerns(removed=(peer(family, 6, name="me"),))
    assert concerns(removed=(OWN_SUBNET[family].replace("/", "-"),))
