"""Reads any program's nftables rules, far enough to know which packets they stop.

Input is what ``nft -j list table`` prints (libnftables-json(5)). What is not understood
counts as unknown, and what is unknown blocks nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import Struct, field

from flannel_dp.resources.firewall.packets import (
    Action,
    Chains,
    Match,
    Packets,
    RuleStep,
    negate,
    yes,
)

Json = dict[str, Any]

_AWAKE: tuple[Any, ...] = ("owner", "persist", ["owner"], ["persist"], ["owner", "persist"], [])
_VERDICTS = ("accept", "drop", "return", "jump", "goto")


class RuleTable(Struct):
    """One table: its chains as nft prints them, and the rules of each."""

    chains: dict[str, Json] = field(default_factory=dict)
    rules: dict[str, list[Json]] = field(default_factory=dict)

    def bases(self, hook: str) -> list[str]:
        """Return the names of the filter chains at a hook."""
        return [
            name
            for name, chain in self.chains.items()
            if chain.get("hook") == hook and chain.get("type") == "filter"
        ]

    def policy(self, chain: str) -> str:
        """Return what a base chain does with what no rule of it decides."""
        return str(self.chains[chain].get("policy", "accept"))

    def steps(self, packets: Packets) -> Chains:
        """Return a function that gives the rules of a chain as seen by ``packets``."""

        def of(chain: str) -> Iterator[RuleStep]:
            for rule in self.rules.get(chain, ()):
                yield _step(rule, packets)

        return of


def table_of(objects: Iterable[Json]) -> RuleTable:
    """Return one table, from the objects that nft prints of it; a dormant one has no chains."""
    table = RuleTable()
    for item in objects:
        # nft 1.0.6 prints any text for "dormant", so what is known to be awake is asked for.
        if "table" in item and item["table"].get("flags", "owner") not in _AWAKE:
            return RuleTable()
        if "chain" in item:
            table.chains[item["chain"]["name"]] = item["chain"]
        elif "rule" in item:
            table.rules.setdefault(item["rule"]["chain"], []).append(item["rule"])
    return table


def _step(rule: Json, packets: Packets) -> RuleStep:
    match = Match.ALL
    where = (rule["chain"], rule.get("handle", 0))
    for expression in rule.get("expr", ()):
        kind, value = next(iter(expression.items()))
        if kind == "match":
            match = min(match, _match(value, packets))
        elif kind == "vmap":
            part, action = _verdict_map(value, packets)
            return RuleStep(min(match, part), action, where)
        elif kind == "reject":
            return RuleStep(match, Action("drop"), where)
        elif kind in _VERDICTS:
            target = value["target"] if isinstance(value, dict) else ""
            return RuleStep(match, Action(kind, target), where)
        elif kind in ("limit", "xt", "quota", "ct count"):
            match = min(match, Match.UNKNOWN)
    return RuleStep(match, Action("continue"), where)


def _verdict_map(value: Json, packets: Packets) -> tuple[Match, Action]:
    """Return the verdict of a vmap over the connection's state; any other may accept."""
    data = value.get("data")
    if _key(value.get("key")) != "ct state" or not isinstance(data, dict) or "set" not in data:
        return Match.UNKNOWN, Action("accept")
    for key, verdict in data["set"]:
        if key == "new":
            kind, target = next(iter(verdict.items()))
            name = target["target"] if isinstance(target, dict) else ""
            return Match.ALL, Action("drop" if kind == "reject" else kind, name)
    return Match.NONE, Action("continue")


def _key(left: Any) -> str:
    """Return what a match reads, as nft spells it: ``ip saddr``, ``meta iifname``, ``ct
    state``."""
    if not isinstance(left, dict) or len(left) != 1:
        return ""
    kind, value = next(iter(left.items()))
    if kind == "payload" and isinstance(value, dict) and "field" in value:
        return f"{value['protocol']} {value['field']}"
    if kind in ("meta", "ct") and isinstance(value, dict):
        return f"{kind} {value.get('key')}"
    return ""


def _match(value: Json, packets: Packets) -> Match:
    key = _key(value["left"])
    if not _has(key, packets):
        return Match.NONE  # whatever is asked of it: nft looks for the header first
    options = _options(value["right"])
    if options is None:
        return Match.UNKNOWN
    found = max((_one(key, option, packets) for option in options), default=Match.NONE)
    return negate(found) if value["op"] == "!=" else found


def _has(key: str, packets: Packets) -> bool:
    """Return whether the packets have the header that a match reads."""
    protocol = key.partition(" ")[0]
    if protocol in ("ip", "ip6"):
        return (protocol == "ip6") == (packets.family == 6)
    transports = ("tcp", "udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "ah", "esp", "comp")
    return protocol not in transports or protocol == packets.protocol


def _options(right: Any) -> list[Any] | None:
    """Return the alternatives of a match's right side; None for what is not written out (a set)."""
    if isinstance(right, dict) and "set" in right:
        right = right["set"]
    if isinstance(right, list):
        return right
    return None if isinstance(right, str) and right.startswith("@") else [right]


def _one(key: str, right: Any, packets: Packets) -> Match:
    if key == "ct state":
        return yes(right == "new")
    if key in ("ip saddr", "ip6 saddr", "ip daddr", "ip6 daddr"):
        cidr = _cidr(right)
        return packets.in_network(key.split()[1][0], cidr) if cidr else Match.UNKNOWN
    if key in ("meta iifname", "meta oifname", "meta iif", "meta oif"):
        return packets.on_interface(key.split()[1][0], str(right))
    if key in ("meta l4proto", "ip protocol", "ip6 nexthdr"):
        return packets.of_protocol(str(right))
    if key in ("meta nfproto", "meta protocol"):
        return yes(right in (("ipv6", "ip6") if packets.family == 6 else ("ipv4", "ip")))
    protocol, _, name = key.partition(" ")
    if name == "dport" and protocol in ("tcp", "udp", "th"):
        ranges = _range(right)
        return Match.UNKNOWN if ranges is None else packets.to_port([ranges])
    return Match.UNKNOWN


def _cidr(right: Any) -> str:
    if isinstance(right, dict) and "prefix" in right:
        return f"{right['prefix']['addr']}/{right['prefix']['len']}"
    return right if isinstance(right, str) else ""


def _range(right: Any) -> tuple[int, int] | None:
    if isinstance(right, dict) and "range" in right:
        low, high = right["range"]
        right = low if low == high else None
        if isinstance(low, int) and isinstance(high, int):
            return low, high
    return (right, right) if isinstance(right, int) else None
