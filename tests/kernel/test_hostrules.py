"""Firewall rules as a part of what DataPlane and the command do: planned, synced, mended,
removed; and what becomes of a node whose firewall program is missing or fails."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import ConfigError, DataPlane, FlannelDPError
from flannel_dp.cli import main
from flannel_dp.explain import explain
from flannel_dp.hostrules import RulesOptions
from flannel_dp.kernel import tools
from flannel_dp.show import show
from tests.support import (
    address,
    endpoint,
    expected,
    lease_of,
    mac,
    network_config,
    observed,
    peer,
    peers,
    plane,
    subnet,
)

ENGINES = ("nft", "iptables-nft")
WORD = {4: "ip", 6: "ip6"}
PEERS = range(1, 4)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def options(engine: str = "nft", **changes: Any) -> RulesOptions:
    given: dict[str, Any] = {"ip_masq": True, "engine": engine, "required": True}
    return RulesOptions(**given | changes)


def cluster(host: Any) -> list[Any]:
    return [lease_of(host), *peers(PEERS)]


def iptables(host: Any, family: int, *rule: str) -> None:
    host.exec("iptables-nft" if family == 4 else "ip6tables-nft", *rule)


def ruleset(host: Any) -> str:
    """Every rule of the namespace, counters aside."""
    text: str = host.exec("nft", "list", "ruleset")
    return re.sub(r"packets \d+ bytes \d+", "", text)


def masquerades(host: Any) -> bool:
    """Whether any rule does; one of ours only says so in its comment."""
    return bool(re.search("masquerade(?!s)", ruleset(host), re.IGNORECASE))


def foreign(host: Any, family: int) -> str:
    """Give the host rules that are none of ours, in each chain where ours go; the ruleset."""
    iptables(host, family, *["-t", "nat", "-A", "POSTROUTING", "-o", "eth9", "-j", "MASQUERADE"])
    iptables(host, family, *["-A", "FORWARD", "-i", "eth9", "-j", "ACCEPT"])
    iptables(host, family, *["-A", "INPUT", "-i", "eth9", "-j", "ACCEPT"])
    host.exec("nft", "add table inet stranger; add set inet stranger s { type ipv4_addr; }")
    return ruleset(host)


def guarded(host: Any, family: int) -> set[str]:
    """The addresses that may use the VXLAN port."""
    shown = host.exec("nft", "-j", "list", "set", WORD[family], "flannel-dp", "peers")
    found = next(item["set"] for item in json.loads(shown)["nftables"] if "set" in item)
    return set(found.get("elem", ()))


def endpoints(family: int, numbers: Any) -> set[str]:
    return {endpoint(family, number) for number in numbers}


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


# ---- no program, or one that fails ------------------------------------------------


@contextmanager
def installed(patch: pytest.MonkeyPatch, folder: Path, script: str = "") -> Iterator[None]:
    """All the firewall programs there are: none, or an nft that is ``script``."""
    if script:
        (folder / "nft").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nft").chmod(0o755)
    with patch.context() as patched:
        patched.setenv("PATH", str(folder))
        patched.setattr(tools, "_SYSTEM_PATH", str(folder))
        yield


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
            with pytest.raises(FlannelDPError, match=words):
                dp.plan(cluster(host))

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
    real = tools.find("nft")
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


# ---- the guard ------------------------------------------------------------------------


def test_the_guard_is_the_endpoints_of_accepted_leases(host: Any, family: int, engine: str) -> None:
    liar = peer(9, backend_data=None, backend_v6_data=None)  # refused: it has no MAC
    with plane(host, family, rules=options(engine, guard=True)) as dp:
        report = dp.sync([*cluster(host), liar])

        assert {rejection.lease for rejection in report.rejected} == {liar.key}
        assert guarded(host, family) == endpoints(family, PEERS)
        assert dp.sync(cluster(host)[:-1]).ok
        assert guarded(host, family) == endpoints(family, [1, 2])


def test_the_guard_follows_updates(host: Any, family: int, engine: str) -> None:
    with plane(host, family, rules=options(engine, guard=True)) as dp:
        dp.sync(cluster(host))
        known = {number: peer(number) for number in PEERS}
        steps: list[tuple[dict[int, Any], list[int]]] = [
            ({4: peer(4), 5: peer(5)}, []),
            ({2: at(22, 2)}, []),  # a peer moves
            ({6: at(1, 6)}, []),  # two leases with one endpoint
            ({}, [1]),  # one of the two leaves, the endpoint stays
            ({}, [6]),  # and now it goes
            ({7: peer(7)}, [4, 5]),
        ]
        for added, removed in steps:
            report = dp.update(added.values(), [known.pop(number) for number in removed])
            known |= added
            wanted = {getattr(lease, _UNDERLAY[family]) for lease in known.values()}

            assert report.ok
            assert guarded(host, family) == wanted
            assert dp.plan([lease_of(host), *known.values()]).is_empty


_UNDERLAY = {4: "public_ip", 6: "public_ipv6"}


def at(place: int, number: int) -> Any:
    """Node ``number`` with the underlay addresses of node ``place``."""
    return peer(number, public_ip=endpoint(4, place), public_ipv6=endpoint(6, place))


def test_the_guard_follows_when_claims_meet(host: Any, family: int) -> None:
    """A subnet that two nodes claim: when the winner leaves, the other one may come in."""
    rival = peer(
        1,
        public_ip=endpoint(4, 50),
        public_ipv6=endpoint(6, 50),
        backend_data=peer(50).backend_data,
        backend_v6_data=peer(50).backend_v6_data,
        name="rival",
    )
    first = peer(1, name="first")
    both = {"first": endpoint(family, 1), "rival": endpoint(family, 50)}
    rest = endpoints(family, [2, 3])
    with plane(host, family, rules=options(guard=True)) as dp:
        report = dp.sync([lease_of(host), first, rival, peer(2), peer(3)])
        (loser,) = {rejection.lease for rejection in report.rejected}
        winner = next(name for name in both if name != loser)
        assert guarded(host, family) == {both[winner], *rest}

        assert dp.update(removed=[winner]).ok
        assert guarded(host, family) == {both[loser], *rest}


def test_a_guard_that_somebody_removed_is_reported_and_mended(host: Any, family: int) -> None:
    with plane(host, family, rules=options(guard=True)) as dp:
        dp.sync(cluster(host))
        host.exec("nft", "delete", "table", WORD[family], "flannel-dp")

        report = dp.update(added=[peer(4)])

        assert not report.ok
        assert "firewall" in report.problems
        assert (mac(family, 4), endpoint(family, 4)) in observed(host, family)["fdb"]
        assert dp.sync([*cluster(host), peer(4)]).ok
        assert guarded(host, family) == endpoints(family, range(1, 5))


def test_the_guard_needs_a_tunnel(host: Any, family: int) -> None:
    with pytest.raises(ConfigError, match="--guard-underlay guards the VXLAN port"):
        DataPlane(
            network_config(family, Type="host-gw"),
            iface="eth0",
            netns=host.ns,
            rules=options(guard=True),
        )


def test_the_guard_of_10000_peers(host: Any, family: int) -> None:
    leases = [lease_of(host), *(_one_of_many(family, number) for number in range(1, 10_001))]
    with plane(host, family, rules=options(guard=True)) as dp:
        assert dp.sync(leases).ok
        again = dp.sync(leases)
        newcomer, leaver = _one_of_many(family, 10_001), leases[1]
        update = dp.update([newcomer], [leaver])

        assert again.rules is not None
        assert again.rules.changes == ()
        assert update.ok
        held = guarded(host, family)
        assert len(held) == 10_000
        assert getattr(newcomer, _UNDERLAY[family]) in held
        assert getattr(leaver, _UNDERLAY[family]) not in held


# ---- rules of others --------------------------------------------------------------------


def test_blockers_are_named_wherever_a_person_looks(host: Any, family: int) -> None:
    leases = cluster(host)
    with plane(host, family, rules=options(guard=True)) as dp:
        assert dp.blockers() == ()  # nothing is known before the first sync
        assert dp.sync(leases).ok
        assert dp.blockers() == dp.blockers(leases) == ()
        for chain in ("FORWARD", "INPUT"):
            iptables(host, family, "-A", chain, "-j", "REJECT")

        found = dp.blockers()

        assert len(found) == 2
        assert all('engine "iptables-nft"' in each for each in found)
        for each, chain in zip(found, ("FORWARD", "INPUT"), strict=True):
            assert f"(IPv{family})" in each
            assert f"-A {chain} -j REJECT" in each
        assert dp.blockers(leases) == found
        assert set(found) <= set(dp.plan(leases).warnings)
        for answer in (show(dp, leases), explain(dp, address(family, 2), leases)):
            assert tuple(answer.to_json()["blockers"]) == found
            assert str(answer).splitlines()[-3:] == ["blocked by:", *(f"  {f}" for f in found)]

    with plane(host, family, rules=options("iptables-nft", guard=True)) as dp:
        assert dp.sync(leases).ok
        assert dp.blockers() == ()
        assert show(dp, leases).blockers == explain(dp, address(family, 2)).blockers == ()


def test_blockers_are_asked_for_only_with_rules(host: Any, family: int) -> None:
    iptables(host, family, *["-A", "FORWARD", "-j", "REJECT"])
    with plane(host, family) as dp:
        dp.sync(cluster(host))
        assert dp.blockers() == dp.blockers(cluster(host)) == ()
        assert show(dp, cluster(host)).to_json()["blockers"] == []


def test_a_look_that_may_not_read_the_rules_is_still_one(
    host: Any,
    family: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with plane(host, family, rules=options()) as dp:
        dp.sync(cluster(host))
        with installed(monkeypatch, tmp_path, "echo 'Error: out of order' >&2; exit 1"):
            overview = show(dp, cluster(host))
            with pytest.raises(FlannelDPError, match="out of order"):
                dp.blockers()

    assert [one.subnet for one in overview.families[0].peers] == [subnet(family, n) for n in PEERS]
    assert "firewall rules cannot be read" in caplog.text


def _one_of_many(family: int, number: int) -> Any:
    """A node of a cluster that has more than a /24 for each of the network would do for."""
    if family == 6:
        return peer(number)
    base = IPv4Address(address(4, 1)) + 16 * number
    return peer(number, subnet=f"{base}/28", ipv6_subnet="", public_ipv6="")
