"""Reads anybody's nftables rules, far enough to tell which packets they stop.

Input is what ``nft -j list table`` prints (libnftables-json(5)). What is not understood
counts as unknown, and what is unknown blocks nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flannel_dp.kernel.packets import Action, Chains, Match, Packets, Step, negate, yes

Json = dict[str, Any]

_VERDICTS = ("accept", "drop", "return", "jump", "goto")


@dataclass(slots=True)
class RuleTable:
    """One table: its chains as nft prints them, and the rules of each."""

    chains: dict[str, Json] = field(default_factory=dict)
    rules: dict[str, list[Json]] = field(default_factory=dict)

    def bases(self, hook: str) -> list[str]:
        """The names of the filter chains at a hook."""
        return [
            name
            for name, chain in self.chains.items()
            if chain.get("hook") == hook and chain.get("type") == "filter"
        ]

    def policy(self, chain: str) -> str:
        """What a base chain does with what no rule of it decides."""
        return str(self.chains[chain].get("policy", "accept"))

    def steps(self, packets: Packets) -> Chains:
        """A function that gives the rules of a chain as seen by ``packets``."""

        def of(chain: str) -> Iterator[Step]:
            for rule in self.rules.get(chain, ()):
                yield _step(rule, packets)

        return of


def table_of(objects: Iterable[Json]) -> RuleTable:
    """One table, from the objects that nft prints of it."""
    table = RuleTable()
    for item in objects:
        if "chain" in item:
            table.chains[item["chain"]["name"]] = item["chain"]
        elif "rule" in item:
            table.rules.setdefault(item["rule"]["chain"], []).append(item["rule"])
    return table


def _step(rule: Json, packets: Packets) -> Step:
    match = Match.ALL
    where = (rule["chain"], rule.get("handle", 0))
    for expression in rule.get("expr", ()):
        kind, value = next(iter(expression.items()))
        if kind == "match":
            match = min(match, _match(value, packets))
        elif kind == "vmap":
            part, action = _verdict_map(value, packets)
            return Step(min(match, part), action, where)
        elif kind == "reject":
            return Step(match, Action("drop"), where)
        elif kind in _VERDICTS:
            target = value["target"] if isinstance(value, dict) else ""
            return Step(match, Action(kind, target), where)
        elif kind in ("limit", "xt", "quota", "ct count"):
            match = min(match, Match.UNKNOWN)
    return Step(match, Action("continue"), where)


def _verdict_map(value: Json, packets: Packets) -> tuple[Match, Action]:
    """A vmap over the connection's state is looked up; any other may accept."""
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
    """What a match looks at, as nft spells it: ``ip saddr``, ``meta iifname``, ``ct state``."""
    if not isinstance(left, dict) or len(left) != 1:
        return ""
    kind, value = next(iter(left.items()))
    if kind == "payload" and isinstance(value, dict) and "field" in value:
        return f"{value['protocol']} {value['field']}"
    if kind in ("meta", "ct") and isinstance(value, dict):
        return f"{kind} {value.get('key')}"
    return ""


def _match(value: Json, packets: Packets) -> Match:
    found = _positive(_key(value["left"]), value["right"], packets)
    return negate(found) if value["op"] == "!=" else found


def _positive(key: str, right: Any, packets: Packets) -> Match:
    options = _options(right)
    if options is None:
        return Match.UNKNOWN
    return max((_one(key, option, packets) for option in options), default=Match.NONE)


def _options(right: Any) -> list[Any] | None:
    """The alternatives of a match's right side; None for what is not written out (a set)."""
    if isinstance(right, dict) and "set" in right:
        right = right["set"]
    if isinstance(right, list):
        return right
    return None if isinstance(right, str) and right.startswith("@") else [right]


def _one(key: str, right: Any, packets: Packets) -> Match:
    if key == "ct state":
        return yes(right == "new")
    if key in ("ip saddr", "ip6 saddr", "ip daddr", "ip6 daddr"):
        if (packets.family == 6) != key.startswith("ip6"):
            return Match.NONE
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
        if ranges is None:
            return Match.UNKNOWN
        of = Match.ALL if protocol == "th" else packets.of_protocol(protocol)
        return min(of, packets.to_port([ranges]))
    if protocol in ("tcp", "udp", "icmp", "icmpv6") and protocol != packets.protocol:
        return Match.NONE
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
