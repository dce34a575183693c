"""The command without a kernel: flags, exit codes, and what is printed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import errors, render
from flannel_dp._core import Diff, Table
from flannel_dp.admission import Reason, Rejection
from flannel_dp.cli import command, main
from flannel_dp.dataplane import DataPlane
from flannel_dp.entries import Neighbour, Route
from flannel_dp.flags import normalise
from flannel_dp.hostrules import RulesOptions
from flannel_dp.output import coloured, columns, plain, stdout_paint
from flannel_dp.plan import DeviceChange, Plan, RulesChange, TablePlan
from flannel_dp.report import Outcome, Report

CONF = '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}'


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Flags that name a good network configuration and an empty cluster."""
    conf, leases = tmp_path / "net-conf.json", tmp_path / "leases.json"
    conf.write_text(CONF)
    leases.write_text('{"leases": []}')
    return ["--net-conf", str(conf), "--leases", str(leases)]


def raise_in_plan(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def plan(*_: object) -> Plan:
        raise error

    monkeypatch.setattr(DataPlane, "plan", plan)


# ---- flags -----------------------------------------------------------------------


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0

    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in ("clean", "explain", "plan", "show", "sync"))
    assert all(f"\n    {code} " in out for code in (0, 1, 2, 3, 4, 5, 77, 130))


@pytest.mark.parametrize("name", sorted(command.commands))
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0

    out = capsys.readouterr().out
    assert "--net-conf, --net-config-path FILE" in out
    assert "CAP_NET_ADMIN" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0

    assert capsys.readouterr().out.startswith("flannel-dp ")


def test_help_imports_nothing_but_click() -> None:
    script = (
        "import sys\nfrom flannel_dp.cli import main\nmain(['sync', '--help'])\n"
        "heavy = {'pyroute2', 'rich', 'msgspec', 'asyncio', 'ipaddress', 'json', 'logging',\n"
        "         'socket', 'flannel_dp._core', 'flannel_dp.dataplane', 'flannel_dp.config'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["sync", "-iface", "eth0"], ["sync", "--iface", "eth0"]),
        (["sync", "-iface=eth0"], ["sync", "--iface=eth0"]),
        (["-version"], ["--version"]),
        (["sync", "-allow-shrink"], ["sync", "--allow-shrink"]),
        (["sync", "--public-ip", "192.0.2.1"], ["sync", "--public-ip", "192.0.2.1"]),
        (["sync", "-leases", "-"], ["sync", "--leases", "-"]),
        (["sync", "-v", "-vv", "-h"], ["sync", "-v", "-vv", "-h"]),
        (["sync", "-unknown"], ["sync", "-unknown"]),
        (["explain", "--", "-iface"], ["explain", "--", "-iface"]),
        (["sync", "-net-config-path=a=b"], ["sync", "--net-config-path=a=b"]),
        # Switches take values there.
        (["sync", "-ip-masq"], ["sync", "--ip-masq"]),
        (["sync", "-ip-masq=true"], ["sync", "--ip-masq"]),
        (["sync", "--ip-masq=1"], ["sync", "--ip-masq"]),
        (["sync", "-ip-masq=false"], ["sync", "--no-ip-masq"]),
        (["sync", "--ip-masq=F"], ["sync", "--no-ip-masq"]),
        (["sync", "-ip-masq=maybe"], ["sync", "--ip-masq=maybe"]),
        (["sync", "--iptables-forward-rules=false"], ["sync", "--no-iptables-forward-rules"]),
        (["sync", "--iptables-forward-rules=TRUE"], ["sync", "--iptables-forward-rules"]),
        (
            ["sync", "-ip-masq-fully-random-disable=false"],
            ["sync", "--no-ip-masq-fully-random-disable"],
        ),
        (["sync", "--", "-ip-masq=false"], ["sync", "--", "-ip-masq=false"]),
    ],
)
def test_one_dash_is_as_good_as_two(given: list[str], made: list[str]) -> None:
    assert normalise(given, (command, *command.commands.values())) == made


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sync"], "give --leases, --etcd-endpoints or --kube-subnet-mgr"),
        (["sync", "--leases"], "'--leases' requires an argument"),
        (["fly"], "No such command 'fly'"),
        (["sync", "--frobnicate"], "No such option"),
        (["clean", "--allow-shrink"], "No such option"),
        (["show", "--output", "xml"], "'xml' is not one of 'text', 'json'"),
        (["explain"], "Missing argument 'ADDRESS'"),
        (["explain", "10.0.0.1", "10.0.0.2"], "unexpected extra argument"),
        (["sync", "--leases", "x", "-ip-masq=maybe"], "'--ip-masq' does not take a value"),
        (["sync", "--leases", "x", "--firewall", "ufw"], "'ufw' is not one of 'auto', 'nft'"),
    ],
)
def test_wrong_use_exits_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flannel-dp: error: ")
    assert words in err
    assert err.endswith("--help'\n")
    assert len(err.splitlines()) == 2


