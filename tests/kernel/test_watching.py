"""Drift is seen in the kernel's events and undone: entry by entry, or by reading a family
again where events cannot tell."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp import DataPlane, Route
from flannel_dp.reconcile.drift import Drift, Repair
from flannel_dp.reconcile.watch import Watch
from flannel_dp.tables.entries import Nexthop
from tests.lib.kernel import expected, ifindex, observed, places, stranger
from tests.lib.leases import (
    DEVICE,
    HOST_GW,
    address,
    endpoint,
    lease_of,
    mac,
    near,
    near_peer,
    network_config,
    peer,
    peers,
    plane,
    replaced,
    subnet,
)
from tests.lib.monitor import Monitor
from tests.lib.watched_node import Kept, nexthop_id, settle

NUMBERS = range(1, 21)
DIRECT = {"Type": "vxlan", "DirectRouting": True}


def counts(made: list[Repair]) -> dict[tuple[str, str], int]:
    total: dict[tuple[str, str], int] = {}
    for repair in made:
        for kind, count in repair.counts.items():
            total[kind] = total.get(kind, 0) + count
    return total


@pytest.fixture
def keep(host: Any) -> Iterator[Callable[..., Kept]]:
    """``keep(*families, **backend)``; with DirectRouting and host-gw the peers below 11 are
    on the host's own network, the others behind a router (in host-gw there are none)."""
    made: list[Kept] = []

    def make(*families: int, **backend: Any) -> Kept:
        numbers = range(1, 11) if backend.get("Type") == "host-gw" else NUMBERS
        others = peers(numbers)
        own = lease_of(host)
        if backend:
            others = [near_peer(n) if n < 11 else peer(n) for n in numbers]
        if backend.get("Type") == "host-gw":
            others = [replaced(lease, backend_type="host-gw") for lease in others]
            own = replaced(own, backend_type="host-gw")
        dp = DataPlane(network_config(*families, **backend), iface=host.iface, netns=host.ns)
        made.append(Kept(host, dp, [own, *others]))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---- through the tunnel ---------------------------------------------------------------

#: What is done to peer 3 of one family, and what is told of it. {..} are filled in.
ENTRIES = {
    "route-deleted": ("ip", "route del {net}", {("route", "deleted"): 1}),
    "route-changed": ("ip", "route replace {net} dev {dev} {v6}", {("route", "changed"): 1}),
    "route-added": ("ip", "route add {stray} dev {dev}", {("route", "added"): 1}),
    "route-marked": ("ip", "route add {stray} dev eth0 proto 138", {("route", "added"): 1}),
    "neighbour-deleted": ("ip", "neigh del {gw} dev {dev}", {("neighbour", "deleted"): 1}),
    "neighbour-changed": (
        "ip",
        "neigh replace {gw} lladdr 02:aa:aa:aa:aa:aa dev {dev}",
        {("neighbour", "changed"): 1},
    ),
    "neighbour-added": (
        "ip",
        "neigh add {other} lladdr 02:aa:aa:aa:aa:aa dev {dev}",
        {("neighbour", "added"): 1},
    ),
    "fdb-deleted": ("bridge", "fdb del {mac} dev {dev}", {("fdb", "deleted"): 1}),
    "fdb-changed": (
        "bridge",
        "fdb replace {mac} dev {dev} dst {end} self permanent",
        {("fdb", "changed"): 1},
    ),
    "fdb-added": (
        "bridge",
        "fdb add 02:aa:aa:aa:aa:aa dev {dev} dst {end} self permanent",
        {("fdb", "added"): 1},
    ),
    "fdb-second-remote": (
        "bridge",
        "fdb append {mac} dev {dev} dst {end} self permanent",
        {("fdb", "changed"): 1},
    ),
}


def _fill(text: str, family: int) -> str:
    return text.format(
        net=subnet(family, 3),
        gw=address(family, 3),
        mac=mac(family, 3),
        dev=DEVICE[family],
        end=endpoint(family, 99),
        stray=subnet(family, 77),
        other=address(family, 77),
        # IPv6 keeps routes of different metrics side by side; ours has the default one.
        v6="metric 1024" if family == 6 else "",
    )


