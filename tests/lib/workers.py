"""One run's tests, shared between processes that are forked when all tests are known.

With ``--workers N`` pytest imports and collects once, which takes ten seconds where nothing was
compiled yet. The workers begin with equal parts of the tests; one that comes to its end takes half
of what the one with the most has left. What they report is shown by the process that forked them.
Tests that are marked ``alone`` run when all others have ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import random
import signal
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.lib import isolation, programs

_PR_SET_PDEATHSIG = 1
_SHARE = struct.Struct("=II")  # the next test, and the one after the last

_number: int | None = None


def number() -> int | None:
    """Which worker this process is, counted from 0; None if tests are not shared."""
    return _number


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that one worker of a run fills, and that the others wait for."""
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".made").exists():
            make(folder)
            (folder / ".made").touch()
    return folder


def run(session: pytest.Session, count: int, first: Sequence[str]) -> None:
    """Run the tests by so many processes; those whose names contain one of ``first`` come first."""
    alone = [item for item in session.items if item.get_closest_marker("alone")]
    others = [item for item in session.items if not item.get_closest_marker("alone")]
    if reporter := session.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.showfspath = False  # results of many files come mixed
    gc.collect()
    gc.freeze()  # no worker needs to look through what is shared
    with programs.shared():
        for parts in (_parts(others, first, count), [alone]):
            left = [item for part in parts for item in part]
            while left:
                before, left = left, _Run(session, parts).run()
                parts = [left]  # what was to be the next for a worker that was killed
                assert left != before, "no worker runs a test"


def _parts(items: list[pytest.Item], first: Sequence[str], n: int) -> list[list[pytest.Item]]:
    """Each begins with some of those that take longest and ends with the shortest, unit tests, so
    that none is left with a long one when all others have ended."""
    long = [item for item in items if any(name in item.nodeid for name in first)]
    short = [item for item in items if "/unit/" in item.nodeid and item not in {*long}]
    rest = [item for item in items if item not in {*long, *short}]
    return [[*long[k::n], *_part(rest, k, n), *_part(short, k, n)] for k in range(n)]


def _part(items: list[pytest.Item], k: int, n: int) -> list[pytest.Item]:
    return items[len(items) * k // n : len(items) * (k + 1) // n]


class _Shares:
    """Ranges of the list of tests, one for each worker, in memory that all of them write."""

    def __init__(self, lengths: list[int]) -> None:
        self._count = len(lengths)
        self._memory = mmap.mmap(-1, _SHARE.size * self._count)
        self._lock = os.memfd_create("shares")
        for n in range(self._count):
            self._put(n, sum(lengths[:n]), sum(lengths[: n + 1]))

    def take(self, worker: int) -> int | None:
        """The number of the next test, None if there is none."""
        with self._locked():
            begin, end = self._get(worker)
            if begin == end:
                other = max(range(self._count), key=self._left)
                begin, end = self._get(other)
                if begin == end:
                    return None
                middle = (begin + end) // 2
                self._put(other, begin, middle)
                begin = middle
            self._put(worker, begin + 1, end)
            return begin

    def clear(self) -> None:
        """No worker gets any more."""
        with self._locked():
            for worker in range(self._count):
                self._put(worker, 0, 0)

    def close(self) -> None:
        self._memory.close()
        os.close(self._lock)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._lock, fcntl.LOCK_EX)  # of the process; gone with it
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def _get(self, worker: int) -> tuple[int, int]:
        begin, end = _SHARE.unpack_from(self._memory, _SHARE.size * worker)
        return begin, end

    def _put(self, worker: int, begin: int, end: int) -> None:
        _SHARE.pack_into(self._memory, _SHARE.size * worker, begin, end)

    def _left(self, worker: int) -> int:
        begin, end = self._get(worker)
        return end - begin


# ---- the process that forks ------------------------------------------------------------


