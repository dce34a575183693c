"""What a node needs beside its tables: firewall rules and subnet.env.

Both hang on what was resolved for the families, come after the tables, and
fail on their own: the data plane is synced whatever becomes of them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Claims, parse_address
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, FlannelDPError
from flannel_dp.kernel.netns import NetNS
from flannel_dp.reconcile.plan import RulesChange
from flannel_dp.resources.device import vxlan

if TYPE_CHECKING:
    from flannel_dp.node.view import Family
    from flannel_dp.reconcile.report import Report
    from flannel_dp.resources.firewall.engine import RulesPlan
    from flannel_dp.resources.firewall.rules import RulesWanted

log = logging.getLogger(__name__)


class RulesOptions(Struct, frozen=True):
    """Which firewall rules are wanted.

    ``ip_masq`` translates what leaves the pod network, ``forward`` accepts
    forwarded pod traffic, ``guard`` opens the VXLAN port to the peers of the
    accepted leases only. ``engine`` is auto, nft or iptables (see
    flannel_dp.resources.firewall.choice). With ``required`` a machine where it cannot be
    had is a failure, else a warning.
    """

    ip_masq: bool = False
    forward: bool = True
    guard: bool = False
    engine: str = "auto"
    random_fully: bool = True
    required: bool = False


def rules_wanted(
    options: RulesOptions, config: NetworkConfig, families: list[Family]
) -> RulesWanted:
    """The rules for these families, as flanneld would have them (masquerade.py)."""
    from flannel_dp.resources.firewall.rules import FamilyRules, RulesWanted, Underlay

    port = config.backend.effective_port
    return RulesWanted(
        families={
            family.number: FamilyRules(
                vxlan.network_of(config, family.number), family.admission.node.subnet
            )
            for family in families
        },
        ip_masq=options.ip_masq,
        forward=options.forward,
        underlay={
            family.number: Underlay(port, family.peers.endpoints if options.guard else None)
            for family in families
            if family.device is not None
        },
        random_fully=options.random_fully,
    )


class Kept(NamedTuple):
    """What ``HostRules.sync`` did: ``change`` is None where rules were left alone.

    ``blockers`` are the rules of others that stop packets all the same, None where nobody
    looked for any.
    """

    change: RulesChange | None
    warnings: tuple[str, ...] = ()
    blockers: tuple[str, ...] | None = None


class HostRules:
    """The firewall rules of one data plane. Raises ConfigError for a guard without a tunnel."""

    def __init__(self, options: RulesOptions, config: NetworkConfig, netns: NetNS) -> None:
        if options.guard and config.backend.type != "vxlan":
            raise ConfigError(
                "--guard-underlay guards the VXLAN port, and this network has none",
                hint="leave it out with host-gw",
            )
        self.options, self._config, self._netns = options, config, netns

    def plan(
        self, families: list[Family], *, probe: bool = True
    ) -> tuple[RulesPlan | None, tuple[str, ...]]:
        """What would be written and, with ``probe``, whose rules stop packets all the same.

        None, and a warning, where the program for it is missing or fails and none is required.
        """
        from flannel_dp.resources.firewall.engine import plan_rules

        try:
            wanted = rules_wanted(self.options, self._config, families)
            engine = self._engine(wanted, families)
            planned = plan_rules(wanted, engine, self._netns)
            # A family that cannot be looked at now keeps the rules that it has.
            missing = _missing(self._config, families)
            steps = tuple(step for step in planned.steps if step.family not in missing)
            planned = replace(planned, steps=steps)
            return planned, self._blockers(wanted, families, engine) if probe else ()
        except FlannelDPError as error:
            return None, self._left_alone(error)

    def _left_alone(self, error: FlannelDPError) -> tuple[str, ...]:
        if self.options.required:
            raise error
        return (f"firewall rules are left alone: {error}",)

    def blockers(self, families: list[Family]) -> tuple[str, ...]:
        """The rules of others that stop packets although ours are in place.

        Raises FlannelDPError when they cannot be read.
        """
        wanted = rules_wanted(self.options, self._config, families)
        return self._blockers(wanted, families, self._engine(wanted, families))

    def _engine(self, wanted: RulesWanted, families: list[Family]) -> str:
        """The engine to write with, as it is named."""
        from flannel_dp.resources.firewall.choice import choose_engine

        devices, iface = self._devices(families)
        asked = self.options.engine
        return choose_engine(asked, wanted, self._netns, devices=devices, iface=iface)

    def _blockers(
        self, wanted: RulesWanted, families: list[Family], engine: str
    ) -> tuple[str, ...]:
        from flannel_dp.resources.firewall.probe import blocking_rules

        devices, iface = self._devices(families)
        found = blocking_rules(wanted, engine, self._netns, devices=devices, iface=iface)
        return tuple(str(blocker) for blocker in found)

    def _devices(self, families: list[Family]) -> tuple[dict[int, list[str]], str]:
        """By family, what the overlay's packets come and go by, and the external interface."""
        devices = {f.number: [f.device.device.name] if f.device else [] for f in families}
        for family in families:
            if family.device is None or self._config.backend.direct_routing:
                devices[family.number].append(family.iface)
        return devices, families[0].iface if families else ""

    def sync(self, families: list[Family], *, probe: bool = False) -> Kept:
        """Write what differs. Rules of others that stop packets are looked for where something
        was written, and with ``probe``."""
        from flannel_dp.resources.firewall.engine import apply_rules

        planned, warnings = self.plan(families, probe=False)
        if planned is None:
            return Kept(None, warnings)
        change = RulesChange(planned.engine, planned.changes)
        try:
            if not planned.is_empty:
                apply_rules(planned, self._netns)
            elif not probe:
                return Kept(change, warnings)
            wanted = rules_wanted(self.options, self._config, families)
            return Kept(change, warnings, self._blockers(wanted, families, planned.engine))
        except FlannelDPError as error:
            return Kept(None, self._left_alone(error))

    def follow(self, family: Family, old: Claims, new: Claims) -> None:
        """Peers changed from ``old`` to ``new``: so does the guard's set, without being read."""
        if not self.options.guard:
            return
        from flannel_dp.resources.firewall.engine import update_guard

        before = {old.endpoint(number) for number in range(len(old))}
        after = {new.endpoint(number) for number in range(len(new))}
        added, removed = after - before, before - after
        # Two leases may have one address: it stays while one of them does.
        removed = {a for a in removed if not family.peers.find_endpoint(parse_address(a)[1])}
        if added or removed:
            update_guard(
                family.number, added=sorted(added), removed=sorted(removed), netns=self._netns
            )


