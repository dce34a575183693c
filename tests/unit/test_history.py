"""What a process leaves to the next one of how far a store was."""

from __future__ import annotations

from pathlib import Path

import pytest

from flannel_dp.sources.base import GRACE_SECONDS
from flannel_dp.sources.etcd.position import Position
from flannel_dp.sources.history import History
from flannel_dp.sources.kube.nodes import ResourceVersion


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(name="path")
def path_fixture(tmp_path: Path) -> str:
    return str(tmp_path / "note")


def listed(path: str, revision: int, cluster: int = 2**64 - 1) -> str:
    """What a new process says of its first listing."""
    return History(Position, path).listed("etcd", Position(revision, cluster))


def test_a_cluster_that_went_on_is_no_news(path: str) -> None:
    assert listed(path, 7) == ""
    assert listed(path, 7) == ""
    assert listed(path, 8) == ""


def test_an_earlier_revision_and_another_cluster_are_told(path: str) -> None:
    listed(path, 7)
    assert "its revision is 3 and was 7" in listed(path, 3)
    assert "its cluster ID is a and was ffffffffffffffff" in listed(path, 9, 10)


def test_what_was_watched_counts(path: str) -> None:
    history = History(Position, path)
    history.listed("etcd", Position(7, 1))
    history.advanced(Position(9, 1))
    assert "was 9" in history.listed("etcd", Position(8, 1))
    other = History(Position, path)
    other.advanced(Position(12, 1))
    other.write()
    assert "was 12" in listed(path, 11, 1)


def test_the_moment_before_a_fresh_start_is_kept_as_long_as_peers_are(path: str) -> None:
    listed(path, 7, 1)
    clock = Clock()
    history = History(Position, path, clock)
    assert history.listed("etcd", Position(3, 1))
    clock.now += GRACE_SECONDS - 1
    assert history.listed("etcd", Position(4, 1)) == ""
    assert "is 4 and was 7" in listed(path, 4, 1)

    clock.now += 1
    history.write()
    assert listed(path, 4, 1) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"revision": "x", "cluster": 1}', "\ud800"])
def test_a_broken_note_says_nothing_and_is_replaced(path: str, text: str) -> None:
    Path(path).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert listed(path, 3) == ""
    assert "was 3" in listed(path, 2)


def test_no_note_is_no_error(tmp_path: Path) -> None:
    for path in ("", str(tmp_path / "nowhere" / "note")):
        history = History(Position, path)
        assert history.listed("etcd", Position(7, 1)) == ""
        assert history.listed("etcd", Position(3, 1))
    assert [*tmp_path.iterdir()] == []


def test_an_earlier_resource_version_is_told(path: str) -> None:
    def of_a_new_process(version: str) -> str:
        return History(ResourceVersion, path).listed("api", ResourceVersion(version))

    assert of_a_new_process("1000") == ""
    assert of_a_new_process("1001") == ""
    assert "its resourceVersion is 999 and was 1001" in of_a_new_process("999")
    assert "was 1001" in of_a_new_process("999")
    assert of_a_new_process("opaque") == ""  # cannot be compared
