"""What the filter in the kernel lets through, and what it leaves out."""

from __future__ import annotations

import re
import socket
import threading
from itertools import starmap
from typing import Any

from flannel_dp.tables.entries import EventFilter
from tests.lib.core_overlay import Overlay
from tests.lib.kernel import ifindex, stranger
from tests.lib.kernel_events import (
    OF_DEVICES,
    PEERS,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEXTHOP,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    Followed,
    Heard,
    delete,
    hear,
    listen,
)
from tests.lib.leases import address, endpoint, mac
from tests.lib.short import run
from tests.lib.waiting import wait_until

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
        f"route add {far}{'.' if family == 4 else ':'}99/{bits} dev other0 proto 138 table 100",
        f"route add {address(family, 200)}/{bits} dev other0 proto 138 table local",
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
    host.ip_batch(f"-{family}", *add, *undo)
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


def test_a_route_inside_the_network_is_let_through_whatever_its_table(followed: Followed) -> None:
    """A policy rule may have any table looked up before ours."""
    strangers(followed.host, followed.overlay)
    followed.read()
    prefix = f"{address(followed.family, 200)}/{32 if followed.family == 4 else 128}"
    for verb in ("add", "del"):
        followed.host.ip(f"-{followed.family} route {verb} {prefix} dev other0 table 100")

    assert [event.kind for event in followed.hear() if event.kind in (24, 25)] == [24, 25]


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


def test_rules_and_routes_of_other_tables_that_may_divert_pods_are_let_through(
    followed: Followed,
) -> None:
    """A policy rule may have such a table looked up before ours."""
    family, ip = followed.family, followed.overlay.ip
    stranger(followed.host, "other0")
    followed.read()
    half, inside = {4: ("0.0.0.0/1", "10.240.200.0/24"), 6: ("::/1", "fd00:10:c8::/64")}[family]
    quarter = {4: "64.0.0.0/2", 6: "4000::/2"}[family]
    for table in ("52", "5000"):
        for words, told in (("default", True), (half, True), (inside, True), (quarter, False)):
            ip(f"route add {words} dev other0 table {table}")
            ip(f"route del {words} dev other0 table {table}")
            heard = [event.kind for event in followed.hear() if event.kind not in OF_DEVICES]
            assert heard == ([RTM_NEWROUTE, RTM_DELROUTE] if told else []), (table, words)
    ip("rule add pref 5270 lookup 52")
    ip("rule del pref 5270")
    heard = [event.kind for event in followed.hear() if event.kind not in OF_DEVICES]
    assert heard == [RTM_NEWRULE, RTM_DELRULE]


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
                packed = value.to_bytes(bits // 8, "big")
                followed.overlay.ip(f"address add {words} dev other0 {nodad} noprefixroute")
                # One that goes before the kernel's work queue has announced it is not announced.
                seen = _told(followed, packed, {RTM_NEWADDR} if told else set())
                followed.overlay.ip(f"address del {words} dev other0")
                seen |= _told(followed, packed, {RTM_DELADDR} if told else set())
                assert seen == ({RTM_NEWADDR, RTM_DELADDR} if told else set()), words


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
        seen.update(kind for kind, body, _ in followed.read()[1] if packed in body)
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

    found = {(event.kind, event.device) for event in starmap(Heard, [one[:2] for one in messages])}
    ours = {host.ifindex, followed.overlay.index}
    assert {(RTM_NEWLINK, device) for device in ours} <= found
    assert {device for _, device in found} == ours

    followed.events.set_filter(followed.filter._replace(every_link=True))
    extra = "198.51.100.1/32" if family == 4 else "2001:db8:7::1/128"
    host.ip(f"address add {extra} dev other0")
    host.ip(f"address del {extra} dev other0")
    host.ip("link del other0")
    _, messages = followed.read()
    assert {RTM_NEWADDR, RTM_DELADDR, RTM_DELLINK} <= {one[0] for one in messages}


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
