"""Log lines: one record is one line, in both forms, and failures are not said a thousand times."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.agent.logs import (
    FirstOfKind,
    JsonFormatter,
    TextFormatter,
    configure,
    fields_of,
    in_words,
    one_line,
)
from flannel_dp.agent.problems import Problems
from flannel_dp.agent.status import StatusBoard
from flannel_dp.errors import ConfigError, SourceError
from tests.lib.stand_ins import Clock

NAME = "flannel_dp.tests.logs"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The logging of the test run, put back as it was."""
    root, ours = logging.getLogger(), logging.getLogger("flannel_dp")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], level, own = before[0], before[1], before[2]
    root.setLevel(level)
    ours.setLevel(own)


class Lines:
    """What is written to a log of one form."""

    def __init__(self, *, json: bool = False, level: int | str = "debug") -> None:
        self.stream = io.StringIO()
        self.handler = configure(level, json, self.stream)
        self.log = logging.getLogger(NAME)

    @property
    def lines(self) -> list[str]:
        text = self.stream.getvalue()
        assert not text or text.endswith("\n")
        return text.split("\n")[:-1]

    @property
    def line(self) -> str:
        (line,) = self.lines
        return line


def record(form: str, *args: object, name: str = NAME) -> logging.LogRecord:
    return logging.LogRecord(name, logging.INFO, "", 0, form, args, None)


# ---- text -----------------------------------------------------------------------


def test_text_line_has_time_level_logger_and_message() -> None:
    text = Lines()

    text.log.info("Device %(device)s has MTU %(mtu)d", {"device": "flannel.1", "mtu": 1450})

    pattern = (
        r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
        r"level=INFO logger=flannel_dp\.tests\.logs Device flannel\.1 has MTU 1450"
    )
    assert re.fullmatch(pattern, text.line)


def test_time_is_utc_with_milliseconds() -> None:
    text = Lines()
    record = logging.LogRecord(NAME, logging.INFO, "", 0, "x", None, None)
    record.created = 1_700_000_000.9996  # is not rounded up to a second that was not there

    text.log.handle(record)

    assert text.line.startswith("time=2023-11-14T22:13:20.999Z ")


def test_own_errors_are_told_with_their_hint_and_without_a_traceback() -> None:
    text = Lines()
    try:
        raise SourceError("leases.json: cut short", hint="write it in one step")
    except SourceError:
        text.log.exception("source failed")

    assert text.line.endswith(
        "source failed error=SourceError: leases.json: cut short - write it in one step"
    )


def test_unexpected_errors_carry_their_traceback_on_the_same_line() -> None:
    text = Lines()
    try:
        raise KeyError("x")
    except KeyError:
        text.log.exception("failed")

    assert "failed error=KeyError: 'x' traceback=" in text.line
    assert "test_logs.py" in text.line


@given(st.text(st.characters(codec=None)))
def test_one_line_is_one_printable_line(text: str) -> None:
    line = one_line(text)

    assert line.splitlines() in ([], [line])
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)
    line.encode()


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_strangers_cannot_forge_lines_or_paint_terminals(as_json: bool) -> None:
    log = Lines(json=as_json)

    log.log.warning("Node %(node)s", {"node": "a\nlevel=INFO all is well\r\x1b[2J\x85\u2028\udcff"})

    assert len(log.line.splitlines()) == 1
    assert log.line.isprintable()


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_wrong_format_loses_no_line(as_json: bool) -> None:
    log = Lines(json=as_json)
    logging.getLogger().handlers[:] = [log.handler]  # pytest's own would raise

    log.log.warning("Device %(device)s has MTU %(mtu)d", {"device": "flannel.1"})

    assert "Device %(device)s has MTU %(mtu)d (cannot be formatted: 'mtu')" in log.line


def test_stack_is_on_the_same_line() -> None:
    text = Lines()

    text.log.info("here", stack_info=True)

    assert "here stack='Stack (most recent call last)" in text.line


# ---- JSON -----------------------------------------------------------------------


def test_json_line_has_the_fields_of_the_message() -> None:
    log = Lines(json=True)

    log.log.info("Device %(device)s is up", {"device": "flannel.1", "mtu": 1450})

    line = json.loads(log.line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "INFO",
        "logger": NAME,
        "message": "Device flannel.1 is up",
        "fields": {"device": "flannel.1", "mtu": "1450"},
    }


def test_json_tells_own_errors_in_parts() -> None:
    log = Lines(json=True)
    try:
        raise ConfigError("VNI 0: not usable", hint="give 1 to 16777215")
    except ConfigError:
        log.log.exception("config")

    assert json.loads(log.line)["error"] == {
        "type": "ConfigError",
        "message": "VNI 0: not usable",
        "hint": "give 1 to 16777215",
    }


