"""Where our rules are in nftables: one table per family, its chains and its set of peers. Pure."""

from __future__ import annotations

from typing import Final

from flannel_dp.resources.firewall.rules import Rule, RulesWanted

#: With the mark of a network, where there is one, behind it.
TABLE: Final = "flannel-dp"
PEERS: Final = "peers"
FAMILY: Final = {4: "ip", 6: "ip6"}
SET_TYPE: Final = {4: "ipv4_addr", 6: "ipv6_addr"}

BASE_CHAINS: Final = {
    "postrouting": ("nat", "postrouting", 99),
    "forward": ("filter", "forward", 0),
    "input": ("filter", "input", -1),
}
"""Chain: type, hook, priority. NAT before the usual srcnat (100), the guard before filters (0)."""


def table_name(mark: str) -> str:
    """Return the name of the table of one network."""
    return f"{TABLE}-{mark}" if mark else TABLE


def is_our_table(name: str) -> bool:
    """Return whether a table of this name is that of any network on the node."""
    return name == TABLE or name.startswith(f"{TABLE}-")


def wanted_rules(wanted: RulesWanted, family: int, *, full: bool) -> dict[str, tuple[Rule, ...]]:
    """Return the rules of each chain that has any; without ``full`` the guard only."""
    rules = {
        "postrouting": wanted.postrouting(family) if full else (),
        "forward": wanted.forwarding(family) if full else (),
        "input": wanted.guard(family),
    }
    return {chain: found for chain, found in rules.items() if found}
