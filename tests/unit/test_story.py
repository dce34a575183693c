"""What the log tells of peers that come, change and go, and how it sums what comes at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from flannel_dp._core import Claims
from flannel_dp.agent.bursts import MOST, WINDOW, Bursts
from flannel_dp.agent.changes import PeerAt, PeerChange, PeerChanges
from flannel_dp.agent.chronicle import MOST_REJECTED
from flannel_dp.agent.story import Story
from flannel_dp.cluster.lease import BackendData, BadClaim, Lease
from flannel_dp.cluster.rejections import Reason, Rejection
from tests.lib.stand_ins import Clock

FAMILIES = (4, 6)


def lease(family: int, number: int, *, name: str = "", to: int = 0, mac: int = 0) -> Lease:
    """The lease of one node; ``to`` moves its endpoint, ``mac`` its MAC."""
    high, low = divmod(number, 256)
    data = BackendData(1, f"02:00:00:{mac:02x}:{high:02x}:{low:02x}")
    if family == 4:
        return Lease(
            name=name or f"node{number}",
            subnet=f"10.{high}.{low}.0/24",
            public_ip=f"192.{to}.{high}.{low}",
            backend_type="vxlan",
            backend_data=data,
        )
    return Lease(
        name=name or f"node{number}",
        ipv6_subnet=f"fd00:{high:x}:{low:x}::/64",
        public_ipv6=f"2001:db8:{to:x}:{high:x}::{low:x}",
        backend_type="vxlan",
        backend_v6_data=data,
    )


def packed(family: int, leases: Iterable[Lease]) -> Claims:
    claims = Claims(family)
    claims.extend(leases, "vxlan", 1, True)
    return claims


def claims(family: int, numbers: Iterable[int], **more: Any) -> Claims:
    return packed(family, (lease(family, number, **more) for number in numbers))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "flannel_dp.agent")
    return caplog


def story(*states: Any) -> tuple[Story, Clock]:
    clock = Clock()
    kept: Any = SimpleNamespace(known=dict(enumerate(states, start=4)))
    return Story(kept, clock), clock


@pytest.mark.parametrize("family", FAMILIES)
def test_each_peer_that_comes_changes_or_goes_is_one_change(family: int) -> None:
    old = packed(family, [lease(family, n) for n in (1, 2, 3)])
    new = packed(family, [lease(family, 2), lease(family, 3, to=1, mac=7), lease(family, 4)])

    found = PeerChanges(old, new)

    assert found.counts == {"added": 1, "changed": 1, "removed": 1}
    (added,), (changed,), (removed,) = (found.first(kind, 9) for kind in found.counts)
    assert added.after is not None
    assert removed.before is not None
    assert (added.after.name, removed.before.name) == ("node4", "node1")
    was, now = changed
    assert was is not None
    assert now is not None
    assert changed.described == (
        f"endpoint from {was.endpoint} to {now.endpoint}, "
        "MAC from 02:00:00:00:00:03 to 02:00:00:07:00:03"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_with_another_subnet_has_changed(family: int) -> None:
    old = packed(family, [lease(family, 1, name="a"), lease(family, 2)])
    new = packed(family, [lease(family, 3, name="a"), lease(family, 2)])

    found = PeerChanges(old, new)

    assert found.counts == {"added": 0, "changed": 1, "removed": 0}
    (changed,) = found.first("changed", 9)
    assert changed.described.startswith("subnet from ")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_of_many_changes_are_found_whatever_the_others_are(family: int) -> None:
    old, new = claims(family, range(300)), claims(family, range(100, 400), to=1)

    found = PeerChanges(old, new)

    assert found.counts == {"added": 100, "changed": 200, "removed": 100}
    for kind in found.counts:
        assert [one.kind for one in found.first(kind, 5)] == [kind] * 5
    assert not PeerChanges(old, old).counts["changed"]


def test_a_peer_without_a_mac_has_none_in_its_words() -> None:
    assert PeerAt("a", "10.1.2.0/24", "192.0.2.1", "").described == "10.1.2.0/24 at 192.0.2.1"
    assert PeerChange(None, PeerAt("a", "b", "c", "d")).kind == "added"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_line_for_each_peer(family: int, told: pytest.LogCaptureFixture) -> None:
    made, _ = story()
    made.peers({}, {family: claims(family, [1])})
    made.peers({family: claims(family, [1])}, {family: claims(family, [1], mac=9)})
    made.peers({family: claims(family, [1])}, {family: Claims(family)})

    where = PeerChanges(Claims(family), claims(family, [1])).first("added", 1)[0].after
    assert where is not None
    assert told.messages == [
        f"Peer node1 was added: {where.described}",
        "Peer node1 has changed: MAC from 02:00:00:00:00:01 to 02:00:00:09:00:01",
        f"Peer node1 was removed: {where.described}",
    ]
    fields: Any = told.records[0].args
    assert (fields["peer"], fields["family"], fields["subnet"]) == ("node1", family, where.subnet)


@pytest.mark.parametrize("many", [10_000])
def test_ten_thousand_peers_at_once_are_a_few_lines(
    many: int, told: pytest.LogCaptureFixture
) -> None:
    made, clock = story()
    all_of_them = {family: claims(family, range(many)) for family in FAMILIES}

    made.peers({}, all_of_them)
    clock.now += WINDOW
    made.flush()

    assert len(told.messages) == 2 * (MOST + 1) <= 20
    assert told.messages[MOST] == f"... and {many - MOST} more IPv4 peers were added"
    assert told.messages[-1] == f"... and {many - MOST} more IPv6 peers were added"
    assert made.due is None


def test_peers_that_come_one_by_one_are_counted_until_the_window_ends(
    told: pytest.LogCaptureFixture,
) -> None:
    made, clock = story()
    for number in range(100):
        made.peers({}, {4: claims(4, [number])})
        clock.now += 0.01
    assert len(told.messages) == MOST
    assert made.due is not None
    assert made.due <= clock.now + WINDOW

    clock.now = made.due
    made.flush()

    assert told.messages[-1] == "... and 95 more IPv4 peers were added"
    made.peers({}, {4: claims(4, [200])})
    assert told.messages[-1].startswith("Peer node200 was added")


def test_the_last_count_is_told_at_the_end(told: pytest.LogCaptureFixture) -> None:
    bursts = Bursts(Clock())
    for _ in range(MOST + 3):
        bursts.more(("drift", 0), 1 - bursts.room(("drift", 0), 1))

    bursts.flush(all=True)

    assert told.messages == ["... and 3 more entries were repaired"]


def test_nothing_is_compared_where_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flannel_dp.agent.story.PeerChanges", None)
    logging.getLogger("flannel_dp.agent.story").setLevel(logging.WARNING)
    try:
        made, _ = story()
        made.peers({}, {4: claims(4, [1])})
    finally:
        logging.getLogger("flannel_dp.agent.story").setLevel(logging.NOTSET)


def test_a_lease_that_cannot_be_read_is_told_once_for_each_reason(
    told: pytest.LogCaptureFixture,
) -> None:
    made, clock = story()
    bad = BadClaim("node9", "bad-claim", "its value is no JSON")

    made.rejections({"node9": bad})
    made.rejections({"node9": bad})
    made.rejections({"node9": BadClaim("node9", "bad-key", "no subnet")})
    made.rejections({})
    clock.now += WINDOW
    made.rejections({"node9": bad})

    assert told.messages == [
        "Lease node9 is rejected (bad-claim): its value is no JSON",
        "Lease node9 is rejected (bad-key): no subnet",
        "Lease node9 is rejected (bad-claim): its value is no JSON",
    ]
    assert {record.levelname for record in told.records} == {"WARNING"}


@pytest.mark.parametrize("family", FAMILIES)
def test_many_rejected_leases_are_a_few_lines_and_are_read_once(
    family: int, told: pytest.LogCaptureFixture
) -> None:
    rejected = Counted(claims(family, range(100)))
    state = SimpleNamespace(family=SimpleNamespace(admission=SimpleNamespace(rejected=rejected)))
    clock = Clock()
    kept: Any = SimpleNamespace(known={family: state})
    made = Story(kept, clock)

    made.rejections({})
    made.rejections({}, again=False)
    assert [message.partition(":")[0] for message in told.messages[:MOST]] == [
        f"Lease node{number} is rejected (overlap)" for number in range(MOST)
    ]
    assert told.messages[MOST:] == [f"... and 95 more IPv{family} leases are rejected"]
    assert rejected.texts == MOST + MOST_REJECTED

    rejected.claims = claims(family, range(101))
    clock.now += WINDOW
    made.rejections({}, again=False)
    assert told.messages[-1].startswith("Lease node100 is rejected")


class Counted:
    """Rejected claims whose texts are counted."""

    def __init__(self, rejected: Claims) -> None:
        self.claims, self.texts = rejected, 0

    def __len__(self) -> int:
        return len(self.claims)

    def __getitem__(self, number: int) -> Rejection:
        self.texts += 1
        return Rejection(self.claims.name(number), self.claims.family, Reason.OVERLAP, "why")
