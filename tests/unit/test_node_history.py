"""What an agent keeps of its events, and what ``flannel-dp history`` makes of it."""

from __future__ import annotations

import errno
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flannel_dp._core import Claims
from flannel_dp.agent.history import History
from flannel_dp.command.cli import main
from flannel_dp.errors import ConfigError, FlannelDPError
from flannel_dp.kernel.netns import netns_identity
from flannel_dp.look.events import BEFORE, Event, history_path
from flannel_dp.look.history import Answer, since_of, words_of
from flannel_dp.look.history_file import Kept
from flannel_dp.look.history_tail import HistoryTail
from tests.lib.packed_claims import numbered

FAMILIES = (4, 6)
INODE = netns_identity()[1]


def kept_in(folder: Path) -> str:
    return history_path(str(folder), INODE, "flannel.1")


def history(folder: Path, lists: dict[int, Claims] | None = None, **more: Any) -> History:
    return History(kept_in(folder), lambda: lists or {}, lambda error: None, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peer_is_found_by_an_address_in_its_subnet_also_when_it_is_gone(
    tmp_path: Path, family: int
) -> None:
    first, second = numbered(family, range(3)), numbered(family, [0, 2, 3])
    with closing(history(tmp_path)) as made:
        made.note(Event(1.0, "started"))
        made.note_list(first, "start")
    with closing(history(tmp_path)) as made:  # the next process; meanwhile a peer went
        made.note(Event(time.time(), "started"))
        made.note_list(second, "start")

    kept = Kept(str(tmp_path))
    subnet = first.subnet(1)
    (peer,) = kept.find(subnet.replace("/64", "5").replace(".0/24", ".5"))
    assert (peer.subnet, peer.present, peer.name) == (subnet, False, first.name(1))
    assert kept.find(first.endpoint(1)) == kept.find(first.name(1).upper()) == [peer]
    answer = Answer(kept, first.name(1))
    assert [one.kind for one in answer.events] == ["started", "started", "removed"]
    assert answer.events[-1].cause == "found when the agent started"
    assert [one.kind for one in Answer(kept, second.name(2)).events][-1] == "added"
    text = "\n".join(answer.lines())
    assert f"{first.name(1)} is no peer any more: {subnet} at {first.endpoint(1)}" in text
    with pytest.raises(ConfigError, match="no peer with this"):
        kept.find("198.51.100.1")


def test_ten_thousand_peers_that_change_at_once_are_one_list(tmp_path: Path) -> None:
    claims = numbered(4, range(10_000))
    with closing(history(tmp_path)) as made:
        made.note_list(claims, "start")
        made.flush()
        made.note_list(numbered(4, range(5_000)))

    assert os.path.getsize(kept_in(tmp_path)) < 1 << 20
    kept = Kept(str(tmp_path))
    assert len(kept.events) == 5_000
    assert {one.kind for one in kept.events} == {"removed"}
    assert Answer(kept, limit=10).left_out == 4_990


def test_the_file_is_bounded_and_a_new_one_begins_with_all_peers(tmp_path: Path) -> None:
    claims = numbered(4, range(3))
    made = history(tmp_path, {4: claims}, most=2_000)
    made.note_list(claims, "start")
    for number in range(200):
        made.note(Event(float(number), "repaired", 4, claims.name(1), claims.subnet(1)))
        made.flush()
    made.close()

    path = kept_in(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(path + end) for end in ("", BEFORE)]
    assert max(os.path.getsize(path + end) for end in ("", BEFORE)) < 4_000
    kept = Kept(str(tmp_path))
    (peer,) = kept.find(claims.name(2))
    assert peer.present
    assert [one.time for one in kept.events if one.kind == "repaired"][-1] == 199.0
    assert {one.kind for one in kept.events} == {"repaired"}


def test_what_fills_a_file_is_told_once(tmp_path: Path) -> None:
    """The lists that the next one begins with have it already."""
    lists = {4: numbered(4, range(3))}
    made = history(tmp_path, lists, most=1_000)
    made.note_list(lists[4], "start")
    for number in range(3, 20):
        lists[4] = numbered(4, range(number + 1))
        name, subnet = lists[4].name(number), lists[4].subnet(number)
        mac = lists[4].mac(number)
        after = f"{subnet} at {lists[4].endpoint(number)}, MAC {mac}"
        made.note(Event(time.time(), "added", 4, name, subnet, after=after))
        made.flush()
    made.close()

    assert os.path.exists(kept_in(tmp_path) + BEFORE)
    added = [one.subnet for one in Kept(str(tmp_path)).events if one.kind == "added"]
    assert sorted(added) == sorted({*added})


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    with closing(history(tmp_path)) as made:
        made.note(Event(1.0, "stopped"))
    with open(kept_in(tmp_path), "ab") as file:
        file.write(b'{"time":2.0,"kind":"st')
    with closing(history(tmp_path)) as made:
        made.note(Event(3.0, "started"))
    with open(kept_in(tmp_path), "ab") as file:
        file.write(b'\xff\n{"time":"x"}\n[]\n{"time":4,"kind":"peers","family":4}\n')

    assert [one.time for one in Kept(str(tmp_path)).events] == [1.0, 3.0]


def test_a_full_disk_is_told_and_its_end_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[OSError | None] = []
    made = History(kept_in(tmp_path), lambda: {}, told.append)
    write = os.write

    def half(fd: int, data: Any) -> int:
        monkeypatch.setattr(os, "write", full)
        return write(fd, bytes(data)[:10])

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        made.note(Event(1.0, "started"))
        made.flush()
        made.note(Event(2.0, "started"))
        made.flush()
        monkeypatch.undo()
    assert [getattr(one, "errno", None) for one in told] == [errno.ENOSPC, errno.ENOSPC]

    made.note(Event(3.0, "started"))
    made.close()
    assert told[-1] is None
    assert [one.time for one in Kept(str(tmp_path)).events] == [3.0]


def test_without_a_history_the_command_says_what_keeps_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["history", "--run-dir", str(tmp_path)]) == 1
    assert "'flannel-dp sync --watch' keeps one" in capsys.readouterr().err
    with pytest.raises(FlannelDPError, match=r"of device flannel\.1"):
        Kept(str(tmp_path), device="flannel.1")


