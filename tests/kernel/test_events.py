"""What the kernel tells of changes, and what it is not asked to tell: the filter in the
kernel, and the comparison of events with tables, by content."""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import starmap
from typing import Any

import pytest

from flannel_dp._core import ADD, REMOVE, REPLACE, Events, Table, Watched
from flannel_dp.errors import KernelError, Overrun
from flannel_dp.tables.entries import EventFilter, Neighbour, Route, Scope
from tests.lib.core_overlay import Overlay
from tests.lib.hosts import run
from tests.lib.kernel import ifindex, stranger
from tests.lib.kernel_events import (
    OF_DEVICES,
    PEERS,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEXTHOP,
    RTM_NEWROUTE,
    Followed,
    Hand,
    Heard,
    hear,
    listen,
    operations,
)
from tests.lib.leases import address, endpoint, mac, subnet
from tests.lib.waiting import wait_until

#: IPv6 routes carry their gateway: there are no nexthop objects.
CASES = [
    pytest.param(family, kind, id=f"ipv{family}-{kind}")
    for family in (4, 6)
    for kind in ("neighbour", "fdb", "nexthop", "route")
    if (family, kind) != (6, "nexthop")
]


@pytest.fixture
def followed(host: Any, family: int) -> Iterator[Followed]:
    made = Followed(host, family)
    yield made
    made.close()


