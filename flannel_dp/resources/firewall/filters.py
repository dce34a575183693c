"""Finds the filter tables that may stop packets, and reads those of iptables.

The kernel is asked over netlink which tables of nftables filter at a hook, and whether anything
in them can stop a packet: a policy, a rule that drops or rejects, a map of verdicts. What has none
of these is not read, so that on most nodes no program is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec import Struct

from flannel_dp.errors import DumpInterrupted
from flannel_dp.kernel import messages as nl
from flannel_dp.resources.firewall import nft_kernel
from flannel_dp.resources.firewall.iptables_layout import existing_tables, is_our_chain
from flannel_dp.resources.firewall.nft_layout import FAMILY, is_our_table
from flannel_dp.resources.firewall.programs import Variant, find, variants

if TYPE_CHECKING:
    from flannel_dp.resources.firewall.iptables import SavedTable
    from flannel_dp.resources.firewall.rules import RulesWanted

_WHAT = "read the rules of nftables"
_DROPS = nl.attr(nft_kernel.VERDICT_CODE, nft_kernel.NF_DROP.to_bytes(4, "big"))
_VERDICT_REGISTER = bytes(4)
_IMMEDIATE_DATA = 2
_LOOKUP_TARGET = 3  # NFTA_LOOKUP_DREG, only of a map


class FilterTables(Struct, frozen=True):
    """The filter tables that packets meet here: those of iptables as read, by kind and family,
    and the names ``(family, table)`` of those that nft has to read, at least a part of them."""

    saved: dict[tuple[Variant, int], SavedTable]
    native: tuple[tuple[str, str], ...] = ()


def hooks_of(wanted: RulesWanted) -> set[tuple[int, str]]:
    """Return (family, hook) of the packets that the rules of ``wanted`` are to let through."""
    forward = {(family, "forward") for family in wanted.families if wanted.forward}
    return forward | {(family, "input") for family in wanted.underlay}


def read_filters(hooks: Iterable[tuple[int, str]]) -> FilterTables:
    """Return the filter tables that may stop packets at ``hooks``, as (family, hook), and those
    that hold chains of ours. For the calling thread's namespace. Raises as ``programs.run``."""
    hooks = {*hooks}
    asked = {(name, hook) for family, hook in hooks for name in (FAMILY[family], "inet")}
    there = variants()
    by_nft = find("nft") or any(variant.kind == "nft" for variant in there)
    tables = nft_kernel.filtering_tables() if by_nft else set()
    native = {(family, table) for family, table, hook in tables if (family, hook) in asked}
    native = {one for one in native if not is_our_table(one[1]) and may_stop(*one)}
    saved: dict[tuple[Variant, int], SavedTable] = {}
    for variant in there:
        for family in sorted({family for family, _ in hooks}):
            home = (FAMILY[family], "filter")
            held = home in native if variant.kind == "nft" else _has_filter(variant, family)
            if not held or not find(variant.program(family, "save")):
                continue
            from flannel_dp.resources.firewall import iptables

            found = iptables.save(variant, family, "filter")
            saved[variant, family] = found
            if variant.kind == "nft" and not found.partial:
                native.discard(home)
    return FilterTables(saved, tuple(sorted(native)))


def may_stop(family: str, table: str) -> bool:
    """Return whether a table of nftables may stop a packet, or has a chain of ours, as iptables
    names them. Reads no further than to the first sign of it."""
    asked = nft_kernel.named(nft_kernel.RULE_TABLE, table)
    with nft_kernel.NftSocket() as kernel:
        for _, chain in kernel.dump(nft_kernel.CHAINS, "chains", family):
            if nft_kernel.name_of(chain.get(nft_kernel.CHAIN_TABLE)) != table:
                continue
            if chain.get(nft_kernel.CHAIN_POLICY) == nft_kernel.NF_DROP.to_bytes(4, "big"):
                return True
            if is_our_chain(nft_kernel.name_of(chain.get(nft_kernel.CHAIN_NAME))):
                return True
        try:
            return any(
                nft_kernel.name_of(rule.get(nft_kernel.RULE_TABLE)) == table and _stops(rule)
                for _, rule in kernel.walk(nft_kernel.RULES, "rules", family, asked)
            )
        except DumpInterrupted:
            return True


def _stops(rule: nft_kernel.Object) -> bool:
    """Return whether a rule drops or rejects, or has a map or a target that may."""
    for item in nft_kernel.items(rule.get(nft_kernel.RULE_EXPRESSIONS, b""), _WHAT):
        expression = nl.attributes(item, 0, _WHAT)
        name = nft_kernel.name_of(expression.get(nft_kernel.EXPRESSION_NAME))
        if name in ("reject", "target"):
            return True
        if name in ("immediate", "lookup"):
            data = nl.attributes(expression.get(nft_kernel.EXPRESSION_DATA, b""), 0, _WHAT)
            if name == "lookup" and data.get(_LOOKUP_TARGET) == _VERDICT_REGISTER:
                return True
            if name == "immediate" and _is_drop(data.get(_IMMEDIATE_DATA, b"")):
                return True
    return False


def _is_drop(data: bytes) -> bool:
    verdict = nl.attributes(data, 0, _WHAT).get(nft_kernel.DATA_VERDICT, b"")
    return verdict == _DROPS


def _has_filter(variant: Variant, family: int) -> bool:
    return "filter" in existing_tables(variant, family)
