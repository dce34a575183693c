"""A plan is the sync that follows it: what it writes, what it fails at, and what it warns of."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from flannel_dp import DataPlane, Lease, Report, ShrinkRefused
from flannel_dp.reconcile.plan import Plan
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
    assert {*report.warnings} <= {*plan.warnings}
    writes = report.writes or any(action != "none" for action in actions.values())
    assert plan.is_empty is not bool(writes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_what_is_planned_is_what_is_done(host: Any, layout: str, seed: int) -> None:
    """Whatever others did to the node, and whatever the list says."""
    rng = random.Random(f"{layout} {seed}")
    stranger(host, "other0")
    config = network_config(*FAMILIES, **LAYOUTS[layout])
    damages = _damages()
    with ExitStack() as stack:
        stack.callback(remove_pins, host)
        dp = stack.enter_context(DataPlane(config, iface=host.iface, netns=host.ns))
        for _ in range(4):
            leases = _leases(host, rng, config.backend.type)
            plan = dp.plan(leases)
            agree(plan, *_synced(dp, leases))
            for damage in rng.sample(damages, rng.randrange(4)):
                damage(host, rng)
