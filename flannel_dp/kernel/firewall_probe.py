"""Finds rules of others that stop pods or the tunnel although our own rules are in place.

Read with ``iptables-save`` and ``nft -j list table`` and never changed. In nftables an
accept ends a packet's way in one base chain only, so a reject in another one still holds
whatever our table says; in iptables our jump is first, and what it accepts is not seen by
rules after it. Each finding names the rule, where it is, and what would not be blocked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct

from flannel_dp.kernel import iptables, nft, nftrules
from flannel_dp.kernel.firewall import choose_engine
from flannel_dp.kernel.iptables import SavedTable, Words
from flannel_dp.kernel.netns import NetNS, call_in_netns
from flannel_dp.kernel.packets import Action, Match, Packets, Step, follow, negate
from flannel_dp.kernel.tools import Variant, find, run, variants
from flannel_dp.masquerade import RulesWanted, address_text

_CHAIN = {"forward": "FORWARD", "input": "INPUT"}
_WITH_VALUE = ("-m", "--comment", "-s", "-d", "-i", "-o", "-p", "--dport", "--dports")
_ACTIONS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}


class Blocker(Struct, frozen=True):
    """A rule of somebody else that stops traffic this node needs.

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
    engine: str = "auto",
    netns: NetNS = None,
    *,
    devices: Mapping[int, str] | None = None,
    iface: str = "",
) -> list[Blocker]:
    """The rules in ``netns`` that block pods, or the tunnel's packets, under ``engine``.

    ``devices`` names each family's overlay device and ``iface`` the external interface, as
    far as they are known: rules that ask for another one are then told apart. Forwarding is
    looked at where ``wanted.forward`` is set, incoming packets for each ``wanted.underlay``.
    Raises as ``plan_rules``.
    """
    kinds = [
        packets
        for family in (4, 6)
        for packets in _kinds(wanted, family, (devices or {}).get(family, ""), iface)
    ]
    return call_in_netns(netns, _blocking, kinds, choose_engine(engine)) if kinds else []


def _kinds(wanted: RulesWanted, family: int, device: str, iface: str) -> Iterator[Packets]:
    rules = wanted.families.get(family)
    if rules and wanted.forward:
        network, own = rules.network, rules.subnet
        yield Packets(family, "pods to the overlay", "forward", own, network, oif=device)
        yield Packets(family, "the overlay to pods", "forward", network, own, iif=device)
    underlay = wanted.underlay.get(family)
    if underlay:
        # One peer stands for all; without any, a rule that asks for a source is not judged.
        peers = wanted.peers(family) if family in wanted.guarded else ()
        source = address_text(min(peers)) if peers else None
        yield Packets(family, "the tunnel", "input", source, None, "udp", underlay.port, iif=iface)


def _blocking(kinds: list[Packets], engine: str) -> list[Blocker]:
    found: list[Blocker] = []
    read_by_iptables: set[tuple[str, str]] = set()
    for variant in variants():
        for family in sorted({packets.family for packets in kinds}):
            if "filter" not in iptables.existing_tables(variant, family):
                continue
            if not find(variant.program(family, "save")):
                continue
            if variant.kind == "nft":
                read_by_iptables.add((nft.FAMILY[family], "filter"))
            if variant.name == engine:
                continue  # our jumps come first here
            held = iptables.save(variant, family, "filter")
            mine = [packets for packets in kinds if packets.family == family]
            found += _unique(_in_iptables(variant, family, held, mine))
    if find("nft"):
        found += _unique(_in_nft(kinds, read_by_iptables))
    return found


def _unique(blockers: Iterator[Blocker]) -> list[Blocker]:
    """One finding per rule, with all that it stops."""
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
    variant: Variant, family: int, held: SavedTable, kinds: list[Packets]
) -> Iterator[Blocker]:
    fix = f'engine "iptables-{variant.kind}" puts its own chain first and is not blocked'
    for packets in kinds:
        base = _CHAIN[packets.hook]

        def steps(chain: str, packets: Packets = packets) -> Iterator[Step]:
            if chain not in iptables.CHAINS:
                for words in held.rules.get(chain, ()):
                    yield _step(words, packets, held, chain)

        end = follow(steps, base)
        where = f"{variant.program(family)} -t filter"
        if end is None and held.policies.get(base) == "DROP":
            yield Blocker(family, packets.what, f"{where} {base}", f"policy DROP of {base}", fix)
        elif end and end.kind == "drop":
            chain, words = end.rule
            yield Blocker(family, packets.what, f"{where} {chain}", _rule_text(chain, words), fix)


def _rule_text(chain: str, words: Words) -> str:
    shown = (f'"{word}"' if " " in word else word for word in words)
    return " ".join(["-A", chain, *shown])


def _step(words: Words, packets: Packets, held: SavedTable, chain: str) -> Step:
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
    return Step(match, action, (chain, words))


def _option(option: str, value: str, packets: Packets) -> Match | None:
    """How much one option matches; None for one that only introduces others."""
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


def _in_nft(kinds: list[Packets], read_by_iptables: set[tuple[str, str]]) -> Iterator[Blocker]:
    for family, table in sorted(nft.present_tables() - read_by_iptables):
        if table == nft.TABLE or family not in ("ip", "ip6", "inet"):
            continue
        held = nftrules.table_of(nft.read_objects(family, table) or ())
        for packets in kinds:
            number = packets.family
            if family not in (nft.FAMILY[number], "inet"):
                continue
            for base in held.bases(packets.hook):
                end = follow(held.steps(packets), base)
                where = f"nft {family} {table} {base}"
                fix = (
                    f"no engine can overrule it: have its owner accept {packets.what} there "
                    "before this rule"
                )
                if end is None and held.policy(base) == "drop":
                    yield Blocker(number, packets.what, where, "policy drop", fix)
                elif end and end.kind == "drop":
                    chain, handle = end.rule
                    where = f"nft {family} {table} {chain}"
                    rule = _listed_rule(family, table, chain, handle)
                    yield Blocker(number, packets.what, where, rule, fix)


def _listed_rule(family: str, table: str, chain: str, handle: int) -> str:
    """A rule in nft's own words, found by its handle."""
    mark = f" # handle {handle}"
    for line in run("nft", "-a", "list", "chain", family, table, chain).splitlines():
        if line.endswith(mark):
            return line.strip().removesuffix(mark)
    return f"rule with handle {handle}"