@pytest.mark.parametrize("what", ENTRIES)
def test_one_entry(keep: Callable[..., Kept], family: int, what: str) -> None:
    """Repaired alone: nothing is read, nothing else is written."""
    kept = keep(4, 6)
    program, words, told = ENTRIES[what]
    words = _fill(words, family)
    if program == "ip":
        kept.host.ip(f"-{family} {words}")
    else:
        kept.host.bridge(words)

    made = settle(kept.watch)

    assert counts(made) == told
    assert kept.clean()
    [named] = [drift for repair in made for drift in repair.drifts()]
    assert (named.family, named.table, named.change) == (family, *next(iter(told)))
    if what != "fdb-second-remote":
        assert [repair.report for repair in made] == [None]
        assert named.entry is not None


def test_a_nexthop_object_and_its_route(keep: Callable[..., Kept]) -> None:
    kept = keep(4)
    kept.host.ip(f"nexthop del id {nexthop_id(3)}")

    made = settle(kept.watch)

    assert counts(made) == {("nexthop", "deleted"): 1, ("route", "deleted"): 1}
    assert [drift.entry for repair in made for drift in repair.drifts()] == [
        Nexthop(nexthop_id(3), address(4, 3), ifindex(kept.host, DEVICE[4])),
        Route(subnet(4, 3), nexthop=nexthop_id(3)),
    ]
    assert kept.clean()


def test_a_nexthop_object_that_was_replaced(keep: Callable[..., Kept]) -> None:
    kept = keep(4)
    kept.host.ip(
        f"nexthop replace id {nexthop_id(3)} via {address(4, 9)} dev {DEVICE[4]} onlink proto 138"
    )

    assert counts(settle(kept.watch)) == {("nexthop", "changed"): 1}
    assert kept.clean()


def test_a_nexthop_object_that_went_and_came_back(keep: Callable[..., Kept]) -> None:
    """Between two looks: the object is as it was, its route is not, and no event told so."""
    kept = keep(4)
    kept.host.ip(f"nexthop del id {nexthop_id(3)}")
    kept.host.ip(
        f"nexthop add id {nexthop_id(3)} via {address(4, 3)} dev {DEVICE[4]} onlink proto 138"
    )

    assert counts(settle(kept.watch)) == {("route", "deleted"): 1}
    assert kept.clean()


DEVICES = {
    "down": ["link set {dev} down"],
    "flap": ["link set {dev} down", "link set {dev} up"],
    "mac": ["link set {dev} address 02:aa:aa:aa:aa:aa"],
    "mtu": ["link set {dev} mtu 1290"],
    "rename": ["link set {dev} name other7"],
    "rename-and-down": ["link set {dev} name other7", "link set other7 down"],
    "learning": ["link set {dev} type vxlan learning"],
    "deleted": ["link del {dev}"],
    "address": ["address del {gw}/{bits} dev {dev}"],
    "flush": ["neigh flush dev {dev} nud permanent", "nexthop flush dev {dev}"],
    "flush-all": ["address flush dev {dev}"],
}


@pytest.mark.parametrize("what", DEVICES)
def test_the_device(keep: Callable[..., Kept], family: int, what: str) -> None:
    """Whatever is lost with it is back, and the other family has not been written to."""
    kept = keep(4, 6)
    other = 10 - family
    untouched = ifindex(kept.host, DEVICE[other])
    gone = what == "deleted"
    for words in DEVICES[what]:
        words = words.format(
            dev=DEVICE[family], gw=address(family, 0), bits=32 if family == 4 else 128
        )
        kept.host.ip(f"-{family} {words}")
    with Monitor(kept.host) as monitor:
        made = settle(kept.watch)
        assert untouched not in {event.device for event in monitor.events()}

    assert made, "it was noticed"
    assert observed(kept.host, family) == expected(kept.leases[1:], family)
    with plane(kept.host) as fresh:
        assert fresh.plan(kept.leases).is_empty
    if not gone:
        assert kept.clean()
    if what in ("mac", "mtu", "rename", "learning", "address"):
        assert counts(made)["device", "changed"] == 1
    settle(kept.watch)
    assert not kept.watch.pending


