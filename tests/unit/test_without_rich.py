"""Without rich, which is an extra, a sync has no progress bar; nothing else needs it."""

from __future__ import annotations

import sys

import pytest

from flannel_dp.look.text import ProgressBar
from tests.lib.stand_ins import Terminal


def terminals(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, Terminal]:
    """Standard output and error on a terminal from now on, and no rich."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def test_a_sync_has_no_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = terminals(monkeypatch)

    with ProgressBar(delay=0.0) as bar:
        bar(1, 2)
        bar(2, 2)

    assert (out.getvalue(), err.getvalue()) == ("", "")


def test_a_bar_is_drawn_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")

    with ProgressBar(delay=0.0) as bar:
        bar(1, 2)

    assert "1/2" in err.getvalue()