def test_json_tells_other_errors_with_a_traceback() -> None:
    log = Lines(json=True)
    try:
        raise ValueError("bad")
    except ValueError:
        log.log.info("failed", exc_info=True, stack_info=True)

    line = json.loads(log.line)
    assert line["error"]["type"] == "ValueError"
    assert line["error"]["message"] == "bad"
    assert line["error"]["traceback"].endswith("ValueError: bad")
    assert line["stack"]


HOSTILE = 'no family=6 problem=none error=all is well" level=INFO x="'


@given(st.text(st.characters(codec=None)) | st.just(HOSTILE))
def test_a_text_of_a_stranger_adds_no_field_and_ends_none(text: str) -> None:
    one = record("Node %(node)s: the server said: %(said)s", {"node": text, "said": text})

    assert fields_of(one) == {"node": text, "said": text}


def test_a_text_of_a_stranger_adds_no_field_to_a_json_line() -> None:
    log = Lines(json=True)

    log.log.warning("Node %(node)s failed: %(error)s", {"node": HOSTILE, "error": HOSTILE})
    log.log.warning(f"The server said: {HOSTILE}")

    first, second = (json.loads(line)["fields"] for line in log.lines)
    assert first == {"node": HOSTILE, "error": HOSTILE}
    assert second == {}


def test_messages_of_libraries_have_no_fields() -> None:
    """They may be finished sentences, with what a server said in them."""
    assert fields_of(record("%(a)s", {"a": HOSTILE}, name="somelibrary")) == {}


def test_both_forms_are_made_of_one_record() -> None:
    one = record("Device %(device)s", {"device": "flannel.1", "mtu": 1450})

    assert TextFormatter().format(one).endswith(" Device flannel.1")
    line = json.loads(JsonFormatter().format(one))
    assert line["message"] == "Device flannel.1"
    assert line["fields"] == {"device": "flannel.1", "mtu": "1450"}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_lines_for_the_journal_begin_with_their_priority(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "journal", "w+") as journal, open(tmp_path / "other", "w+") as other:
        status = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        for stream in (journal, other):
            configure("debug", as_json, stream)
            for level in (10, 20, 30, 40, 50):
                logging.getLogger(NAME).log(level, "hello")
            stream.seek(0)
        lines, plain = journal.read().splitlines(), other.read().splitlines()

    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<2>"]
    assert not any(line.startswith("<") for line in plain)


# ---- configure ------------------------------------------------------------------


def test_level_holds_for_this_package_and_libraries_are_quieter() -> None:
    log = Lines(level="info")
    library = logging.getLogger("somelibrary")

    log.log.debug("no")
    log.log.info("ours")
    library.info("no")
    library.warning("theirs")

    assert [line.rpartition(" ")[2] for line in log.lines] == ["ours", "theirs"]


def test_debug_does_not_let_libraries_print_their_headers() -> None:
    log = Lines(level=logging.DEBUG)
    library = logging.getLogger("somelibrary")

    library.debug("authorization: Bearer x")
    library.info("theirs")
    log.log.debug("ours")

    assert [line.rpartition(" ")[2] for line in log.lines] == ["theirs", "ours"]


def test_configuring_again_replaces_what_was_there() -> None:
    first = Lines()
    second = Lines(json=True)

    second.log.info("once")

    assert first.lines == []
    assert json.loads(second.line)["message"] == "once"


def test_no_stream_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")

    logging.getLogger(NAME).info("hello")

    captured = capsys.readouterr()
    assert captured.err.endswith("hello\n")
    assert captured.out == ""


def test_unknown_level_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'loud'") as caught:
        configure("loud")
    assert "debug" in caught.value.hint


def test_a_log_that_cannot_be_written_stops_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    configure("info", stream=Full())

    logging.getLogger(NAME).info("lost")

    assert capsys.readouterr().err == ""


# ---- the first of a kind --------------------------------------------------------


class Failures:
    """A FirstOfKind with a clock of ours, and what it logged."""

    def __init__(self, caplog: pytest.LogCaptureFixture, **options: int) -> None:
        caplog.set_level(logging.DEBUG, NAME)
        self.clock = Clock()
        self.first = FirstOfKind(logging.getLogger(NAME), clock=self.clock, **options)
        self._caplog = caplog

    def said(self) -> list[tuple[str, str]]:
        """Level and message of what was logged since the last time."""
        found = [(r.levelname, r.getMessage()) for r in self._caplog.records]
        self._caplog.clear()
        return found


@pytest.fixture
def failures(caplog: pytest.LogCaptureFixture) -> Failures:
    return Failures(caplog)


def test_first_is_said_in_full_and_the_rest_is_counted(failures: Failures) -> None:
    for number in range(100):
        failures.first.warning("route", "peer=%d failed", number)

    assert failures.said() == [("WARNING", "peer=0 failed")]


