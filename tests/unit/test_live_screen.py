"""show --watch on a terminal: what is on the screen, and keys, from scripted readings."""

from __future__ import annotations

import sys
from datetime import datetime

import pytest
from msgspec.structs import replace

from flannel_dp.cluster.rejections import Reason, Rejection
from flannel_dp.errors import DumpInterrupted
from flannel_dp.look.live_show import DriftLine, watch_view
from flannel_dp.look.lives import Life, Lives
from flannel_dp.look.show import FamilyView, Overview
from flannel_dp.resources.device.view import DeviceView
from flannel_dp.tables.entries import Neighbour
from tests.lib.live_script import (
    DEVICE,
    NEW_YEAR,
    Script,
    drawings_of,
    drift,
    frames_of,
    overview,
    peer,
)
from tests.lib.stand_ins import Screen, Terminal


def shown(frame: list[str]) -> list[int]:
    """The numbers of the peers on a screen."""
    return [int(line.split(".")[2]) for line in frame if line.startswith("10.244.")]


# ---- the screen --------------------------------------------------------------------


def test_the_screen() -> None:
    seen = overview(peer(7), peer(8, way="direct", mac=""), peer(9, state="no fdb", endpoint=""))
    what = "10.244.7.0/24 via 10.244.7.0 dev flannel.1"
    script = Script([seen], [1.0, [drift(what)], 1.0])

    frame = frames_of(script, source="/etc/leases.json", width=160, height=15)[-1]

    assert [line.rstrip() for line in frame] == [
        f"IPv4 10.244.0.0/16  {DEVICE}",
        "3 peers, 2 tunnel, 1 direct, 1 out of sync, source /etc/leases.json",
        "SUBNET         PUBLIC IP  MAC                PATH    STATE",
        "10.244.9.0/24  -          02:00:00:00:00:09  tunnel  no fdb",
        "10.244.7.0/24  192.0.2.7  02:00:00:00:00:07  tunnel  ok",
        "10.244.8.0/24  192.0.2.8  -                  direct  ok",
        *[""] * 4,
        f"{datetime.fromtimestamp(NEW_YEAR):%H:%M:%S} change    ipv4 route deleted {what}",
        *[""] * 2,
        "0.1 events/s, 0.1 repaired/s; 1 event, 1 repaired in all",
        "q quit  / filter  j k PgUp PgDn scroll  g G first, last" + "1-3 of 3".rjust(105),
    ]


def test_both_families_and_everything_that_is_wrong() -> None:
    four = overview(peer(7)).families[0]
    broken = DeviceView("flannel-v6.1", problem="there is no such device")
    six = FamilyView(6, "fd00:10:244::/48", broken, error="no IPv6 lease")
    stray = Neighbour(7, "10.244.3.0", "02:00:00:00:00:03")
    refused = tuple(Rejection(name, 4, Reason.BAD_MAC, "") for name in ("node3", "node4"))
    seen = Overview((replace(four, strays=(stray,)), six), refused, True, ("nft: drop",))

    frame = frames_of(Script([seen], [[]]))[-1]

    assert frame[1:4] == [
        "IPv6 fd00:10:244::/48  flannel-v6.1: there is no such device",
        "no IPv6 lease",
        "1 peer, 1 tunnel, 0 direct, 0 out of sync, 1 stray, 2 rejected, stopped by a firewall",
    ]


def test_the_problem_of_a_device_is_seen_on_a_narrow_terminal() -> None:
    down = replace(DEVICE, up=False, problem="it is down")

    frame = frames_of(Script([overview(device=down)], [[]]), width=60)[-1]

    assert frame[0] == "IPv4 10.244.0.0/16  flannel.1: it is down"


def test_host_gw_has_no_device() -> None:
    frame = frames_of(Script([overview(device=None)], [[]]))[-1]

    assert frame[0] == "IPv4 10.244.0.0/16  host-gw: direct IPv4 routes, no device"


