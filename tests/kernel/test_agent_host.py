"""An agent and what a node needs beside its tables.

Ready means that firewall rules and subnet.env are written, a failure of either lasts until a pass
that looked at it succeeds, and rules of others that stop pods are told as long as they do.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.resources.firewall import programs
from flannel_dp.resources.firewall.options import RulesOptions
from tests.lib.agents import Script, Watched
from tests.lib.firewall import WORD, cluster, installed, iptables, options, ruleset
from tests.lib.kernel import expected, observed
from tests.lib.leases import DEVICE, lease_of, peer, peers, plane, subnet
from tests.lib.waiting import wait_until

AUDIT = 0.3


class Waiting(Watched):
    """An agent that may be not ready yet; ``readies`` counts the calls of on_ready."""

    def __init__(self, host: Any, *families: int, audit: float = 3600.0, **options: Any) -> None:
        self.readies: list[bool] = []
        super().__init__(
            plane(host, *families, **options),
            Script(cluster(host)),
            audit=audit,
            on_ready=lambda: self.readies.append(True),
        )

    def __enter__(self) -> Waiting:
        self.agent.start()
        return self


@contextmanager
def broken_nft(
    patch: pytest.MonkeyPatch, folder: Path, when: str = "true"
) -> Iterator[Callable[[], None]]:
    """An nft that fails ``when`` a shell command succeeds, until what is given is called."""
    real, mark = programs.find("nft"), folder / "broken"
    mark.touch()
    script = (
        f'[ -e {mark} ] && {when} && {{ echo "Error: no room" >&2; exit 1; }}; exec {real} "$@"'
    )
    (folder / "nft").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nft").chmod(0o755)
    with patch.context() as patched:
        patched.setenv("PATH", str(folder), prepend=":")
        yield mark.unlink


def disturb(host: Any, family: int, node: Watched) -> None:
    """Change an entry, and then the device, until the one is repaired and then a whole family."""
    route, device = subnet(family, 2), DEVICE[family]

    def mtu() -> int:
        return int(host.ip_json(f"link show {device}")[0]["mtu"])

    right = mtu()
    for change, is_right in (
        (f"-{family} route del {route}", lambda: host.ip(f"-{family} route show {route}")),
        (f"link set {device} mtu 1290", lambda: mtu() == right),
    ):
        made = len(node.repairs)
        for _ in range(50):  # a retry that comes just then mends it without a repair
            host.ip(change)
            wait_until(is_right)
            wait_until(lambda: not node.agent._watch or not node.agent._watch.pending)
            if len(node.repairs) > made:
                break
        assert len(node.repairs) > made


@pytest.mark.parametrize("rules", [options(), RulesOptions()], ids=["required", "default"])
def test_it_is_not_ready_before_its_rules_are(
    host: Any, family: int, rules: RulesOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The pass that fails, a repair, an update: none of them makes it ready, a retry does."""
    with (
        broken_nft(monkeypatch, tmp_path) as mend,
        Waiting(host, family, rules=rules) as node,
    ):
        wait_until(lambda: "no room" in node.status.problems.get("firewall", ""))
        disturb(host, family, node)
        node.script.change(added=[peer(9)])
        wait_until(lambda: node.status.updates == 1)

        assert "no room" in node.status.problems["firewall"]
        assert not node.status.ready
        assert node.readies == []
        wait_until(lambda: node.status.audits > 0)  # tried again, and not by the clock
        mend()
        wait_until(lambda: node.status.ready)

        assert node.readies == [True]
        assert node.status.problems == {}
        assert "flannel-dp" in ruleset(host)