def test_the_text_says_what_when_and_by_whom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    with closing(history(tmp_path)) as made:
        made.note(Event(now - 7200, "problem", problem="source", cause="no answer"))
        made.note(Event(now - 60, "rejected", 4, "node9", reason="overlap", cause="it overlaps"))
        made.note(Event(now, "repaired", 4, after="route 10.1.0.0/24", change="deleted"))

    assert main(["history", "--state-dir", str(tmp_path), "--since", "1h"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("lease node9 is rejected (overlap): it overlaps")
    assert "(60 s ago)" in first or "(1 min ago)" in first
    assert second.endswith("another program deleted route 10.1.0.0/24; restored")
    event = Event(1.0, "repaired", after="x", change="deleted", program="bird (process 7)")
    assert words_of(event) == "bird (process 7) deleted x; restored"


def test_times_since_when() -> None:
    now = time.mktime((2026, 11, 27, 3, 0, 0, 0, 0, -1))

    assert since_of("90min", now) == since_of("1.5h", now) == now - 5400
    assert since_of("02:30", now) == since_of("2026-11-27 02:30", now) == now - 1800
    assert since_of("03:12", now) < now - 80_000  # yesterday's
    with pytest.raises(ConfigError, match="is no time"):
        since_of("soon", now)


def test_show_watch_tells_the_events_of_an_agent_apart(tmp_path: Path) -> None:
    before = history(tmp_path)
    before.note(Event(1.0, "started"))
    before.close()
    tail = HistoryTail(str(tmp_path))
    assert tail.lines() == []

    with closing(history(tmp_path)) as made:
        made.note(Event(2.0, "repaired", 4, table="route", change="deleted", after="route x"))
        made.note(Event(3.0, "rejected", 4, "node9", reason="overlap", cause="it overlaps"))
        made.note(Event(4.0, "removed", 4, "node7", before="10.1.7.0/24 at 192.0.2.7"))
        made.flush()
        with open(kept_in(tmp_path), "ab") as file:
            file.write(b'{"time":5.0,"kind"')
        lines = [f"{line.word} {line}" for line in tail.lines()]
        assert lines == [
            "drift another program deleted route x; restored",
            "rejection lease node9 is rejected (overlap): it overlaps",
            "peer node7 was removed: 10.1.7.0/24 at 192.0.2.7",
        ]
        with open(kept_in(tmp_path), "ab") as file:
            file.write(b':"stopped"}\n')
        (line,) = tail.lines()
        assert (line.word, line.time, line.told_by) == ("agent", 5.0, "agent")
    os.rename(kept_in(tmp_path), kept_in(tmp_path) + BEFORE)
    with closing(history(tmp_path)) as made:
        made.note(Event(6.0, "problem", problem="source", cause="no answer"))
    (line,) = tail.lines()
    assert f"{line.word} {line}" == "problem (source) began: no answer"
