"""What a source has told, gathered: the later word about a lease counts."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.agent.backlog import Backlog
from flannel_dp.cluster.lease import BadClaim, Lease, LeaseList
from flannel_dp.sources import Change, Delivery, Snapshot
from tests.lib.leases import peer


def snapshot(*leases: Lease, bad: tuple[BadClaim, ...] = ()) -> Snapshot:
    return Snapshot(LeaseList([*leases], [*bad]), "test", 0.0)


def broken(name: str, reason: str = "bad-claim") -> BadClaim:
    return BadClaim(name, reason, "it is broken")


def delivery(*changes: Change, first: Snapshot | None = None) -> Delivery:
    return Delivery(first, [*changes])


def test_nothing_was_heard_at_first() -> None:
    backlog = Backlog()
    backlog.add(Delivery())

    assert not backlog.heard
    assert not backlog.changed
    assert backlog.snapshot is None
    assert backlog.changes() == ([], [], [])


def test_a_snapshot_stays_until_it_was_synced() -> None:
    backlog, one = Backlog(), snapshot(peer(1))
    backlog.add(delivery(first=one))
    backlog.add(delivery())
    assert backlog.heard
    assert backlog.snapshot is one

    assert not backlog.synced(complete=False)
    assert backlog.snapshot is one, "one family is still to come"
    assert not backlog.synced(complete=True)
    assert backlog.snapshot is None


def test_a_snapshot_makes_earlier_changes_void() -> None:
    backlog = Backlog()
    backlog.add(delivery(Change((peer(1),), ("10.9.9.0-24",))))
    backlog.add(delivery(first=snapshot(peer(2))))

    assert not backlog.changed


def test_changes_after_a_snapshot_wait_for_it() -> None:
    backlog = Backlog()
    backlog.add(delivery(Change((peer(3),)), first=snapshot(peer(2))))

    assert backlog.snapshot is not None
    assert backlog.synced(complete=True)
    assert backlog.changes() == ([peer(3)], [], [])


def test_changes_that_come_together_are_one() -> None:
    backlog = Backlog()
    newer = peer(1, public_ip="198.18.9.9")
    backlog.add(delivery(Change((peer(1), peer(2))), Change((newer,), (peer(3).key,))))
    backlog.add(delivery(Change(removed=(peer(2).key,))))

    added, removed, _ = backlog.changes()

    assert added == [newer]
    assert removed == [peer(3).key, peer(2).key]
    assert backlog.changes() == ([], [], [])


def test_what_came_back_is_not_removed() -> None:
    backlog = Backlog()
    backlog.add(delivery(Change(removed=(peer(1).key,)), Change((peer(1),))))

    assert backlog.changes() == ([peer(1)], [], [])


def test_a_lease_whose_new_form_is_broken_is_removed() -> None:
    backlog = Backlog()
    bad = broken(peer(1).key)
    backlog.add(delivery(Change((peer(1),)), Change(bad=(bad,))))

    assert backlog.changes() == ([], [peer(1).key], [bad])
    assert backlog.bad_reasons() == {"bad-claim": 1}


def test_broken_claims_are_counted_until_they_are_mended_or_gone() -> None:
    backlog = Backlog()
    bad = (*(broken(f"n{number}") for number in range(3)), broken("x", "bad-key"))
    backlog.add(delivery(first=snapshot(bad=bad)))
    assert backlog.bad_reasons() == {"bad-claim": 3, "bad-key": 1}

    backlog.add(delivery(Change((peer(1, name="n1"),), ("n2",))))
    assert backlog.bad_reasons() == {"bad-claim": 1, "bad-key": 1}

    backlog.add(delivery(first=snapshot(peer(1))))
    assert backlog.bad_reasons() == {}


NAMES = st.sampled_from([f"n{number}" for number in range(5)])
NEWS = st.one_of(
    st.tuples(st.just("add"), NAMES, st.integers(1, 3)),
    st.tuples(st.just("remove"), NAMES, st.just(0)),
    st.tuples(st.just("bad"), NAMES, st.just(0)),
)


@given(before=st.dictionaries(NAMES, st.integers(1, 3)), batches=st.lists(st.lists(NEWS)))
def test_changes_lead_where_the_single_words_would(
    before: dict[str, int], batches: list[list[tuple[str, str, int]]]
) -> None:
    """However they are cut into changes and deliveries, against a plain dictionary."""

    def lease(name: str, number: int) -> Lease:
        return peer(number, name=name)

    model: dict[str, Any] = {name: lease(name, number) for name, number in before.items()}
    outcome, backlog, bad = dict(model), Backlog(), set[str]()
    for batch in batches:
        changes = []
        for word, name, number in batch:
            bad.discard(name)
            if word == "add":
                model[name] = lease(name, number)
                changes.append(Change((model[name],)))
            else:
                model.pop(name, None)
                if word == "bad":
                    bad.add(name)
                news = {"bad": (broken(name),)} if word == "bad" else {"removed": (name,)}
                changes.append(Change(**news))
        backlog.add(delivery(*changes))
    added, removed, _ = backlog.changes()
    for name in removed:
        outcome.pop(str(name), None)
    outcome |= {one.name: one for one in added}

    assert outcome == model
    assert sum(backlog.bad_reasons().values()) == len(bad)
