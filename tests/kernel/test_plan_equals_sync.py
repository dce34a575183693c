"""A plan is the sync that follows it: what it writes, what it fails at, and what it warns of."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import Busy, DataPlane, FlannelDPError, Lease, Report, ShrinkRefused
from flannel_dp.reconcile.plan import Plan
from flannel_dp.resources.firewall.options import RulesOptions
from tests.lib.forwarding import remove_pins
from tests.lib.kernel import stranger
from tests.lib.leases import (
    DEVICE,
    endpoint,
    lease_of,
    network_config,
    peer,
    replaced,
    subnet,
)

FAMILIES = (4, 6)

LAYOUTS: dict[str, dict[str, Any]] = {
    "vxlan": {},
    "direct": {"DirectRouting": True},
    "host-gw": {"Type": "host-gw"},
    "ebpf": {"Forwarding": "ebpf"},
}

#: Damage that other programs do to a node, and what makes a family or an entry impossible.
Damage = Callable[[Any, random.Random], object]


def _run(host: Any, command: str) -> None:
    """Run ip(8); a command that finds nothing to act on does no damage."""
    with suppress(AssertionError):
        host.ip(command)


def _device(family: int, command: str) -> Damage:
    return lambda host, rng: _run(host, command.format(DEVICE[family]))


def _foreign_device(family: int) -> Damage:
    def damage(host: Any, rng: random.Random) -> None:
        _run(host, f"link del {DEVICE[family]}")
        _run(host, f"link add {DEVICE[family]} type dummy")

    return damage


def _on_peer(family: int, command: str) -> Damage:
    def damage(host: Any, rng: random.Random) -> None:
        number = rng.randrange(1, 9)
        gateway = subnet(family, number).partition("/")[0]
        words = command.format(
            dev=DEVICE[family], subnet=subnet(family, number), gateway=gateway, n=number
        )
        _run(host, f"-{family} {words}")

    return damage


def _damages() -> list[Damage]:
    found: list[Damage] = []
    for family in FAMILIES:
        metric = "metric 1024" if family == 6 else ""
        found += [
            _device(family, "link del {}"),
            _foreign_device(family),
            _device(family, "link set {} down"),
            _device(family, "link set {} mtu 1300"),
            _device(family, "link set {} address 02:00:00:00:aa:bb"),
            _on_peer(family, "route del {subnet}"),
            _on_peer(family, f"route add {{subnet}} dev other0 proto static {metric}"),
            _on_peer(family, "route add 198.51.{n}.0/24 dev {dev} proto 138"),
            _on_peer(family, "neigh del {gateway} dev {dev}"),
            _on_peer(
                family, "neigh replace {gateway} lladdr 02:0:0:0:0:99 dev {dev} nud permanent"
            ),
            _on_peer(family, "nexthop flush proto 138"),
        ]
    return found


def _without_rules(family: str) -> Damage:
    def damage(host: Any, rng: random.Random) -> None:
        with suppress(AssertionError):
            host.exec("nft", f"delete table {family} flannel-dp")

    return damage


def _without_counters(family: int) -> Damage:
    def damage(host: Any, rng: random.Random) -> None:
        with suppress(AssertionError):
            host.exec("tc", "qdisc", "del", "dev", DEVICE[family], "clsact")

    return damage


def _without_file(file: Path) -> Damage:
    return lambda host, rng: file.unlink(missing_ok=True)


def _leases(host: Any, rng: random.Random, backend: str) -> list[Lease]:
    numbers = rng.sample(range(1, 16), rng.randrange(6, 14))
    leases = [lease_of(host), *(peer(number) for number in numbers)]
    if rng.random() < 0.3:  # of one family only
        leases[-1] = replaced(leases[-1], ipv6_subnet="", public_ipv6="", backend_v6_data=None)
    if rng.random() < 0.3:  # the address of another
        leases[-1] = replaced(leases[-1], public_ip=endpoint(4, numbers[0]))
    if rng.random() < 0.2:  # this node has no IPv6
        own = leases[0]
        leases[0] = replaced(own, ipv6_subnet="", public_ipv6="", backend_v6_data=None)
    if rng.random() < 0.2:  # most are gone
        leases = leases[:2]
    if backend == "host-gw":
        leases = [
            replaced(one, backend_type="host-gw", backend_data=None, backend_v6_data=None)
            for one in leases
        ]
    return leases


def _synced(dp: DataPlane, leases: list[Lease]) -> tuple[Report, ShrinkRefused | None]:
    try:
        return dp.sync(leases), None
    except ShrinkRefused as error:
        return error.report or Report(), error


def _tried(call: Callable[..., Any], *given: Any) -> tuple[Any, FlannelDPError | None]:
    """What a call returns, and what it raises."""
    try:
        return call(*given), None
    except FlannelDPError as error:
        return None, error


def _places(pairs: Any) -> set[str]:
    return {wanted.prefix for wanted, _ in pairs}


def agree(plan: Plan, report: Report, refused: ShrinkRefused | None) -> None:
    """Assert that what was planned is what was done."""
    words = ("added", "replaced", "removed", "unchanged")
    done = {kind: {word: row[word] for word in words} for kind, row in report.tables.items()}
    assert plan.counts() == done
    actions = {one.name: one.action for one in report.devices}
    assert {one.name: one.action for one in plan.devices} == actions
    assert _places(plan.conflicts()) == _places(report.conflicts)
    assert {str(one.entry) for one in plan.failures} == {str(one.entry) for one in report.failures}
    assert {n: str(e) for n, e in plan.family_errors.items()} == {
        n: str(e) for n, e in report.family_errors.items()
    }
    assert [*plan.problems] == [*report.problems]
    assert {n: [*names] for n, names in plan.held.items()} == (report.held if refused else {})
    assert plan.ok is (report.ok and refused is None)
    assert len(plan.rejected) == len(report.rejected)
    # How full the neighbour table is, all namespaces of the machine decide.
    warned = {text for text in report.warnings if "gc_thresh3" not in text}
    assert warned <= {*plan.warnings}
    planned, written = (one.changes if one else () for one in (plan.rules, report.rules))
    assert planned == written
    assert bool(plan.resources.get("subnet file")) is bool(report.subnet_file)
    assert bool(plan.resources.get("counters")) is bool(report.counters)
    writes = [report.writes, written, report.subnet_file, report.counters]
    writes += [action != "none" for action in actions.values()]
    assert plan.is_empty is not any(writes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_planned_is_what_is_done(host: Any, layout: str, seed: int, tmp_path: Path) -> None:
    """Whatever others did to the node, and whatever the list says."""
    file = tmp_path / "subnet.env"
    rng = random.Random(f"{layout} {seed}")
    stranger(host, "other0")
    config = network_config(*FAMILIES, **LAYOUTS[layout])
    damages = _damages()
    beside = seed % 3 == 0  # what is kept beside the overlay
    counts = seed == 0 and config.backend.type == "vxlan"
    if counts:
        damages += [_without_counters(family) for family in FAMILIES] * 3
    if beside:
        damages += [_without_rules("ip"), _without_rules("ip6"), _without_file(file)] * 3
    with ExitStack() as stack:
        stack.callback(remove_pins, host)
        dp = stack.enter_context(
            DataPlane(
                config,
                iface=host.iface,
                netns=host.ns,
                rules=RulesOptions(engine="nft", ip_masq=True) if beside else None,
                subnet_file=str(file) if beside else "",
                ip_blackhole_route=beside,
                counters=counts,
                nexthops=seed % 2 == 0,
                take_over=rng.random() < 0.5,
            )
        )
        counted = 0
        for _ in range(4):
            leases = _leases(host, rng, config.backend.type)
            plan, error = _tried(dp.plan, leases)
            done, raised = _tried(_synced, dp, leases)
            assert (type(raised), str(raised)) == (type(error), str(error))
            if error is None:
                agree(plan, *done)
                counted += bool(done[0].counters)
            for damage in rng.sample(damages, rng.randrange(4)):
                damage(host, rng)
        assert bool(counted) is counts


def test_a_plan_says_that_another_instance_owns_the_device(host: Any, tmp_path: Path) -> None:
    """It is no reason not to plan: plan is what one asks for beside an agent."""
    leases = [lease_of(host), peer(2)]
    config = network_config(4)
    with DataPlane(config, iface=host.iface, netns=host.ns, run_dir=str(tmp_path)) as other:
        before = other.plan(leases)
        assert not any("exit code 5" in warning for warning in before.warnings)
        assert [*tmp_path.iterdir()] == []
        other.sync(leases)
        own = other.plan(leases)
        with DataPlane(config, iface=host.iface, netns=host.ns, run_dir=str(tmp_path)) as one:
            plan = one.plan(leases)
            with pytest.raises(Busy) as caught:
                one.sync(leases)

    assert not any("exit code 5" in warning for warning in own.warnings)
    (warning,) = [text for text in plan.warnings if "exit code 5" in text]
    assert warning == f"sync would change nothing now (exit code 5): {caught.value.message}"
    assert (plan.is_empty, plan.ok) == (True, True)
