"""What fits a terminal: columns by importance, folded and cut lines, bars."""

from __future__ import annotations

import re

import pytest

from flannel_dp.look.fitting import Grid, bar, cut, folded, speaks_unicode, whole_words
from flannel_dp.look.stats import DroppedView, FamilyStats, Flow, PeerStats, Stats


def test_columns_are_left_out_in_their_order() -> None:
    grid = Grid([("A", "BBBB", "CC"), ("a", "b", "1")], right=[2], drop=[1, 2], indent=" ")

    assert [*grid.lines()] == [" A  BBBB  CC", " a  b      1"]
    assert [*grid.lines(12)] == [*grid.lines()]
    assert [*grid.lines(11)] == [" A  CC", " a   1"]
    assert [*grid.lines(5)] == [" A", " a"]
    assert [*grid.lines(1, [("x", "y", "z")])] == [" x"]

    goes_on = Grid([("A", "B", "WHY"), ("a", "b", "because, of this")], drop=[0], last=8)
    assert [*goes_on.lines(14)] == ["A  B  WHY", "a  b  because, of this"]
    assert [*folded(goes_on.lines(14), 14)] == ["A  B  WHY", "a  b  because,", "      of this"]
    assert [*goes_on.lines(13)] == ["B  WHY", "b  because, of this"]


@pytest.mark.parametrize("seconds", [None, 1.0])
@pytest.mark.parametrize("with_leases", [False, True])
@pytest.mark.parametrize("family", [4, 6])
def test_statistics_of_80_columns_have_traffic_and_drops(
    seconds: float | None, with_leases: bool, family: int
) -> None:
    flow = Flow(123_456_789, 123_456_789_012, None, 123_456.0, 123_456_789.0)
    subnet, endpoint = "10.244.200.0/24", "192.0.2.200"
    if family == 6:
        subnet, endpoint = "fd00:10:244:200::/64", "2001:db8:1234:5678:9abc:def0:1234:5678"
    drops = (DroppedView("NETFILTER_DROP", "sent", 87654),)
    peer = PeerStats(subnet, "02:00:00:00:00:02", endpoint, "node2" * 8, flow, flow, drops)
    view = FamilyStats(family, "flannel.1", "", (peer,), {}, {})
    lines = {
        width: [*Stats((view,), seconds, with_leases).lines(width=width)] for width in (60, 80, 300)
    }

    for width in (60, 80):
        assert all(len(line) <= width for line in lines[width])
        titles, row = lines[width][1:3]
        assert titles.endswith("DROPS")
        assert row.endswith(" 87,654")
        assert subnet in row
    for title in ("SENT BIT/S", "RECV BIT/S") if seconds else ("SENT B", "RECV B"):
        assert title in lines[80][1]
    assert ("node2" in lines[300][2]) == with_leases
    assert endpoint in lines[300][2]


def test_long_lines_go_on_below_and_commands_stay_whole() -> None:
    line = "  \x1b[31mit isn't there: run 'flannel-dp sync --iface eth0', and look again\x1b[0m"

    made = [*folded([line, "short"], 42)]

    assert [re.sub(r"\x1b\[\d*m", "", one) for one in made] == [
        "  it isn't there: run",
        "      'flannel-dp sync --iface eth0',",
        "      and look again",
        "short",
    ]
    device = "flannel.1: up, vni 1 port 8472, local 192.0.2.1 dev eth0"
    assert [*folded([device], 44)] == [
        "flannel.1: up, vni 1 port 8472,",
        "    local 192.0.2.1 dev eth0",
    ]
    assert [*folded(["  IPv4   10.244.1.0/24 of 10.244.0.0/16 at 192.0.2.1"], 40)] == [
        "  IPv4   10.244.1.0/24 of 10.244.0.0/16",
        "         at 192.0.2.1",
    ]
    assert [*folded(["short\nand " + "long " * 3], 10)] == [
        "short",
        "and long",
        "    long",
        "    long",
    ]
    assert [*folded([line], 0)] == [line]
    assert [*folded(["x" * 50], 40)] == ["x" * 50]


def test_text_is_cut_where_the_terminal_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    for text, shown in (
        ("abcdef", "abcdef"),
        ("abcdefg", "abcde…"),
        ("é" * 7, "é" * 5 + "…"),
        ("ab日本", "ab日本"),
        ("ab日本語", "ab日…"),
        ("e\u0301" * 6, "e\u0301" * 6),
    ):
        assert cut(text, 6) == shown
    monkeypatch.setenv("LC_ALL", "C")
    assert cut("abcdefg", 6) == "abcde>"


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert [bar(part, 4) for part in (0.0, 0.001, 0.5, 0.53, 1.0, 7.0)] == [
        "", "▏", "██", "██▏", "████", "████",
    ]  # fmt: skip
    monkeypatch.setenv("LC_ALL", "de_DE.ISO-8859-15")
    assert [bar(part, 4) for part in (0.0, 0.001, 0.5, 1.0)] == ["", "#", "##", "####"]


def test_who_has_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert not speaks_unicode()
    monkeypatch.setenv("LANG", "de_DE.utf8")
    assert speaks_unicode()
    monkeypatch.setenv("LC_CTYPE", "C")
    assert not speaks_unicode()
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert speaks_unicode()


def test_as_many_words_as_have_room() -> None:
    assert whole_words(["up", "mtu 1450", "mac x"], 15) == "up, mtu 1450"
    assert whole_words(["up", "mtu 1450", "mac x"], 19) == "up, mtu 1450, mac x"
    assert whole_words(["longer than that"], 5) == "longer than that"
    assert whole_words([], 5) == ""
