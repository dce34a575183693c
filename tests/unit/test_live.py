"""show --watch: in the lines and in the JSON, from scripted readings."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from flannel_dp.errors import DumpInterrupted, kernel_error
from flannel_dp.look.live_show import DriftLine, watch_json, watch_view
from flannel_dp.look.live_turns import HOLD_SECONDS, InOrder
from flannel_dp.look.show import Overview
from tests.lib.live_script import (
    Script,
    Step,
    drift,
    frames_of,
    json_of,
    lines_of,
    overview,
    peer,
    plain,
)
from tests.lib.stand_ins import Clock
from tests.lib.waiting import LIMIT

# ---- lines -------------------------------------------------------------------------


def test_into_a_pipe_go_the_lines_of_show_and_one_for_each_event() -> None:
    seen = overview(peer(7), peer(8, state="no fdb"))
    what = "10.244.7.0/24 via 10.244.7.0 dev flannel.1"
    script = Script(
        [seen],
        [
            [drift(what)],
            [],
            [drift("fd00::1 lladdr x", "changed", "neighbour", 6), drift("lost", "overrun", "", 0)],
        ],
    )

    lines = lines_of(script)

    assert lines[:-3] == str(seen).splitlines()
    assert lines[-3:] == [
        f"2026-01-01T00:00:00.250Z change ipv4 route deleted {what}",
        "2026-01-01T00:00:00.250Z change ipv6 neighbour changed fd00::1 lladdr x",
        "2026-01-01T00:00:00.250Z change overrun lost",
    ]
    assert script.looked == [0.0]


def test_lines_are_in_the_order_of_their_times() -> None:
    """An agent writes down that it found an entry deleted after it has added it again."""
    clock = Clock()
    deleted, repaired, added = (
        DriftLine(clock.now + number / 100, 4, "route", change, "x")
        for number, change in enumerate(("deleted", "repaired", "added"))
    )
    came = [[deleted], [added], [repaired], []]
    waits: list[float | None] = []

    def events(timeout: float | None) -> list[DriftLine]:
        waits.append(timeout)
        clock.now += 0.01 if len(came) > 1 else HOLD_SECONDS
        return came.pop(0)

    ordered = InOrder(events, clock)
    told = [ordered(10.0) for _ in range(4)]

    assert told == [[], [], [], [deleted, repaired, added]]
    assert waits == [10.0, *(pytest.approx(HOLD_SECONDS, abs=0.05),) * 3]
    assert ordered.rest() == []


def test_what_waits_is_written_at_the_end() -> None:
    """Times of now wait for earlier ones."""
    for error in (KeyboardInterrupt(), None):
        event = DriftLine(time.time() + HOLD_SECONDS / 2, 4, "route", "deleted", "x")
        steps: list[Step] = [[event], *([error] if error else [])]
        assert lines_of(Script([overview()], [*steps]))[-1].endswith("route deleted x")
        assert json_of(Script([overview()], [*steps]))[-1]["event"]["what"] == "x"


def test_each_line_is_written_out_at_once() -> None:
    class File(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    file = File()
    seen: list[str] = []
    script = Script([overview()], [[drift("a")], [drift("b")], []])

    def events(timeout: float | None) -> list[DriftLine]:
        seen.append(file.flushed)
        return script.events(timeout)

    watch_view(script.read, events, file=file, stop=script.stop)

    assert [text.count(" change ") for text in seen] == [0, 1, 2]
    assert seen[0].startswith("flannel.1: up")


def test_a_name_cannot_steer_the_terminal() -> None:
    [*_, line] = lines_of(Script([overview()], [[drift("10.0.0.0/8 dev \x1b[2Jx\n\u202e")]]))

    assert line.endswith("route deleted 10.0.0.0/8 dev \\x1b[2Jx\\n\\u202e")


def test_long_lines_are_not_cut_in_a_pipe() -> None:
    [*_, line] = lines_of(Script([overview()], [[drift("x" * 500)]]))

    assert line.endswith("x" * 500)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError()])
def test_interruption_and_a_reader_that_left_end_it(error: BaseException) -> None:
    for run in (lines_of, frames_of, json_of):
        script = Script([overview()], [[drift("a")], error, [drift("b")]])
        run(script)
        assert not script.stop()


def test_a_real_pipe_whose_reader_leaves() -> None:
    program = (
        "import sys, time\n"
        "from flannel_dp.look.live_show import DriftLine, watch_view\n"
        "from flannel_dp.look.show import Overview\n"
        "from flannel_dp.look import terminal\n"
        "line = DriftLine(0.0, 4, 'route', 'deleted', 'x' * 999)\n"
        "watch_view(lambda: Overview(()), lambda timeout: [line], stop=lambda: False)\n"
        "terminal.flush()\n"
        "assert 'rich' not in sys.modules\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(
        b"1970-01-01T00:00:00.000Z change ipv4 route deleted x"
    )
    process.stdout.close()

    assert process.wait(LIMIT) == 0, process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("run", [lines_of, frames_of, json_of])
def test_an_error_at_first_is_an_error(run: Callable[[Script], object]) -> None:
    error = kernel_error(1, "read the routes")

    with pytest.raises(type(error)):
        run(Script([error], [[]]))


@pytest.mark.parametrize("watch", [watch_view, watch_json])
def test_closed_standard_output(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    script = Script([overview()], [[drift("a")]])

    watch(script.read, script.events, stop=script.stop)

    assert not script.looked


# ---- when it looks -----------------------------------------------------------------


def test_without_events_it_looks_every_ten_seconds() -> None:
    script = Script([overview()], [35.0])
    frames_of(script)

    assert script.looked == pytest.approx([0, 10, 20, 30])
    assert all(timeout is not None and 0 <= timeout <= 1 for timeout in script.timeouts)


def test_after_an_event_it_looks_at_once_but_not_twice_a_second() -> None:
    quiet: list[Step] = [5.0, [drift("a")], 3.0]
    script = Script([overview()], quiet)
    frames_of(script)
    assert script.looked == pytest.approx([0, 5])

    storm: list[Step] = [[drift("a")] if number % 2 else 0.05 for number in range(210)]
    script = Script([overview()], storm)
    frames_of(script)
    assert script.looked == pytest.approx([0, 1, 2, 3, 4, 5], abs=0.3)


def test_a_look_that_takes_long_is_taken_less_often() -> None:
    class Slow(Script):
        def read(self) -> Overview:
            self.now += 1.0
            return super().read()

    script = Slow([overview()], [[drift("a")] if number % 2 else 0.1 for number in range(200)])
    frames_of(script)

    assert script.looked == pytest.approx([1, 6, 11], abs=0.5)


def test_a_storm_is_not_drawn_line_by_line() -> None:
    script = Script([overview()], [[drift(str(number))] for number in range(500)])

    frames = frames_of(script)

    assert len(frames) <= 3
    assert "500 events" in frames[-1][-2]


# ---- JSON --------------------------------------------------------------------------


def test_json_lines() -> None:
    event = drift("10.244.7.0/24 dev flannel.1")
    script = Script([overview(peer(7)), overview()], [1.0, [event], 10.0])

    first, second, third = json_of(script)

    assert (first["schema"], first["overview"]) == (1, plain(overview(peer(7))))
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert second == {
        "schema": 1,
        "time": "2026-01-01T00:00:00.250Z",
        "event": {
            "family": 4,
            "table": "route",
            "change": "deleted",
            "what": "10.244.7.0/24 dev flannel.1",
            "told_by": "kernel",
        },
    }
    assert third["overview"] == plain(overview())


def test_json_says_nothing_new_while_there_is_nothing_new() -> None:
    script = Script([overview(peer(7))], [95.0])

    assert len(json_of(script)) == 1
    assert len(script.looked) == 10


def test_json_of_an_error() -> None:
    error = DumpInterrupted(4, "read the routes", hint="try again")

    lines = json_of(Script([overview(), error, overview()], [25.0]))

    assert [set(line) - {"schema", "time"} for line in lines] == [{"overview"}, {"error"}]
    assert lines[1]["error"]["hint"] == "try again"
    assert "read the routes" in lines[1]["error"]["message"]
