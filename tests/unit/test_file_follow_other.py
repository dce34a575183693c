"""FileSource.follow without inotify, and of what can be read once."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannel_dp.errors import Unavailable
from flannel_dp.sources import file_follow
from flannel_dp.sources.inotify import FileWatch
from tests.lib.followed_file import (
    HEALTHY,
    Following,
    document,
    following,
    replace,
    says,
)

# ---- without inotify ---------------------------------------------------------------


def test_without_inotify_the_file_is_polled(
    leases: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "flannel_dp.sources.inotify.inotify_init1"

    def no_more(flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "inotify")

    monkeypatch.setattr(file_follow, "_POLL", 0.05)
    with caplog.at_level(logging.INFO), monkeypatch.context() as patch:
        patch.setattr(name, no_more)
        with following(leases) as followed:
            followed.box.until(lambda: HEALTHY in followed.box.log)  # it was read twice
            followed.told([2], lambda: replace(leases, document(2)))
            followed.told("line 1, column", lambda: leases.write_bytes(b"{"))
            followed.told("line 1, column", lambda: None)
            followed.told("no such file", leases.unlink)
            followed.told([3], lambda: replace(leases, document(3)))
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            assert "fs.inotify.max_user_instances" in caplog.text

            patch.undo()
            followed.told(HEALTHY, lambda: None)
            monkeypatch.setattr(file_follow, "_POLL", 3600)
            followed.told([4], lambda: replace(leases, document(4)))
            followed.told([5], lambda: replace(leases, document(5)))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_events_that_were_lost_count_as_a_change(leases: Path) -> None:
    watch = FileWatch(str(leases))
    watch.arm()
    other = leases.with_name("other")
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    other.touch()
    assert not watch.read()

    for _ in range(limit // 2 + 1):
        other.unlink()
        other.touch()

    assert watch.read()
    assert not watch.read()
    watch.close()


def test_watches_are_only_those_of_the_path(leases: Path) -> None:
    watch = FileWatch(str(leases))

    def watched() -> int:
        text = Path(f"/proc/self/fdinfo/{watch.fileno()}").read_text()
        return text.count("inotify wd:")

    watch.arm()
    first = watched()
    for number in range(5):
        replace(leases, document(number))
        assert watch.read()
        watch.arm()

    assert first == len(leases.parts)  # each directory from / on, and the file
    assert watched() == first
    watch.close()


# ---- what can be read once ---------------------------------------------------------


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The end of a pipe that becomes standard input; who takes it closes it."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield writer


def test_standard_input_is_delivered_once(stdin: int) -> None:
    with following("-") as followed:
        os.write(stdin, document(1)[:20])
        followed.box.refresh()  # it is on its way anyway
        os.write(stdin, document(1)[20:])
        followed.told([1], lambda: os.close(stdin))
        followed.told("it cannot be read twice", followed.box.refresh)
        assert isinstance(followed.box.take().error, Unavailable)
        followed.told("it cannot be read twice", followed.box.refresh)


def test_standard_input_that_never_ends_does_not_keep_the_agent(stdin: int) -> None:
    with following("-") as followed:
        os.write(stdin, b"{")
        followed.box.until(lambda: followed.box.waits >= 2)
        followed.close()
        assert followed.box.log == []
    os.close(stdin)


def test_standard_input_that_is_cut_short(stdin: int) -> None:
    os.write(stdin, b"{")
    os.close(stdin)
    with following("-") as followed:
        followed.box.until(lambda: followed.box.log)
    assert says("line 1, column")(followed.box.log[0])


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with following("-") as followed:
        followed.box.until(lambda: followed.box.log)
    assert followed.box.log == ["standard input: it is closed"]

    with open(os.devnull) as file:
        pass
    monkeypatch.setattr(sys, "stdin", file)
    with following("-") as followed:
        followed.box.until(lambda: followed.box.log)
    assert says("closed file")(followed.box.log[0])


def test_a_pipe_is_delivered_once_and_waited_for_no_longer_than_wanted(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with following(path) as followed:
        followed.told([1], lambda: path.write_bytes(document(1)))
        followed.told("it cannot be read twice", followed.box.refresh)

    with following(path) as followed:
        followed.box.until(lambda: followed.box.waits)
        followed.close()


def test_a_file_that_became_a_pipe_is_trouble(followed: Following, leases: Path) -> None:
    pipe = leases.with_name("pipe")
    os.mkfifo(pipe)

    followed.told("no regular file any more", lambda: pipe.rename(leases))
    followed.told([2], lambda: replace(leases, document(2)))