@pytest.mark.parametrize("height", [10, 12, 24, 50])
@pytest.mark.parametrize("peers", [1, 7, 250])
@pytest.mark.parametrize("events", [0, 3, 25])
def test_it_fits_the_terminal(height: int, peers: int, events: int) -> None:
    seen = overview(*map(peer, range(peers)))
    happened = [drift(f"event {number}") for number in range(events)]

    frame = frames_of(Script([seen], [happened]), height=height, width=60)[-1]

    assert len(frame) == height
    assert all(len(line) <= 60 for line in (frame[0], *frame[2:]))
    rows = shown(frame)
    assert rows == [*range(len(rows))]
    assert frame[-1].endswith(f" 1-{len(rows)} of {peers}")
    listed = [int(line.split()[-1]) for line in frame if " event " in line]
    assert listed == [*range(events)][-len(listed) :][:events]
    assert len(listed) <= 10
    assert bool(listed) == bool(events)
    assert ("no changes yet" in frame) == (not events)
    assert frame[-2].endswith("repaired in all")
    assert len(rows) == peers or "" not in frame[3 : 3 + len(rows)]  # no line is wasted


def test_a_repair_is_counted_once_it_was_seen() -> None:
    looks = [
        overview(peer(7), peer(8)),
        overview(peer(8, state="no neighbour")),  # without its route a peer is none
        overview(peer(7), peer(8, state="no neighbour")),
        overview(peer(7), peer(8)),
    ]
    gone = drift("10.244.7.0/24 via 10.244.7.0 dev flannel.1")
    neighbour = drift("10.244.8.0 lladdr 02:00:00:00:00:08 dev flannel.1", table="neighbour")
    twice = drift("02:00:00:00:00:08 dst 192.0.2.8", "changed", "fdb")
    frames = frames_of(Script(looks, [1.0, [gone, neighbour], 10.0, [twice], 1.0]))

    totals = [frame[-2].rpartition("; ")[2] for frame in frames]
    assert [total for n, total in enumerate(totals) if total not in totals[:n]] == [
        "0 events, 0 repaired in all",
        "2 events, 0 repaired in all",
        "2 events, 1 repaired in all",
        "3 events, 1 repaired in all",
        "3 events, 2 repaired in all",
    ]


def test_what_was_removed_for_good_is_not_a_repair_later() -> None:
    gone = drift("10.244.7.0/24 via 10.244.7.0 dev flannel.1")
    looks = [overview(peer(7)), *[overview()] * 9, overview(peer(7))]

    frames = frames_of(Script(looks, [1.0, [gone], 120.0]))

    assert frames[-1][-2].endswith("1 event, 0 repaired in all")


def test_rates_are_of_the_last_ten_seconds() -> None:
    script = Script([overview()], [[drift(str(n)) for n in range(50)], 5.0, 20.0])

    rates = [frame[-2].split(" ")[0] for frame in frames_of(script)]

    assert "5.0" in rates
    assert rates[-1] == "0.0"


def test_an_error_is_shown_until_it_is_over() -> None:
    error = DumpInterrupted(4, "read the routes", hint="try again")
    script = Script([overview(peer(7)), error, overview(peer(7))], [25.0])

    frames = frames_of(script)

    shown = ["read the routes: Interrupted" in "\n".join(frame) for frame in frames]
    assert True in shown
    assert not shown[0]
    assert not shown[-1]
    assert all("10.244.7.0/24" in "\n".join(frame) for frame in frames)


def test_kinds_of_events_and_states_have_words_and_colours() -> None:
    lines = [
        drift("10.244.7.0/24"),
        DriftLine(NEW_YEAR, 4, "route", "repaired", "another program deleted x; restored", "agent"),
        DriftLine(NEW_YEAR, 4, "", "rejected", "lease node9 is rejected (overlap)", "agent"),
        DriftLine(NEW_YEAR, 4, "", "added", "peer node7 was added", "agent"),
        DriftLine(NEW_YEAR, 0, "", "problem", "problem (source) began", "agent"),
    ]
    differs = "change route via 10.244.6.0"
    seen = overview(peer(5), peer(6, difference=differs), peer(7, state="no fdb", difference="add"))
    refused = Rejection("node9", 4, Reason.BAD_MAC, "of node7")
    script = Script([replace(seen, rejected=(refused,))], [lines])

    drawn = drawings_of(script, Screen(120, 24))[-1]

    told = {text[9:].split()[0]: colour for text, colour in drawn[9:] if text[2:3] == ":"}
    assert told == {
        "change": "",
        "drift": "magenta",
        "rejection": "yellow",
        "peer": "green",
        "problem": "red",
    }
    assert [(" ".join(text.split()[4:]), colour) for text, colour in drawn[3:7]] == [
        ("rejected (bad-mac)", "yellow"),
        ("no fdb", "red"),
        (f"ok ({differs})", "yellow"),
        ("ok", ""),
    ]