def test_wrong_use_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", "--output", "json"]) == 2

    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["ok"]) == (1, False)
    assert set(document["error"]) == {"type", "message", "hint", "exit_code"}
    assert document["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FLANNELD_NET_CONFIG_PATH", "/nowhere/conf", "/nowhere/conf"),
        ("FLANNELD_KUBE_ANNOTATION_PREFIX", "A/B", "'A/B'"),
    ],
)
def test_environment(
    variable: str,
    value: str,
    words: str,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    flags = files[2:] if "CONFIG" in variable else files

    assert main(["plan", *flags]) == 2

    assert words in capsys.readouterr().err


def test_flags_reach_the_data_plane(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def remember(self: DataPlane, config: Any, **given: Any) -> None:
        seen.update(given)
        raise errors.ConfigError("enough")

    monkeypatch.setattr(DataPlane, "__init__", remember)
    monkeypatch.setenv("FLANNELD_PUBLIC_IPV6", "2001:db8::1")
    flags = ["--iface", "eth0", "--public-ip", "192.0.2.1", "--subnet", "10.244.1.0/24"]
    flags += ["--netns", "host1", "--take-over", "--allow-shrink", "--no-nexthops"]
    flags += ["--iface", "192.0.2.1", "--iface-regex", "^eth", "--iface-can-reach", "192.0.2.9"]
    flags += ["--behind-nat"]

    assert main(["sync", *files, *flags]) == 2

    assert capsys.readouterr().err == "flannel-dp: error: enough\n"
    assert seen == {
        "iface": ("eth0", "192.0.2.1"),
        "iface_regex": ("^eth",),
        "iface_can_reach": "192.0.2.9",
        "behind_nat": True,
        "public_ip": "192.0.2.1",
        "public_ipv6": "2001:db8::1",
        "subnet": "10.244.1.0/24",
        "netns": "host1",
        "take_over": True,
        "allow_shrink": True,
        "nexthops": False,
        "ip_blackhole_route": False,
        "rules": RulesOptions(),
        "subnet_file": "",  # one file serves one node, and --netns names another
        "counters": None,
    }


Given = Callable[..., dict[str, Any]]


@pytest.fixture
def given(files: list[str], monkeypatch: pytest.MonkeyPatch) -> Given:
    """``given("--ip-masq")`` is what ``sync`` with these flags gives to the data plane."""
    seen: dict[str, Any] = {}

    def remember(self: DataPlane, config: Any, **options: Any) -> None:
        seen.update(options)
        raise errors.ConfigError("enough")

    def run(*flags: str) -> dict[str, Any]:
        assert main(["sync", *files, *flags]) == 2
        return seen

    monkeypatch.setattr(DataPlane, "__init__", remember)
    return run


@pytest.mark.parametrize(
    ("flags", "rules"),
    [
        ([], RulesOptions()),
        (["--ip-masq"], RulesOptions(ip_masq=True, required=True)),
        (["-ip-masq=false", "--iptables-forward-rules=false"], RulesOptions(forward=False)),
        (["--ip-masq-fully-random-disable"], RulesOptions(random_fully=False)),
        (["--guard-underlay"], RulesOptions(guard=True, required=True)),
        (["--firewall", "nft"], RulesOptions(engine="nft", required=True)),
        (["--firewall", "none"], None),
    ],
)
def test_flags_of_the_firewall(flags: list[str], rules: RulesOptions | None, given: Given) -> None:
    assert given(*flags)["rules"] == rules


@pytest.mark.parametrize(
    ("variable", "value", "rules"),
    [
        ("FLANNELD_IP_MASQ", "true", RulesOptions(ip_masq=True, required=True)),
        ("FLANNELD_IP_MASQ", "false", RulesOptions()),
        ("FLANNELD_IPTABLES_FORWARD_RULES", "false", RulesOptions(forward=False)),
        ("FLANNELD_IP_MASQ_FULLY_RANDOM_DISABLE", "true", RulesOptions(random_fully=False)),
    ],
)
def test_environment_of_the_firewall(
    variable: str, value: str, rules: RulesOptions, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    assert given()["rules"] == rules


def test_a_flag_beats_the_environment(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLANNELD_IP_MASQ", "true")
    monkeypatch.setenv("FLANNELD_SUBNET_FILE", "/from/environment")

    seen = given("-ip-masq=false", "--subnet-file", "/from/flag")

    assert (seen["rules"], seen["subnet_file"]) == (RulesOptions(), "/from/flag")


@pytest.mark.parametrize(
    ("flags", "environment", "path"),
    [
        ([], "", "/run/flannel/subnet.env"),
        (["--netns", "host1"], "", ""),
        (["--netns", "host1", "--subnet-file", "/a/b"], "", "/a/b"),
        (["--subnet-file="], "", ""),
        ([], "/from/environment", "/from/environment"),
        (["--netns", "host1"], "/from/environment", "/from/environment"),
    ],
)
def test_where_the_subnet_file_is(
    flags: list[str],
    environment: str,
    path: str,
    given: Given,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if environment:
        monkeypatch.setenv("FLANNELD_SUBNET_FILE", environment)

    assert given(*flags)["subnet_file"] == path


@pytest.mark.parametrize("flag", ["--ip-masq", "--guard-underlay"])
@pytest.mark.parametrize("name", ["sync", "plan"])
def test_rules_and_no_firewall_contradict_each_other(
    name: str, flag: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, *files, flag, "--firewall", "none"]) == 2

    assert f"error: {flag} needs a firewall, and --firewall is none" in capsys.readouterr().err


def test_a_guard_without_a_tunnel_is_refused(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(files[1]).write_text(CONF.replace("vxlan", "host-gw"))

    assert main(["sync", *files, "--guard-underlay"]) == 2

    assert "--guard-underlay guards the VXLAN port" in capsys.readouterr().err


# ---- errors and exit codes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x", hint="y"), 2),
        (errors.SourceError("x", hint="y"), 4),
        (errors.Unavailable("x", hint="y"), 4),
        (errors.ShrinkRefused("x", hint="y"), 4),
        (errors.Busy("x", hint="y"), 5),
        (errors.LeaseRejected("x", reason="overlap", hint="y"), 1),
        (errors.kernel_error(1, "x"), 77),
        (errors.kernel_error(17, "x"), 1),
        (errors.kernel_error(22, "x"), 1),
    ],
)
def test_exit_code_of_each_error(
    error: errors.FlannelDPError,
    code: int,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raise_in_plan(monkeypatch, error)

    assert main(["plan", *files, "--output", "json"]) == code

    out, err = capsys.readouterr()
    hint = f"hint: {error.hint}\n" if error.hint else ""
    assert err == f"flannel-dp: error: {error.message}\n{hint}"
    assert json.loads(out)["error"] == {
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "exit_code": code,
    }


def test_a_bug_is_one_line_and_a_traceback_on_demand(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_plan(monkeypatch, RuntimeError("boom"))

    assert main(["plan", *files]) == 1
    assert capsys.readouterr().err == (
        "flannel-dp: error: unexpected RuntimeError: boom\n"
        "hint: run again with -v and report what it prints\n"
    )
    assert main(["plan", *files, "-v"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interrupt_exits_130(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_plan(monkeypatch, KeyboardInterrupt())

    assert main(["plan", *files]) == 130

    assert capsys.readouterr().err.strip() == "flannel-dp: interrupted"


def test_a_reader_that_went_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    done = subprocess.run(
        [sys.executable, "-m", "flannel_dp", "--help"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_goes_away_midway_is_no_error() -> None:
    script = (
        "import sys\nfrom flannel_dp.output import flush, write_lines\n"
        "write_lines('x' * 100 for _ in range(100_000))\nflush()\nprint('on', file=sys.stderr)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(10)
        child.stdout.close()
        assert child.stderr.read() == b"on\n"

    assert child.returncode == 0


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
    )
    report.tables["route"] |= {"added": 1234, "failed": 22}

    lines = list(render.report_lines(report, "in sync", {2: "eth0"}, plain))

    assert lines[0].split() == ["added", "replaced", "removed", "unchanged", "failed"]
    assert lines[1].split() == ["route", "1234", "0", "0", "0", "22"]
    assert "device flannel.1: mtu 1400 -> 1450" in lines
    assert "refused leases (25):" in lines
    assert "  node19  IPv4  overlap  detail 19" in lines
    assert "  ... and 5 more (--output json has all)" in lines
    taken = "route 10.244.2.0/24 nhid 7: the place is taken: route 10.244.2.0/24 dev eth0"
    assert f"  {taken} proto static" in lines
    assert "failures (23):" in lines
    assert "  IPv6: add device: No such device (ENODEV): gone" in lines
    assert "  ... and 3 more (--output json has all)" in lines
    assert "  ip_forward is 0" in lines
    assert lines[-1] == (
        "not in sync: 1 conflict and 23 failures; 1234 entries changed, 1 device, "
        "25 leases refused, 0.000 s"
    )


def test_colour_changes_no_text() -> None:
    report = Report(rejected=rejections(2), failures=[failure(1)], warnings=("w",))

    without = list(render.report_lines(report, "in sync", {}, plain))
    painted = list(render.report_lines(report, "in sync", {}, coloured))

    assert painted != without
    for code in ("31", "32", "33", "1", "2", "0"):
        painted = [line.replace(f"\x1b[{code}m", "") for line in painted]
    assert painted == without


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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

    lines = list(render.plan_lines(plan, coloured))

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
    painted = [*render.plan_lines(plan, coloured)]
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

    lines = [*render.report_lines(report, "in sync", {}, plain)]
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

    assert list(render.plan_lines(plan, plain))[-1] == "nothing to do"


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

    with render.ProgressBar(delay=0) as bar:
        for done in array("I", [0, 4096, 10_000]):
            bar(done, 10_000)

    assert "10000/10000" in stderr.getvalue()


def test_no_progress_bar_in_the_first_second(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stderr_terminal(monkeypatch)

    with render.ProgressBar(delay=3600) as bar:
        bar(1, 2)

    assert stderr.getvalue() == ""


def test_no_progress_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with render.ProgressBar(delay=0) as bar:
        bar(1, 2)

    assert capsys.readouterr() == ("", "")
