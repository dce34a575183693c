"""What the kernel announces of changes, compared with tables by content, and the socket."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp._core import ADD, REMOVE, REPLACE, Events, Table, Watched
from flannel_dp.errors import KernelError, Overrun
from flannel_dp.tables.entries import EventFilter, Neighbour, Route, Scope
from tests.lib.core_overlay import Overlay
from tests.lib.kernel import stranger
from tests.lib.kernel_events import (
    OF_DEVICES,
    RTM_DELLINK,
    RTM_NEWROUTE,
    Followed,
    Hand,
    delete,
    hear,
    listen,
    operations,
)
from tests.lib.leases import address, endpoint, mac, subnet

#: IPv6 routes carry their gateway: there are no nexthop objects.
CASES = [
    pytest.param(family, kind, id=f"ipv{family}-{kind}")
    for family in (4, 6)
    for kind in ("neighbour", "fdb", "nexthop", "route")
    if (family, kind) != (6, "nexthop")
]


@pytest.fixture
def follow(host: Any) -> Iterator[Callable[..., Followed]]:
    made: list[Followed] = []

    def make(family: int, **changes: Any) -> Followed:
        made.append(Followed(host, family, **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def change(overlay: Overlay, kind: str, number: int) -> None:
    family, device = overlay.family, overlay.device
    if kind == "fdb":
        overlay.bridge(
            f"fdb replace {mac(family, number)} dst {endpoint(family, 99)} dev {device} "
            "self permanent"
        )
    else:
        overlay.ip(
            {
                "neighbour": f"neigh replace {address(family, number)} lladdr {mac(family, 99)} "
                f"dev {device} nud permanent",
                "nexthop": f"nexthop replace id {number} via {address(family, 99)} "
                f"dev {device} onlink proto 138",
                "route": f"route replace {subnet(family, number)} dev {device}",
            }[kind]
        )


def stray(overlay: Overlay, kind: str, number: int) -> None:
    """One more entry that is taken for one of ours: on our device, or with our mark."""
    family, device = overlay.family, overlay.device
    if kind == "fdb":
        overlay.bridge(
            f"fdb add {mac(family, number)} dev {device} dst {endpoint(family, 9)} self permanent"
        )
    else:
        overlay.ip(
            {
                "neighbour": f"neigh add {address(family, number)} lladdr {mac(family, 9)} "
                f"dev {device}",
                "nexthop": f"nexthop add id {number} dev {device} proto 138",
                "route": f"route add {subnet(family, number)} dev {device}",
            }[kind]
        )


# ---- one event each -----------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_deleted_entry(follow: Callable[..., Followed], family: int, kind: str) -> None:
    followed = follow(family)
    delete(followed.overlay, kind, 3)
    count, messages = followed.read()

    assert count >= 1
    assert {one[0] for one in messages} <= OF_DEVICES
    assert followed.touched() == {kind: 1}
    assert followed.take(kind) == [(ADD, followed.entry(kind, 3), None)] == followed.truth(kind)
    assert followed.touched() == {}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_changed_entry(follow: Callable[..., Followed], family: int, kind: str) -> None:
    followed = follow(family)
    change(followed.overlay, kind, 3)
    followed.read()

    assert followed.touched() == {kind: 1}
    [(op, new, old)] = found = followed.take(kind)
    assert (op, new) == (REPLACE, followed.entry(kind, 3))
    assert old != new
    assert found == followed.truth(kind)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_stray_entry(follow: Callable[..., Followed], family: int, kind: str) -> None:
    followed = follow(family)
    stray(followed.overlay, kind, 50)
    followed.read()

    assert followed.touched() == {kind: 1}
    [(op, _, _)] = found = followed.take(kind)
    assert op == REMOVE
    assert found == followed.truth(kind)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_was_undone_touches_nothing(
    follow: Callable[..., Followed], family: int, kind: str
) -> None:
    """By content, whoever wrote: here somebody with another port puts it back."""
    followed = follow(family)
    stray(followed.overlay, kind, 50)
    change(followed.overlay, kind, 3)
    followed.read()
    assert followed.touched() == {kind: 2}

    delete(followed.overlay, kind, 50)
    with Hand(followed.host) as hand:
        hand.write(followed.entry(kind, 3), REPLACE)
    seen = followed.tables[kind].events
    followed.read()

    assert followed.touched() == {}
    assert followed.tables[kind].events >= seen + 2
    assert followed.truth(kind) == []


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_forget_and_touch(follow: Callable[..., Followed], family: int, kind: str) -> None:
    view = (followed := follow(family)).tables[kind]
    delete(followed.overlay, kind, 3)
    followed.read()
    view.forget()
    assert view.touched == 0

    view.touch(followed.entry(kind, 4))
    assert view.touched == 1
    assert operations(view.take()) == [(ADD, followed.entry(kind, 4), None)]


def test_a_route_of_somebody_else_in_our_place_is_a_conflict(followed: Followed) -> None:
    """It is inside the network, so it is told of; it is on another device, so it is not ours."""
    family = followed.family
    stranger(followed.host, "other0")
    followed.overlay.ip(f"route del {subnet(family, 3)}")
    followed.overlay.ip(f"route add {subnet(family, 3)} dev other0 proto static")
    followed.read()

    assert followed.touched() == {"route": 1}
    diff = followed.tables["route"].take()
    assert len(diff) == 0
    [(wanted, held)] = diff.conflicts()
    assert wanted == followed.entry("route", 3)
    assert isinstance(held, Route)
    assert held.protocol == 4


def test_a_route_of_somebody_else_beside_ours_is_nothing(followed: Followed) -> None:
    stranger(followed.host, "other0")
    beside = listen(followed.host, followed.filter)
    try:
        followed.overlay.ip(f"route add {subnet(followed.family, 77)} dev other0")
        followed.read()
        assert RTM_NEWROUTE in {event.kind for event in hear(beside)}, "it was told of"
    finally:
        beside.close()

    assert followed.touched() == {}


# ---- the nexthop's routes -------------------------------------------------------------


def test_routes_whose_nexthop_goes_are_orphans(follow: Callable[..., Followed]) -> None:
    """The kernel removes them with the object and tells of the object only."""
    followed = follow(4)
    for number in (3, 5):
        delete(followed.overlay, "nexthop", number)
    followed.read()
    routes, nexthops = followed.tables["route"], followed.tables["nexthop"]
    assert followed.touched() == {"nexthop": 2}

    routes.orphan(nexthops)

    assert routes.touched == 2
    assert operations(routes.take()) == followed.truth("route")
    assert len(followed.truth("route")) == 2


def test_a_nexthop_that_changed_orphans_nothing(follow: Callable[..., Followed]) -> None:
    followed = follow(4)
    change(followed.overlay, "nexthop", 3)
    stray(followed.overlay, "nexthop", 60)
    followed.read()
    followed.tables["route"].orphan(followed.tables["nexthop"])

    assert followed.touched() == {"nexthop": 2}


def test_what_an_event_said_of_an_orphan_counts(follow: Callable[..., Followed]) -> None:
    followed = follow(4)
    delete(followed.overlay, "nexthop", 3)
    followed.overlay.ip(f"route add {subnet(4, 3)} dev {followed.overlay.device}")
    followed.read()
    followed.tables["route"].orphan(followed.tables["nexthop"])

    [(op, _, old)] = followed.take("route")
    assert op == REPLACE
    assert isinstance(old, Route)
    assert old.nexthop == 0


def test_only_routes_are_orphaned_and_only_by_nexthops(follow: Callable[..., Followed]) -> None:
    tables = follow(4).tables
    with pytest.raises(ValueError, match="orphaned by nexthops"):
        tables["fdb"].orphan(tables["nexthop"])
    with pytest.raises(ValueError, match="orphaned by nexthops"):
        tables["route"].orphan(tables["fdb"])


# ---- the socket ----------------------------------------------------------------------


class Told:
    """An event socket seen from outside."""

    def __init__(self, events: Events) -> None:
        self._fd = events.fileno()
        with socket.socket(fileno=os.dup(self._fd)) as same:
            self.port: int = same.getsockname()[0]

    def readable(self) -> bool:
        return bool(select.select([self._fd], [], [], 5.0)[0])


def test_a_full_queue_is_an_overrun_and_then_it_goes_on(followed: Followed) -> None:
    overlay = followed.overlay
    small = listen(followed.host, followed.filter, rcvbuf=8192)
    try:
        with Hand(followed.host) as hand:
            for number in range(500):
                hand.write(
                    Neighbour(
                        overlay.index, address(followed.family, 100), mac(overlay.family, number)
                    ),
                    ADD,
                )
        with pytest.raises(Overrun) as caught:
            small.read(followed.tables.values())
        assert "ip" not in caught.value.operation
        assert caught.value.hint
        small.read(followed.tables.values())
        delete(overlay, "fdb", 3)
        for view in followed.tables.values():
            view.forget()
        small.read(followed.tables.values())
        assert followed.touched() == {"fdb": 1}
    finally:
        small.close()
    assert followed.read()[0] >= 500, "the larger socket has them all"


@pytest.mark.parametrize("kind", ["route", "link"])
def test_only_the_kernel_is_believed(followed: Followed, kind: str) -> None:
    """Root may write to our port; that our entry, or the device, were gone is not taken in."""
    forged = struct.pack(
        "=IHHIIBxHiII", 32, RTM_DELLINK, 0, 0, 0, 0, 0, followed.overlay.index, 0, 0
    )
    if kind == "route":
        table = next(table for table, _ in followed.wanted if table.kind == "route")
        forged = table.encode(2, REMOVE, 0)
    told = Told(followed.events)
    with Hand(followed.host) as hand:
        hand.send_to(told.port, forged)
        assert told.readable(), "it did arrive"
        _, messages = followed.read()
        assert RTM_DELLINK not in {one[0] for one in messages}
        assert followed.touched() == {}

        hand.write(followed.entry("fdb", 3), REMOVE)
        followed.read()
        assert followed.touched() == {"fdb": 1}, "the kernel still is"


def test_a_part_may_be_read(followed: Followed) -> None:
    for number in (1, 2, 3):
        delete(followed.overlay, "fdb", number)

    assert followed.events.read(followed.tables.values(), most=2)[0] == 2
    assert followed.touched() == {"fdb": 2}
    followed.read()
    assert followed.touched() == {"fdb": 3}


def test_limits_and_wrong_use(host: Any) -> None:
    with pytest.raises(ValueError, match="8 devices"):
        Events(filter=EventFilter(tunnels=tuple(range(1, 10))))
    with pytest.raises(ValueError, match="4 ports"):
        Events(filter=EventFilter(ports=(1, 2, 3, 4, 5)))
    with pytest.raises(ValueError, match="not a prefix"):
        Events(filter=EventFilter(networks=("10.0.0.0.0/8",)))
    with pytest.raises(ValueError, match="scope of fdb"):
        Watched(Table("route"), [Scope("fdb", 7)])
    full = EventFilter(
        tunnels=tuple(range(1, 9)),
        uplinks=tuple(range(11, 19)),
        ports=(1, 2, 3, 4),
        networks=("10.244.1.0/32", "fd00::1/128"),
    )
    events = listen(host, full)
    with pytest.raises(ValueError, match="too many tables"):
        events.read([Watched(Table("route"), [])] * 17)
    events.close()
    events.close()
    with pytest.raises(ValueError, match="closed"):
        events.fileno()
    with pytest.raises(ValueError, match="closed"):
        events.read([])
    with open(os.devnull) as file, pytest.raises(KernelError):
        Events(file.fileno())


# ---- nexthop objects named alone -----------------------------------------------------


def test_routes_that_name_their_nexthop_only(host: Any, follow: Callable[..., Followed]) -> None:
    """nexthop_compat_mode=0: of a route on an object, the kernel tells the id and no device."""
    host.sysctl("ipv4/nexthop_compat_mode", 0)
    followed = follow(4)
    overlay = followed.overlay
    delete(overlay, "route", 3)
    change(overlay, "route", 4)
    overlay.ip(f"route add {subnet(4, 60)} nhid 5 proto 138")
    followed.read()

    assert followed.touched() == {"route": 3}
    assert sorted(op for op, _, _ in followed.take("route")) == [ADD, REPLACE, REMOVE]

    stranger(host, "other0")
    overlay.ip("nexthop add id 900 dev other0")
    overlay.ip(f"route add {subnet(4, 61)} nhid 900 proto static")
    overlay.ip(f"route add {subnet(4, 5)} nhid 900 proto static metric 50")
    assert followed.read()[0] >= 2
    assert followed.touched() == {}, "somebody else's, though on an object"

    overlay.ip(f"route replace {subnet(4, 6)} nhid 900 proto static")
    followed.read()
    assert len(followed.tables["route"].take().conflicts()) == 1