@pytest.mark.parametrize("words", ["down", "mtu 1400", "name up0"])
def test_the_external_interface(keep: Callable[..., Kept], words: str) -> None:
    """What the tunnel hangs on: a change makes us look, and what is lost comes back."""
    kept = keep(4, 6)
    kept.host.ip(f"link set eth0 {words}")
    if words == "down":
        settle(kept.watch)
        kept.host.ip("link set eth0 up")
        kept.host.ip("address replace 2001:db8::1/64 dev eth0 nodad")
    elif words.startswith("name"):
        kept.host.ip("link set up0 name eth0")
    settle(kept.watch)

    for number in (4, 6):
        assert observed(kept.host, number) == expected(kept.leases[1:], number)
    with plane(kept.host) as fresh:
        assert fresh.plan(kept.leases).is_empty


# ---- without the tunnel -----------------------------------------------------------------

PLAIN = {
    "deleted": ("route del {net}", "deleted"),
    "changed": ("route replace {net} via {wrong} dev eth0 proto 138 {v6}", "changed"),
    "added": ("route add {stray} via {wrong} dev eth0 proto 138", "added"),
}


@pytest.mark.parametrize("what", PLAIN)
@pytest.mark.parametrize("backend", [HOST_GW, DIRECT], ids=["host-gw", "DirectRouting"])
def test_a_direct_route(
    keep: Callable[..., Kept], family: int, backend: dict[str, Any], what: str
) -> None:
    kept = keep(family, **backend)
    words, change = PLAIN[what]
    kept.host.ip(
        f"-{family} "
        + words.format(
            net=subnet(family, 3),
            wrong=near(family, 50),
            stray=subnet(family, 77),
            v6="metric 1024" if family == 6 else "",
        )
    )

    made = settle(kept.watch)

    assert counts(made) == {("route", change): 1}
    assert [repair.report for repair in made] == [None]
    assert kept.clean()


@pytest.mark.parametrize("backend", [HOST_GW, DIRECT], ids=["host-gw", "DirectRouting"])
def test_a_direct_nexthop(keep: Callable[..., Kept], backend: dict[str, Any]) -> None:
    kept = keep(4, **backend)
    kept.host.ip(f"nexthop del id {nexthop_id(3)}")

    made = settle(kept.watch)

    assert counts(made) == {("nexthop", "deleted"): 1, ("route", "deleted"): 1}
    assert kept.clean()


@pytest.mark.parametrize("backend", [HOST_GW, DIRECT], ids=["host-gw", "DirectRouting"])
def test_direct_routes_after_a_flap_of_their_interface(
    keep: Callable[..., Kept], family: int, backend: dict[str, Any]
) -> None:
    """Down takes all of them along, the IPv4 ones without a word."""
    kept = keep(family, **backend)
    kept.host.ip("link set eth0 down")
    kept.watch.read()
    kept.host.ip("link set eth0 up")
    kept.host.ip("address replace 2001:db8::1/64 dev eth0 nodad")
    settle(kept.watch)

    with DataPlane(kept.dp.config, iface="eth0", netns=kept.host.ns) as fresh:
        assert fresh.plan(kept.leases).is_empty


# ---- what is no drift --------------------------------------------------------------------


def test_our_own_writes_are_no_drift(keep: Callable[..., Kept], family: int) -> None:
    kept = keep(family)
    moved = peer(4, **{f"backend_{'v6_' if family == 6 else ''}data": peer(54).backend_v6_data})
    for added, removed in (
        ([peer(50)], [peer(3)]),
        ([peer(3), moved], [peer(50)]),
        ([peer(4)], []),
    ):
        kept.dp.update(added=added, removed=removed)
        assert not kept.watch.read()
    kept.dp.sync(kept.leases[:15])
    assert not kept.watch.read()
    kept.dp.sync(kept.leases)

    assert not kept.watch.read()
    assert kept.clean()


