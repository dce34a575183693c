"""Follows a kind of packet through a firewall's chains, and says which rule ends its way.

A rule matches a whole kind of packet, a part of it, none of it, or it is unknown
(a mark, a set, an interface that is not known). Only what is sure is reported: a rule that
drops the whole kind, with no rule before it that accepts it or may do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from ipaddress import ip_network
from typing import Any, NamedTuple, TypeAlias

from msgspec import Struct

MAX_DEPTH = 32
"""Jumps deep; the kernel allows 16 (NFT_JUMP_STACK_SIZE)."""


class Match(IntEnum):
    """How much of a kind of packet something matches; the least of several holds."""

    NONE = 0
    PART = 1
    UNKNOWN = 2
    ALL = 3


class Packets(Struct, frozen=True):
    """A kind of packet: new connections from any of ``source`` to any of ``destination``.

    CIDRs, None where it is unknown; ``protocol`` by name; ``port`` None is any; an
    interface "" is not known, and never ``lo``.
    """

    family: int
    what: str
    hook: str
    source: str | None
    destination: str | None = None
    protocol: str = "tcp"
    port: int | None = None
    iif: str = ""
    oif: str = ""

    def in_network(self, side: str, cidr: str) -> Match:
        """Compare the source ("s") or destination ("d") with a CIDR."""
        own = self.source if side == "s" else self.destination
        if own is None:
            return Match.UNKNOWN
        try:
            mine, other = ip_network(own), ip_network(cidr, strict=False)
        except ValueError:
            return Match.UNKNOWN
        if mine.version != other.version or not mine.overlaps(other):
            return Match.NONE
        return Match.ALL if mine.prefixlen >= other.prefixlen else Match.PART

    def on_interface(self, side: str, name: str) -> Match:
        """Compare the incoming ("i") or outgoing ("o") interface; ``name`` may end in + or *."""
        own = self.iif if side == "i" else self.oif
        stem = name.rstrip("+*")
        if stem != name and not stem:
            return Match.ALL
        if not own:
            return Match.NONE if name == "lo" else Match.UNKNOWN
        return yes(own.startswith(stem) if stem != name else own == name)

    def to_port(self, numbers: Iterable[tuple[int, int]]) -> Match:
        """Compare the destination port with ranges."""
        if self.port is None:
            return Match.PART
        return yes(any(low <= self.port <= high for low, high in numbers))

    def of_protocol(self, name: str) -> Match:
        """Compare the protocol, by name or number."""
        numbers = {"6": "tcp", "17": "udp", "1": "icmp", "58": "ipv6-icmp", "0": "all"}
        name = numbers.get(name, name)
        return yes(name in ("all", self.protocol))


def yes(matches: bool) -> Match:
    """Return all or none."""
    return Match.ALL if matches else Match.NONE


def negate(match: Match) -> Match:
    """Return what the opposite matches."""
    return {Match.ALL: Match.NONE, Match.NONE: Match.ALL}.get(match, match)


class Action(NamedTuple):
    """What a rule does: accept, drop, return, jump or goto (to ``target``), or continue."""

    kind: str
    target: str = ""


class RuleStep(NamedTuple):
    """One rule: how much it matches, what it does, and the rule itself for the report."""

    match: Match
    action: Action
    rule: Any


Chains: TypeAlias = Callable[[str], Iterable[RuleStep]]
"""The rules of a chain, by its name."""


class End(NamedTuple):
    """Where a packet's way ended: ``accept`` or ``drop``, and by which rule."""

    kind: str
    rule: Any


def walk_chain(chains: Chains, chain: str, *, depth: int = 0) -> End | None:
    """Walk a chain; None when its end is reached without a verdict that is sure.

    An accept of unknown extent counts as one, a drop of unknown extent does not.
    """
    if depth > MAX_DEPTH:
        return End("accept", None)
    for step in chains(chain):
        if step.match is Match.NONE:
            continue
        kind, sure = step.action.kind, step.match is Match.ALL
        end: End | None = None
        if kind in ("jump", "goto"):
            end = walk_chain(chains, step.action.target, depth=depth + 1)
            if end and end.kind == "drop" and not sure:
                end = None
            if kind == "goto" and end is None and sure:
                return None
        elif kind == "accept" or (kind == "drop" and sure):
            end = End(kind, step.rule)
        elif kind == "return" and step.match is not Match.PART:
            return None if sure else End("accept", step.rule)
        if end and not (end.kind == "accept" and step.match is Match.PART):
            return end
    return None