def test_default_rules_that_cannot_be_written_are_written_later(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """nft can read and cannot write: the node is not ready, and a retry writes them."""
    with (
        broken_nft(monkeypatch, tmp_path, when='[ "$*" != "${*#*-f}" ]') as mend,
        Waiting(host, family, rules=RulesOptions()) as node,
    ):
        wait_until(lambda: "no room" in node.status.problems.get("firewall", ""))
        assert not node.status.ready
        mend()
        wait_until(lambda: node.status.ready)

        assert node.status.problems == {}
        assert "flannel-dp" in ruleset(host)


def test_default_rules_without_a_program_do_not_keep_it_from_being_ready(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (
        installed(monkeypatch, tmp_path),
        Waiting(host, family, rules=RulesOptions()) as node,
    ):
        wait_until(lambda: node.status.ready)
        assert node.status.problems == {}


def test_it_is_not_ready_before_subnet_env_is(host: Any, family: int, tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.mkdir()  # a file cannot take its place
    with Waiting(host, family, subnet_file=str(path)) as node:
        wait_until(lambda: "subnet file" in node.status.problems)
        disturb(host, family, node)

        assert "subnet file" in node.status.problems
        assert not node.status.ready
        assert node.readies == []
        path.rmdir()
        wait_until(lambda: node.status.ready)

        assert node.readies == [True]
        assert node.status.problems == {}
        assert "FLANNEL_MTU" in path.read_text()


def test_a_guard_that_does_not_follow_is_a_problem_until_it_does(host: Any, family: int) -> None:
    with Waiting(host, family, rules=options(guard=True)) as node:
        wait_until(lambda: node.status.ready)
        audits = node.status.audits
        host.exec("nft", "delete", "table", WORD[family], "flannel-dp")
        node.script.change(added=[peer(9)])
        wait_until(lambda: node.status.audits > audits)
        wait_until(lambda: node.status.problems == {})

    assert "@peers" in ruleset(host)


def test_a_family_that_comes_late_has_its_rules_before_it_is_ready(host: Any) -> None:
    """What was written of the other one alone does not count."""
    shown = host.ip_json(f"-6 address show dev {host.iface} scope global")[0]["addr_info"]
    (length,) = [one["prefixlen"] for one in shown if one.get("local") == host.ipv6]
    address = f"{host.ipv6}/{length}"
    host.ip(f"-6 address del {address} dev {host.iface}")
    with Waiting(host, rules=options()) as node:
        wait_until(lambda: observed(host, 4) == expected(peers(range(1, 4)), 4))
        assert not node.status.ready
        host.ip(f"-6 address add {address} dev {host.iface} nodad")
        wait_until(lambda: node.status.ready)

        assert "table ip6 flannel-dp" in ruleset(host)
        wait_until(lambda: node.status.problems == {})


def test_a_repair_of_one_family_does_not_end_the_failure_of_the_other(host: Any) -> None:
    with Waiting(host) as node:
        wait_until(lambda: node.status.ready)
        host.ip(f"-6 address flush dev {host.iface}")
        wait_until(lambda: "kernel" in node.status.problems)
        seen: list[dict[str, str]] = []
        node.agent.board.on_change = lambda status: seen.append(status.problems)
        disturb(host, 4, node)

        assert seen
        assert all("kernel" in problems for problems in seen)


# ---- what others block ------------------------------------------------------------

DROP = "{ type filter hook forward priority 0; policy drop; }"


def test_what_stops_pods_is_told_as_long_as_it_does(host: Any, family: int) -> None:
    """No engine can overrule a table of somebody else, so that only its owner ends it."""
    with Waiting(host, family, audit=AUDIT, rules=RulesOptions()) as node:
        wait_until(lambda: node.status.ready and not node.status.problems)
        host.exec("nft", f"add table inet other; add chain inet other stop {DROP}")
        wait_until(lambda: "forwarding" in node.status.problems)
        audits = node.status.audits
        wait_until(lambda: node.status.audits > audits + 2)

        assert "nft inet other stop: policy drop" in node.status.problems["forwarding"]
        assert node.status.degraded
        assert node.status.ready
        host.exec("nft", "delete table inet other")
        wait_until(lambda: node.status.problems == {})


def test_it_is_told_from_the_start_though_the_rules_are_there(host: Any, family: int) -> None:
    with plane(host, family, rules=RulesOptions()) as dp:
        assert dp.sync(cluster(host)).ok
    host.exec("nft", f"add table inet other; add chain inet other stop {DROP}")

    with Waiting(host, family, rules=RulesOptions()) as node:
        wait_until(lambda: node.status.ready)
        assert "forwarding" in node.status.problems


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_rules_move_to_the_iptables_that_began_to_drop(host: Any, family: int, kind: str) -> None:
    """Docker was started after the agent."""
    program = f"{'iptables' if family == 4 else 'ip6tables'}-{kind}"
    with Waiting(host, family, audit=AUDIT, rules=RulesOptions()) as node:
        wait_until(lambda: node.status.ready)
        host.exec(program, "-P", "FORWARD", "DROP")
        wait_until(lambda: "FLANNEL-DP-FWD" in host.exec(f"{program}-save"))
        wait_until(lambda: "flannel-dp {" not in ruleset(host))
        written = ruleset(host), node.status.audits
        wait_until(lambda: node.status.audits > written[1] + 2)

        assert ruleset(host) == written[0]
        assert node.status.problems == {}


# ---- what it costs ------------------------------------------------------------------


def test_an_unchanged_sync_reads_the_own_table_and_runs_nothing_else(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of nftables, and whether iptables has any, is asked from the kernel."""
    leases = [lease_of(host), *peers(range(1, 4))]
    with plane(host, family, rules=RulesOptions()) as dp:
        dp.sync(leases)
        ran: list[list[str]] = []
        real = subprocess.run

        def recorded(words: list[str], **more: Any) -> Any:
            ran.append(words)
            return real(words, **more)

        monkeypatch.setattr(subprocess, "run", recorded)
        report = dp.sync(leases, probe=True)

    assert report.rules is not None
    assert (report.rules.engine, report.rules.changes) == ("nft", ())
    assert ran == []


def test_a_policy_of_iptables_without_its_programs_names_the_package(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    iptables(host, family, "-P", "FORWARD", "DROP")
    with (
        plane(host, family, rules=RulesOptions()) as dp,
        installed(monkeypatch, tmp_path, f'exec {programs.find("nft")} "$@"'),
    ):
        report = dp.sync(cluster(host))

    (blocked,) = report.blockers
    assert "policy drop" in blocked
    assert "install the package iptables" in blocked
