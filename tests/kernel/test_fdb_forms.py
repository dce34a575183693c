"""The FDB in every form that the kernel has: read as `bridge` shows it, compared, written; what is
another program's stays."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flannel_dp import (
    ConfigError,
    Fdb,
    Kernel,
    Table,
    Unsupported,
    fdb_columns,
    fdb_scope,
    fdb_table,
    keep,
)
from flannel_dp._core import parse_address
from flannel_dp.tables.entries import Scope
from tests.lib.fdb_forms import GROUP, ZERO, Forms, consistent
from tests.lib.hosts import Lab
from tests.lib.leases import endpoint, mac
from tests.lib.waiting import LIMIT


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[int, Forms]]:
    with Lab() as lab:
        host = lab.host()
        made = {family: Forms(host, family) for family in (4, 6)}
        yield made
        for one in made.values():
            one.close()


@pytest.fixture
def forms(shared: dict[int, Forms], family: int) -> Iterator[Forms]:
    """Devices without entries."""
    yield shared[family]
    shared[family].clear()


def sync(kernel: Kernel, table: Table, *scopes: Scope) -> dict[str, int]:
    (result,) = kernel.apply(kernel.diff(table, *scopes))
    assert [one.message() for one in result.failures()] == []
    return result.counts()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_is_what_bridge_shows(forms: Forms, data: Any) -> None:
    """Whatever was put there, by `bridge` or by us, and however the one changed the other's."""
    forms.clear()
    entries = data.draw(st.lists(forms.entries(), max_size=8))
    forms.batch(*(forms.words(data.draw(st.sampled_from(("append", "replace", "add"))), one)
                  for one in entries))  # fmt: skip
    ours = consistent(data.draw(st.lists(forms.entries(), max_size=4)))
    for device in (forms.port, forms.many):
        table = Table("fdb_any")
        for entry in ours:
            if entry.device == device:
                table.add(entry)
        forms.kernel.apply(forms.kernel.diff(table, fdb_scope(device, side="")))

        assert sorted(forms.read(device)) == sorted(forms.shown(device))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_after_a_sync_the_table_is_what_the_kernel_has(forms: Forms, data: Any) -> None:
    """From any entries to any others in one sync, after which there is nothing to do."""
    before, after = (consistent(data.draw(st.lists(forms.entries(), max_size=8))) for _ in "12")
    for entries in (before, after):
        for device, scope in forms.scopes.items():
            wanted = [one for one in entries if one.device == device]
            table = fdb_table(device, wanted)

            sync(forms.kernel, table, scope)

            own = [one for one in forms.read(device) if one.master and one.state == 0x80]
            assert sorted(forms.read(device)) == sorted([*wanted, *own])
            again = forms.kernel.diff(table, scope)
            assert (len(again), again.unchanged, again.conflicting) == (0, len(wanted), False)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_entries_of_others_stay(forms: Forms, data: Any) -> None:
    """Lists and marked entries; of a list we share the kernel keeps one state for all, though."""
    forms.clear()
    device, scope = forms.port, fdb_scope(forms.port)
    some = [
        [one for one in data.draw(st.lists(forms.entries(), max_size=8)) if one.device == device]
        for _ in "12"
    ]
    theirs = [e for e in some[0] if not e.master and (e.mac in (ZERO, GROUP)) is not bool(e.flags)]
    ours = consistent([e for e in some[1] if not (e.master or e.flags or e.nexthop)])
    forms.batch(*(forms.words("append", one) for one in theirs))

    def of_others() -> set[Fdb]:
        found = [one for one in forms.shown(device) if not one.master and one not in ours]
        return {e._replace(state=0) for e in found if e.flags or e.mac in (ZERO, GROUP)}

    held = of_others()
    on_group = {e.mac for e in forms.shown(device) if e.nexthop and e.mac in (ZERO, GROUP)}
    ours = [one for one in ours if one.mac not in on_group]  # that is not to be shared
    table = fdb_table(device, ours)
    diff = forms.kernel.diff(table, scope)
    forms.kernel.apply(diff)

    assert held <= of_others() | {one._replace(state=0) for one in ours}
    conflicts = {wanted for wanted, _ in diff.conflicts()}
    assert {*ours} - conflicts <= {*forms.shown(device)}
    assert len(forms.kernel.diff(table, scope)) == 0


@pytest.mark.parametrize("several", [ZERO, GROUP])
def test_destinations_are_added_and_removed_one_by_one(forms: Forms, several: str) -> None:
    """A list is installed whole; without it, another program's stays unless the scope claims it."""
    family, kernel = forms.family, forms.kernel
    one, two, three = (endpoint(family, n) for n in (1, 2, 3))
    theirs = Fdb(forms.port, several, three)
    forms.batch(forms.words("append", theirs))
    both = fdb_table(forms.port, [(several, one), (several, two)])
    ours = [Fdb(forms.port, several, there) for there in (one, two)]

    assert sync(kernel, both, fdb_scope(forms.port))["added"] == 2
    held = [entry for entry in forms.read(forms.port) if not entry.master]
    assert sorted(held) == sorted([*ours, theirs])
    assert len(kernel.diff(both, fdb_scope(forms.port))) == 0
    assert {kernel.get(fdb_scope(forms.port), entry) for entry in ours} == {*ours}

    assert len(kernel.diff(Table("fdb"), fdb_scope(forms.port))) == 0
    counts = sync(kernel, fdb_table(forms.port, ours[:1]), fdb_scope(forms.port, owner="all"))
    assert (counts["removed"], counts["unchanged"]) == (2, 1)
    assert [e for e in forms.shown(forms.port) if not e.master] == ours[:1]


