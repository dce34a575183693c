"""DataPlane.update: whatever the changes, the outcome is that of a sync with the resulting
set of leases, and a clean change costs a few messages."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from flannel_dp import BackendData, DataPlane, Lease, SourceError
from tests.lib.cluster_script import ClusterRun
from tests.lib.hosts import Host, Lab
from tests.lib.kernel import expected, observed, places
from tests.lib.leases import lease_of, mac, peer, peers, plane, replaced, subnet
from tests.lib.monitor import Monitor
from tests.lib.script import Script, each_script


@pytest.fixture
def dp(host: Any, family: int) -> Iterator[DataPlane]:
    """A data plane of one family, in sync with peers 1 to 20."""
    with plane(host, family) as made:
        made.sync([lease_of(host), *peers(range(1, 21))])
        yield made


def _data(number: int) -> dict[str, BackendData]:
    return {
        "backend_data": BackendData(1, mac(4, number)),
        "backend_v6_data": BackendData(1, mac(6, number)),
    }


def label(lease: Lease) -> str:
    return lease.name or lease.key


def agrees(dp: DataPlane, host: Any, leases: Iterable[Lease]) -> None:
    """The kernel, and what the data plane remembers, are as after a sync of these leases."""
    wanted = [lease_of(host), *leases]
    with plane(host, *dp.families, lock=False) as fresh:
        plan = fresh.plan(wanted)
        assert plan.is_empty, str(plan)
        resolved = fresh.resolver.resolve(wanted)
        for family in resolved.families:
            known = dp.state[family.number]
            again = known.layout.desired(family.peers, known.place, known.paths.column)
            for held, table in zip(known.tables, again, strict=True):
                assert set(held.table) == set(table.table)
            assert _refusals(known.family) == _refusals(family)
            _tags_are_right(known)


def _refusals(family: Any) -> list[tuple[str, str, str]]:
    return sorted((r.lease, str(r.reason), r.detail) for r in family.admission.rejected)


def _tags_are_right(family: Any) -> None:
    """Every entry of peer n is tagged n, or a failing peer would take another one down."""
    peers = family.peers
    for number, route in enumerate(family.routes.table):
        assert peers.subnet(family.routes.table.tag(number)) == route.prefix


@each_script(Path(__file__).with_name("update.txt"))
def test_changes(script: Script, host: Any, family: int) -> None:
    ClusterRun(script, host, family, check=agrees).run()


# ---- single changes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("added", "removed"),
    [
        ([peer(50)], []),
        ([], [peer(5)]),
        ([], [peer(5).key]),
        ([peer(5, **_data(55))], []),
        ([peer(5, public_ip="198.18.9.9", public_ipv6="2001:db8:1::909")], []),
        ([peer(5, public_ip="198.18.9.9", public_ipv6="2001:db8:1::909", **_data(55))], []),
        ([peer(50), peer(51), peer(6, **_data(56))], [peer(1), peer(20)]),
        ([peer(50, name="node50")], [peer(2)]),
        ([peer(5)], [peer(5)]),
    ],
    ids=["new", "gone", "gone-by-key", "mac", "endpoint", "both", "several", "named", "back"],
)
def test_a_clean_change(
    dp: DataPlane, host: Any, family: int, added: list[Lease], removed: list[Lease | str]
) -> None:
    before = dp.kernel.channel.messages_sent
    report = dp.update(added, removed)

    assert report.ok
    assert dp.kernel.channel.messages_sent - before <= 4 * (len(added) + len(removed))
    cluster = {lease.key: lease for lease in peers(range(1, 21))}
    for lease in removed:
        cluster.pop(lease if isinstance(lease, str) else lease.key)
    cluster |= {lease.key: lease for lease in added}
    agrees(dp, host, cluster.values())
    assert observed(host, family) == expected(cluster.values(), family)


def test_a_renewal_writes_nothing(dp: DataPlane, host: Any) -> None:
    before = dp.kernel.channel.messages_sent
    with Monitor(host) as monitor:
        report = dp.update(added=[peer(5), lease_of(host), peer(6, expiration="2031-01-01")])

        assert monitor.events() == []
    assert report.ok
    assert report.writes == 0
    assert dp.kernel.channel.messages_sent == before


@pytest.mark.parametrize("gone", [peer(99), peer(99).key, "node99", "10.0.0.0-8&x", ""])
def test_removing_what_is_unknown_is_a_success(dp: DataPlane, host: Any, gone: Lease | str) -> None:
    report = dp.update(removed=[gone])

    assert report.ok
    assert report.writes == 0
    assert report.unknown == (gone if isinstance(gone, str) else label(gone),)
    assert f"not known, so not removed: {report.unknown[0]}" in str(report)
    assert report.to_dict()["unknown"] == [*report.unknown]
    agrees(dp, host, peers(range(1, 21)))


def test_removing_twice_is_a_success(dp: DataPlane, host: Any) -> None:
    assert dp.update(removed=[peer(3), peer(3)]).unknown == ()
    assert dp.update(removed=[peer(3)]).unknown == (label(peer(3)),)

    agrees(dp, host, [p for p in peers(range(1, 21)) if p != peer(3)])


def test_a_change_of_the_own_lease_takes_a_sync(dp: DataPlane, host: Any, family: int) -> None:
    own, moved = lease_of(host), {"subnet": subnet(4, 77), "ipv6_subnet": subnet(6, 77)}
    for changed in (replaced(own, **_data(77)), replaced(own, **moved)):
        for gone in ([], [own], [label(own)]):
            with pytest.raises(SourceError, match="has changed"):
                dp.update(added=[peer(60), changed], removed=gone)

    agrees(dp, host, peers(range(1, 21)))


def test_a_named_lease_can_be_removed_by_name_and_by_key(
    dp: DataPlane, host: Any, family: int
) -> None:
    dp.update(added=[peer(60, name="node60"), peer(61, name="node61")])

    report = dp.update(removed=["node60", "node99"])
    assert (report.ok, report.unknown) == (True, ("node99",))
    assert dp.update(removed=[peer(61).key]).unknown == ()
    agrees(dp, host, peers(range(1, 21)))


def test_a_named_lease_is_removed_whatever_its_last_subnet_was(
    dp: DataPlane, host: Any, family: int
) -> None:
    dp.update(added=[peer(60, name="node60")])

    dp.update(removed=[peer(61, name="node60")])

    agrees(dp, host, peers(range(1, 21)))


# ---- what it costs --------------------------------------------------------------------


def _steps(dp: DataPlane, added: list[Lease], removed: list[Lease | str]) -> int:
    """Calls of and by Python functions in an update: the same at every run, on any machine."""
    found: list[str] = []
    sys.setprofile(lambda frame, event, what: found.append(event))
    try:
        report = dp.update(added, removed)
    finally:
        sys.setprofile(None)
    assert report.ok
    return sum(event in ("call", "c_call") for event in found)


def test_a_change_takes_few_steps_however_many_peers_there_are(host: Any, family: int) -> None:
    named = [peer(n, name=f"node{n}") for n in range(5, 10)]
    changes: list[tuple[list[Lease], list[Lease | str]]] = [
        ([peer(50)], []),
        ([peer(50, public_ip="198.18.9.9", public_ipv6="2001:db8:1::909")], []),
        ([peer(50, **_data(3000))], []),
        ([peer(50, **_data(3000), expiration="2031-01-01")], []),
        ([], [peer(50)]),
        ([named[0]], []),
        ([], ["node5"]),
    ]
    counted: list[list[int]] = []
    for count in (20, 1200):
        there = peers([*range(10, 10 + count - 5)]) + named[1:]
        with plane(host, family) as dp:
            dp.sync([lease_of(host), *(one for one in there if one.key != peer(50).key)])
            dp.update(added=[peer(4), named[1]], removed=["node4"])  # all that is made once is made
            counted.append([_steps(dp, *change) for change in changes])

    assert counted[0] == counted[1]
    assert max(counted[0]) < 110  # 240 when each lease was Python


# ---- claims that meet ----------------------------------------------------------------


def test_a_refused_lease_that_is_renewed_is_remembered_once(
    dp: DataPlane, host: Any, family: int
) -> None:
    bad = peer(60, public_ip="0.0.0.0", public_ipv6="::")

    for _ in range(5):
        dp.update(added=[bad])

    assert len(dp.state[family].family.admission.rejected) == 1
    agrees(dp, host, [bad, *peers(range(1, 21))])


def test_refusals_keep_their_own_words(dp: DataPlane, host: Any, family: int) -> None:
    """Claims of several updates stood first in their lists; their details must not mix."""
    first = peer(60, public_ip="here", public_ipv6="here")
    there = peer(62, public_ip="-", public_ipv6="-")
    dp.sync([lease_of(host), there, *peers(range(1, 21))])
    second = peer(61, backend_type="host-gw")

    dp.update(added=[first])
    dp.update(added=[second])

    agrees(dp, host, [first, second, there, *peers(range(1, 21))])


def test_a_new_endpoint_of_a_subnet_and_mac_is_one_replacement(
    dp: DataPlane, host: Any, family: int
) -> None:
    """As a node whose address changed publishes it."""
    moved = peer(5, public_ip="198.18.77.77", public_ipv6="2001:db8:1::7777")

    with Monitor(host) as monitor:
        report = dp.update(added=[moved])
        assert monitor.deleted("fdb", "neighbour", "nexthop", "route") == set()

    assert report.ok
    assert report.writes == 1
    agrees(dp, host, [moved, *(p for p in peers(range(1, 21)) if p != peer(5))])


def test_an_update_after_the_world_changed_finds_its_way(
    dp: DataPlane, host: Any, family: int
) -> None:
    """Another agent has written the peer already, and deleted one: both are successes."""
    with plane(host, family, lock=False) as other:
        other.sync([lease_of(host), *peers(range(2, 22))])

    report = dp.update(added=[peer(21)], removed=[peer(1)])

    assert report.ok, report.to_json()
    assert observed(host, family) == expected(peers(range(2, 22)), family)


def test_a_foreign_route_in_our_place_is_a_conflict(dp: DataPlane, host: Any, family: int) -> None:
    host.ip("link add other0 type veth peer name other1")
    host.ip("link set other0 up")
    host.ip(f"-{family} route add {subnet(family, 60)} dev other0 proto static")

    report = dp.update(added=[peer(60), peer(61)])

    assert not report.ok
    assert places(report.conflicts) == [subnet(family, 60)]
    assert report.failures == []
    assert expected(peers([61]), family)["route"] <= observed(host, family)["route"]


# ---- any sequence --------------------------------------------------------------------

_NUMBERS = st.integers(1, 6)


@st.composite
def _leases(draw: st.DrawFn) -> Lease:
    """A lease out of few subnets, MACs and names, so that they meet."""
    number = draw(_NUMBERS)
    shape: dict[str, Any] = {"revision": draw(st.sampled_from((0, 0, 1, 2)))}
    if draw(st.booleans()):
        shape["name"] = f"node{draw(_NUMBERS)}"
    if draw(st.integers(0, 4)) == 0:
        shape |= {"subnet": "10.240.0.0/21", "ipv6_subnet": "fd00:10::/45"}
        shape["subnet"], shape["ipv6_subnet"] = draw(
            st.sampled_from(
                (("10.240.2.0/23", "fd00:10:2::/47"), ("10.240.4.128/25", "fd00:10:4:0:8000::/65"))
            )
        )
    if draw(st.integers(0, 2)) == 0:
        shape |= _data(draw(_NUMBERS))
    if draw(st.integers(0, 7)) == 0:
        shape |= draw(
            st.sampled_from(
                (
                    {"public_ip": "0.0.0.0", "public_ipv6": "::1"},
                    {"public_ip": "x", "public_ipv6": "y"},
                    {"backend_type": "udp"},
                    {"ipv6_subnet": "", "public_ipv6": ""},
                )
            )
        )
    if draw(st.integers(0, 3)) == 0:
        other = draw(_NUMBERS)
        shape |= {"public_ip": f"198.18.3.{other}", "public_ipv6": f"2001:db8:1::3:{other}"}
    return peer(number, **shape)


_STEPS = st.lists(
    st.tuples(st.lists(_leases(), max_size=3), st.lists(_leases(), max_size=2)),
    min_size=1,
    max_size=10,
)


@pytest.fixture(scope="module")
def node() -> Iterator[Host]:
    """One host for all examples: each starts with a sync from what the last one left."""
    with Lab() as lab:
        yield lab.host()


@seed(20240611)
@settings(
    max_examples=60,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(steps=_STEPS)
def test_any_sequence_of_updates_ends_as_a_sync_would(
    node: Host, steps: list[tuple[list[Lease], list[Lease]]]
) -> None:
    """Both families at once; no lease is named twice in one list of changes."""
    cluster = {label(lease): lease for lease in peers(range(1, 4))}
    with plane(node, allow_shrink=True) as dp:
        assert dp.sync([lease_of(node), *cluster.values()]).ok
        for added, removed in steps:
            fresh = {label(lease): lease for lease in added}
            for lease in removed:
                cluster.pop(label(lease), None)
            cluster |= fresh

            assert dp.update(list(fresh.values()), removed).ok
            agrees(dp, node, cluster.values())


def test_a_long_walk_of_clean_changes(host: Any) -> None:
    """300 changes of one peer each, both families; what they cost stays what it was."""
    chance = random.Random(7)
    cluster = {n: peer(n) for n in range(1, 60)}
    with plane(host) as dp:
        dp.sync([lease_of(host), *cluster.values()])
        for turn in range(300):
            number = chance.randrange(1, 90)
            before = dp.kernel.channel.messages_sent
            if number in cluster and chance.random() < 0.5:
                report = dp.update(removed=[cluster.pop(number)])
            else:
                cluster[number] = peer(number, **_data(1000 + turn))
                report = dp.update(added=[cluster[number]])
            assert report.ok
            # A new MAC is one FDB entry more and one less; everything else once per table.
            assert dp.kernel.channel.messages_sent - before <= 7
        agrees(dp, host, cluster.values())
        for family in (4, 6):
            assert observed(host, family) == expected(cluster.values(), family)
