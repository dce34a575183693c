"""What the command prints: reports, plans, tables, and progress."""

from __future__ import annotations

import io
import sys
from array import array

import pytest

from flannel_dp import errors
from flannel_dp._core import Diff, Table
from flannel_dp.cluster.rejections import Reason, Rejection
from flannel_dp.look import text
from flannel_dp.look.terminal import coloured, columns, plain, stdout_paint
from flannel_dp.reconcile.plan import DeviceChange, Plan, RulesChange, TablePlan
from flannel_dp.reconcile.report import Report
from flannel_dp.tables.entries import Neighbour, Route
from flannel_dp.tables.results import Outcome
from tests.lib.stand_ins import Terminal

# ---- text --------------------------------------------------------------------------


def rejections(number: int) -> list[Rejection]:
    return [Rejection(f"node{n}", 4, Reason.OVERLAP, f"detail {n}") for n in range(number)]


def failure(number: int) -> Outcome:
    return Outcome("add", "route", Route(f"10.244.{number}.0/24", 7), 22, "the kernel's words")


def test_report_of_trouble() -> None:
    report = Report(
        devices=(DeviceChange("flannel.1", "adopt", ("mtu 1400 -> 1450",)),),
        rejected=rejections(25),
        conflicts=[(Route("10.244.2.0/24", 7), Route("10.244.2.0/24", device=2, protocol=4))],
        failures=[failure(number) for number in range(22)],
        family_errors={6: errors.KernelError(19, "add device", "gone")},
        warnings=("ip_forward is 0",),
        names={2: "eth0"},
    )
    report.tables["route"] |= {"added": 1234, "failed": 22}

    lines = list(text.report_lines(report, "in sync", plain))

    assert lines[0].split() == ["added", "replaced", "removed", "unchanged", "failed"]
    assert lines[1].split() == ["route", "1234", "0", "0", "0", "22"]
    assert "device flannel.1: mtu 1400 -> 1450" in lines
    assert "rejected leases (25):" in lines
    assert "  node19  IPv4  overlap  detail 19" in lines
    assert "  ... and 5 more (--output json has all)" in lines
    conflict = "route 10.244.2.0/24 nhid 7: conflicts with an existing route (not ours): "
    foreign = "route 10.244.2.0/24 dev eth0 proto static"
    assert f"  {conflict}{foreign}; remove it or change the lease" in lines
    assert "failures (23):" in lines
    assert "  IPv6: add device: No such device (ENODEV): gone" in lines
    assert "  ... and 3 more (--output json has all)" in lines
    assert "  ip_forward is 0" in lines
    assert lines[-1] == (
        "not in sync: 1 conflict and 23 failures; 1234 entries changed, 1 device, "
        "25 leases rejected, 0.000 s"
    )


def test_one_entry_is_an_entry() -> None:
    report = Report()
    report.tables["route"]["added"] = 1

    assert "1 entry changed" in [*text.report_lines(report, "in sync", plain)][-1]


def test_colour_changes_no_text() -> None:
    report = Report(rejected=rejections(2), failures=[failure(1)], warnings=("w",))

    without = list(text.report_lines(report, "in sync", plain))
    painted = list(text.report_lines(report, "in sync", coloured))

    assert painted != without
    for code in ("31", "32", "33", "1", "2", "0"):
        painted = [line.replace(f"\x1b[{code}m", "") for line in painted]
    assert painted == without


