"""A file that is followed, and the news that the source delivers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import SourceError
from flannel_dp.sources import Call, Change, FollowedSource, Inbox, Snapshot
from flannel_dp.sources.file import FileSource
from tests.lib.waiting import LIMIT

HEALTHY = "healthy"


def document(*numbers: int) -> bytes:
    leases = [
        {"Subnet": f"10.244.{number}.0/24", "PublicIP": f"192.0.2.{number}"} for number in numbers
    ]
    return json.dumps({"leases": leases}).encode()


class Box(Inbox):
    """An inbox that remembers, in ``log``, what was put into it: the numbers of the leases of
    a snapshot, the text of a trouble, HEALTHY."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[list[int] | str] = []
        self.waits = 0
        self.news = threading.Condition()

    def _note(self, what: list[int] | str) -> None:
        with self.news:
            self.log.append(what)
            self.news.notify_all()

    def put(self, news: Snapshot | Change) -> None:
        assert isinstance(news, Snapshot)
        super().put(news)
        self._note([int(lease.subnet.split(".")[2]) for lease in news.claims.leases])

    def trouble(self, error: SourceError) -> None:
        assert error.hint
        super().trouble(error)
        self._note(error.message)

    def healthy(self) -> None:
        super().healthy()
        self._note(HEALTHY)

    def wait(self, timeout: float | None = None, fds: Iterable[int] = ()) -> Call:
        with self.news:
            self.waits += 1
            self.news.notify_all()
        return super().wait(timeout, fds)

    def until(self, predicate: Callable[[], object]) -> None:
        with self.news:
            assert self.news.wait_for(predicate, LIMIT), self.log

    def expect(self, *, after: int, what: Callable[[list[int] | str], bool]) -> None:
        """Wait until ``what`` was delivered after the first ``after`` entries."""
        self.until(lambda: any(what(one) for one in self.log[after:]))


def says(text: str) -> Callable[[list[int] | str], bool]:
    return lambda one: isinstance(one, str) and text in one


class Following:
    """A source that is followed on a thread; ``box`` has what it delivers."""

    def __init__(self, source: FollowedSource, before: Callable[[], None] = lambda: None) -> None:
        self.box = Box()
        self._source, self._before = source, before
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._before()
        self._source.follow(self.box)

    def told(self, what: list[int] | str, do: Callable[[], object]) -> None:
        """Do it, and wait until ``what`` was delivered (part of an error's text will do)."""
        after = len(self.box.log)
        do()
        self.box.expect(after=after, what=says(what) if isinstance(what, str) else what.__eq__)

    def close(self) -> None:
        """Stop; a second time it does nothing."""
        self.box.stop()
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()
        self.box.close()


@contextmanager
def following(path: object, **options: Any) -> Iterator[Following]:
    followed = Following(FileSource(str(path)), **options)
    try:
        yield followed
    finally:
        followed.close()


def replace(path: Path, data: bytes) -> None:
    """As careful writers do it."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.rename(path)


@pytest.fixture(name="leases")
def leases_fixture(tmp_path: Path) -> Path:
    path = tmp_path / "conf" / "leases.json"
    path.parent.mkdir()
    path.write_bytes(document(1))
    return path


@pytest.fixture(name="followed")
def followed_fixture(leases: Path) -> Iterator[Following]:
    """``leases`` is followed and was delivered once."""
    with following(leases) as one:
        one.box.until(lambda: one.box.log == [[1]])
        yield one
