"""Without rich, which is an extra, a terminal gets plain lines and is told what is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from flannel_dp.look.live_show import DriftLine, watch_view
from flannel_dp.look.live_stats import watch_stats
from flannel_dp.look.show import Overview
from flannel_dp.look.stats import Stats
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


def show() -> None:
    steps, event = [False, True], DriftLine(0.0, 4, "route", "deleted", "10.244.7.0/24")
    watch_view(lambda: Overview(()), lambda timeout: [event], stop=lambda: steps.pop(0))


def stats() -> None:
    steps = [False, True]
    watch_stats(lambda: Stats(()), lambda seconds: steps.pop(0))


@pytest.mark.parametrize("watch", [show, stats])
def test_it_prints_plain_lines_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, watch: Callable[[], Any]
) -> None:
    out, err = terminals(monkeypatch)

    watch()

    assert out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert err.getvalue().count("pip install 'flannel-dp[live]'") == 1


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
