"""Our rules as nftables has them: the tables ``ip flannel-dp`` and ``ip6 flannel-dp``.

One table per family, written by one ``nft -j -f -`` transaction: all of it or nothing.
Whether it still is as it was written the kernel says
(:mod:`flannel_dp.resources.firewall.nft_unchanged`). Where that is not certain it is read back by
``nft -j list table`` and compared expression by expression, so rules that are there cost no
write and a rule that is missing, added or moved is seen.

What a verdict can do (nft(8), "VERDICT STATEMENT"): a drop ends a packet's way, an accept
ends it in this base chain only. So the guard's drop holds whatever others accept, and the
forward chain's accepts overrule no other chain: rules of other programs that block are found by
:mod:`flannel_dp.resources.firewall.probe`. A source translation is final: the kernel asks no later
NAT chain (``nf_nat_inet_fn``), which is why ``keep`` is a translation of a source to itself.
It holds against masquerade rules of iptables-nft and of iptables-legacy, for both families and
for TCP, UDP and ICMP: ``test_pod_is_seen_as_itself_although_docker_masquerades``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from socket import inet_ntop
from typing import Any

from msgspec import Struct

from flannel_dp.resources.firewall.nft_layout import (
    BASE_CHAINS,
    FAMILY,
    PEERS,
    SET_TYPE,
    TABLE,
    table_name,
    wanted_rules,
)
from flannel_dp.resources.firewall.programs import run
from flannel_dp.resources.firewall.rules import (
    AF,
    KUBE_MARK,
    Except,
    Rule,
    RulesWanted,
    pack_addresses,
    without,
)

SHOWN_PEERS = 20
"""More peers than these are counted in a plan's lines instead of named."""

Json = dict[str, Any]


class Content(Struct, frozen=True):
    """One table's chains in nft's JSON expressions, and its set of peers (None: no set).

    ``other`` names what is in the table and is none of these.
    """

    chains: dict[str, tuple[str, ...]]
    peers: frozenset[bytes] | None = None
    other: tuple[str, ...] = ()


class TableChange(Struct, frozen=True):
    """What one family's table needs: ``script`` is nft's JSON input, ``changes`` says it."""

    family: int
    changes: tuple[str, ...]
    script: str


def plan_table(wanted: RulesWanted, family: int, *, full: bool, exists: bool) -> TableChange | None:
    """Compare one family's table with the existing one; None when they agree.

    ``exists`` says whether the table is there (``present_tables``). Raises as ``tools.run``.
    """
    rules, name = wanted_rules(wanted, family, full=full), table_name(wanted.mark)
    chains = {
        chain: [_rule_json(rule, family, chain, wanted.random_fully, name) for rule in found]
        for chain, found in rules.items()
    }
    peers = wanted.peers(family) if family in wanted.guarded else None
    want = Content({chain: _canons(found) for chain, found in chains.items()}, peers)
    if not want.chains:
        return _removal(family, name) if exists else None
    held = read_table(family, name) if exists else None
    if held == want:
        return None
    if held and held.peers is not None and (held.chains, held.other) == (want.chains, ()):
        return _peers_change(family, name, held.peers, want.peers or frozenset())
    commands = _whole_table(family, name, chains, peers)
    return TableChange(family, tuple(_differences(family, name, held, want)), _script(commands))


def apply_table(change: TableChange, *, check: bool = False) -> None:
    """Send one transaction; with ``check`` the kernel only says whether it would take it."""
    run("nft", *(["-c"] if check else []), "-j", "-f", "-", stdin=change.script)


def update_peers(family: int, added: Any, removed: Any, mark: str = "") -> None:
    """Add peers to and remove peers from a guard that is there, without reading it first.

    Addresses as in ``Underlay.peers``. Adding one that is there is no error; removing one
    that is not is one, and then nothing changed. Equivalent:
    ``nft add element ip flannel-dp peers { 192.0.2.7 }``. Raises as ``tools.run``.
    """
    more, less = pack_addresses(added, family), pack_addresses(removed, family)
    name = table_name(mark)
    commands = [*_elements("add", family, name, more), *_elements("delete", family, name, less)]
    if commands:
        run("nft", "-j", "-f", "-", stdin=_script(commands))


def try_out() -> None:
    """See that nft works before it is planned what it has to write. Raises as ``tools.run``."""
    run("nft", "list", "tables")


def read_objects(family: str, table: str) -> list[Json] | None:
    """Return what is in one table, as nft's JSON objects; None when nft prints it as no JSON."""
    output = run("nft", "-j", "list", "table", family, table)
    try:
        found: list[Json] = json.loads(output)["nftables"]
    except (ValueError, KeyError, TypeError):
        return None  # its flags, see nft_kernel; a table with flags is dormant
    return found