@pytest.fixture
def follow(host: Any) -> Iterator[Callable[..., Followed]]:
    made: list[Followed] = []

    def make(family: int, **changes: Any) -> Followed:
        made.append(Followed(host, family, **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def delete(overlay: Overlay, kind: str, number: int) -> None:
    """As somebody at a shell would."""
    family, device = overlay.family, overlay.device
    if kind == "fdb":
        overlay.bridge(f"fdb del {mac(family, number)} dev {device}")
    else:
        overlay.ip(
            {
                "neighbour": f"neigh del {address(family, number)} dev {device}",
                "nexthop": f"nexthop del id {number}",
                "route": f"route del {subnet(family, number)}",
            }[kind]
        )


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
    assert {kind for kind, _ in messages} <= OF_DEVICES
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


# ---- the filter ----------------------------------------------------------------------


def foreign_churn(host: Any, family: int) -> None:
    """Everything that others do beside us: other devices, tables, protocols and networks."""
    near, far = ("198.51.100", "203.0.113") if family == 4 else ("2001:db8:7:", "2001:db8:8:")
    bits = 32 if family == 4 else 128
    add = [f"neigh add {near}{'.' if family == 4 else ':'}9 lladdr {mac(family, 9)} dev other0"]
    for number in range(1, 40):
        one = f"{far}.{number}/{bits}" if family == 4 else f"{far}:{number:x}/{bits}"
        protocol = (3, 4, 186, 137)[number % 4]
        add.append(f"route add {one} dev other0 proto {protocol}")
        add.append(f"route add {one} dev other0 proto {protocol} table 100")
    add += [
        f"route add {address(family, 200)}/{bits} dev other0 proto 138 table 100",
        f"nexthop add id 77 via {near}{'.' if family == 4 else ':'}2 dev other0 onlink proto 186",
        "nexthop add id 0x60000001 dev other0",
        "link set other0 mtu 1400",
        "link set other1 down",
        "link set other1 up",
        f"address add {near}{'.' if family == 4 else ':'}1/{bits} dev other1",
    ]
    undo = [line.replace(" add ", " del ", 1) for line in reversed(add) if " add " in line]
    undo = [" ".join(line.split()[:4]) if "nexthop" in line else line for line in undo]
    undo = [re.sub(r" proto \d+", "", line) for line in undo]
    run("ip", f"-{family}", "-n", host.ns, "-batch", "-", stdin="\n".join([*add, *undo]) + "\n")
    host.bridge(f"fdb add {mac(family, 9)} dev vx9 dst {endpoint(family, 9)} self permanent")
    host.bridge(f"fdb del {mac(family, 9)} dev vx9")


def strangers(host: Any, overlay: Overlay) -> None:
    for name in ("other0", "other1"):
        stranger(host, name)
    overlay.add_device("vx9", 9)


def test_foreign_churn_is_not_let_through(followed: Followed) -> None:
    strangers(followed.host, followed.overlay)
    followed.read()
    foreign_churn(followed.host, followed.family)

    ours = {followed.host.ifindex, followed.overlay.index}
    assert [event for event in followed.hear() if event.device not in ours] == []


def test_the_same_churn_without_a_filter(followed: Followed) -> None:
    """What the test above relies on: there is plenty to be told of."""
    strangers(followed.host, followed.overlay)
    every = {int(link["ifindex"]) for link in followed.host.ip_json("link show")}
    loose = EventFilter(
        tunnels=tuple(sorted(every))[:8],
        networks=("203.0.113.0/24", "2001:db8:8::/48"),
        every_link=True,
    )
    with_all = listen(followed.host, loose)
    try:
        foreign_churn(followed.host, followed.family)
        ours = {followed.host.ifindex, followed.overlay.index}
        heard = [event for event in hear(with_all) if event.device not in ours]
        assert len(heard) > 80
        assert {RTM_NEWLINK, RTM_NEWADDR, RTM_DELADDR} <= {event.kind for event in heard}
    finally:
        with_all.close()


def test_routes_into_the_network_are_let_through_and_others_are_not(followed: Followed) -> None:
    """The prefix is compared to its last bit, at lengths that are no multiple of 32, too."""
    family = followed.family
    stranger(followed.host, "other0")
    followed.read()
    lengths = (8, 13, 16, 20) if family == 4 else (20, 32, 45, 48, 61, 64)
    base = "10.244.3.0" if family == 4 else "fd00:10:244:3::"
    raw = int.from_bytes(socket.inet_pton(_af(family), base), "big")
    bits = 32 if family == 4 else 128
    for length in lengths:
        network = _text(family, raw >> (bits - length) << (bits - length), length)
        followed.events.set_filter(followed.filter._replace(networks=(network,)))
        inside = _text(family, raw, bits)
        outside = _text(family, raw ^ 1 << (bits - length), bits)
        wider = _text(family, raw >> (bits - length + 1) << (bits - length + 1), length - 1)
        for words, told in ((inside, True), (outside, False), (wider, False), (network, True)):
            followed.overlay.ip(f"route add {words} dev other0 metric 7")
            followed.overlay.ip(f"route del {words} dev other0 metric 7")
            wanted = [RTM_NEWROUTE, RTM_DELROUTE] if told else []
            assert _told_of_route(followed, words) == wanted, (network, words)


def test_addresses_in_the_network_are_let_through_and_others_are_not(followed: Followed) -> None:
    """On any device: one with a peer's address is in the peer's way. Removals are told as well."""
    family = followed.family
    stranger(followed.host, "other0")
    followed.host.sysctl("ipv6/conf/other0/accept_dad", 0)
    followed.read()
    base = "10.244.3.0" if family == 4 else "fd00:10:244:3::"
    raw = int.from_bytes(socket.inet_pton(_af(family), base), "big")
    bits = 32 if family == 4 else 128
    for length in (8, 13, 16, 20) if family == 4 else (20, 32, 45, 61, 64):
        network = _text(family, raw >> (bits - length) << (bits - length), length)
        followed.events.set_filter(followed.filter._replace(networks=(network,)))
        nodad = "nodad" if family == 6 else ""
        for value, told in ((raw, True), (raw ^ 1 << (bits - length), False)):
            for size in (bits, length - 1):  # the prefix may hold all of the network
                words = _text(family, value, size)
                followed.overlay.ip(f"address add {words} dev other0 {nodad} noprefixroute")
                followed.overlay.ip(f"address del {words} dev other0")
                wanted = {RTM_NEWADDR, RTM_DELADDR} if told else set()
                assert _told(followed, value.to_bytes(bits // 8, "big"), wanted) == wanted, words


def _told_of_route(followed: Followed, prefix: str) -> list[int]:
    """The kinds of the events about the route to a prefix, which the kernel sends before it
    answers the program that made the change."""
    network, _, length = prefix.partition("/")
    packed = socket.inet_pton(_af(followed.family), network)
    return [
        kind
        for kind, body in followed.hear()
        if kind in (RTM_NEWROUTE, RTM_DELROUTE) and body[1] == int(length) and packed in body
    ]


def _told(followed: Followed, packed: bytes, wanted: set[int]) -> set[int]:
    """The kinds of the events about an address, once those ``wanted`` have come. The kernel tells
    of an IPv6 address from its work queue: late or twice, so that older ones may be among them."""
    seen: set[int] = set()

    def all_seen() -> bool:
        seen.update(kind for kind, body in followed.read()[1] if packed in body)
        return seen >= wanted

    wait_until(all_seen)
    return seen


def _af(family: int) -> int:
    return socket.AF_INET if family == 4 else socket.AF_INET6


def _text(family: int, number: int, length: int) -> str:
    raw = number.to_bytes(4 if family == 4 else 16, "big")
    return f"{socket.inet_ntop(_af(family), raw)}/{length}"


def test_our_mark_is_let_through_wherever_it_is(followed: Followed) -> None:
    stranger(followed.host, "other0")
    followed.read()
    where = "203.0.113.0/24" if followed.family == 4 else "2001:db8:8::/64"
    followed.overlay.ip(f"route add {where} dev other0 proto 138")
    followed.overlay.ip("nexthop add id 0x50000007 dev other0 proto bgp")
    followed.overlay.ip("nexthop add id 0x60000007 dev other0 proto 138")

    other = ifindex(followed.host, "other0")
    told = [event.kind for event in followed.hear() if event.device == other]
    assert told == [RTM_NEWROUTE, RTM_NEWNEXTHOP, RTM_NEWNEXTHOP]


def test_what_our_own_ports_wrote_is_left_out(followed: Followed) -> None:
    """Where the kernel says who wrote; FDB entries and deleted neighbours carry no name,
    and are told apart by what they say."""
    overlay = followed.overlay
    with_echoes = listen(followed.host, followed.filter._replace(ports=()))
    try:
        overlay.sync(overlay.wanted(range(1, 20)))
        overlay.sync(overlay.wanted(PEERS))
        loud = len([event for event in hear(with_echoes) if event.kind not in OF_DEVICES])
        followed.read()
    finally:
        with_echoes.close()
    quiet = sum(view.events for view in followed.tables.values())

    assert followed.touched() == {}
    routes = 2 * 10 * (2 if followed.family == 4 else 1)
    assert loud - quiet >= routes + 10
    assert quiet >= 20 + 10
    assert followed.tables["route"].events == 0


def test_devices_and_addresses_are_handed_on(followed: Followed) -> None:
    host, family = followed.host, followed.family
    stranger(host, "other0")
    followed.read()
    host.ip("link set other0 mtu 1300")
    host.ip("link set eth0 mtu 1490")
    host.ip(f"link set {followed.overlay.device} mtu 1300")

    _, messages = followed.read()

    found = {(event.kind, event.device) for event in starmap(Heard, messages)}
    ours = {host.ifindex, followed.overlay.index}
    assert {(RTM_NEWLINK, device) for device in ours} <= found
    assert {device for _, device in found} == ours

    followed.events.set_filter(followed.filter._replace(every_link=True))
    extra = "198.51.100.1/32" if family == 4 else "2001:db8:7::1/128"
    host.ip(f"address add {extra} dev other0")
    host.ip(f"address del {extra} dev other0")
    host.ip("link del other0")
    _, messages = followed.read()
    assert {RTM_NEWADDR, RTM_DELADDR, RTM_DELLINK} <= {kind for kind, _ in messages}


def test_exchanging_the_filter_loses_nothing(followed: Followed) -> None:
    """A thousand changes by another process while the filter is exchanged again and again
    for one that lets them through just the same."""
    family, overlay = followed.family, followed.overlay
    lladdr, device = mac(family, 9), overlay.device
    lines = [
        f"neigh {word} {address(family, number % 50 + 100)} lladdr {lladdr} dev {device}"
        for number in range(500)
        for word in ("add", "del")
    ]
    batch = "\n".join(lines) + "\n"
    args = ("ip", "-n", followed.host.ns, "-batch", "-")
    writer = threading.Thread(target=lambda: run(*args, stdin=batch))
    others = followed.filter._replace(uplinks=(), ports=(1, 2, 3))
    writer.start()
    exchanged = 0
    while writer.is_alive():
        followed.events.set_filter(others if exchanged % 2 else followed.filter)
        exchanged += 1
    writer.join()
    followed.read()

    assert exchanged > 10
    told = followed.tables["neighbour"].events
    assert told == 1500, "an addition, and a deletion that is told twice, 500 times"
    assert followed.touched() == {}


def test_what_waits_already_is_not_filtered_again(followed: Followed) -> None:
    delete(followed.overlay, "neighbour", 3)
    followed.events.set_filter(EventFilter())
    followed.read()
    assert followed.touched() == {"neighbour": 1}

    delete(followed.overlay, "neighbour", 4)
    assert followed.read() == (0, [])


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
        assert RTM_DELLINK not in {kind for kind, _ in messages}
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
