"""Says whether our table of nftables is as it is wanted, from the kernel's own messages.

The answer is yes only where every byte that the kernel has of the table is one that is
expected: the table's flags and its number of objects, each chain's hook, each rule's
expressions and comment in order, the set and its elements. Anything else, be it a change by
another program or the way another version of nft says the same, is a no; then nft is asked
(``nft.plan_table``), and its answer counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from socket import inet_pton

from flannel_dp.errors import DumpInterrupted
from flannel_dp.kernel import messages as nl
from flannel_dp.resources.firewall import nft_kernel as nft
from flannel_dp.resources.firewall.nft_layout import (
    BASE_CHAINS,
    FAMILY,
    PEERS,
    table_name,
    wanted_rules,
)
from flannel_dp.resources.firewall.rules import AF, KUBE_MARK, Except, Rule, RulesWanted

Expression = tuple[bytes, dict[int, bytes]]
"""An expression's name and its attributes, those left out that have their default."""

_WHAT = "read the rules of nftables"
_BYTES = {4: 4, 6: 16}
_KEY_TYPE = {4: 7, 6: 8}  # nft's numbers for ipv4_addr and ipv6_addr
_OFFSET = {(4, "saddr"): 12, (4, "daddr"): 16, (6, "saddr"): 8, (6, "daddr"): 24}
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META_MARK, _META_L4PROTO, _UDP = 3, 16, b"\x11"
_EQ, _NEQ = 0, 1
_RANDOM_FULLY = 16  # NF_NAT_RANGE_PROTO_RANDOM_FULLY
_VERDICTS = {"leave": nft.NFT_RETURN, "accept": nft.NF_ACCEPT, "drop": nft.NF_DROP}


def _u32(value: int) -> bytes:
    return (value & 0xFFFFFFFF).to_bytes(4, "big")


_REGISTER, _VERDICT_REGISTER, _ZERO, _ONE = _u32(1), _u32(0), _u32(0), _u32(1)

#: Attributes that not every kernel prints, with the value that says nothing: the operation of
#: a bitwise (and-xor), and of a translation that it is one of addresses, by one register.
_DEFAULTS: dict[bytes, dict[int, bytes]] = {
    b"bitwise": {6: _ZERO},
    b"nat": {4: _REGISTER, 7: _ONE},
}

#: What the kernel may print of each object beside what is compared.
_OF_CHAIN = {nft.CHAIN_TABLE, nft.CHAIN_HANDLE, nft.CHAIN_NAME, nft.CHAIN_USE} | {
    nft.CHAIN_HOOK,
    nft.CHAIN_POLICY,
    nft.CHAIN_TYPE,
    nft.CHAIN_FLAGS,
}
_OF_RULE = {nft.RULE_TABLE, nft.RULE_CHAIN, nft.RULE_HANDLE, nft.RULE_POSITION} | {
    nft.RULE_EXPRESSIONS,
    nft.RULE_USERDATA,
}
_OF_SET = {nft.SET_TABLE, nft.SET_NAME, nft.SET_HANDLE, nft.SET_BACKEND, nft.SET_COUNT} | {
    nft.SET_FLAGS,
    nft.SET_KEY_TYPE,
    nft.SET_KEY_LENGTH,
    nft.SET_DESCRIPTION,
    nft.SET_USERDATA,
}
#: nft notes the byte order of a set's keys (NFTNL_UDATA_SET_KEYBYTEORDER): big endian.
_SET_USERDATA = (b"", b"\0\4" + struct.pack("=I", 2))


def is_unchanged(wanted: RulesWanted, family: int, *, full: bool) -> bool:
    """Return True where our table of one family is certainly what ``plan_table`` would leave.

    Reads only. Raises NotPermitted without CAP_NET_ADMIN, KernelError where there is no
    nftables.
    """
    rules = wanted_rules(wanted, family, full=full)
    if not rules:
        return False
    peers = wanted.peers(family) if family in wanted.guarded else None
    name = table_name(wanted.mark)
    with nft.NftSocket() as kernel:
        try:
            return (
                _same_table(kernel, family, name, len(rules) + (peers is not None))
                and _same_chains(kernel, family, name, set(rules))
                and _same_rules(kernel, family, name, rules, random_fully=wanted.random_fully)
                and (peers is None or _same_peers(kernel, family, name, peers))
                and len(kernel.generations) == 1
            )
        except DumpInterrupted:
            return False