def read_table(family: int, name: str = TABLE) -> Content:
    """Return our table of one family as it is. Equivalent: ``nft -j list table ip flannel-dp``."""
    chains: dict[str, list[str]] = {}
    other: list[str] = []
    peers: frozenset[bytes] | None = None
    objects = read_objects(FAMILY[family], name)
    for item in [{"table": {"flags": "dormant"}}] if objects is None else objects:
        kind, value = next(iter(item.items()))
        if kind == "chain" and _is_our_chain(value):
            chains.setdefault(value["name"], [])
        elif kind == "rule":
            chains.setdefault(value["chain"], []).append(_canon(value))
        elif kind == "set" and _is_our_set(value, family):
            peers = pack_addresses(map(str, value.get("elem", ())), family)
        elif kind != "metainfo" and (kind != "table" or "flags" in value):
            other.append("table flags" if kind == "table" else f"{kind} {value.get('name', '')}")
    return Content({name: tuple(rules) for name, rules in chains.items()}, peers, tuple(other))


def _is_our_chain(chain: Json) -> bool:
    made = tuple(chain.get(key) for key in ("type", "hook", "prio"))
    return made == BASE_CHAINS.get(chain["name"]) and chain.get("policy") == "accept"


def _is_our_set(found: Json, family: int) -> bool:
    known = {"family", "table", "name", "handle", "type", "elem"}
    return (
        found["name"] == PEERS
        and found["type"] == SET_TYPE[family]
        and set(found) <= known
        and all(isinstance(element, str) for element in found.get("elem", ()))
    )


def _removal(family: int, name: str) -> TableChange:
    command = {"delete": {"table": {"family": FAMILY[family], "name": name}}}
    return TableChange(family, (f"- nft table {FAMILY[family]} {name}",), _script([command]))


def _peers_change(
    family: int, name: str, held: frozenset[bytes], want: frozenset[bytes]
) -> TableChange:
    added, removed = want - held, held - want
    commands = [*_elements("add", family, name, added), *_elements("delete", family, name, removed)]
    return TableChange(family, tuple(_peer_lines(family, name, added, removed)), _script(commands))


def _peer_lines(
    family: int, name: str, added: Iterable[bytes], removed: Iterable[bytes]
) -> Iterator[str]:
    where = f"nft {FAMILY[family]} {name} @{PEERS}"
    for sign, addresses in (("+", list(added)), ("-", list(removed))):
        if len(addresses) > SHOWN_PEERS:
            yield f"{sign} {where}: {len(addresses)} addresses"
            continue
        for address in sorted(addresses):
            yield f"{sign} {where} {inet_ntop(AF[family], address)}"


def _elements(verb: str, family: int, name: str, addresses: Iterable[bytes]) -> list[Json]:
    texts = [inet_ntop(AF[family], address) for address in sorted(addresses)]
    where = {"family": FAMILY[family], "table": name, "name": PEERS}
    return [{verb: {"element": {**where, "elem": texts}}}] if texts else []


def _whole_table(
    family: int, name: str, chains: dict[str, list[Json]], peers: frozenset[bytes] | None
) -> list[Json]:
    table = {"table": {"family": FAMILY[family], "name": name}}
    # Adding first makes the deletion one that cannot fail; no packet sees a state between.
    commands: list[Json] = [{"add": table}, {"delete": table}, {"add": table}]
    here = {"family": FAMILY[family], "table": name}
    if peers is not None:
        commands.append({"add": {"set": {**here, "name": PEERS, "type": SET_TYPE[family]}}})
        commands += _elements("add", family, name, peers)
    for chain_name, rules in chains.items():
        kind, hook, priority = BASE_CHAINS[chain_name]
        chain = {**here, "name": chain_name, "type": kind, "hook": hook, "prio": priority}
        commands.append({"add": {"chain": {**chain, "policy": "accept"}}})
        commands += [{"add": {"rule": rule}} for rule in rules]
    return commands


def _differences(family: int, table: str, held: Content | None, want: Content) -> Iterator[str]:
    where = f"nft {FAMILY[family]} {table}"
    if held is None:
        yield f"+ nft table {FAMILY[family]} {table}"
        held = Content({})
    for name in [*want.chains, *(set(held.chains) - set(want.chains))]:
        old, new = held.chains.get(name, ()), want.chains.get(name, ())
        yield from (f"+ {where} {name}: {text(rule)}" for rule in without(new, old))
        yield from (f"- {where} {name}: {text(rule)}" for rule in without(old, new))
        if old != new and Counter(old) == Counter(new):
            yield f"~ {where} {name}: order of the rules"
        if name not in held.chains and not new:
            yield f"+ {where} {name}"
    yield from (f"- {where} {thing}" for thing in held.other)
    if held.peers != want.peers:
        old_peers, new_peers = held.peers or frozenset(), want.peers or frozenset()
        yield from _peer_lines(family, table, new_peers - old_peers, old_peers - new_peers)
        if not old_peers and not new_peers:
            yield f"{'+' if want.peers is not None else '-'} {where} @{PEERS}"


