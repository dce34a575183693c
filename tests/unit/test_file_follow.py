"""FileSource.follow: what happens to a file is told once, and nothing costs nothing."""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib  # here, and not on a thread that may not read Python's own files
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from flannel_dp.backoff import Backoff
from flannel_dp.errors import Unavailable
from flannel_dp.sources import FollowedSource, Inbox, Snapshot, file_follow
from flannel_dp.sources import file as file_module
from flannel_dp.sources.file import FileSource
from tests.lib.followed_file import (
    HEALTHY,
    Following,
    document,
    following,
    replace,
    says,
)
from tests.lib.waiting import LIMIT, NEVER

assert hashlib.blake2b
assert random.uniform

NOBODY = 65534


# ---- what is delivered -------------------------------------------------------------


def test_the_first_delivery_wakes_the_agent(leases: Path) -> None:
    woken = threading.Event()
    inbox = Inbox(woken.set)
    source: FollowedSource = FileSource(leases)
    thread = threading.Thread(target=source.follow, args=(inbox,), daemon=True)
    thread.start()
    assert woken.wait(LIMIT)
    delivery = inbox.take()
    inbox.stop()
    thread.join(LIMIT)

    assert delivery.snapshot is not None
    assert [lease.subnet for lease in delivery.snapshot.claims.leases] == ["10.244.1.0/24"]
    assert delivery.snapshot.origin == str(leases)
    assert delivery.error is None


def test_an_atomic_replacement(followed: Following, leases: Path) -> None:
    followed.told([2, 3], lambda: replace(leases, document(2, 3)))
    followed.told([4], lambda: replace(leases, document(4)))

    assert followed.box.log == [[1], [2, 3], [4]]


def test_a_file_written_in_place_is_read_when_it_is_closed(
    followed: Following, leases: Path
) -> None:
    followed.told([2], lambda: leases.write_bytes(document(2)))

    assert followed.box.log == [[1], [2]]  # and not what was there before it was closed


