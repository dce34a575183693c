"""Where our rules are in iptables: our chains, and the tables that hold them."""

from __future__ import annotations

from flannel_dp.resources.firewall.programs import Variant

#: Our chains: where each is, and what jumps to it.
CHAINS = {
    "FLANNEL-DP-POSTRTG": ("nat", "POSTROUTING"),
    "FLANNEL-DP-FWD": ("filter", "FORWARD"),
    "FLANNEL-DP-INPUT": ("filter", "INPUT"),
}
_OURS = "FLANNEL-DP-"
TABLES = ("nat", "filter")

_NAMES = {4: "/proc/thread-self/net/ip_tables_names", 6: "/proc/thread-self/net/ip6_tables_names"}


def chains_of(mark: str) -> dict[str, tuple[str, str]]:
    """Return ``CHAINS`` with the names that they have in one network: at most 28 characters."""
    return {f"{chain}-{mark}": where for chain, where in CHAINS.items()} if mark else CHAINS


def is_our_chain(name: str) -> bool:
    """Return whether a chain of this name is that of any network on the node."""
    return name.startswith(_OURS)


def existing_tables(variant: Variant, family: int) -> tuple[str, ...]:
    """Return the tables that may be read without being made.

    Reading a table of legacy iptables loads and registers it (``iptable_nat`` and its hooks),
    so only those that the kernel lists are asked for; iptables-nft-save makes nothing.
    """
    if variant.kind != "legacy":
        return TABLES
    try:
        with open(_NAMES[family], encoding="ascii") as file:
            names = file.read().split()
    except FileNotFoundError:
        return ()
    return tuple(table for table in TABLES if table in names)