def test_foreign_churn_costs_nothing(keep: Callable[..., Kept], family: int) -> None:
    kept = keep(4, 6)
    stranger(kept.host, "other0")
    kept.rest()
    seen = kept.watch.seen
    where = "203.0.113.0/24" if family == 4 else "2001:db8:8::/64"
    near_by = "198.51.100.9" if family == 4 else "2001:db8:7::9"
    for _ in range(3):
        kept.host.ip(f"-{family} route add {where} dev other0 proto static")
        kept.host.ip(f"-{family} route del {where} dev other0")
        kept.host.ip(f"neigh add {near_by} lladdr 02:aa:aa:aa:aa:aa dev other0")
        kept.host.ip(f"neigh del {near_by} dev other0")
        kept.host.ip("link set other0 mtu 1400")
        kept.host.ip("link set other0 mtu 1500")

    assert not kept.watch.read()
    assert kept.watch.seen == seen


def test_a_foreign_route_in_our_place_is_a_conflict_until_it_goes(
    keep: Callable[..., Kept], family: int
) -> None:
    kept = keep(family)
    stranger(kept.host, "other0")
    metric = "metric 1024" if family == 6 else ""
    kept.host.ip(f"-{family} route del {subnet(family, 3)}")
    kept.host.ip(f"-{family} route add {subnet(family, 3)} dev other0 proto static {metric}")

    made = settle(kept.watch)

    report = made[-1].report
    assert report is not None
    assert places(report.conflicts) == [subnet(family, 3)]
    assert counts(made) == {}, "nothing could be repaired"
    kept.host.ip(f"-{family} route del {subnet(family, 3)} dev other0")
    assert counts(settle(kept.watch)) == {("route", "deleted"): 1}
    assert observed(kept.host, family) == expected(kept.leases[1:], family)


# ---- more than one thing at a time ------------------------------------------------------


def test_one_family_is_read_again_and_the_other_mended(keep: Callable[..., Kept]) -> None:
    """A device of one family and an entry of the other, in one and the same reading."""
    kept = keep(4, 6)
    kept.host.ip(f"route del {subnet(4, 3)}")
    kept.host.ip(f"link del {DEVICE[6]}")
    settle(kept.watch)
    for number in (4, 6):
        assert observed(kept.host, number) == expected(kept.leases[1:], number)

    kept.host.ip(f"-6 route del {subnet(6, 3)}")
    kept.host.ip(f"link del {DEVICE[4]}")
    settle(kept.watch)
    for number in (4, 6):
        assert observed(kept.host, number) == expected(kept.leases[1:], number)


def test_many_entries_are_one_reading(host: Any, family: int) -> None:
    """From some hundreds on, reading the table is cheaper than the entries one by one."""
    leases = [lease_of(host), *peers(range(1, 701))]
    kept = Kept(host, plane(host, family), leases)
    try:
        host.ip(f"neigh flush dev {DEVICE[family]} nud permanent")
        made = settle(kept.watch)
        assert counts(made) == {("neighbour", "deleted"): 700}
        assert [repair.report is None for repair in made] == [False]
        drifts = [drift for repair in made for drift in repair.drifts()]
        assert len(drifts) == 700
        named = [drift for drift in drifts if drift.entry is not None]
        assert len({drift.entry for drift in named}) == len(named) == 256
        assert {drift[:3] for drift in named} == {(family, "neighbour", "deleted")}
        assert {*drifts} - {*named} == {Drift(0, "neighbour", "deleted", None)}
        assert observed(host, family) == expected(leases[1:], family)
    finally:
        kept.close()


def test_an_overrun_is_one_reading(host: Any, family: int) -> None:
    """Events were lost: anything may have happened, and what did is found."""
    leases = [lease_of(host), *peers(NUMBERS)]
    with plane(host, family) as dp, Watch(dp, rcvbuf=4096) as watch:
        dp.sync(leases, progress=watch.progress)
        watch.remember()
        settle(watch)
        before, storms = watch.overruns, 0
        while watch.overruns == before:
            storms += 1
            assert storms < 50
            host.ip(f"neigh flush dev {DEVICE[family]} nud permanent")
            host.ip(f"-{family} nexthop flush dev {DEVICE[family]}")
            watch.read()
        assert watch.dirty == {family}
        made = settle(watch)

        assert [repair.report is not None for repair in made] == [True]
        assert observed(host, family) == expected(leases[1:], family)


