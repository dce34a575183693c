"""The firewall rules as a resource: desired, compare, apply, update, and compare with nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import ConfigError, FlannelDPError
from flannel_dp.kernel import host as kernel
from flannel_dp.reconcile.reconciler import Reconciler
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.firewall.options import RulesOptions
from flannel_dp.resources.firewall.resource import FirewallResource
from tests.lib.firewall import ENGINES, foreign, guarded, installed, iptables, options, ruleset
from tests.lib.leases import endpoint, network_config, peer, peers, subnet
from tests.lib.views import View, changed, facts, view

CONFIG = network_config()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def node(host: Any) -> Iterator[kernel.Host]:
    made = kernel.Host(host.ns)
    yield made
    made.close()


def cluster(*families: int) -> View:
    return view(CONFIG, peers(range(1, 4)), *(families or (4, 6)))


def sync(node: kernel.Host, resource: FirewallResource, wanted: View) -> Report:
    return recorded(resource, Reconciler(node, [resource]).sync(wanted))


def recorded(resource: FirewallResource, found: Any) -> Report:
    report = Report()
    resource.record(report, found.changes.get(resource.name), found.done[resource.name])
    return report


def test_compare_writes_nothing_and_apply_leaves_nothing_to_do(
    host: Any, node: kernel.Host, engine: str
) -> None:
    before = foreign(host, 4)
    resource = FirewallResource(options(engine, guard=True), CONFIG)
    reconciler = Reconciler(node, [resource])

    compared = reconciler.compare(cluster()).changes["firewall"]

    assert ruleset(host) == before
    assert not compared.is_empty
    lines = [*compared.lines()]
    for family in (4, 6):
        assert any(subnet(family, 0) in line for line in lines)

    report = recorded(resource, reconciler.sync(cluster()))

    assert report.rules is not None
    assert [*report.rules.changes] == lines
    written = ruleset(host)
    assert written != before
    assert reconciler.compare(cluster()).changes["firewall"].is_empty
    again = sync(node, resource, cluster())
    assert again.rules is not None
    assert again.rules.changes == ()
    assert ruleset(host) == written


def test_clean_removes_ours_and_nothing_else(host: Any, node: kernel.Host, engine: str) -> None:
    foreign(host, 4)
    before = foreign(host, 6)  # iptables' own tables are there, for both families
    resource = FirewallResource(options(engine, guard=True), CONFIG)
    sync(node, resource, cluster())
    written = ruleset(host)

    removal = resource.compare(node, None, {})

    assert ruleset(host) == written
    assert {line[:2] for line in removal.lines()} == {"- "}

    report = recorded(resource, Reconciler(node, [resource]).clean())

    assert ruleset(host) == before
    assert report.rules is not None
    assert report.rules.changes == (*removal.lines(),)
    assert recorded(resource, Reconciler(node, [resource]).clean()).rules is None


def test_a_family_that_cannot_be_synced_keeps_its_rules(
    host: Any, node: kernel.Host, family: int, engine: str
) -> None:
    resource = FirewallResource(options(engine, guard=True), CONFIG)
    assert sync(node, resource, cluster()).looked == {"firewall", "forwarding"}
    before = ruleset(host)

    report = sync(node, resource, cluster(family))

    assert ruleset(host) == before
    assert report.rules is not None
    assert report.rules.changes == ()
    assert report.looked == set()  # not all of it was looked at


def test_no_family_that_can_be_synced_changes_nothing(host: Any, node: kernel.Host) -> None:
    resource = FirewallResource(options(guard=True), CONFIG)
    sync(node, resource, cluster())
    before = ruleset(host)

    sync(node, resource, view(CONFIG, []))

    assert ruleset(host) == before


def test_a_family_that_is_switched_off_loses_its_rules(
    host: Any, node: kernel.Host, family: int, engine: str
) -> None:
    sync(node, FirewallResource(options(engine, guard=True), CONFIG), cluster())

    config = network_config(10 - family)
    left = FirewallResource(options(engine, guard=True), config)
    sync(node, left, view(config, peers(range(1, 4)), 10 - family))

    assert subnet(family, 0).partition("/")[0] not in ruleset(host)
    assert subnet(10 - family, 0).partition("/")[0] in ruleset(host)


def test_the_guard_follows_peers_without_reading(
    host: Any, node: kernel.Host, family: int, engine: str
) -> None:
    resource = FirewallResource(options(engine, guard=True), CONFIG)
    sync(node, resource, cluster())
    twin = peer(4, public_ip=endpoint(4, 1), public_ipv6=endpoint(6, 1))
    steps: list[tuple[list[Any], list[Any], list[Any], list[int]]] = [
        (peers(range(1, 6)), [], [peer(4), peer(5)], [1, 2, 3, 4, 5]),
        ([*peers([1, 2, 3]), twin], [peer(4), peer(5)], [twin], [1, 2, 3]),
        ([peer(2), peer(3), twin], [peer(1)], [], [1, 2, 3]),  # the twin has the address, too
        ([peer(2), peer(3)], [twin], [], [2, 3]),
    ]
    for after, old, new, expected in steps:
        told = changed(facts(CONFIG, family, after), old, new)
        assert {*Reconciler(node, [resource]).update(told)} <= {"firewall"}
        assert guarded(host, family) == {endpoint(family, number) for number in expected}


def test_an_update_that_changes_no_endpoint_is_none(node: kernel.Host, family: int) -> None:
    after = facts(CONFIG, family, [peer(1)])

    same = changed(after, [peer(1)], [peer(1)])

    assert FirewallResource(options(guard=True), CONFIG).update(node, same, {}) is None
    gone = changed(after, [peer(1), peer(2)], [peer(1)])
    assert FirewallResource(options(), CONFIG).update(node, gone, {}) is None


def test_an_update_that_fails_is_a_problem_of_the_firewall(node: kernel.Host, family: int) -> None:
    resource = FirewallResource(options(guard=True), CONFIG)
    told = changed(facts(CONFIG, family, [peer(1)]), [], [peer(1)])

    outcome = Reconciler(node, [resource]).update(told)["firewall"]  # there is no set

    report = Report()
    resource.record(report, None, outcome)
    assert report.problems == {"firewall": outcome.error}


def test_blockers_are_looked_for_where_asked_and_after_writing(
    host: Any, node: kernel.Host, family: int
) -> None:
    iptables(host, family, *["-A", "FORWARD", "-j", "REJECT"])
    resource = FirewallResource(options("nft"), CONFIG)
    first, second = sync(node, resource, cluster()), sync(node, resource, cluster())
    resource.probe = True
    third = sync(node, resource, cluster())

    assert any("REJECT" in text for text in first.blockers)
    assert second.blockers == ()
    assert second.looked == {"firewall"}
    assert third.blockers == first.blockers == resource.blockers(node, cluster())
    assert third.looked == {"firewall", "forwarding"}
    assert set(third.blockers) <= set(third.warnings)


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("broken", ["", "echo 'Error: out of order' >&2; exit 1"])
def test_without_a_program_that_works(
    node: kernel.Host,
    required: bool,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    resource = FirewallResource(RulesOptions(required=required), CONFIG)
    with installed(monkeypatch, tmp_path, broken):
        report = sync(node, resource, cluster())

    assert report.rules is None
    assert ("firewall" in report.problems) is required
    assert ("firewall" in report.tolerated) is (not required and broken != "")
    assert report.ok is not required
    assert any("rules are left alone" in text for text in report.warnings) is not required


def test_rights_that_a_program_lacks_are_a_problem_and_not_the_end(
    node: kernel.Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resource = FirewallResource(options("nft"), CONFIG)
    with installed(monkeypatch, tmp_path, "echo 'Operation not permitted' >&2; exit 1"):
        report = sync(node, resource, cluster())

    assert "not permitted" in str(report.problems["firewall"])


def test_clean_says_where_it_cannot_remove(
    node: kernel.Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether the table is there the kernel says by itself; nft is asked to remove it."""
    resource = FirewallResource(RulesOptions(), CONFIG)
    sync(node, resource, cluster())
    with (
        installed(monkeypatch, tmp_path, "echo 'Error: out of order' >&2; exit 1"),
        pytest.raises(FlannelDPError, match="out of order"),
    ):
        resource.apply(node, resource.compare(node, None, {}))


def test_a_guard_without_a_tunnel_is_an_error() -> None:
    with pytest.raises(ConfigError, match="guards the VXLAN port"):
        FirewallResource(options(guard=True), network_config(Type="host-gw"))
