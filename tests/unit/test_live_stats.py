"""stats --watch on a terminal: the busiest first, drops, and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flannel_dp.look.live_stats import watch_stats
from flannel_dp.look.stats import DroppedView, FamilyStats, Flow, PeerStats, Stats
from tests.lib.stand_ins import Screen


def peer(family: int, number: int, rate: float, drops: tuple[DroppedView, ...] = ()) -> PeerStats:
    subnet = f"10.244.{number}.0/24" if family == 4 else f"fd00:10:244:{number}::/64"
    flow = Flow(1, 100, None, rate / 100, rate)
    return PeerStats(subnet, f"02:00:00:00:00:{number:02x}", "", "", flow, flow, drops)


def family(number: int, *peers: PeerStats, **more: Any) -> FamilyStats:
    return FamilyStats(number, f"flannel-v{number}", "", peers, {}, {}, **more)


def frames_of(found: Stats, screen: Screen, turns: int) -> Iterator[list[tuple[str, str]]]:
    left = iter(range(turns))
    watch_stats(lambda: found, lambda _: next(left, None) is None, interval=0.0, terminal=screen)
    return iter(screen.drawn[1:])  # the first says that it reads


def test_the_busiest_come_first_and_drops_are_told_below() -> None:
    lost = (DroppedView("NETFILTER_DROP", "sent", 3),)
    found = Stats(
        (
            family(4, peer(4, 1, 10.0), peer(4, 2, 0.0, lost), peer(4, 3, 1e6), direct=2),
            family(6, peer(6, 1, 1e3), drops=(DroppedView("NO_TX_TARGET", "", 4),)),
        ),
        1.0,
    )

    frame = [*frames_of(found, Screen(80, 12), 1)][-1]

    assert len(frame) == 12
    assert [text.split()[0] for text, _ in frame[3:7]] == [
        "10.244.3.0/24",
        "fd00:10:244:1::/64",
        "10.244.1.0/24",
        "10.244.2.0/24",
    ]
    assert frame[0] == ("IPv4 flannel-v4: 3 peers, 2 direct (not counted)", "bold")
    assert frame[6][1] == "yellow"  # it has drops
    assert frame[-3:-1] == [
        ("dropped: 10.244.2.0/24 (sent): 3 NETFILTER_DROP", "yellow"),
        ("dropped: no peer: 4 NO_TX_TARGET", "yellow"),
    ]
    assert frame[-1][0].endswith("1-4 of 4")


def test_many_lines_of_drops_leave_room_for_peers() -> None:
    lost = tuple(DroppedView(f"REASON_{number}", "sent", 1) for number in range(40))
    found = Stats((family(4, *(peer(4, number, 1.0) for number in range(50)), drops=lost),), 1.0)

    frame = [*frames_of(found, Screen(80, 24), 1)][-1]

    assert len(frame) == 24
    assert frame[-2][0] == "... and 36 more lines of drops"
    assert frame[-1][0].endswith("1-15 of 50")


def test_keys_filter_scroll_and_end_it() -> None:
    found = Stats((family(4, *(peer(4, number, 1.0) for number in range(50))),), 1.0)
    screen = Screen(80, 13, [["j"], [*"/.49", "enter"], ["q"]])

    frames = [*frames_of(found, screen, 1000)]

    assert [frame[-1][0].rpartition("  ")[2] for frame in frames[:2]] == [
        "2-11 of 50",
        "1-1 of 1 (50 in all)",
    ]
    assert len(frames) == 3  # and not a thousand


def test_a_device_that_is_not_counted_says_so() -> None:
    found = Stats((FamilyStats(4, "flannel.1", "not counted: \x1b[2J"),), 1.0)

    frame = [*frames_of(found, Screen(80, 10), 1)][-1]

    assert frame[0] == ("IPv4 flannel.1: not counted: \\x1b[2J", "yellow")
    assert frame[-1][0].endswith("none")
