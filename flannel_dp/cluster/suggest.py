"""What a mistyped word most likely stands for: a flag, a command, a key of net-conf.json."""

from __future__ import annotations

from collections.abc import Iterable

#: The keys of flannel's network configuration that are read.
KEYS = (
    "Network", "EnableIPv4", "EnableIPv6", "EnableNFTables", "SubnetLen", "SubnetMin", "SubnetMax",
    "IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", "Backend", "Backend.Type",
    "Backend.VNI", "Backend.Port", "Backend.MTU", "Backend.Learning", "Backend.GBP",
    "Backend.DirectRouting", "Backend.Forwarding",
)  # fmt: skip


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'this'?`` for the known word that is most alike, "" for none."""
    from difflib import get_close_matches

    folded = {one.casefold(): one for one in known}
    found = get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return f" Did you mean '{folded[found[0]]}'?" if found else ""


def about_key(key: str) -> str:
    """Return a warning of a key of net-conf.json that is not read, with the key that was meant:
    one that is alike, or the same in the place where it is read."""
    places = {one.rpartition(".")[2].casefold(): one for one in KEYS}
    elsewhere = places.get(key.rpartition(".")[2].casefold())
    meant = f" Did you mean '{elsewhere}'?" if elsewhere else did_you_mean(key, KEYS)
    return f"net-conf: key '{key}' is not known and has no effect." + meant
