"""Chooses the firewall engine: what is asked for, or by what the rules of other programs let
through.

An accept of nftables ends a packet's way in one base chain, and an accept of one kind of
iptables says nothing to the other kind. So ``auto`` finds where packets are stopped: iptables'
FORWARD with the policy DROP, as Docker sets it, or REJECT rules of iptables-services, are passed
by a chain that comes first in the same table, and by nothing else. Accepts of some packets, such
as kube-proxy's of those with its mark, do not count: that chain does no harm. Where nothing is
stopped it is nft, and the engine that has our rules already stays: it lets everything through as
well.

Whether iptables has a table that could stop a packet is asked from the kernel, so that the
choice runs no program on a node without such rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from flannel_dp.errors import ConfigError
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.resources.firewall.filters import FilterTables, hooks_of, read_filters
from flannel_dp.resources.firewall.iptables_layout import chains_of, existing_tables
from flannel_dp.resources.firewall.programs import Variant, choose_variant, find, variants

if TYPE_CHECKING:
    from flannel_dp.resources.firewall.probe import Devices
    from flannel_dp.resources.firewall.rules import RulesWanted

Engine: TypeAlias = Literal["auto", "nft", "iptables", "iptables-nft", "iptables-legacy"]
"""``iptables`` is the one the system calls so; the longer names choose its kind."""

#: Chains that will not be there for good: ours, and flanneld's, which go with the next boot.
_PASSING = ("FLANNEL-FWD",)


def choose_engine(
    engine: str,
    wanted: RulesWanted | None = None,
    netns: NetNS = None,
    *,
    devices: Devices | None = None,
    iface: str = "",
) -> str:
    """Return ``nft``, or the name of an iptables (as an Engine), for what was asked.

    ``auto`` with the rules ``wanted`` is the iptables that holds rules of other programs that would
    stop the packets (``devices`` and ``iface`` as in ``blocking_rules``); else the engine that
    has our rules; else nft, or iptables where nft is not installed. Reads, never writes.
    Raises ConfigError for an engine that does not exist, and when none is installed, naming
    the package; for ``auto`` as ``plan_rules``.
    """
    if engine not in get_args(Engine):
        raise ConfigError(
            f"firewall engine {engine!r} does not exist",
            hint=f"choose one of {', '.join(get_args(Engine))}",
        )
    if engine == "nft":
        if not find("nft"):
            raise ConfigError(
                "firewall rules: the program nft is not installed",
                hint='install the package nftables, or choose engine "iptables"',
            )
        return "nft"
    if engine != "auto":
        return choose_variant(engine).name
    if not find("nft") and not variants():
        raise ConfigError(
            "firewall rules: neither nft nor iptables is installed",
            hint="install the package nftables (or iptables)",
        )
    found = None
    if wanted and hooks_of(wanted) and variants():
        found = call_in_netns(netns, _by_what_is_there, wanted, devices, iface)
    return found or ("nft" if find("nft") else choose_variant("iptables").name)


def _by_what_is_there(wanted: RulesWanted, devices: Devices | None, iface: str) -> str | None:
    """Return the iptables that stops the packets or, where none does, that has our rules."""
    filters = read_filters(hooks_of(wanted))
    if not filters.saved:
        return None
    from flannel_dp.resources.firewall.probe import blocked_in_iptables, kinds_of

    kinds = kinds_of(wanted, devices, iface)
    there = [*dict.fromkeys(variant for variant, _ in filters.saved)]
    for variant in there:
        mine = {key: held for key, held in filters.saved.items() if key[0] == variant}
        if blocked_in_iptables(kinds, FilterTables(mine), "", _PASSING, wary=True):
            return variant.name
    return next(
        (variant.name for variant in there if _has_ours(variant, filters, wanted.mark)), None
    )


def _has_ours(variant: Variant, filters: FilterTables, mark: str) -> bool:
    return any(
        chain in held.policies
        for (one, _), held in filters.saved.items()
        for chain in chains_of(mark)
        if one == variant
    )


def needs_raw_socket(engine: str) -> bool:
    """Return whether ``engine`` runs legacy iptables, or may have to later, in this namespace.

    That takes CAP_NET_RAW. ``auto`` may where legacy is what the system calls iptables, and so
    what Docker uses; every engine does where the kernel has legacy tables, which it reads.
    """
    found = variants()
    legacy = [variant for variant in found if variant.kind == "legacy"]
    if any(existing_tables(variant, family) for variant in legacy for family in (4, 6)):
        return True
    if engine == "auto":
        return bool(found) and found[0].kind == "legacy"
    return engine != "nft" and choose_variant(engine).kind == "legacy"
