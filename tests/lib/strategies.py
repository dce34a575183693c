"""Hypothesis strategies for entries of tables, and what a table makes of them."""

from __future__ import annotations

import socket
from typing import Any

from hypothesis import strategies as st

from flannel_dp.tables.entries import BLACKHOLE, UNICAST, Entry, Fdb, Neighbour, Nexthop, Route

KINDS = ("neighbour", "fdb", "nexthop", "route")

U8 = st.integers(0, 0xFF)
U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)
#: Few values, so that keys meet, and some from the edges.
FEW = st.sampled_from((1, 2, 3, 0x7FFFFFFF, 0xFFFFFFFF))

#: Nothing that a table cannot hold.
_PLAIN = st.just("")


def _address(raw: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def addresses(family: int = 0) -> st.SearchStrategy[str]:
    """Addresses of family 4 or 6 (0: of both) in the form inet_ntop gives them."""
    v4 = st.sampled_from((b"\n\xf4\x01\0", b"\n\xf4\x02\0")) | st.binary(min_size=4, max_size=4)
    v6 = st.sampled_from((bytes(15) + b"\1", b"\xfd" + bytes(15))) | st.binary(
        min_size=16, max_size=16
    )
    return {4: v4, 6: v6, 0: v4 | v6}[family].map(_address)


def prefixes(family: int = 0) -> st.SearchStrategy[str]:
    """ADDRESS/LENGTH with all host bits zero."""
    return addresses(family).flatmap(
        lambda text: st.integers(0, 128 if ":" in text else 32).map(
            lambda length: masked(text, length)
        )
    )


def masked(text: str, length: int) -> str:
    """The prefix of an address that has ``length`` bits."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    raw = socket.inet_pton(family, text)
    keep = ((1 << length) - 1) << (8 * len(raw) - length)
    return f"{_address((int.from_bytes(raw, 'big') & keep).to_bytes(len(raw), 'big'))}/{length}"


def macs() -> st.SearchStrategy[str]:
    few = st.sampled_from((b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"))
    return (few | st.binary(min_size=6, max_size=6)).map(lambda raw: raw.hex(":"))


def _route(entry: Route) -> Route:
    if entry.type != UNICAST:
        entry = entry._replace(nexthop=0, gateway="", device=0, onlink=False)
    if entry.nexthop:
        entry = entry._replace(gateway="", device=0, onlink=False)
    if ":" in entry.prefix and not entry.metric:
        entry = entry._replace(metric=1024)
    return entry


def entries(kind: str, family: int = 0) -> st.SearchStrategy[Any]:
    """Entries exactly as a table gives them back."""
    if kind == "neighbour":
        state = st.just(0x80) | U16
        return st.builds(Neighbour, FEW, addresses(family), macs(), state, _PLAIN)
    if kind == "fdb":
        remote = addresses(family) | st.just("")
        group = st.just(0) | U32
        none = st.just(0)
        values = FEW, macs(), remote, U32, U16, U32, group, U16, none, _PLAIN
        return st.builds(Fdb, *values, _PLAIN, none, none)
    if kind == "nexthop":
        return st.builds(Nexthop, FEW, addresses(family), U32, st.booleans(), U8, _PLAIN)
    gateway = addresses(family) | st.just("")
    few = st.sampled_from((0, 50, 1024, 0xFFFFFFFF))
    table = st.sampled_from((1, 254, 255, 256, 1000, 0xFFFFFFFF))
    kinds = st.sampled_from((UNICAST, UNICAST, BLACKHOLE))
    return st.builds(
        Route,
        prefixes(family),
        st.just(0) | U32,
        gateway,
        U32,
        st.booleans(),
        few,
        table,
        U8,
        U8,
        kinds,
        _PLAIN,
        st.just(0) | U16,
    ).map(_route)


def key_of(entry: Entry) -> tuple[Any, ...]:
    """The key by which the kernel identifies an entry of a table."""
    if isinstance(entry, Neighbour):
        return entry.device, entry.address
    if isinstance(entry, Fdb):
        return entry.device, entry.mac, bool(entry.nexthop)
    if isinstance(entry, Nexthop):
        return (entry.id,)
    return entry.prefix, entry.table, entry.metric, entry.tos
