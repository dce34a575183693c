"""The firewall rules of a node as a resource: planned, written, and kept up with the peers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from flannel_dp._core import Claims, parse_address
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, FlannelDPError
from flannel_dp.reconcile.plan import RulesChange
from flannel_dp.reconcile.resource import Done, Resource, Result
from flannel_dp.resources.firewall.options import (
    DesiredRules,
    RulesOptions,
    check_options,
    desired_rules,
    mark_of,
)

if TYPE_CHECKING:
    from flannel_dp.kernel.host import Host
    from flannel_dp.reconcile.report import Report
    from flannel_dp.resources.firewall.engine import RulesPlan

log = logging.getLogger(__name__)

NAME = "firewall"


class FirewallChange(Struct, frozen=True):
    """What has to be written: ``plan`` is None where the rules are left alone, and ``warnings``
    say why.

    ``blockers`` are the rules of other programs that stop packets although ours are in place, None
    where they were not searched for. ``desired`` is what the plan was made for, None for a removal.
    ``error`` is why an installed program could not compare rules that are not required."""

    plan: RulesPlan | None
    desired: DesiredRules | None = None
    blockers: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    error: FlannelDPError | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be written."""
        return self.plan is None or self.plan.is_empty

    def lines(self) -> Iterator[str]:
        """Yield one line for each rule, jump, set element or table; each names its program."""
        yield from self.plan.changes if self.plan is not None else ()

    def rules(self) -> RulesChange | None:
        """Return what a plan and a report say of it; None where no rules are wanted and none were
        there, and where they are left alone."""
        if self.plan is None or (self.desired is None and self.plan.is_empty):
            return None
        return RulesChange(self.plan.engine, self.plan.changes)


class FirewallResource(Resource[DesiredRules, FirewallChange]):
    """The rules that ``options`` ask for in the network ``config``.

    ``probe`` asks ``compare`` to search for rules of other programs that stop packets; they are
    searched in any case after something was written. Raises ConfigError for a guard without a
    tunnel."""

    name = NAME

    def __init__(self, options: RulesOptions, config: NetworkConfig, *, probe: bool = False):
        check_options(options, config)
        self.options, self.probe = options, probe
        self._config = config

    def desired(self, view: Any) -> DesiredRules:
        """Return the rules for the families of the view."""
        return desired_rules(self.options, self._config, view)

    def compare(self, host: Host, desired: DesiredRules | None, done: Done) -> FirewallChange:
        """Choose the engine, and compare the rules with those of the kernel.

        Raises FlannelDPError where its program is missing or fails, and rules are required or
        are to be removed.
        """
        from flannel_dp.resources.firewall.engine import plan_removal

        if desired is None:
            return FirewallChange(plan_removal(host.netns, mark_of(self._config)))
        try:
            plan = self._plan(host, desired)
            blockers = self._blockers(host, desired, plan.engine) if self.probe else None
        except FlannelDPError as error:
            warnings = self._left_alone(error)
            return FirewallChange(None, desired, warnings=warnings, error=_may_recover(error))
        return FirewallChange(plan, desired, blockers)

    def apply(self, host: Host, change: FirewallChange) -> Result:
        """Write the rules, and find rules of other programs that still stop packets.

        Raises FlannelDPError where that fails and rules are required or are to be removed.
        """
        from flannel_dp.resources.firewall.engine import apply_rules

        if change.plan is None:
            return Result()
        if change.desired is None:
            apply_rules(change.plan, host.netns)
            return Result()
        try:
            apply_rules(change.plan, host.netns)
            blockers = self._blockers(host, change.desired, change.plan.engine)
        except FlannelDPError as error:
            facts = {"left_alone": True, "error": _may_recover(error)}
            return Result(warnings=self._left_alone(error), facts=facts)
        return Result(facts={"blockers": blockers})

    def update(self, host: Host, changed: Any, done: Done) -> Result | None:
        """Let the guard's set follow the peers: one transaction, and nothing is read.

        Raises FlannelDPError where the set is not as it was written.
        """
        if not self.options.guard:
            return None
        from flannel_dp.resources.firewall.engine import update_guard

        before, after = _endpoints(changed.old), _endpoints(changed.new)
        # Two peers may have one address: it stays while one of them does.
        removed = {
            address
            for address in before - after
            if not changed.peers.find_endpoint(parse_address(address)[1])
        }
        added = after - before
        if not added and not removed:
            return None
        update_guard(
            changed.family.number,
            added=sorted(added),
            removed=sorted(removed),
            netns=host.netns,
            mark=mark_of(self._config),
        )
        return Result()

    def blockers(self, host: Host, view: Any) -> tuple[str, ...]:
        """Return the rules of other programs that stop packets although ours are in place.

        Reads, never writes. Raises FlannelDPError when they cannot be read.
        """
        desired = self.desired(view)
        return self._blockers(host, desired, self._engine(host, desired))

    def record(self, report: Report, change: FirewallChange | None, outcome: Result) -> None:
        """Add rules, blockers and warnings; see ``Resource.record``."""
        super().record(report, change, outcome)
        if outcome.error is not None:
            log.error("Firewall rules were not synced: %(error)s", {"error": outcome.error})
            return
        if change is None:
            return
        report.warnings += change.warnings
        if (error := outcome.facts.get("error", change.error)) is not None:
            report.tolerated[self.name] = error
        report.rules = None if outcome.facts.get("left_alone") else change.rules()
        blockers = outcome.facts.get("blockers", change.blockers)
        if blockers is not None:
            report.blockers = blockers
            report.warnings += blockers
        if change.desired is not None and not change.desired.kept:
            report.looked |= {self.name} if blockers is None else {self.name, "forwarding"}

    # ---- parts

    def _plan(self, host: Host, desired: DesiredRules) -> RulesPlan:
        from flannel_dp.resources.firewall.engine import plan_rules

        plan = plan_rules(desired.rules, self._engine(host, desired), host.netns)
        steps = tuple(step for step in plan.steps if step.family not in desired.kept)
        return replace(plan, steps=steps)

    def _engine(self, host: Host, desired: DesiredRules) -> str:
        """Return the name of the engine to write with, any but auto."""
        from flannel_dp.resources.firewall.choice import choose_engine

        return choose_engine(
            self.options.engine,
            desired.rules,
            host.netns,
            devices=desired.devices,
            iface=desired.iface,
        )

    def _blockers(self, host: Host, desired: DesiredRules, engine: str) -> tuple[str, ...]:
        from flannel_dp.resources.firewall.probe import blocking_rules

        found = blocking_rules(
            desired.rules, engine, host.netns, devices=desired.devices, iface=desired.iface
        )
        return tuple(map(str, found))

    def _left_alone(self, error: FlannelDPError) -> tuple[str, ...]:
        if self.options.required:
            raise error
        return (f"firewall rules are left alone: {error}",)


def _may_recover(error: FlannelDPError) -> FlannelDPError | None:
    """Return the error of a program that is installed and failed; None where there is no
    program."""
    return None if isinstance(error, ConfigError) else error


def _endpoints(peers: Claims) -> set[str]:
    return {peers.endpoint(number) for number in range(len(peers))}