@pytest.mark.parametrize("flags", ["extern_learn", "router", "sticky"])
def test_marked_entries_of_others_are_conflicts_or_stay(forms: Forms, flags: str) -> None:
    family, kernel, scope = forms.family, forms.kernel, fdb_scope(forms.port)
    theirs = Fdb(forms.port, mac(family, 1), endpoint(family, 1), flags=flags)
    forms.batch(forms.words("add", theirs))
    held = forms.shown(forms.port)

    assert kernel.get(scope, theirs) == theirs
    assert sync(kernel, Table("fdb"), scope)["removed"] == 0
    diff = kernel.diff(fdb_table(forms.port, {theirs.mac: endpoint(family, 9)}), scope)
    ((wanted, found),) = diff.conflicts()
    assert (wanted.endpoint, found) == (endpoint(family, 9), theirs)
    kernel.apply(diff)
    assert forms.shown(forms.port) == held

    assert len(kernel.diff(fdb_table(forms.port, [theirs]), scope)) == 0  # as we want it
    if flags == "extern_learn":
        learned = fdb_scope(forms.port, owner="extern_learn")
        plain = Fdb(forms.port, mac(family, 2), endpoint(family, 2))
        forms.batch(forms.words("add", plain))
        assert sync(kernel, Table("fdb"), learned)["removed"] == 1
        assert [e for e in forms.shown(forms.port) if not e.master] == [plain]


def test_a_keeper_keeps_a_list_and_no_more(forms: Forms) -> None:
    """A destination that went comes back, another program's stays, and one is added to the rest."""
    device, family = forms.port, forms.family
    ours = [Fdb(device, ZERO, endpoint(family, n)) for n in (1, 2)]
    theirs, more = Fdb(device, ZERO, endpoint(family, 3)), Fdb(device, ZERO, endpoint(family, 4))

    def lists() -> list[Fdb]:
        return sorted(entry for entry in forms.shown(device) if not entry.master)

    with keep(forms.kernel, fdb_table(device, ours), fdb_scope(device), timeout=LIMIT) as kept:
        forms.batch(forms.words("append", theirs), forms.words("del", ours[0]))

        repair = next(iter(kept))

        assert [one.entry for one in repair.named] == [ours[0]]
        assert lists() == sorted([*ours, theirs])
        kept.update(added=[more], removed=[ours[1]])
        assert lists() == sorted([ours[0], theirs, more])


def test_what_the_kernel_learned_is_shown_and_stays(forms: Forms) -> None:
    device, name = forms.port, forms.names[forms.port]
    there = f"{mac(forms.family, 1)} dev {name}"
    forms.batch(f"fdb add {there} self dynamic dst {endpoint(forms.family, 1)}",
                f"fdb add {there} master dynamic")  # fmt: skip
    held = forms.shown(device)
    assert {(one.state, bool(one.master)) for one in held} >= {(2, False), (2, True)}

    assert sorted(forms.read(device)) == sorted(held)
    sync(forms.kernel, Table("fdb"), fdb_scope(device, owner="all", side=""))

    assert forms.shown(device) == held
    with pytest.raises(Unsupported, match="age by itself"):
        fdb_table(device, [held[0]])


def test_vnis_of_one_device_are_told_apart(forms: Forms) -> None:
    """By columns as well; a scope may be of some VNIs alone."""
    family, device, kernel = forms.family, forms.many, forms.kernel
    entries = [
        Fdb(device, address, endpoint(family, vni), vni=vni, src_vni=vni)
        for address in (mac(family, 1), ZERO)
        for vni in (10, 11)
    ]
    raw = b"".join(bytes.fromhex(e.mac.replace(":", "")) for e in entries)
    vnis = array("I", [e.vni for e in entries])
    there = b"".join(parse_address(e.endpoint)[1] for e in entries)
    table = fdb_columns(device, family, raw, there, vnis=vnis, src_vnis=vnis)

    assert [*table] == entries
    assert sync(kernel, table, fdb_scope(device))["added"] == 4
    assert sorted(forms.shown(device)) == sorted(entries)
    assert len(kernel.diff(table, fdb_scope(device))) == 0
    some = fdb_scope(device, src_vnis=(11, 11), owner="all")
    assert sync(kernel, Table("fdb"), some)["removed"] == 2
    assert sorted(forms.shown(device)) == sorted(e for e in entries if e.vni == 10)


def test_a_devices_own_vni_and_port_may_be_named(forms: Forms) -> None:
    """The kernel leaves them out of what it shows."""
    family, device, kernel = forms.family, forms.port, forms.kernel
    named = Fdb(device, ZERO, endpoint(family, 1), vni=1, port=8400 + family)
    table = fdb_table(device, [named])

    sync(kernel, table, fdb_scope(device))

    assert len(kernel.diff(table, fdb_scope(device))) == 0
    assert [e for e in forms.shown(device) if not e.master] == [named._replace(vni=0, port=0)]


def test_what_the_kernel_would_make_something_else_of(forms: Forms) -> None:
    family, kernel = forms.family, forms.kernel
    other = Fdb(forms.port, mac(family, 1), endpoint(family, 1), src_vni=9)

    with pytest.raises(ConfigError, match="has the VNI 1 alone"):
        kernel.diff(fdb_table(forms.port, [other]), fdb_scope(forms.port))