def test_a_write_through_another_name_of_the_file(
    followed: Following, leases: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    followed.told(HEALTHY, lambda: other.hardlink_to(leases))  # its link count is an attribute

    followed.told([2], lambda: other.write_bytes(document(2)))


def test_deleted_and_made_anew(followed: Following, leases: Path) -> None:
    followed.told("there is no such file", leases.unlink)
    assert followed.box.take().error is not None

    followed.told([2], lambda: replace(leases, document(2)))
    assert followed.box.take().error is None


def test_a_broken_version_is_trouble_and_a_good_one_its_end(
    followed: Following, leases: Path
) -> None:
    followed.box.take()

    followed.told("expected a list", lambda: replace(leases, b'{"leases": 7}'))
    delivery = followed.box.take()
    assert delivery.snapshot is None
    assert isinstance(delivery.error, Unavailable)
    followed.told("it is empty", lambda: replace(leases, b" \n"))
    followed.told([2], lambda: replace(leases, document(2)))
    assert followed.box.take().error is None


def test_half_a_document_changes_nothing(followed: Following, leases: Path) -> None:
    followed.box.take()
    whole = document(1, 2)
    with leases.open("wb", buffering=0) as file:
        file.write(whole[:40])
        followed.told("line 1, column", followed.box.refresh)
        assert followed.box.take().snapshot is None
        file.write(whole[40:])
        assert followed.box.take().error is not None
        followed.told([1, 2], file.close)


def test_the_last_good_content_again_ends_the_trouble_without_a_delivery(
    followed: Following, leases: Path
) -> None:
    followed.box.take()
    followed.told("line 1, column", lambda: replace(leases, b"{"))

    followed.told(HEALTHY, lambda: replace(leases, document(1)))

    delivery = followed.box.take()
    assert delivery.error is None
    assert delivery.snapshot is None


def test_the_same_content_is_delivered_once(followed: Following, leases: Path) -> None:
    followed.told(HEALTHY, lambda: replace(leases, document(1)))
    followed.told(HEALTHY, lambda: leases.write_bytes(document(1)))
    followed.told(HEALTHY, leases.touch)

    assert [1] not in followed.box.log[1:]


def test_a_refresh_delivers_in_any_case(followed: Following, leases: Path) -> None:
    followed.told([1], followed.box.refresh)
    followed.told([1], followed.box.refresh)

    followed.told("no such file", leases.unlink)
    followed.told("no such file", followed.box.refresh)
    followed.told([1], lambda: replace(leases, document(1)))  # what was asked for, at last
    followed.told(HEALTHY, lambda: replace(leases, document(1)))


def test_a_thousand_replacements_end_with_the_last(followed: Following, leases: Path) -> None:
    for number in range(1000):
        replace(leases, document(number % 250, 251))
    followed.told([7, 251], lambda: replace(leases, document(7, 251)))

    delivery = followed.box.take()
    assert delivery.error is None
    assert delivery.snapshot is not None
    assert len(delivery.snapshot.claims.leases) == 2
    assert len(followed.box.log) < 1000  # those that came together were one


def test_other_files_of_the_directory_do_not_matter(followed: Following, leases: Path) -> None:
    for number in range(100):
        replace(leases.with_name(f"other{number}"), b"x")
    followed.told([2], lambda: replace(leases, document(2)))

    assert followed.box.log == [[1], [2]]


# ---- paths -------------------------------------------------------------------------


def test_a_file_that_comes_later_with_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "leases.json"
    with following(path) as followed:
        followed.box.until(lambda: followed.box.log)
        assert says("there is no such file")(followed.box.log[0])

        followed.told("no such file", path.parent.parent.mkdir)
        followed.told("no such file", path.parent.mkdir)
        followed.told([1], lambda: path.write_bytes(document(1)))


def test_a_kubernetes_config_map(tmp_path: Path) -> None:
    """The kubelet makes a new directory and swaps the link ``..data`` to it."""
    volume = tmp_path / "volume"

    def publish(version: int) -> None:
        directory = volume / f"..version_{version}"
        directory.mkdir(parents=True)
        (directory / "leases.json").write_bytes(document(version))
        link = volume / "..data_tmp"
        link.symlink_to(directory.name)
        link.rename(volume / "..data")
        shutil.rmtree(volume / f"..version_{version - 1}", ignore_errors=True)

    publish(1)
    (volume / "leases.json").symlink_to("..data/leases.json")
    (tmp_path / "etc").symlink_to(volume)
    with following(tmp_path / "etc" / "leases.json") as followed:
        followed.box.until(lambda: followed.box.log == [[1]])
        for version in (2, 3, 4):
            followed.told([version], lambda version=version: publish(version))

        second = tmp_path / "second"
        second.mkdir()
        (second / "leases.json").write_bytes(document(9))
        link = tmp_path / "new"
        link.symlink_to(second)
        followed.told([9], lambda: link.rename(tmp_path / "etc"))


def test_a_directory_that_goes_away_and_comes_back(
    followed: Following, leases: Path, tmp_path: Path
) -> None:
    home, away = leases.parent, tmp_path / "away"

    followed.told("there is no such file", lambda: home.rename(away))
    followed.told(HEALTHY, lambda: away.rename(home))
    followed.told("there is no such file", lambda: shutil.rmtree(home))

    def come_back() -> None:
        home.mkdir()
        leases.write_bytes(document(2))

    followed.told([2], come_back)
    followed.told([3], lambda: replace(leases, document(3)))


def test_any_directory_above_may_move(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c" / "leases.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(document(1))
    with following(path) as followed:
        followed.box.until(lambda: followed.box.log == [[1]])

        followed.told("no such file", lambda: (tmp_path / "a").rename(tmp_path / "z"))
        followed.told(HEALTHY, lambda: (tmp_path / "z").rename(tmp_path / "a"))
        followed.told([2], lambda: replace(path, document(2)))


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to(second)
    second.symlink_to(first)
    (tmp_path / "leases.json").write_bytes(document(1))
    with following(first) as followed:
        followed.box.until(lambda: followed.box.log)
        assert says("symbolic links")(followed.box.log[0])

        (tmp_path / "new").symlink_to("leases.json")
        followed.told([1], lambda: (tmp_path / "new").rename(second))


def test_a_relative_path_with_dots(
    tmp_path: Path, leases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    monkeypatch.chdir(tmp_path)
    with following("link/../../conf/./leases.json") as followed:  # .. of where the link leads
        followed.box.until(lambda: followed.box.log == [[1]])

        followed.told([2], lambda: replace(leases, document(2)))


def test_a_file_in_the_place_of_a_directory_and_the_reverse(
    followed: Following, leases: Path
) -> None:
    home = leases.parent
    shutil.rmtree(home)
    followed.told("Not a directory", home.touch)
    home.unlink()
    followed.told("it is a directory", lambda: leases.mkdir(parents=True))
    leases.rmdir()
    followed.told([2], lambda: replace(leases, document(2)))


# ---- trouble -----------------------------------------------------------------------


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can get at, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def become_nobody() -> None:
    """Touch files as nobody does, on this thread alone (setfsuid(2)); root may anything."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).setfsuid(NOBODY)


def test_permission_lost_and_given_back(public: Path) -> None:
    path = public / "leases.json"
    path.write_bytes(document(1))
    path.chmod(0o644)
    with following(path, before=become_nobody) as followed:
        followed.box.until(lambda: followed.box.log == [[1]])

        followed.told("Permission denied", lambda: path.chmod(0))
        followed.told(HEALTHY, lambda: path.chmod(0o644))
    assert followed.box.take().error is None


def test_a_directory_that_cannot_be_read_is_not_watched_until_it_can(
    public: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_follow, "_POLL", 0.05)
    path = public / "leases.json"
    path.write_bytes(document(1))
    path.chmod(0o644)
    with caplog.at_level(logging.INFO), following(path, before=become_nobody) as followed:
        followed.box.until(lambda: followed.box.log == [[1]])

        followed.told("Permission denied", lambda: public.chmod(0))
        followed.told(HEALTHY, lambda: public.chmod(0o755))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "let this user read that directory" in caplog.text


def test_an_error_that_passes_without_an_event_is_tried_again(
    leases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[float] = []
    real = file_module._read_unchanged

    def read(path: str, regular: bool) -> bytes | None:
        reads.append(time.monotonic())
        if len(reads) < 4:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, regular)

    monkeypatch.setattr(file_module, "_read_unchanged", read)
    monkeypatch.setattr(file_follow, "Backoff", lambda **_: Backoff(first=0.02, most=1.0))
    with following(leases) as followed:
        followed.box.until(lambda: len(followed.box.log) == 4)

    assert [says("Input/output error")(one) for one in followed.box.log[:3]] == [True] * 3
    assert followed.box.log[3] == [1]
    pauses = [later - earlier for earlier, later in pairwise(reads)]
    assert all(pause >= 0.75 * 0.02 * 2**n for n, pause in enumerate(pauses))


def test_a_broken_document_is_not_read_again_without_an_event(
    followed: Following, leases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "next", lambda self: 0.01)
    followed.told("line 1, column", lambda: replace(leases, b"["))

    assert thread_switches(followed.thread, over=0.3) == 0


def test_an_error_does_not_hold_on_to_what_was_read(followed: Following, leases: Path) -> None:
    followed.told("line 1, column", lambda: replace(leases, document(1, 2)[:-1]))

    error = followed.box.take().error
    assert error is not None
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_nothing_is_kept_of_what_was_delivered(
    followed: Following, wait_until: Callable[..., None]
) -> None:
    alone: list[object] = [object()]
    taken: list[object] = [followed.box.take().snapshot]
    assert isinstance(taken[0], Snapshot)

    wait_until(lambda: sys.getrefcount(taken[0]) == sys.getrefcount(alone[0]))
    assert [type(one) for one in gc.get_referrers(taken[0].claims)] == [Snapshot]


# ---- cost --------------------------------------------------------------------------


def switches(thread: threading.Thread) -> int:
    """How often the thread went to sleep so far."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def thread_switches(thread: threading.Thread, over: float) -> int:
    """How often a thread that is about to fall asleep was woken in so many seconds."""
    last = -1
    pause = threading.Event()
    while last != (last := switches(thread)):
        pause.wait(0.05)
    pause.wait(over)
    return switches(thread) - last


def test_nothing_happens_while_nothing_happens(followed: Following) -> None:
    assert thread_switches(followed.thread, over=1.0) == 0


def test_a_busy_directory_further_up_wakes_nobody(followed: Following, tmp_path: Path) -> None:
    assert thread_switches(followed.thread, over=0) == 0
    before = switches(followed.thread)
    for number in range(100):
        (tmp_path / f"file{number}").touch()
        (tmp_path / f"file{number}").unlink()

    assert thread_switches(followed.thread, over=0) == 0
    assert switches(followed.thread) == before


def test_it_ends_at_once(leases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_follow, "Backoff", lambda **_: Backoff(first=NEVER, most=NEVER))
    leases.unlink()
    with following(leases) as followed:
        followed.box.expect(after=0, what=says("no such file"))
        followed.close()


def test_no_descriptor_is_left_open(leases: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(20):
        with following(leases) as followed:
            followed.box.until(lambda: followed.box.log)

    assert descriptors() == before
