"""A thread that cannot begin is an error, and not a wait without an end."""

from __future__ import annotations

import threading

import pytest

from flannel_dp import threads
from flannel_dp.kernel.netns import call_on_thread
from flannel_dp.threads import Thread


def test_a_thread_that_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has made it, and it ended before its first line, as without memory."""
    name = "_start_new_thread" if hasattr(threading, "_start_new_thread") else ""
    name = name or "_start_joinable_thread"
    monkeypatch.setattr(threading, name, lambda *args, **keywords: None)
    monkeypatch.setattr(threads, "_SECONDS", 0.05)

    thread = Thread(target=print)
    with pytest.raises(MemoryError, match="could not begin"):
        thread.start()
    thread.join()  # an error here would hide that there is no memory
    with pytest.raises(MemoryError):
        call_on_thread(print)


def test_one_that_begins() -> None:
    done: list[int] = []
    thread = Thread(target=done.append, args=(1,), daemon=True)
    thread.start()
    thread.join()
    assert done == [1]
    with pytest.raises(RuntimeError):
        thread.start()
