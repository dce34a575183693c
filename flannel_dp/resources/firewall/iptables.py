"""Our rules as iptables has them: chains of our own and one jump to each, first in its place.

Chains ``FLANNEL-DP-POSTRTG`` (nat), ``FLANNEL-DP-FWD`` and ``FLANNEL-DP-INPUT`` (filter) are
written by one ``iptables-restore --noflush`` per family, read back by ``iptables-save`` and
compared word by word. The jumps come first because the first verdict counts: what is accepted
there is not seen by rules of other programs that reject or masquerade. No other rule is touched.

Legacy iptables and iptables-nft are two rule sets that both see every packet: a verdict in
one does not end a packet's way in the other, so the rules belong into the one that others use.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct, field

from flannel_dp.errors import FlannelDPError
from flannel_dp.resources.firewall.iptables_layout import (
    TABLES,
    chains_of,
    existing_tables,
    is_our_chain,
)
from flannel_dp.resources.firewall.programs import Variant, run
from flannel_dp.resources.firewall.rules import KUBE_MARK, Except, Rule, RulesWanted, without

#: How long a restore waits for the lock that all of iptables shares, in seconds.
LOCK_WAIT = 20

_VERDICTS = {"leave": "RETURN", "keep": "ACCEPT", "accept": "ACCEPT", "masquerade": "MASQUERADE"}

Words: TypeAlias = tuple[str, ...]


class SavedTable(Struct, frozen=True):
    """A table as ``iptables-save`` prints it: policies of its chains, and its rules by chain.

    A chain that the user made has the policy ``-``. ``partial`` is True where iptables-nft
    says that nft has put things into the table that it cannot print.
    """

    policies: dict[str, str] = field(default_factory=dict)
    rules: dict[str, list[Words]] = field(default_factory=dict)
    partial: bool = False


class ChainChange(Struct, frozen=True):
    """What one family needs of one iptables: ``script`` is for its restore program."""

    family: int
    variant: Variant
    changes: tuple[str, ...]
    script: str


def wanted_rules(wanted: RulesWanted, family: int, variant: Variant) -> dict[str, list[Words]]:
    """Return the rules of each of our chains that has any, in the words that iptables-save uses."""
    every = (wanted.postrouting(family), wanted.forwarding(family), wanted.welcome(family))
    rules = dict(zip(chains_of(wanted.mark), every, strict=True))
    random_fully = wanted.random_fully and variant.is_modern
    return {
        chain: [rule_words(rule, random_fully) for rule in found]
        for chain, found in rules.items()
        if found
    }


def rule_words(rule: Rule, random_fully: bool) -> Words:
    """Return one rule as iptables-save orders its words, without ``-A CHAIN``."""
    words: list[str] = []
    for option, address in (("-s", rule.source), ("-d", rule.destination)):
        if isinstance(address, Except):
            words += ["!", option, address.cidr]
        elif address is not None:
            words += [option, address]
    if rule.port is not None:
        words += ["-p", "udp", "-m", "udp", "--dport", str(rule.port)]
    if rule.marked:
        words += ["-m", "mark", "--mark", f"{KUBE_MARK:#x}/{KUBE_MARK:#x}"]
    words += ["-m", "comment", "--comment", rule.why, "-j", _VERDICTS[rule.verdict]]
    return (
        (*words, "--random-fully") if rule.verdict == "masquerade" and random_fully else (*words,)
    )


def save(variant: Variant, family: int, table: str) -> SavedTable:
    """Return one table, read. Equivalent: ``iptables-save -t TABLE``. Raises as ``tools.run``."""
    lines = run(variant.program(family, "save"), "-t", table).splitlines()
    found = SavedTable(partial=any(line[:1] == "#" and " incompatible" in line for line in lines))
    for line in lines:
        if line.startswith(":"):
            name, policy = line[1:].split()[:2]
            found.policies[name] = policy
        elif line.startswith("-A "):
            _, chain, *words = _split(line)
            found.rules.setdefault(chain, []).append(tuple(words))
    return found


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a quote that is not closed, in a comment of another program
        return line.split()


def plan_chains(
    variant: Variant, family: int, wanted: Mapping[str, Sequence[Words]], mark: str = ""
) -> ChainChange | None:
    """Compare our chains and jumps with the existing ones; None when they agree.

    ``wanted`` has the rules of each chain that is to be there. Raises as ``tools.run``.
    """
    there = existing_tables(variant, family)
    changes: list[str] = []
    script: list[str] = []
    for table in TABLES:
        held = save(variant, family, table) if table in there else SavedTable()
        lines: list[str] = []
        for chain, (home, base) in chains_of(mark).items():
            if home == table:
                rules = wanted.get(chain)
                title = f"{variant.program(family)} -t {table}"
                changes += _describe(title, chain, base, rules, held)
                lines += _lines(chain, base, rules, held)
        if lines:
            # Chains are declared before the rules that may jump to them.
            lines.sort(key=lambda line: not line.startswith(":"))
            script += [f"*{table}", *lines, "COMMIT"]
    if not script:
        return None
    return ChainChange(family, variant, tuple(changes), "\n".join(script) + "\n")


def apply_chains(change: ChainChange, *, check: bool = False) -> None:
    """Send one restore; with ``check`` nothing is committed. Raises as ``tools.run``."""
    args = ["--noflush", *(["--test"] if check else [])]
    if change.variant.is_modern:
        args.append(f"--wait={LOCK_WAIT}")
    program = change.variant.program(change.family, "restore")
    try:
        run(program, *args, stdin=change.script)
    except FlannelDPError as error:
        if "line" in error.message and not error.hint.startswith("run as"):
            error.hint += f"; it was given: {' | '.join(change.script.splitlines())}"[:2000]
        raise


def jump(chain: str) -> Words:
    """Return the one rule of ours outside of our chains."""
    return ("-m", "comment", "--comment", "flannel-dp", "-j", chain)


def _jumps(chain: str, base: str, held: SavedTable) -> list[tuple[int, Words]]:
    """Position and words of every rule of the built-in chain that goes to ``chain``."""
    rules = held.rules.get(base, [])
    return [(place, words) for place, words in enumerate(rules) if words[-1] == chain]


def _jump_is_right(chain: str, base: str, held: SavedTable) -> bool:
    """Return whether there is one jump to a chain, and nothing before it but jumps to chains of
    other networks of this node."""
    rules = held.rules.get(base, [])
    first = next((n for n, words in enumerate(rules) if not _is_our_jump(words)), len(rules))
    found = _jumps(chain, base, held)
    return len(found) == 1 and found[0][0] < first


def _is_our_jump(words: Words) -> bool:
    return is_our_chain(words[-1]) and words == jump(words[-1])


def _lines(chain: str, base: str, rules: Sequence[Words] | None, held: SavedTable) -> Iterator[str]:
    """Yield the restore script's lines that make one chain and its jump what they should be."""
    exists = chain in held.policies
    remove_jumps = [_line("-D", base, words) for _, words in _jumps(chain, base, held)]
    if rules is None:
        if exists:
            # Declaring a chain empties it, so that it can be deleted.
            yield from (f":{chain} - [0:0]", *remove_jumps, f"-X {chain}")
        return
    if not exists or held.rules.get(chain, []) != list(rules):
        yield f":{chain} - [0:0]"
        yield from (_line("-A", chain, words) for words in rules)
    if not _jump_is_right(chain, base, held):
        yield from remove_jumps
        yield _line("-I", f"{base} 1", jump(chain))


def _describe(
    title: str, chain: str, base: str, rules: Sequence[Words] | None, held: SavedTable
) -> Iterator[str]:
    old, new = held.rules.get(chain, []), list(rules or ())
    yield from (f"+ {title} {_line('-A', chain, words)}" for words in without(new, old))
    yield from (f"- {title} {_line('-A', chain, words)}" for words in without(old, new))
    if old != new and Counter(old) == Counter(new):
        yield f"~ {title} {chain}: order of the rules"
    jumps = _jumps(chain, base, held)
    if rules is not None and not _jump_is_right(chain, base, held):
        how = "~" if jumps else "+"
        yield f"{how} {title} {_line('-I', f'{base} 1', jump(chain))}"
    if rules is None and chain in held.policies:
        yield from (f"- {title} {_line('-A', base, words)}" for _, words in jumps)
        yield f"- {title} {chain}"


def _line(command: str, chain: str, words: Words) -> str:
    """Return a line for the restore program, which knows double quotes only (and shlex reads
    back)."""
    shown = [_quoted(word) for word in words]
    return " ".join([command, chain, *shown])


def _quoted(word: str) -> str:
    if word and not set(word) & set(" \t\"'\\"):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
