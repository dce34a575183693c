"""The command without a kernel: flags, exit codes, and what is printed."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click import Option

from flannel_dp import errors
from flannel_dp.command.cli import command, main
from flannel_dp.command.output import GROUPS, code_of_plan
from flannel_dp.command.spelling import normalise
from flannel_dp.dataplane import DataPlane
from flannel_dp.reconcile.plan import Plan
from flannel_dp.resources.firewall.options import RulesOptions

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
    assert "..." not in out.partition("Commands:")[2], "a description is cut"


@pytest.mark.parametrize("name", sorted(command.commands))
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0

    out = capsys.readouterr().out
    assert "--run-dir DIRECTORY" in out
    assert "CAP_NET_ADMIN" in out


@pytest.mark.parametrize("name", sorted(command.commands))
def test_each_flag_is_in_one_section_of_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--help"])

    out = capsys.readouterr().out
    assert not re.search(r"^  \[", out, re.MULTILINE), "an argument is among the flags"
    grouped = " ".join(GROUPS.values()).split()
    options = [one for one in command.commands[name].params if isinstance(one, Option)]
    flags = [one for one in options if not one.hidden]
    assert len(grouped) == len({*grouped})
    assert {one.name for one in flags} <= {*grouped}
    for one in flags:
        assert re.findall(rf"^  {one.opts[0]}(?![\w-])", out, re.MULTILINE), one.name


def test_the_command_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out

    code = main([])

    out, err = capsys.readouterr()
    assert (code, out, err) == (2, "", help_text)


@pytest.mark.parametrize(("words", "found"), [("pl", "plan"), ("plan --exit", "--exit-code")])
def test_completion_for_bash(words: str, found: str) -> None:
    variables = {"COMP_WORDS": f"flannel-dp {words}", "COMP_CWORD": str(len(words.split()))}
    environment = {**os.environ, "_FLANNEL_DP_COMPLETE": "bash_complete", **variables}
    program = "import sys; from flannel_dp.command.cli import main; sys.exit(main([]))"

    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout.split()) == (0, [f"plain,{found}"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0

    assert capsys.readouterr().out.startswith("flannel-dp ")


@pytest.mark.parametrize("name", ["sync", "show", "stats"])
def test_who_stays_collects_garbage(name: str, tmp_path: Path) -> None:
    """The program starts without, see __main__.py."""
    net_conf = tmp_path / "net-conf.json"
    net_conf.write_text("{}")  # which is wrong; one that is missing is waited for
    gc.disable()
    try:
        code = main([name, "--watch", "--net-conf", str(net_conf), "--leases", "/no/leases"])
        enabled = gc.isenabled()
    finally:
        gc.enable()

    assert (code, enabled) == (2, True)


def test_help_imports_nothing_but_click() -> None:
    script = (
        "import sys\nfrom flannel_dp.command.cli import main\nmain(['sync', '--help'])\n"
        "heavy = {'pyroute2', 'rich', 'msgspec', 'asyncio', 'ipaddress', 'json', 'logging',\n"
        "         'socket', 'flannel_dp._core', 'flannel_dp.dataplane',\n"
        "         'flannel_dp.cluster.network', 'flannel_dp.command.running',\n"
        "         'flannel_dp.command.failing'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_flags_are_made_for_the_command_that_is_called() -> None:
    script = (
        "import click, contextlib, io\nmade, init = [], click.Option.__init__\n"
        "def note(self, names, *rest, **more):\n"
        "    made.append(names[0]); init(self, names, *rest, **more)\n"
        "click.Option.__init__ = note\nfrom flannel_dp.command.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help']); print(made, file=__import__('sys').stderr)\n"
        "    made.clear(); main(['sync', '--leases', '-', '--help'])\n"
        "print(*made)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.stderr.split() == ["['--version',", "'-h']"]
    flags = [flag for flag in done.stdout.split() if flag != "-h"]
    assert {"--leases", "--watch", "--version"} < set(flags)
    assert not {"--interval", "--exit-code", "--keep-device"} & set(flags)
    assert len(flags) == len(set(flags))


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
        (["clean", "--exit-code"], "No such option"),
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
    flags += ["--netns", "/proc/self/ns/net", "--take-over", "--allow-shrink", "--no-nexthops"]
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
        "node_name": "",
        "netns": "/proc/self/ns/net",
        "take_over": True,
        "allow_shrink": True,
        "nexthops": False,
        "ip_blackhole_route": False,
        "rules": RulesOptions(),
        "subnet_file": "",  # one file serves one node, and --netns names another
        "counters": None,
        "run_dir": "/run/flannel-dp",
        "path_mtus": False,
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
        (
            ["--ip-masq", "--ip-masq-fully-random-disable"],
            RulesOptions(ip_masq=True, random_fully=False, required=True),
        ),
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
        (["--netns", "/proc/self/ns/net"], "", ""),
        (["--netns", "/proc/self/ns/net", "--subnet-file", "/a/b"], "", "/a/b"),
        (["--subnet-file="], "", ""),
        ([], "/from/environment", "/from/environment"),
        (["--netns", "/proc/self/ns/net"], "/from/environment", "/from/environment"),
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

    assert f"error: {flag} has no effect with --firewall none" in capsys.readouterr().err


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
        (errors.LeaseRejected("x", reason="own-lease", hint="y"), 4),
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
        "import sys\nfrom flannel_dp.look.terminal import flush, write_lines\n"
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


def test_help_has_the_flags_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", "--help"]) == 0

    shown = re.findall(r"^(\S.*):$", capsys.readouterr().out, re.MULTILINE)
    absent = {"Probes"}
    assert [title for title in shown if title in GROUPS] == [t for t in GROUPS if t not in absent]


@pytest.mark.parametrize(
    ("empty", "held", "ok", "code"),
    [
        (True, False, True, 0),
        (False, False, True, 10),
        (False, True, False, 10),
        (True, True, False, 4),
        (True, False, False, 3),
    ],
)
def test_the_code_of_a_plan_is_10_or_that_of_its_sync(
    empty: bool, held: bool, ok: bool, code: int
) -> None:
    planned: Any = SimpleNamespace(is_empty=empty, held={4: ["a"]} if held else {}, ok=ok)

    assert code_of_plan(planned) == code
