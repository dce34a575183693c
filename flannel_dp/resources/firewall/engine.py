"""Firewall rules: plan, apply, clean. Which engine does what, in which order.

===========  ==================================  ======================================
engine       written                             removed where it is left over
===========  ==================================  ======================================
nft          all in ``ip|ip6 flannel-dp``        our chains of both kinds of iptables
iptables     our chains; the guard as a table    our chains of the other kind, the rest
             ``flannel-dp`` of nft               of our nft tables
===========  ==================================  ======================================

The guard is nft's in both: sets are a separate package for iptables (ipset), while a drop of
nft holds whatever iptables accepts. Which engine ``auto`` is, :mod:`.engines` says.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from flannel_dp.errors import ConfigError, FlannelDPError
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.resources.firewall import nft_kernel
from flannel_dp.resources.firewall.choice import choose_engine
from flannel_dp.resources.firewall.iptables_layout import TABLES, chains_of, existing_tables
from flannel_dp.resources.firewall.nft_layout import FAMILY, table_name, wanted_rules
from flannel_dp.resources.firewall.nft_unchanged import is_unchanged
from flannel_dp.resources.firewall.programs import Variant, find, variants
from flannel_dp.resources.firewall.rules import RulesWanted

if TYPE_CHECKING:
    from flannel_dp.resources.firewall.iptables import ChainChange
    from flannel_dp.resources.firewall.nft import TableChange
    from flannel_dp.resources.firewall.probe import Devices

log = logging.getLogger(__name__)

_FAMILIES = (4, 6)


class RulesPlan(Struct, frozen=True):
    """What ``apply_rules`` would write; ``changes`` are its lines for people (+ ~ -)."""

    engine: str
    steps: tuple[TableChange | ChainChange, ...] = ()

    @property
    def changes(self) -> tuple[str, ...]:
        """One line per rule, jump, set element or table that changes."""
        return tuple(line for step in self.steps for line in step.changes)

    @property
    def is_empty(self) -> bool:
        """Nothing would be written."""
        return not self.steps


def plan_rules(
    wanted: RulesWanted,
    engine: str = "auto",
    netns: NetNS = None,
    *,
    devices: Devices | None = None,
    iface: str = "",
) -> RulesPlan:
    """Return what has to be written for ``wanted`` to hold in ``netns``. Reads, never writes.

    Rules of ours that another engine left are part of it; ``devices`` and ``iface`` help to
    choose the engine (``choose_engine``). Raises ConfigError for an engine
    that is not there, for a guard without nft, and for a namespace that is not there;
    NotPermitted without CAP_NET_ADMIN; FlannelDPError with a failing program's own words.
    """
    chosen = choose_engine(engine, wanted, netns, devices=devices, iface=iface)
    return call_in_netns(netns, _plan, wanted, chosen)


def apply_rules(plan: RulesPlan, netns: NetNS = None) -> None:
    """Write a plan: per family, all of it is tried on the kernel first, then sent.

    A family that fails does not stop the other. Raises FlannelDPError (or NotPermitted) with
    the programs' own words, after both had their turn; a family that failed its trial is as
    it was.
    """
    call_in_netns(netns, _apply, plan)


def plan_removal(netns: NetNS = None, mark: str = "") -> RulesPlan:
    """Return what it takes to remove our tables, chains and jumps, of every engine and of the
    network with this ``mark``. Reads, never writes.

    Nothing else is touched; built-in tables that iptables made to hold a chain of ours stay,
    empty. Raises as ``plan_rules``.
    """
    return call_in_netns(netns, _plan, RulesWanted(mark=mark), "")


def clean_rules(netns: NetNS = None, mark: str = "") -> tuple[str, ...]:
    """Remove our rules (see ``plan_removal``), and return a line for each that was removed.

    Raises as ``apply_rules``.
    """
    plan = plan_removal(netns, mark)
    apply_rules(plan, netns)
    return plan.changes


def update_guard(
    family: int, *, added: Any = (), removed: Any = (), netns: NetNS = None, mark: str = ""
) -> None:
    """Change the peers of a guard that is in place: one transaction, cost as the change.

    Addresses as in ``Underlay.peers``. Raises FlannelDPError when there is no guard, or when
    one of ``removed`` is not in it: nothing changed then, and ``plan_rules`` repairs it.
    """
    from flannel_dp.resources.firewall.nft import update_peers

    call_in_netns(netns, update_peers, family, added, removed, mark)


def _plan(wanted: RulesWanted, engine: str) -> RulesPlan:
    chosen = next((variant for variant in variants() if variant.name == engine), None)
    full = engine == "nft"
    name = table_name(wanted.mark)
    tables = _tables(name, any(wanted_rules(wanted, one, full=full) for one in _FAMILIES))
    if tables is None and wanted.guarded:
        raise ConfigError(
            "--guard-underlay: the program nft is not installed",
            hint="install the package nftables: it holds the set of peers for every engine",
        )
    steps: list[TableChange | ChainChange] = []
    leftovers = _leftovers(tables or set(), wanted.mark)
    for family in _FAMILIES:
        ours = (FAMILY[family], name) in (tables or ())
        table = None
        needed = ours or wanted_rules(wanted, family, full=full)
        if tables is not None and needed and not (ours and is_unchanged(wanted, family, full=full)):
            from flannel_dp.resources.firewall.nft import plan_table

            table = plan_table(wanted, family, full=full, exists=ours)
        chains = _plan_chains(wanted, family, chosen, leftovers)
        # What takes over comes first and what is left over goes last, so that there is no
        # moment without rules; a guard that is new comes before the port is let in.
        table_first = engine in ("nft", "") or not ours
        tables_part = [table] if table else []
        steps += [*tables_part, *chains] if table_first else [*chains, *tables_part]
    return RulesPlan(engine, tuple(steps))


def _tables(ours: str, wanted: bool) -> set[tuple[str, str]] | None:
    """Return the tables of nftables, None where nft is not installed.

    Where one is ``wanted`` and none is ours nothing else would run nft before it has to write.
    """
    if not find("nft"):
        return None
    tables = nft_kernel.present_tables()
    if wanted and all(name != ours for _, name in tables):
        from flannel_dp.resources.firewall.nft import try_out

        try_out()
    return tables


def _plan_chains(
    wanted: RulesWanted,
    family: int,
    chosen: Variant | None,
    leftovers: Collection[Variant],
) -> list[ChainChange]:
    if not chosen and not leftovers:
        return []
    from flannel_dp.resources.firewall import iptables

    found: list[ChainChange | None] = []
    if chosen:
        rules = iptables.wanted_rules(wanted, family, chosen)
        installed = find(chosen.program(family, "save"))
        if rules or (installed and chosen in leftovers):
            found.append(iptables.plan_chains(chosen, family, rules, wanted.mark))
    found += [
        iptables.plan_chains(variant, family, {}, wanted.mark)
        for variant in leftovers
        if variant != chosen and find(variant.program(family, "save"))
    ]
    return [change for change in found if change]


def _leftovers(tables: set[tuple[str, str]], mark: str) -> list[Variant]:
    """Return the kinds of iptables that may hold chains of ours, found without running them."""
    found = []
    for variant in variants():
        if variant.kind == "legacy":
            there = any(existing_tables(variant, family) for family in _FAMILIES)
        elif find("nft"):
            homes = {(family, table) for family in ("ip", "ip6") for table in TABLES}
            there = bool(homes & tables) and any(
                (family, table) in homes and chain in chains_of(mark)
                for family, table, chain in nft_kernel.present_chains()
            )
        else:
            there = True
        if there:
            found.append(variant)
    return found


def _apply(plan: RulesPlan) -> None:
    failures: list[FlannelDPError] = []
    for family in _FAMILIES:
        steps = [step for step in plan.steps if step.family == family]
        try:
            for step in steps:
                _send(step, check=True)
            for step in steps:
                _send(step)
        except FlannelDPError as error:
            failures.append(error)
        else:
            changed = sum(len(step.changes) for step in steps)
            if changed:
                log.info(
                    "IPv%(family)d firewall rules were written by %(engine)s: %(changes)d changes",
                    {
                        "engine": plan.engine,
                        "family": family,
                        "changes": changed,
                    },
                )
    if len(failures) == 1 or (failures and str(failures[0]) == str(failures[-1])):
        raise failures[0]
    if failures:
        message = "; ".join(error.message for error in failures)
        raise FlannelDPError(message, hint=failures[0].hint)


def _send(step: TableChange | ChainChange, *, check: bool = False) -> None:
    from flannel_dp.resources.firewall import iptables, nft

    if isinstance(step, nft.TableChange):
        nft.apply_table(step, check=check)
    else:
        iptables.apply_chains(step, check=check)