def _same_table(kernel: nft.NftSocket, family: int, name: str, objects: int) -> bool:
    """Compare the flags, and the number of chains, sets and all else that the table holds."""
    for _, table in kernel.dump(nft.TABLES, "tables", FAMILY[family]):
        if nft.name_of(table.get(nft.TABLE_NAME)) == name:
            flags, use = table.get(nft.TABLE_FLAGS, _ZERO), table.get(nft.TABLE_USE)
            return flags == _ZERO and use == _u32(objects)
    return False


def _same_chains(kernel: nft.NftSocket, family: int, name: str, names: set[str]) -> bool:
    found = set()
    for _, chain in kernel.dump(nft.CHAINS, "chains", FAMILY[family]):
        if nft.name_of(chain.get(nft.CHAIN_TABLE)) != name:
            continue
        own = nft.name_of(chain.get(nft.CHAIN_NAME))
        kind, hook, priority = BASE_CHAINS.get(own, ("", "", 0))
        as_wanted = {
            nft.CHAIN_TYPE: kind.encode() + b"\0",
            nft.CHAIN_POLICY: _u32(nft.NF_ACCEPT),
            nft.CHAIN_HOOK: nl.attr(nft.HOOK_NUMBER, _u32(nft.HOOKS.get(hook, 0)))
            + nl.attr(nft.HOOK_PRIORITY, _u32(priority)),
        }
        if not chain.keys() <= _OF_CHAIN or not as_wanted.items() <= chain.items():
            return False
        # Kernels before 5.8 have no flags; this one says that it is a base chain.
        if chain.get(nft.CHAIN_FLAGS, _ONE) != _ONE:
            return False
        found.add(own)
    return found == names


def _same_rules(
    kernel: nft.NftSocket,
    family: int,
    name: str,
    rules: dict[str, tuple[Rule, ...]],
    *,
    random_fully: bool,
) -> bool:
    asked = nft.named(nft.RULE_TABLE, name)
    held: dict[str, list[nft.Object]] = {}
    for _, rule in kernel.dump(nft.RULES, "rules", FAMILY[family], asked):
        if nft.name_of(rule.get(nft.RULE_TABLE)) == name:  # a kernel may not filter
            held.setdefault(nft.name_of(rule.get(nft.RULE_CHAIN)), []).append(rule)
    return held.keys() == rules.keys() and all(
        len(held[chain]) == len(wanted)
        and all(map(lambda a, b: _same_rule(a, b, family, random_fully), held[chain], wanted))
        for chain, wanted in rules.items()
    )


def _same_rule(held: nft.Object, rule: Rule, family: int, random_fully: bool) -> bool:
    comment = rule.why.encode() + b"\0"
    if not held.keys() <= _OF_RULE or held.get(nft.RULE_USERDATA) != (
        bytes((0, len(comment))) + comment  # NFTNL_UDATA_RULE_COMMENT
    ):
        return False
    found = list(_expressions(held.get(nft.RULE_EXPRESSIONS, b"")))
    # nft reads as many bytes of a prefix that ends with one, or all of them through a mask.
    return any(
        found == list(_wanted_expressions(rule, family, random_fully, short=short))
        for short in (True, False)
    )


def _same_peers(kernel: nft.NftSocket, family: int, name: str, peers: frozenset[bytes]) -> bool:
    asked = nft.named(nft.SET_TABLE, name)
    sets = [
        found
        for _, found in kernel.dump(nft.SETS, "sets", FAMILY[family], asked)
        if nft.name_of(found.get(nft.SET_TABLE)) == name
    ]
    if len(sets) != 1 or not _is_our_set(sets[0], family):
        return False
    asked = nft.named(nft.ELEMENTS_TABLE, name) + nft.named(nft.ELEMENTS_SET, PEERS)
    size = _BYTES[family]
    # An element is a list of attributes in an attribute: key, in it a value, in it the address.
    headers = [nl.NLATTR.pack(size + 4 * depth, 1) for depth in (3, 2, 1)]
    entry = struct.Struct(f"4s4s4s{size}s")
    held: set[bytes] = set()
    for _, found in kernel.dump(nft.ELEMENTS, "set elements", FAMILY[family], asked):
        data = found.get(nft.ELEMENTS_LIST, b"")
        if len(data) % entry.size:
            return False
        for *head, address in entry.iter_unpack(data):
            if head != headers:
                return False
            held.add(address)
    return held == peers


