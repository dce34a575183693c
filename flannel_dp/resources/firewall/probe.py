"""Finds rules of other programs that stop pods or the tunnel although our own rules are in place.

Read with ``iptables-save`` and ``nft -j list table`` and never changed. In nftables an
accept ends a packet's way in one base chain only, so a reject in another one still holds
whatever our table says; in iptables our jump is first, and what it accepts is not seen by
rules after it. Each finding names the rule, where it is, and what would not be blocked.

Which tables can stop a packet is asked from the kernel first
(:mod:`flannel_dp.resources.firewall.filters`): where there are none, no program is run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from socket import inet_ntop
from typing import TypeAlias

from msgspec import Struct

from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.resources.firewall import nft, nft_packets
from flannel_dp.resources.firewall.filters import FilterTables, read_filters
from flannel_dp.resources.firewall.iptables import SavedTable, Words
from flannel_dp.resources.firewall.iptables_layout import is_our_chain
from flannel_dp.resources.firewall.nft_layout import FAMILY
from flannel_dp.resources.firewall.packets import (
    Action,
    Match,
    Packets,
    RuleStep,
    negate,
    walk_chain,
)
from flannel_dp.resources.firewall.programs import Variant, choose_variant, find, run, variants
from flannel_dp.resources.firewall.rules import AF, RulesWanted

Devices: TypeAlias = Mapping[int, Iterable[str]]
"""By family the devices that the overlay's packets come and go by: the tunnel's, and the
external interface where peers are reached directly."""

_CHAIN = {"forward": "FORWARD", "input": "INPUT"}
_WITH_VALUE = ("-m", "--comment", "-s", "-d", "-i", "-o", "-p", "--dport", "--dports")
_ACTIONS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}


class Blocker(Struct, frozen=True):
    """A rule of another program that stops traffic this node needs.

    ``stops`` names the traffic, ``where`` the program, table and chain, ``rule`` is its text
    as its own program prints it, ``fix`` says what would not be blocked.
    """

    family: int
    stops: str
    where: str
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.stops} (IPv{self.family}): blocked by {self.where}: {self.rule} - {self.fix}"


def blocking_rules(
    wanted: RulesWanted,
    engine: str,
    netns: NetNS = None,
    *,
    devices: Devices | None = None,
    iface: str = "",
) -> list[Blocker]:
    """Return the rules in ``netns`` that block pods, or the tunnel's packets, under ``engine``.

    ``engine`` is any but ``auto``, which ``choose_engine`` makes one of the others. ``devices``
    and the external interface ``iface`` are given as far as they are known: rules that ask for
    another one are then distinguished. Forwarding is checked where ``wanted.forward`` is set,
    incoming packets for each ``wanted.underlay``.
    Raises as ``plan_rules``.
    """
    kinds = kinds_of(wanted, devices, iface)
    if engine != "nft":
        engine = choose_variant(engine).name
    return call_in_netns(netns, _blocking, kinds, engine) if kinds else []


def kinds_of(wanted: RulesWanted, devices: Devices | None, iface: str) -> list[Packets]:
    """Return the kinds of packets that the rules of ``wanted`` are to let through."""
    return [
        packets
        for family in (4, 6)
        for packets in _kinds(wanted, family, [*(devices or {}).get(family, ("",))], iface)
    ]


def _kinds(wanted: RulesWanted, family: int, devices: list[str], iface: str) -> Iterator[Packets]:
    rules = wanted.families.get(family)
    if rules and wanted.forward:
        network, own = rules.network, rules.subnet
        for device in devices:
            yield Packets(family, "pods to the overlay", "forward", own, network, oif=device)
            yield Packets(family, "the overlay to pods", "forward", network, own, iif=device)
    underlay = wanted.underlay.get(family)
    if underlay:
        # One peer stands for all; without any, a rule that asks for a source is not evaluated.
        peers = wanted.peers(family) if family in wanted.guarded else ()
        source = inet_ntop(AF[family], min(peers)) if peers else None
        yield Packets(family, "the tunnel", "input", source, None, "udp", underlay.port, iif=iface)


def _blocking(kinds: list[Packets], engine: str) -> list[Blocker]:
    filters = read_filters({(packets.family, packets.hook) for packets in kinds})
    found = blocked_in_iptables(kinds, filters, engine)
    if find("nft"):
        found += _unique(_in_nft(kinds, filters))
    return found


def blocked_in_iptables(
    kinds: list[Packets],
    filters: FilterTables,
    engine: str,
    passed_over: Collection[str] = (),
    *,
    wary: bool = False,
) -> list[Blocker]:
    """Return what the iptables of ``filters`` block under ``engine``, our chains and those
    ``passed_over`` counted as empty. A rule that accepts by a mark or a set may accept pods'
    packets; with ``wary`` it counts as one that does not."""
    found: list[Blocker] = []
    for (variant, family), held in filters.saved.items():
        if variant.name == engine:
            continue  # our jumps come first here
        mine = [packets for packets in kinds if packets.family == family]
        found += _unique(_in_iptables(variant, family, held, mine, passed_over, wary=wary))
    return found


def _unique(blockers: Iterator[Blocker]) -> list[Blocker]:
    """Return one finding per rule, with all that it stops."""
    found: dict[tuple[int, str, str], Blocker] = {}
    for blocker in blockers:
        key = (blocker.family, blocker.where, blocker.rule)
        if key in found:
            first = found[key]
            stops = f"{first.stops}, {blocker.stops}"
            blocker = Blocker(first.family, stops, first.where, first.rule, first.fix)
        found[key] = blocker
    return list(found.values())


def _in_iptables(
    variant: Variant,
    family: int,
    held: SavedTable,
    kinds: list[Packets],
    passed_over: Collection[str],
    *,
    wary: bool,
) -> Iterator[Blocker]:
    fix = f'engine "iptables-{variant.kind}" puts its own chain first and is not blocked'
    for packets in kinds:
        base = _CHAIN[packets.hook]

        def steps(chain: str, packets: Packets = packets) -> Iterator[RuleStep]:
            if chain not in passed_over and not is_our_chain(chain):
                for words in held.rules.get(chain, ()):
                    step = _step(words, packets, held, chain)
                    unsure = wary and step.match is Match.UNKNOWN
                    yield step._replace(match=Match.PART) if unsure else step

        end = walk_chain(steps, base)
        where = f"{variant.program(family)} -t filter"
        if end is None and held.policies.get(base) == "DROP":
            yield Blocker(family, packets.what, f"{where} {base}", f"policy DROP of {base}", fix)
        elif end and end.kind == "drop":
            chain, words = end.rule
            yield Blocker(family, packets.what, f"{where} {chain}", _rule_text(chain, words), fix)


def _rule_text(chain: str, words: Words) -> str:
    shown = (f'"{word}"' if " " in word else word for word in words)
    return " ".join(["-A", chain, *shown])


def _step(words: Words, packets: Packets, held: SavedTable, chain: str) -> RuleStep:
    match, action = Match.ALL, Action("continue")
    pending = list(words)
    negated = False
    while pending:
        option = pending.pop(0)
        if option == "!":
            negated = True
            continue
        value = pending[0] if pending else ""
        if option in ("-j", "-g"):
            kind = _ACTIONS.get(value, "continue")
            if value in held.policies:
                kind = "jump" if option == "-j" else "goto"
            action = Action(kind, value)
            break  # what follows are the target's own options
        if not option.startswith("-"):
            continue
        if pending and option in _WITH_VALUE:
            pending.pop(0)
        part = _option(option, value, packets)
        if part is not None:
            match = min(match, negate(part) if negated else part)
        negated = False
    return RuleStep(match, action, (chain, words))


def _option(option: str, value: str, packets: Packets) -> Match | None:
    """Return how much one option matches; None for one that only introduces others."""
    if option in ("-m", "--comment"):
        return None
    if option in ("-s", "-d"):
        return packets.in_network(option[1], value)
    if option in ("-i", "-o"):
        return packets.on_interface(option[1], value)
    if option == "-p":
        return packets.of_protocol(value)
    if option in ("--dport", "--dports"):
        return _ports(value, packets)
    if option in ("--state", "--ctstate"):
        return Match.ALL if "NEW" in value.split(",") else Match.NONE
    return Match.UNKNOWN


def _ports(value: str, packets: Packets) -> Match:
    ranges = []
    for item in value.split(","):
        low, _, high = item.partition(":")
        if not (low.isdigit() and (high or low).isdigit()):
            return Match.UNKNOWN
        ranges.append((int(low), int(high or low)))
    return packets.to_port(ranges)


def _in_nft(kinds: list[Packets], filters: FilterTables) -> Iterator[Blocker]:
    for family, table in filters.native:
        held = nft_packets.table_of(nft.read_objects(family, table) or ())
        for packets in kinds:
            number = packets.family
            if family not in (FAMILY[number], "inet"):
                continue
            for base in held.bases(packets.hook):
                shared = table == "filter" and family != "inet" and base == _CHAIN[packets.hook]
                if shared and _reads_nft(filters, number, base):
                    continue
                end = walk_chain(held.steps(packets), base)
                where = f"nft {family} {table} {base}"
                fix = _fix(packets, shared=shared)
                if end is None and held.policy(base) == "drop":
                    yield Blocker(number, packets.what, where, "policy drop", fix)
                elif end and end.kind == "drop":
                    chain, handle = end.rule
                    where = f"nft {family} {table} {chain}"
                    rule = _listed_rule(family, table, chain, handle)
                    yield Blocker(number, packets.what, where, rule, fix)


def _reads_nft(filters: FilterTables, family: int, chain: str) -> bool:
    """Return whether a chain was read by iptables-nft."""
    return any(
        variant.kind == "nft" and one == family and chain in held.policies
        for (variant, one), held in filters.saved.items()
    )


def _fix(packets: Packets, *, shared: bool) -> str:
    if shared and all(variant.kind != "nft" for variant in variants()):
        return (
            'install the package iptables: its engine "iptables-nft" puts its own chain first '
            "and is not blocked"
        )
    return f"no engine can overrule it: have its owner accept {packets.what} there before this rule"


def _listed_rule(family: str, table: str, chain: str, handle: int) -> str:
    """Return a rule in nft's own words, found by its handle."""
    mark = f" # handle {handle}"
    for line in run("nft", "-a", "list", "chain", family, table, chain).splitlines():
        if line.endswith(mark):
            return line.strip().removesuffix(mark)
    return f"rule with handle {handle}"