def test_kinds_do_not_hide_each_other(failures: Failures) -> None:
    failures.first.warning("a", "one")
    failures.first.warning("b", "two")

    assert failures.said() == [("WARNING", "one"), ("WARNING", "two")]


def test_count_is_told_once_a_minute_with_the_last_one_in_full(failures: Failures) -> None:
    failures.first.warning("route", "peer=%d failed", 0)
    failures.said()
    for second in range(1, 131):
        failures.clock.now += 1
        failures.first.warning("route", "peer=%d failed", second)

    assert failures.said() == [
        ("WARNING", "... and 60 more of route, the last: peer=60 failed"),
        ("WARNING", "... and 60 more of route, the last: peer=120 failed"),
    ]


def test_end_of_a_kind_tells_the_count_and_makes_the_next_a_first(failures: Failures) -> None:
    for number in range(5):
        failures.first.warning("route", "peer=%d failed", number)

    assert failures.first.recovered("route") == 5
    failures.first.warning("route", "again")

    assert failures.said() == [
        ("WARNING", "peer=0 failed"),
        ("WARNING", "... and 4 more of route, the last: peer=4 failed"),
        ("WARNING", "again"),
    ]


def test_end_of_a_single_failure_has_no_count(failures: Failures) -> None:
    failures.first.warning("route", "failed")
    failures.said()

    assert failures.first.recovered("route") == 1
    assert failures.said() == []


def test_end_of_what_never_was_says_nothing(failures: Failures) -> None:
    assert not failures.first.recovered("route")
    assert failures.said() == []


def test_kinds_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures(caplog, kinds=2)
    for kind in ("a", "b", "b", "a", "c"):  # b is the one that was silent for longest
        failures.first.warning(kind, "kind %s", kind)

    assert failures.said() == [
        ("WARNING", "kind a"),
        ("WARNING", "kind b"),
        ("WARNING", "... and 1 more of b, the last: kind b"),
        ("WARNING", "kind c"),
    ]


def test_wrong_format_is_counted_like_any_other(failures: Failures) -> None:
    failures.first.warning("a", "fine")
    failures.first.warning("a", "value=%d", "x")
    failures.said()

    failures.first.recovered("a")

    ((_, message),) = failures.said()
    assert "value=%d (cannot be formatted" in message


def test_no_failure_is_lost_between_threads(failures: Failures) -> None:
    def fail() -> None:
        for _ in range(500):
            failures.first.warning("route", "failed")

    threads = [threading.Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures.first.recovered("route") == 2000


def test_a_problem_is_logged_at_its_beginning_and_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    problems = Problems(StatusBoard(), clock)
    with caplog.at_level(logging.INFO):
        problems.note("path4", "diverted by a rule")
        clock.now += 20
        problems.note("path4", "diverted by another rule")
        clock.now += 180
        problems.note("path4", None)
        problems.note("path4", None)

    assert caplog.messages == [
        "Problem (path4): diverted by a rule",
        "... and 1 more of path4, the last: Problem (path4): diverted by another rule",
        "Problem (path4) ended after 3 min 20 s",
    ]
    assert fields_of(caplog.records[0]) == {"problem": "path4", "error": "diverted by a rule"}
    assert fields_of(caplog.records[-1]) == {
        "problem": "path4",
        "length": "3 min 20 s",
        "seconds": "200.000",
        "failures": "2",
    }


def test_a_problem_that_its_finder_has_told_is_told_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also by another owner: an agent ends what the service has found before it."""
    board, clock = StatusBoard(), Clock()
    with caplog.at_level(logging.INFO):
        assert Problems(board, clock).note("counters", "no programs", told=True)
        clock.now += 90
        assert Problems(board, clock).note("counters", None)
        assert not Problems(board, clock).note("counters", None)

    assert caplog.messages == ["Problem (counters) ended after 1 min 30 s"]
    assert board.began == {}


def test_a_problem_ends_though_its_count_was_dropped(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems(StatusBoard(), Clock())
    with caplog.at_level(logging.INFO):
        for number in range(257):
            problems.note(f"path{number}", "diverted by a rule")
        problems.note("path0", None)

    assert caplog.messages[-1] == "Problem (path0) ended after 0.0 s"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.34, "0.3 s"),
        (48, "48 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_a_length_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_sentence_has_its_values_as_fields(as_json: bool) -> None:
    log = Lines(json=as_json)

    log.log.info("Peer %(peer)s was added", {"peer": HOSTILE, "family": 4})

    if as_json:
        line = json.loads(log.line)
        assert line["message"] == f"Peer {HOSTILE} was added"
        assert line["fields"] == {"peer": HOSTILE, "family": "4"}
    else:
        assert log.line.endswith(f" Peer {HOSTILE} was added")