def _is_our_set(found: nft.Object, family: int) -> bool:
    as_wanted = {
        nft.SET_NAME: PEERS.encode() + b"\0",
        nft.SET_KEY_TYPE: _u32(_KEY_TYPE[family]),
        nft.SET_KEY_LENGTH: _u32(_BYTES[family]),
    }
    return (
        found.keys() <= _OF_SET
        and as_wanted.items() <= found.items()
        and found.get(nft.SET_FLAGS, _ZERO) == _ZERO
        and found.get(nft.SET_DESCRIPTION, b"") == b""
        and found.get(nft.SET_USERDATA, b"") in _SET_USERDATA
    )


def _expressions(data: bytes) -> Iterator[Expression]:
    for item in nft.items(data, _WHAT):
        expression = nl.attributes(item, 0, _WHAT)
        name = expression.get(nft.EXPRESSION_NAME, b"").rstrip(b"\0")
        found = nl.attributes(expression.get(nft.EXPRESSION_DATA, b""), 0, _WHAT)
        yield name, _less_defaults(name, found)


def _less_defaults(name: bytes, found: dict[int, bytes]) -> dict[int, bytes]:
    left_out = _DEFAULTS.get(name, {}).items()
    return {key: value for key, value in found.items() if (key, value) not in left_out}


def _wanted_expressions(
    rule: Rule, family: int, random_fully: bool, *, short: bool
) -> Iterator[Expression]:
    if rule.marked:
        mark = struct.pack("=I", KUBE_MARK)
        yield b"meta", {1: _REGISTER, 2: _u32(_META_MARK)}
        yield _masked(mark)
        yield _compared(_EQ, mark)
    for field, address in (("saddr", rule.source), ("daddr", rule.destination)):
        if address is not None:
            yield from _in_network(address, family, field, short)
    if rule.port is not None:
        yield b"meta", {1: _REGISTER, 2: _u32(_META_L4PROTO)}
        yield _compared(_EQ, _UDP)
        yield _loaded(_TRANSPORT_HEADER, 2, 2)
        yield _compared(_EQ, rule.port.to_bytes(2, "big"))
    if rule.strangers:
        yield _loaded(_NETWORK_HEADER, _OFFSET[family, "saddr"], _BYTES[family])
        yield b"lookup", {1: PEERS.encode() + b"\0", 2: _REGISTER, 5: _ONE}  # inverted
    if rule.verdict == "keep":
        yield _loaded(_NETWORK_HEADER, _OFFSET[family, "saddr"], _BYTES[family])
        yield b"nat", {1: _ZERO, 2: _u32(nft.FAMILY_NUMBER[FAMILY[family]]), 3: _REGISTER}
    elif rule.verdict == "masquerade":
        yield b"masq", {1: _u32(_RANDOM_FULLY)} if random_fully else {}
    else:
        code = nl.attr(nft.VERDICT_CODE, _u32(_VERDICTS[rule.verdict]))
        yield b"immediate", {1: _VERDICT_REGISTER, 2: nl.attr(nft.DATA_VERDICT, code)}


def _in_network(
    address: str | Except, family: int, field: str, short: bool
) -> Iterator[Expression]:
    cidr = address.cidr if isinstance(address, Except) else address
    start, _, length = cidr.partition("/")
    bits, size = int(length), _BYTES[family]
    packed = inet_pton(AF[family], start)
    if short and bits > 0 and bits % 8 == 0:
        packed = packed[: bits // 8]
    yield _loaded(_NETWORK_HEADER, _OFFSET[family, field], len(packed))
    if len(packed) == size and bits < size * 8:
        mask = (1 << size * 8) - (1 << size * 8 - bits)
        yield _masked(mask.to_bytes(size, "big"))
    yield _compared(_NEQ if isinstance(address, Except) else _EQ, packed)


def _loaded(base: int, offset: int, size: int) -> Expression:
    return b"payload", {1: _REGISTER, 2: _u32(base), 3: _u32(offset), 4: _u32(size)}


def _masked(mask: bytes) -> Expression:
    data = {4: nl.attr(nft.DATA_VALUE, mask), 5: nl.attr(nft.DATA_VALUE, bytes(len(mask)))}
    return b"bitwise", {1: _REGISTER, 2: _REGISTER, 3: _u32(len(mask)), **data}


def _compared(operation: int, value: bytes) -> Expression:
    return b"cmp", {1: _REGISTER, 2: _u32(operation), 3: nl.attr(nft.DATA_VALUE, value)}