def _rule_json(rule: Rule, family: int, chain: str, random_fully: bool, table: str = TABLE) -> Json:
    expressions = [*_matches(rule, family), _statement(rule, family, random_fully)]
    where = {"family": FAMILY[family], "table": table, "chain": chain}
    return {**where, "comment": rule.why, "expr": expressions}


def _matches(rule: Rule, family: int) -> Iterator[Json]:
    if rule.marked:
        left = {"&": [{"meta": {"key": "mark"}}, KUBE_MARK]}
        yield {"match": {"op": "==", "left": left, "right": KUBE_MARK}}
    for name, address in (("saddr", rule.source), ("daddr", rule.destination)):
        if address is not None:
            negated = isinstance(address, Except)
            cidr = address.cidr if isinstance(address, Except) else address
            start, _, length = cidr.partition("/")
            # nft prints a prefix that is one address as that address.
            whole = int(length) == (32 if family == 4 else 128)
            right = start if whole else {"prefix": {"addr": start, "len": int(length)}}
            yield _match("!=" if negated else "==", FAMILY[family], name, right)
    if rule.port is not None:
        yield _match("==", "udp", "dport", rule.port)
    if rule.strangers:
        yield _match("!=", FAMILY[family], "saddr", f"@{PEERS}")


def _match(op: str, protocol: str, name: str, right: object) -> Json:
    left = {"payload": {"protocol": protocol, "field": name}}
    return {"match": {"op": op, "left": left, "right": right}}


def _statement(rule: Rule, family: int, random_fully: bool) -> Json:
    if rule.verdict == "keep":
        source = {"payload": {"protocol": FAMILY[family], "field": "saddr"}}
        return {"snat": {"addr": source}}
    if rule.verdict == "masquerade":
        return {"masquerade": {"flags": "fully-random"} if random_fully else None}
    return {"return" if rule.verdict == "leave" else rule.verdict: None}


def _canons(rules: Iterable[Json]) -> tuple[str, ...]:
    return tuple(_canon(rule) for rule in rules)


def _canon(rule: Json) -> str:
    """Return a rule as one comparable text: its comment and expressions, spelling differences
    out."""
    parts = {"comment": rule.get("comment", ""), "expr": _plain(rule["expr"])}
    return json.dumps(parts, sort_keys=True)


def _plain(value: Any) -> Any:
    """nft versions differ in writing one flag as a list of one, and no flags as {} or null."""
    if isinstance(value, dict):
        return {
            key: (item[0] if key == "flags" and isinstance(item, list) and len(item) == 1 else item)
            for key, item in ((key, _plain(item)) for key, item in value.items())
        } or None
    return [_plain(item) for item in value] if isinstance(value, list) else value


def text(canon: str) -> str:
    """Return a rule in about nft's own words, for people."""
    rule = json.loads(canon)
    words = " ".join(_words(expression) for expression in rule["expr"])
    return f'{words} comment "{rule["comment"]}"' if rule["comment"] else words


def _words(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    kind, inner = next(iter(value.items()))
    if kind == "match":
        op = "" if inner["op"] == "==" else f"{inner['op']} "
        masked = isinstance(inner["left"], dict) and "&" in inner["left"]
        right = hex(inner["right"]) if masked else _words(inner["right"])
        return f"{_words(inner['left'])} {op}{right}"
    if kind == "payload" and "field" in inner:
        return f"{inner['protocol']} {inner['field']}"
    if kind == "prefix":
        return f"{inner['addr']}/{inner['len']}"
    if kind == "&" and len(inner) == 2:
        return f"{_words(inner[0])} & {inner[1]:#x} =="
    if kind == "meta":
        return f"meta {inner.get('key')}"
    if kind == "snat" and isinstance(inner, dict) and "addr" in inner:
        return f"snat to {_words(inner['addr'])}"
    if kind == "masquerade" and inner:
        return f"masquerade {inner.get('flags', '')}".strip()
    return kind if inner is None else f"{kind} {json.dumps(inner)}"


def _script(commands: list[Json]) -> str:
    return json.dumps({"nftables": commands})