def test_an_agents_probes_say_who_is_dead() -> None:
    lives = Lives({"10.244.7.0/24": Life("dead"), "10.244.8.0/24": Life("lossy", 0.001)})
    seen = replace(overview(peer(5), peer(7), peer(8), peer(9, state="no fdb")), lives=lives)

    drawn = drawings_of(Script([seen], [[]]), Screen(120, 24))[-1]

    assert "4 tunnel, 0 direct, 1 out of sync, 1 dead" in drawn[1][0]
    assert [(" ".join(text.split()[4:]), colour) for text, colour in drawn[2:7]] == [
        ("PATH STATE LIFE", "dim"),
        ("no fdb -", "red"),
        ("ok dead", "red"),
        ("ok lossy 1.00 ms", "yellow"),
        ("ok -", ""),
    ]


# ---- keys --------------------------------------------------------------------------


def test_keys_scroll_and_filter_and_end_it() -> None:
    looks, turn = [overview(*map(peer, range(1, 101)))], [[drift("a")]]
    steps: list[tuple[list[str], list[int]]] = [
        ([], [1, 2, 3, 4, 5]),
        (["j", "down"], [3, 4, 5, 6, 7]),
        (["k"], [2, 3, 4, 5, 6]),
        (["page down"], [6, 7, 8, 9, 10]),
        (["page up"], [2, 3, 4, 5, 6]),
        (["up"] * 9, [1, 2, 3, 4, 5]),
        (["G"], [96, 97, 98, 99, 100]),
        (["down", "end"], [96, 97, 98, 99, 100]),
        (["g"], [1, 2, 3, 4, 5]),
        (["end", "home"], [1, 2, 3, 4, 5]),
        ([*"/.77.x", "backspace"], [77]),
        (["enter", "j"], [77]),
        ([*"/.9", "enter", "G"], [95, 96, 97, 98, 99]),
        (["/", "escape"], [1, 2, 3, 4, 5]),
    ]
    for ending in ("q", "escape"):
        script = Script(looks, [*turn * len(steps), AssertionError("it goes on")])
        keys = [*(keys for keys, _ in steps[1:]), [ending]]
        frames = frames_of(script, keys=keys, height=13)
        assert [shown(frame) for frame in frames[: len(steps)]] == [numbers for _, numbers in steps]


def test_the_last_line_tells_the_keys_and_the_place() -> None:
    seen = overview(*map(peer, range(1, 101)))
    for width in (40, 80, 140):
        frame = frames_of(Script([seen], [[]]), width=width, height=13)[-1]
        assert frame[-1].startswith("q quit  / filter")
        assert frame[-1].endswith("1-5 of 100")
        assert len(frame[-1]) == width

    typed = frames_of(Script([seen], [[], []]), keys=[[*"/.7"]], height=13)[-1]
    assert typed[-1].startswith("/.7_")
    assert typed[-1].endswith("of 11 (100 in all)")


# ---- what has room -----------------------------------------------------------------


def test_narrow_terminals_lose_what_is_less_important(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    traffic = {("02:00:00:00:00:07", 4): (6e6, 2e6), ("02:00:00:00:00:08", 4): (0.0, 1e3)}
    seen = overview(peer(7), peer(8))
    titles = {}
    for width in (44, 60, 80, 140):
        frame = frames_of(Script([seen], [[]]), width=width, rates=lambda: traffic)[-1]
        titles[width] = frame[2].split()
        assert all(len(line) <= width for line in frame[2:5])
    assert "MAC" in titles[140]
    assert {"SUBNET", "STATE", "SENT/S", "RECEIVED/S"} <= set(titles[60])
    assert "MAC" not in titles[60]
    assert frame[3].endswith("2 Mbit  " + 8 * "\u2588")
    assert frame[4].endswith("\u258f")  # a little is not nothing

    monkeypatch.setenv("LC_ALL", "en_US.ISO-8859-1")
    frame = frames_of(Script([seen], [[]]), width=140, rates=lambda: traffic)[-1]
    assert frame[3].endswith("########")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "dumb")
    script = Script([overview(peer(7))], [[drift("a")]])

    watch_view(script.read, script.events, stop=script.stop)

    assert out.getvalue().splitlines()[:-1] == str(overview(peer(7))).splitlines()
