"""Asks the kernel itself what nftables holds: tables, chains, and whether rules can stop packets.

The program ``nft`` takes some ten milliseconds to answer, and nft 1.0.6 prints the flags of a
dormant table from memory that is not its own. Each message of the kernel is one object.

Source of the layouts: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final, Self

from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.socket import NetlinkSocket

Object = dict[int, bytes]
"""The attributes of a table, chain, rule, set or element, by their number."""

FAMILY_NUMBER: Final = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}
_FAMILY_NAME = {number: name for name, number in FAMILY_NUMBER.items()}

_NETLINK_NETFILTER = 12
_NFGENMSG = struct.Struct("=BB2s")
_SUBSYSTEM = 10 << 8
#: What a dump is asked with and what it is answered with, less the subsystem's bits.
TABLES: Final = (1, 0)
CHAINS: Final = (4, 3)
RULES: Final = (7, 6)
SETS: Final = (10, 9)
ELEMENTS: Final = (13, 12)

TABLE_NAME, TABLE_FLAGS, TABLE_USE = 1, 2, 3
CHAIN_TABLE, CHAIN_HANDLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY = 1, 2, 3, 4, 5
CHAIN_USE, CHAIN_TYPE, CHAIN_FLAGS = 6, 7, 10
HOOK_NUMBER, HOOK_PRIORITY = 1, 2
RULE_TABLE, RULE_CHAIN, RULE_HANDLE, RULE_EXPRESSIONS = 1, 2, 3, 4
RULE_POSITION, RULE_USERDATA = 6, 7
SET_TABLE, SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_KEY_LENGTH = 1, 2, 3, 4, 5
SET_DESCRIPTION, SET_USERDATA, SET_HANDLE, SET_BACKEND, SET_COUNT = 9, 13, 16, 19, 20
ELEMENTS_TABLE, ELEMENTS_SET, ELEMENTS_LIST = 1, 2, 3
EXPRESSION_NAME, EXPRESSION_DATA = 1, 2
DATA_VALUE, DATA_VERDICT, VERDICT_CODE = 1, 2, 1
NF_DROP, NF_ACCEPT, NFT_RETURN = 0, 1, -5

#: linux/netfilter.h, enum nf_inet_hooks.
HOOKS: Final = {"input": 1, "forward": 2, "postrouting": 4}
_HOOK_NAME = {HOOKS["input"]: "input", HOOKS["forward"]: "forward"}


class NftSocket:
    """A socket to the kernel's nf_tables in this thread's namespace; a context manager.

    ``generations`` are those of the rule set that the answers came from: with more than one,
    another program changed it in between.
    """

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(protocol=_NETLINK_NETFILTER)
        self.generations: set[bytes] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._netlink.close()

    def dump(
        self, what: tuple[int, int], name: str, family: str = "", asked: bytes = b""
    ) -> list[tuple[str, Object]]:
        """Return (family, object) of all of ``what``; ``name`` is for errors, and ``asked`` are
        attributes that limit the dump where the kernel does so.

        Raises NotPermitted without CAP_NET_ADMIN, KernelError where there is no nftables.
        """
        said = f"list the {name} of nftables"
        body = _NFGENMSG.pack(FAMILY_NUMBER.get(family, 0), 0, b"\0\0") + asked
        replies = self._netlink.dump(_SUBSYSTEM | what[0], body, said)
        return list(self._objects(replies, what, said))

    def walk(
        self, what: tuple[int, int], name: str, family: str = "", asked: bytes = b""
    ) -> Iterator[tuple[str, Object]]:
        """Yield as ``dump`` returns, for a caller that need not read to the end; then this socket
        has to be closed. Raises as ``dump``, and DumpInterrupted at the end of a dump."""
        said = f"list the {name} of nftables"
        body = _NFGENMSG.pack(FAMILY_NUMBER.get(family, 0), 0, b"\0\0") + asked
        replies = self._netlink.begin_dump(_SUBSYSTEM | what[0], body, said)
        return self._objects(replies, what, said)

    def _objects(
        self, replies: Iterable[tuple[int, bytes]], what: tuple[int, int], said: str
    ) -> Iterator[tuple[str, Object]]:
        for kind, data in replies:
            if kind == _SUBSYSTEM | what[1] and len(data) >= _NFGENMSG.size:
                number, _, generation = _NFGENMSG.unpack_from(data)
                self.generations.add(generation)
                family = _FAMILY_NAME.get(number, "unknown")
                yield family, nl.attributes(data, _NFGENMSG.size, said)


def present_tables() -> set[tuple[str, str]]:
    """Return ``(family, name)`` of every table in this namespace.

    Equivalent: ``nft list tables``. Raises as ``NftSocket.dump``.
    """
    with NftSocket() as kernel:
        found = kernel.dump(TABLES, "tables")
    return {(family, name_of(table.get(TABLE_NAME))) for family, table in found}


def present_chains() -> list[tuple[str, str, str]]:
    """Return ``(family, table, chain)`` of every chain of every table in this namespace.

    Equivalent: ``nft list chains``. Raises as ``NftSocket.dump``.
    """
    with NftSocket() as kernel:
        found = kernel.dump(CHAINS, "chains")
    return [
        (family, name_of(chain.get(CHAIN_TABLE)), name_of(chain.get(CHAIN_NAME)))
        for family, chain in found
    ]


def filtering_tables() -> set[tuple[str, str, str]]:
    """Return ``(family, table, hook)`` for each table with a filter chain at ``input`` or
    ``forward``.

    A table that cannot stop a packet there costs no process. Raises as ``NftSocket.dump``.
    """
    with NftSocket() as kernel:
        chains = kernel.dump(CHAINS, "chains")
    found = set()
    for family, chain in chains:
        hook = nl.attributes(chain.get(CHAIN_HOOK, b""), 0, "read a chain of nftables")
        number = int.from_bytes(hook.get(HOOK_NUMBER, b""), "big")
        kept = name_of(chain.get(CHAIN_TYPE)) == "filter"
        if kept and number in _HOOK_NAME and family in ("ip", "ip6", "inet"):
            found.add((family, name_of(chain.get(CHAIN_TABLE)), _HOOK_NAME[number]))
    return found


def name_of(value: bytes | None) -> str:
    """Return a name of nf_tables, which ends in a NUL, as text."""
    return (value or b"").rstrip(b"\0").decode(errors="replace")


def named(attribute: int, name: str) -> bytes:
    """Return the attribute that names something, for a request."""
    return nl.attr(attribute, name.encode() + b"\0")


def items(data: bytes, what: str) -> Iterator[bytes]:
    """Yield the values of a list of attributes (NFTA_LIST_ELEM)."""
    offset = 0
    while offset + nl.NLATTR.size <= len(data):
        length, _ = nl.NLATTR.unpack_from(data, offset)
        if length < nl.NLATTR.size or offset + length > len(data):
            raise nl.malformed(what)
        yield data[offset + nl.NLATTR.size : offset + length]
        offset += (length + 3) & ~3
