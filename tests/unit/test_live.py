"""show --watch: what is on the screen, in the lines and in the JSON, from scripted looks."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console

from flannel_dp.errors import DumpInterrupted, kernel_error
from flannel_dp.look.live_show import DriftLine, watch_json, watch_view
from flannel_dp.look.live_turns import HOLD_SECONDS, InOrder
from flannel_dp.look.show import FamilyView, Overview, PeerView
from flannel_dp.resources.device.view import DeviceView
from flannel_dp.tables.entries import Neighbour
from tests.lib.stand_ins import Clock
from tests.lib.waiting import LIMIT

NEW_YEAR = 1767225600.25  # 2026-01-01T00:00:00.25Z
DEVICE = DeviceView("flannel.1", 7, True, 1, 8472, "192.0.2.1", "eth0", 1450, "02:00:00:00:00:01")


def peer(number: int, **changes: Any) -> PeerView:
    view = PeerView(
        f"10.244.{number}.0/24",
        f"10.244.{number}.0",
        f"02:00:00:00:00:{number:02x}",
        f"192.0.2.{number}",
    )
    return replace(view, **changes)


def overview(*peers: PeerView, **changes: Any) -> Overview:
    family = FamilyView(4, "10.244.0.0/16", DEVICE, peers)
    return Overview((replace(family, **changes),))


def drift(what: str, change: str = "deleted", table: str = "route", family: int = 4) -> DriftLine:
    return DriftLine(NEW_YEAR, family, table, change, what)


Step = list[DriftLine] | float | BaseException


class Script:
    """What happens, step by step: events, seconds in which nothing does, an error.

    It is over when it was played; ``looks`` are answered in order, the last for ever.
    """

    def __init__(
        self, looks: Sequence[Overview | BaseException], steps: Iterable[Step] = ()
    ) -> None:
        self._looks, self._steps = [*looks], [*steps]
        self.now = 0.0
        self.looked: list[float] = []
        self.timeouts: list[float | None] = []

    def read(self) -> Overview:
        self.looked.append(self.now)
        found = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        if isinstance(found, BaseException):
            raise found
        return found

    def events(self, timeout: float | None) -> list[DriftLine]:
        self.timeouts.append(timeout)
        assert timeout is not None
        step = self._steps[0]
        if isinstance(step, float):
            spent = min(step, timeout)
            self.now += spent
            self._steps[0] = step - spent
            if step - spent < 1e-9:
                self._steps.pop(0)
            return []
        self._steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step

    def stop(self) -> bool:
        return not self._steps

    def clock(self) -> float:
        return self.now


def lines_of(script: Script) -> list[str]:
    file = io.StringIO()
    watch_view(script.read, script.events, console=Console(file=file), stop=script.stop)
    return file.getvalue().splitlines()


def frames_of(
    script: Script, *, width: int = 100, height: int = 30, source: str = "", **options: Any
) -> list[list[str]]:
    """What was drawn, each time from the top; without colours unless asked for."""
    file = io.StringIO()
    options = {"color_system": None, "force_terminal": True, **options}
    console = Console(file=file, width=width, height=height, _environ={}, **options)
    watch_view(
        script.read,
        script.events,
        console=console,
        stop=script.stop,
        source=source,
        clock=script.clock,
    )
    frames = re.split(r"(?:\r|\x1b\[1A|\x1b\[2K|\x1b\[\?25[lh])+", file.getvalue())
    return [frame.splitlines() for frame in frames if frame.strip()]


def json_of(script: Script) -> list[dict[str, Any]]:
    file = io.StringIO()
    watch_json(script.read, script.events, file=file, stop=script.stop, clock=script.clock)
    return [json.loads(line) for line in file.getvalue().splitlines()]


def plain(seen: Overview) -> object:
    """What a program reads of it."""
    return json.loads(json.dumps(seen.to_json()))


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

    watch_view(script.read, events, console=Console(file=file), stop=script.stop)

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
    assert "500 events" in frames[-1][-1]


# ---- the screen --------------------------------------------------------------------


def test_the_screen() -> None:
    seen = overview(peer(7), peer(8, way="direct", mac=""), peer(9, state="no fdb", endpoint=""))
    what = "10.244.7.0/24 via 10.244.7.0 dev flannel.1"
    script = Script([seen], [1.0, [drift(what)], 1.0])

    assert frames_of(script, source="/etc/leases.json", width=160)[-1] == [
        f"IPv4 10.244.0.0/16  {DEVICE}",
        "3 peers, 2 tunnel, 1 direct, 1 out of sync, source /etc/leases.json",
        "SUBNET         PUBLIC IP  MAC                PATH    STATE ",
        "10.244.9.0/24  -          02:00:00:00:00:09  tunnel  no fdb",
        "10.244.7.0/24  192.0.2.7  02:00:00:00:00:07  tunnel  ok    ",
        "10.244.8.0/24  192.0.2.8  -                  direct  ok    ",
        "",
        f"2026-01-01T00:00:00Z change ipv4 route deleted {what}",
        "0.1 events/s, 0.1 repaired/s; 1 event, 1 repaired in all",
    ]


def test_both_families_and_everything_that_is_wrong() -> None:
    four = overview(peer(7)).families[0]
    broken = DeviceView("flannel-v6.1", problem="there is no such device")
    six = FamilyView(6, "fd00:10:244::/48", broken, error="no IPv6 lease")
    stray = Neighbour(7, "10.244.3.0", "02:00:00:00:00:03")
    refused: Any = (object(), object())
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

    assert len(frame) < height  # the cursor has the last line
    shown = [line for line in frame if line.startswith("10.244.")]
    more = [line for line in frame if line.startswith("... and ")]
    assert more == [f"... and {peers - len(shown)} more"] * (len(shown) < peers)
    assert shown
    listed = [int(line.split()[-1]) for line in frame if " event " in line]
    assert listed == [*range(events)][-len(listed) :][:events]
    assert len(listed) <= 10
    assert bool(listed) == bool(events)
    assert len(frame) == height - 1 or not more  # no line is wasted
    assert "repaired" in frame[-1]


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

    totals = [frame[-1].rpartition("; ")[2] for frame in frames]
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

    assert frames[-1][-1].endswith("1 event, 0 repaired in all")


def test_rates_are_of_the_last_ten_seconds() -> None:
    script = Script([overview()], [[drift(str(n)) for n in range(50)], 5.0, 20.0])

    rates = [frame[-1].split(" ")[0] for frame in frames_of(script)]

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


def test_colours_only_where_they_are_wanted() -> None:
    script = [overview(peer(7, state="no fdb"))]

    with_colour = frames_of(Script(script, [[]]), color_system="standard")
    without = frames_of(Script(script, [[]]), color_system="standard", no_color=True)

    assert "\x1b[31mno fdb" in "\n".join(with_colour[-1])
    assert "\x1b[31m" not in "\n".join(without[-1])


def test_a_dumb_terminal_gets_lines() -> None:
    file = io.StringIO()
    script = Script([overview(peer(7))], [[drift("a")]])
    console = Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})

    watch_view(script.read, script.events, console=console, stop=script.stop)

    assert file.getvalue().splitlines()[:-1] == str(overview(peer(7))).splitlines()


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
