"""Firewall rules as a part of what DataPlane and the command do: planned, synced, mended,
removed; and what becomes of a node whose firewall program is missing or fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.command.cli import main
from flannel_dp.resources.firewall import programs
from flannel_dp.resources.firewall.options import RulesOptions
from tests.lib.firewall import (
    ENGINES,
    PEERS,
    WORD,
    cluster,
    foreign,
    installed,
    iptables,
    masquerades,
    options,
    ruleset,
)
from tests.lib.kernel import expected, observed
from tests.lib.leases import peers, plane


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- plan, sync, drift, clean ---------------------------------------------------


def test_rules_are_part_of_plan_and_sync(host: Any, family: int, engine: str) -> None:
    leases = cluster(host)
    with plane(host, family) as dp:
        dp.sync(leases)
    before = ruleset(host)
    with plane(host, family, rules=options(engine, guard=True)) as dp:
        plan = dp.plan(leases)

        assert ruleset(host) == before
        assert plan.rules is not None
        assert plan.rules.changes
        assert not plan.is_empty  # the tables agree, the rules are all there is to do
        assert [line for line in plan.lines() if "flannel" in line.lower()] == [*plan.rules.changes]
        document = plan.to_json()
        assert document["rules"] == {
            "engine": plan.rules.engine,
            "changes": list(plan.rules.changes),
        }
        assert document["empty"] is False

        report = dp.sync(leases)
        written = ruleset(host)
        again = dp.sync(leases)

        assert report.ok
        assert report.rules == plan.rules
        assert report.to_json()["rules"] == document["rules"]
        assert "flannel-dp" in written
        assert again.rules is not None
        assert again.rules.changes == ()
        assert ruleset(host) == written
        assert dp.plan(leases).is_empty


@pytest.mark.parametrize("drift", ["lost", "reordered"])
def test_drift_is_planned_and_mended(host: Any, family: int, engine: str, drift: str) -> None:
    leases = cluster(host)
    with plane(host, family, rules=options(engine)) as dp:
        dp.sync(leases)
        good = ruleset(host)
        _spoil(host, family, engine, drift)
        assert ruleset(host) != good

        plan = dp.plan(leases)
        report = dp.sync(leases)

        assert plan.rules is not None
        assert plan.rules.changes
        assert report.rules == plan.rules
        assert report.writes == 0
        assert ruleset(host) == good
        assert dp.plan(leases).is_empty


def _spoil(host: Any, family: int, engine: str, drift: str) -> None:
    if engine != "nft":
        chain = "FLANNEL-DP-FWD"
        shown = host.exec("iptables-nft-save" if family == 4 else "ip6tables-nft-save")
        first = next(line for line in shown.splitlines() if line.startswith(f"-A {chain} "))
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', first)]
        iptables(host, family, "-D", *words[1:])
        if drift == "reordered":
            iptables(host, family, *words)
        return
    chain = f"{WORD[family]} flannel-dp forward"
    shown = host.exec("nft", "-a", "list", "chain", *chain.split())
    rule, handle = next(line for line in shown.splitlines() if "from pods" in line).split(" # ")
    host.exec("nft", f"delete rule {chain} {handle}")
    if drift == "reordered":
        host.exec("nft", f"add rule {chain} {rule.strip()}")


def test_a_rule_put_before_our_jump_is_drift(host: Any, family: int) -> None:
    leases = cluster(host)
    with plane(host, family, rules=options("iptables-nft")) as dp:
        dp.sync(leases)
        iptables(host, family, *["-I", "FORWARD", "1", "-j", "REJECT"])

        assert not dp.plan(leases).is_empty
        assert dp.sync(leases).ok
        assert dp.plan(leases).is_empty

    shown = host.exec("nft", "list", "chain", WORD[family], "filter", "FORWARD")
    assert shown.index("FLANNEL-DP-FWD") < shown.index("reject")


def test_clean_removes_ours_and_nothing_else(host: Any, family: int, engine: str) -> None:
    before = foreign(host, family)
    with plane(host, family, rules=options(engine, guard=True)) as dp:
        assert dp.sync(cluster(host)).ok
        assert ruleset(host) != before
        report = dp.clean()

        assert report.ok
        assert report.rules is not None
        assert all(line.startswith("- ") for line in report.rules.changes)
        assert ruleset(host) == before
        assert dp.clean().rules is None


def test_without_rules_nobody_s_are_touched(host: Any, family: int) -> None:
    with plane(host, family, rules=options(guard=True)) as dp:
        dp.sync(cluster(host))
    before = ruleset(host)

    with plane(host, family) as dp:
        plan, report = dp.plan(cluster(host)), dp.sync(cluster(host))
        dp.clean()

    assert (plan.rules, report.rules) == (None, None)
    assert (plan.to_json()["rules"], report.to_json()["rules"]) == (None, None)
    assert ruleset(host) == before


def test_an_option_that_is_dropped_takes_its_rules_along(
    host: Any, family: int, engine: str
) -> None:
    with plane(host, family, rules=options(engine, guard=True)) as dp:
        dp.sync(cluster(host))
    assert masquerades(host)

    with plane(host, family, rules=options(engine, ip_masq=False)) as dp:
        assert dp.sync(cluster(host)).ok
        assert dp.plan(cluster(host)).is_empty
    assert not masquerades(host)
    assert "@peers" not in ruleset(host)


def test_both_families_and_then_one(host: Any) -> None:
    with plane(host, rules=options()) as dp:
        assert dp.sync(cluster(host)).ok
        assert dp.plan(cluster(host)).is_empty
    assert {"table ip flannel-dp {", "table ip6 flannel-dp {"} <= {*ruleset(host).splitlines()}


def test_a_family_that_cannot_be_looked_at_keeps_its_rules(host: Any, engine: str) -> None:
    with plane(host, rules=options(engine, guard=True)) as dp:
        assert dp.sync(cluster(host)).ok
        before = ruleset(host)
        host.ip(f"-6 address flush dev {host.iface}")

        plan, report = dp.plan(cluster(host)), dp.sync(cluster(host))

        assert set(report.family_errors) == {6}
        assert plan.rules == report.rules
        assert plan.rules is not None
        assert plan.rules.changes == ()
        assert ruleset(host) == before


# ---- no program, or one that fails ------------------------------------------------


FAILURES = [
    pytest.param("", "neither nft nor iptables is installed", id="missing"),
    pytest.param("echo 'Error: out of order' >&2; exit 1", "out of order", id="failing"),
]


@pytest.mark.parametrize(("script", "words"), FAILURES)
def test_rules_that_were_asked_for_and_cannot_be(
    host: Any,
    family: int,
    script: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with plane(host, family, rules=options("auto")) as dp:
        with installed(monkeypatch, tmp_path, script):
            report = dp.sync(cluster(host))
            plan = dp.plan(cluster(host))

        assert words in str(plan.problems["firewall"])
        assert not plan.ok
        assert not report.ok
        assert words in str(report.problems["firewall"])
        assert report.rules is None
        assert observed(host, family) == expected(peers(PEERS), family)
        told = [f for f in report.to_json()["failures"] if f["table"] == "firewall"]
        assert words in told[0]["detail"]

        assert dp.sync(cluster(host)).ok  # as soon as there is one


@pytest.mark.parametrize(("script", "words"), FAILURES)
def test_default_rules_that_cannot_be_are_a_warning(
    host: Any,
    family: int,
    script: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with (
        plane(host, family, rules=RulesOptions()) as dp,
        installed(monkeypatch, tmp_path, script),
    ):
        plan, report = dp.plan(cluster(host)), dp.sync(cluster(host))

    for warnings in (plan.warnings, report.warnings):
        assert any("rules are left alone" in each and words in each for each in warnings)
    assert report.ok
    assert (plan.rules, report.rules) == (None, None)
    assert observed(host, family) == expected(peers(PEERS), family)


def test_a_write_that_fails_leaves_the_tables_synced(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reading the rules works, writing them does not."""
    real = programs.find("nft")
    script = f'case "$*" in *"-f -"*) echo "Error: no room" >&2; exit 1;; esac; exec {real} "$@"'
    with plane(host, family, rules=options()) as dp, installed(monkeypatch, tmp_path, script):
        report = dp.sync(cluster(host))

    assert not report.ok
    assert "no room" in str(report.problems["firewall"])
    assert observed(host, family) == expected(peers(PEERS), family)
    assert ruleset(host) == ""