class _Run:
    def __init__(self, session: pytest.Session, parts: list[list[pytest.Item]]) -> None:
        self._session = session
        self._items = [item for part in parts for item in part]
        self._unreported = {item.nodeid: item for item in self._items}
        self._shares = _Shares([len(part) for part in parts])
        self._base = vars(session.config)["_tmp_path_factory"].getbasetemp()
        self._pids: dict[Connection, int] = {}
        self._running: dict[Connection, str] = {}
        self._trouble: dict[Connection, str] = {}
        for worker in range(len(parts)):
            self._fork(worker)

    def _fork(self, worker: int) -> None:
        assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
        parent, (theirs, ours) = os.getpid(), Pipe(duplex=False)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == parent:
                    _become(worker, self._session.config, self._base)
                    _work(worker, self._session, self._items, self._shares, ours)
                code = 0
            except BaseException:
                ours.send(("trouble", traceback.format_exc()))
            finally:
                os._exit(code)
        ours.close()
        self._pids[theirs] = pid

    def run(self) -> list[pytest.Item]:
        """Show what the workers report until all have ended; returns the tests that did not run."""
        try:
            while self._pids:
                self._receive()
                if self._session.shouldfail or self._session.shouldstop:
                    break
        finally:
            self._shares.clear()
            while self._pids:  # each ends what it has begun
                self._receive()
            self._shares.close()
        if self._session.shouldfail:
            raise self._session.Failed(self._session.shouldfail)
        if self._session.shouldstop:
            raise self._session.Interrupted(self._session.shouldstop)
        return [*self._unreported.values()]

    def _receive(self) -> None:
        for one in wait([*self._pids]):
            assert isinstance(one, Connection)
            try:
                kind, said = one.recv()
            except EOFError:
                self._ended(one)
            else:
                getattr(self, f"_on_{kind}")(one, said)

    def _on_start(self, one: Connection, nodeid: str) -> None:
        self._running[one] = nodeid

    def _on_report(self, one: Connection, said: dict[str, Any]) -> None:
        hook, config = self._session.config.hook, self._session.config
        report = hook.pytest_report_from_serializable(config=config, data=said)
        hook.pytest_runtest_logreport(report=report)

    def _on_finish(self, one: Connection, nodeid: str) -> None:
        self._running.pop(one, None)
        self._unreported.pop(nodeid, None)

    def _on_trouble(self, one: Connection, said: str) -> None:
        self._trouble[one] = said

    def _on_warning(self, one: Connection, said: dict[str, Any]) -> None:
        self._session.config.hook.pytest_warning_recorded.call_historic(kwargs=said)

    def _ended(self, one: Connection) -> None:
        one.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self._pids.pop(one), 0)[1])
        trouble = self._trouble.pop(one, "")
        if nodeid := self._running.pop(one, None):
            self._fail(nodeid, f"the worker that ran it ended with {code}\n{trouble}")
        elif code:
            self._session.shouldfail = f"a worker ended with {code} outside of a test\n{trouble}"

    def _fail(self, nodeid: str, why: str) -> None:
        item = self._unreported.pop(nodeid)
        report = pytest.TestReport(nodeid, item.location, {}, "failed", why, "call")
        self._session.config.hook.pytest_runtest_logreport(report=report)


# ---- a worker --------------------------------------------------------------------------


class _Reporter:
    """A plug-in that sends what happens to the process that shows it."""

    def __init__(self, config: pytest.Config, end: Connection) -> None:
        self._config, self._end = config, end

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._end.send(("start", nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        said = hook.pytest_report_to_serializable(config=self._config, report=report)
        self._end.send(("report", said))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._end.send(("finish", nodeid))

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        plain = warnings.WarningMessage(
            str(warning_message.message),
            UserWarning,
            warning_message.filename,
            warning_message.lineno,
        )
        said = {"warning_message": plain, "when": when, "nodeid": nodeid, "location": location}
        self._end.send(("warning", said))


def _become(worker: int, config: pytest.Config, base: Any) -> None:
    """Have nothing in common with the others that is written: output, folders, numbers."""
    global _number
    _number = worker
    isolation.isolate_worker()
    gc.set_threshold(20_000, 20, 20)  # what tests leave is little, and looking through all is long
    random.seed()
    plugins = config.pluginmanager
    capture = plugins.get_plugin("capturemanager")
    assert capture is not None
    capture.stop_global_capturing()
    capture.start_global_capturing()
    shown = plugins.unregister(name="terminalreporter")
    plugins.register(SimpleNamespace(_tw=vars(shown)["_tw"]), "terminalreporter")  # for time-outs
    own = base / f"worker-{os.getpid()}"
    own.mkdir(mode=0o700)
    vars(config)["_tmp_path_factory"]._basetemp = own


def _work(
    worker: int,
    session: pytest.Session,
    items: list[pytest.Item],
    shares: _Shares,
    end: Connection,
) -> None:
    hook = session.config.hook
    session.config.pluginmanager.register(_Reporter(session.config, end))
    try:
        this = shares.take(worker)
        while this is not None:
            following = shares.take(worker)  # what of fixtures is kept depends on it
            hook.pytest_runtest_protocol(
                item=items[this], nextitem=None if following is None else items[following]
            )
            this = following
    finally:
        vars(session)["_setupstate"].teardown_exact(None)
        isolation.note_pins()