def test_what_happens_during_a_sync_is_not_overlooked(host: Any) -> None:
    """The sync has written IPv4 already, and works on IPv6, when somebody deletes a route."""
    leases = [lease_of(host), *peers(NUMBERS)]
    with plane(host) as dp, Watch(dp) as watch:
        dp.sync(leases[:10])
        watch.remember()
        settle(watch)
        calls = 0

        def progress(done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if dp.known[6] is not old and not deleted:
                host.ip(f"route del {subnet(4, 3)}")
                deleted.append(calls)
            watch.progress(done, total)

        old, deleted = dp.known[6], list[int]()
        dp.sync(leases, progress=progress)
        watch.remember()
        assert deleted
        settle(watch)

        for number in (4, 6):
            assert observed(host, number) == expected(leases[1:], number)


def test_what_happens_before_a_table_is_made_anew_is_not_overlooked(host: Any) -> None:
    """As above, but IPv4's drift is known to the watch when IPv6's tables are exchanged."""
    leases = [lease_of(host), *peers(NUMBERS)]
    with plane(host) as dp, Watch(dp) as watch:
        dp.sync(leases[:10])
        watch.remember()
        settle(watch)
        deleted: list[int] = []
        old = dp.known

        def progress(done: int, total: int) -> None:
            if dp.known[4] is not four and dp.known[6] is six and done == total:
                host.ip(f"route del {subnet(4, 3)}")
                deleted.append(done)
            watch.progress(done, total)

        four, six = old[4], old[6]
        dp.sync(leases, progress=progress)
        watch.remember()
        assert deleted
        settle(watch)

        for number in (4, 6):
            assert observed(host, number) == expected(leases[1:], number)


def test_a_watch_on_devices_that_were_there_already(host: Any, family: int) -> None:
    """A new process: until its first sync it did not know what to listen for. What happens
    between its look at the tables and that moment is found all the same."""
    leases = [lease_of(host), *peers(NUMBERS)]
    with plane(host, family) as dp:
        dp.sync(leases)
    with plane(host, family) as dp:
        done: list[int] = []

        def meanwhile() -> None:
            if not done:
                done.append(1)
                host.ip(f"-{family} route del {subnet(family, 3)}")

        dp.on_written.append(meanwhile)
        with Watch(dp) as watch:
            dp.sync(leases, progress=watch.progress)
            watch.remember()
            assert done
            settle(watch)

            assert observed(host, family) == expected(leases[1:], family)


@pytest.mark.parametrize("words", ["mtu 1290", "down", "address 02:aa:aa:aa:aa:aa"])
def test_what_happens_before_a_device_is_remembered_is_not_overlooked(
    keep: Callable[..., Kept], family: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was in order when it was read; when the device is looked at to be remembered, it
    is no longer as it should be, and the event still to come says nothing new."""
    kept, done = keep(family), list[str]()
    look = kept.watch._read_devices

    def late() -> Any:
        if not done:
            done.append(words)
            kept.host.ip(f"link set {DEVICE[family]} {words}")
        return look()

    monkeypatch.setattr(kept.watch, "_read_devices", late)
    kept.watch.mark_dirty()
    settle(kept.watch)

    assert done
    assert kept.clean()


def test_other_threads_may_use_the_data_plane(host: Any) -> None:
    """One thread watches and repairs; another changes the cluster; a third one meddles."""
    leases = [lease_of(host), *peers(range(1, 60))]
    with plane(host) as dp, Watch(dp) as watch:
        dp.sync(leases)
        watch.remember()
        failures: list[BaseException] = []

        def change() -> None:
            try:
                for turn in range(60):
                    dp.update(added=peers(range(100, 160)))
                    dp.update(removed=peers(range(100 + turn, 160)))
                dp.update(removed=peers(range(100, 160)))
            except BaseException as error:
                failures.append(error)

        def meddle() -> None:
            lines = [
                f"{'-6 ' if n % 2 else ''}route del {subnet(6 if n % 2 else 4, n)}"
                for n in range(1, 60)
            ]
            for line in lines:
                host.ip(line)

        threads = [threading.Thread(target=target) for target in (change, meddle)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if watch.read():
                watch.repair()
        settle(watch)

        assert failures == []
        for number in (4, 6):
            assert observed(host, number) == expected(leases[1:], number)