@pytest.mark.parametrize(
    ("terminal", "environment", "colour"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_colour_is_for_terminals(
    terminal: bool,
    environment: dict[str, str],
    colour: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert (stdout_paint() is coloured) == colour


def test_plan_lines() -> None:
    wanted, held = Table("neighbour"), Table("neighbour")
    wanted.add(Neighbour(3, "10.244.2.0", "02:00:00:00:00:02"))
    held.add(Neighbour(3, "10.244.9.0", "02:00:00:00:00:09"))
    from flannel_dp._core import diff_tables

    plan = Plan((TablePlan(diff_tables(wanted, held), (), {3: "flannel.1"}),))

    lines = list(text.plan_lines(plan, coloured))

    assert lines[0].startswith("\x1b[32m+\x1b[0m neighbour 10.244.2.0 lladdr ")
    assert lines[1].startswith("\x1b[31m-\x1b[0m neighbour 10.244.9.0 lladdr ")
    assert lines[2].split() == [
        "neighbours", "1", "added", "0", "replaced", "1", "removed", "0", "unchanged",
    ]  # fmt: skip
    assert lines[-1] == "nothing was changed: this is what sync would do"


RULES = RulesChange("nft", ("+ nft table ip flannel-dp", "- iptables -t nat FLANNEL-DP-POSTRTG"))


def test_rules_in_a_plan() -> None:
    plan = Plan((), rules=RULES)

    assert not plan.is_empty
    assert [*plan.lines()] == [*RULES.changes]
    painted = [*text.plan_lines(plan, coloured)]
    assert painted[0] == "\x1b[32m+\x1b[0m nft table ip flannel-dp"
    assert plan.to_json()["rules"] == {"engine": "nft", "changes": [*RULES.changes]}
    settled = Plan((), rules=RulesChange("nft"))
    assert settled.is_empty
    assert settled.to_json()["rules"] == {"engine": "nft", "changes": []}


def test_rules_and_subnet_file_in_a_report() -> None:
    report = Report(rules=RULES, subnet_file="/run/flannel/subnet.env")
    report.problems = {
        "firewall": errors.FlannelDPError("nft: exit 1: no"),
        "subnet file": errors.KernelError(28, "write /run/flannel/subnet.env"),
    }

    lines = [*text.report_lines(report, "in sync", plain)]
    document = report.to_json()

    assert "firewall nft: + nft table ip flannel-dp" in lines
    assert "/run/flannel/subnet.env: written" in lines
    assert "failures (2):" in lines
    assert "  firewall: nft: exit 1: no" in lines
    assert document["ok"] is False
    assert document["rules"] == {"engine": "nft", "changes": [*RULES.changes]}
    assert document["subnet_file"] == "/run/flannel/subnet.env"
    assert [each["table"] for each in document["failures"]] == ["firewall", "subnet file"]
    assert "write /run/flannel/subnet.env" in document["failures"][1]["detail"]
    untouched = Report().to_json()
    assert (untouched["rules"], untouched["subnet_file"], untouched["ok"]) == (None, None, True)


def test_empty_plan() -> None:
    plan = Plan((TablePlan(Diff(Table("route")), ()),))

    assert list(text.plan_lines(plan, plain))[-1] == "nothing to do"


def test_columns() -> None:
    assert list(columns([("a", "1"), ("bbb", "22")], right=[1])) == ["a     1", "bbb  22"]
    assert list(columns([("a", ""), ("b", "")], indent="  ")) == ["  a", "  b"]
    assert list(columns([])) == []


# ---- the progress bar --------------------------------------------------------------


def stderr_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal that is 100 columns wide."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return terminal


def test_progress_bar_of_a_long_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stderr_terminal(monkeypatch)

    with text.ProgressBar(delay=0) as bar:
        for done in array("I", [0, 4096, 10_000]):
            bar(done, 10_000)

    assert "10000/10000" in stderr.getvalue()


def test_no_progress_bar_in_the_first_second(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stderr_terminal(monkeypatch)

    with text.ProgressBar(delay=3600) as bar:
        bar(1, 2)

    assert stderr.getvalue() == ""


def test_no_progress_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with text.ProgressBar(delay=0) as bar:
        bar(1, 2)

    assert capsys.readouterr() == ("", "")


def test_a_plan_says_what_sync_would_fail_at() -> None:
    plan = Plan(
        (),
        failures=[failure(1)],
        family_errors={6: errors.SourceError("no lease")},
        problems={"firewall": errors.FlannelDPError("nft: exit 1")},
        held={4: ["node7"]},
    )

    lines = [*text.plan_lines(plan, plain)]
    document = plan.to_json()

    assert "sync would fail at (3):" in lines
    assert "  IPv6: no lease" in lines
    assert "  firewall: nft: exit 1" in lines
    assert any("10.244.1.0/24" in line for line in lines)
    assert lines[-1] == "nothing would be written, and not all is in sync"
    assert (document["ok"], document["empty"]) == (False, True)
    assert [one["table"] for one in document["failures"]] == ["route", "IPv6", "firewall"]
    assert document["held"] == {"IPv4": ["node7"]}
    assert Plan(()).ok
    assert [*text.plan_lines(Plan(()), plain)][-1] == "nothing to do"