@pytest.mark.parametrize(("flag", "code"), [("--ip-masq", 3), ("--no-ip-masq", 0)])
def test_exit_code_without_a_program(
    host: Any,
    flag: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command(host, 4, tmp_path, "sync", flag, "--output", "json")
    with installed(monkeypatch, tmp_path):
        assert main(arguments) == code

    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is (code == 0)
    assert document["tables"]["route"]["added"] == len(PEERS)
    assert any("left alone" in each for each in document["warnings"]) is (code == 0)


def command(host: Any, family: int, folder: Path, name: str, *more: str) -> list[str]:
    """Arguments of the command for the host's cluster."""
    config, leases = folder / "net-conf.json", folder / "leases.json"
    config.write_text(
        json.dumps(
            {
                "Backend": {"Type": "vxlan"},
                "EnableIPv4": family == 4,
                "EnableIPv6": family == 6,
                **({"Network": "10.240.0.0/12", "SubnetLen": 24} if family == 4 else {}),
                **({"IPv6Network": "fd00:10::/32", "IPv6SubnetLen": 64} if family == 6 else {}),
            }
        )
    )
    members = [json.loads(lease.to_json()) for lease in cluster(host)]
    leases.write_text(json.dumps({"leases": members}))
    made = [name, "--netns", host.ns, "--iface", "eth0", "--net-conf", str(config)]
    return made + ["--leases", str(leases)] * (name != "clean") + list(more)


@pytest.mark.parametrize(
    ("flags", "environment", "masquerades", "forwards"),
    [
        ([], {}, False, True),
        (["--ip-masq"], {}, True, True),
        (["-ip-masq=true", "-iptables-forward-rules=false"], {}, True, False),
        (["--ip-masq=false"], {"FLANNELD_IP_MASQ": "true"}, False, True),
        ([], {"FLANNELD_IP_MASQ": "true", "FLANNELD_IPTABLES_FORWARD_RULES": "false"}, True, False),
        (["--firewall", "none"], {}, False, False),
    ],
)
def test_flags_of_flanneld_make_the_rules(
    host: Any,
    flags: list[str],
    environment: dict[str, str],
    masquerades: bool,
    forwards: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert main(command(host, 4, tmp_path, "sync", *flags)) == 0
    written = ruleset(host)
    assert main(command(host, 4, tmp_path, "plan", "--exit-code", *flags)) == 0

    assert ("masquerade fully-random" in written) is masquerades
    assert ("from pods" in written) is forwards
    assert ("flannel-dp" in written) is ("none" not in flags)
    assert capsys.readouterr().out.endswith("nothing to do\n")