def _missing(config: NetworkConfig, families: list[Family]) -> set[int]:
    """Families that are switched on and could not be resolved."""
    return {*vxlan.families_of(config)} - {family.number for family in families}


def sync_host(
    rules: HostRules | None,
    path: str,
    config: NetworkConfig,
    families: list[Family],
    report: Report,
    *,
    probe: bool,
) -> None:
    """Firewall rules and the subnet.env at ``path`` ("": none); what goes wrong there is
    noted in ``report``, and the tables stand."""
    looked = {"firewall", "subnet file"}
    if rules is None:
        looked.add("forwarding")
    else:
        try:
            report.rules, warnings, blockers = rules.sync(families, probe=probe)
            report.warnings += warnings
            if blockers is not None:
                report.blockers = blockers
                report.warnings += blockers
                looked.add("forwarding")
        except FlannelDPError as error:
            report.problems["firewall"] = error
            log.error("firewall rules were not synced: %s", error)
    if path:
        masq = rules is not None and rules.options.ip_masq
        try:
            if write_subnet_file(path, config, families, masq):
                report.subnet_file = path
        except FlannelDPError as error:
            report.problems["subnet file"] = error
            log.error("subnet file was not written: %s", error)
    if not _missing(config, families):  # else not all of it was looked at
        report.looked |= looked


def clean_rules(netns: NetNS) -> RulesChange | None:
    """Remove our tables and chains; None when there were none, or no program to ask."""
    from flannel_dp.resources.firewall.engine import clean_rules as clean

    removed = clean(netns)
    return RulesChange("", tuple(removed)) if removed else None


def previous_subnets(path: str, config: NetworkConfig) -> dict[int, str]:
    """The own subnets that a former run, or a person, wrote into subnet.env."""
    from flannel_dp.cluster.subnet_env import previous_subnets as read

    try:
        return read(path, config)
    except FlannelDPError as error:
        log.warning("subnet_file=%s cannot be read: %s", path, error)
        return {}


def write_subnet_file(
    path: str, config: NetworkConfig, families: list[Family], ip_masq: bool
) -> bool:
    """Write subnet.env for the CNI plugin; True when it changed. One MTU serves both
    families, so it is the smaller one's. A family that could not be resolved keeps
    what the file says of it."""
    from flannel_dp.cluster.subnet_env import read_subnet_env, write_subnet_env

    subnets = {family.number: family.admission.node.subnet for family in families}
    mtu = min(family.mtu for family in families)
    kept: dict[int, str] = {}
    if missing := _missing(config, families):
        before = previous_subnets(path, config)
        kept = {number: before[number] for number in missing if number in before}
    if kept:
        mtu = min(mtu, read_subnet_env(path).mtu or mtu)
    return write_subnet_env(path, config=config, subnets=kept | subnets, mtu=mtu, ipmasq=ip_masq)
