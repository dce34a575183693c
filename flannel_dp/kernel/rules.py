"""Read policy rules and the routes of tables that they name; write nothing.

The messages are those of include/uapi/linux/fib_rules.h and rtnetlink.h. Loaded where a node has
other rules than the kernel's own three; :meth:`flannel_dp.kernel.links.LinkReader.rules` is what
every pass asks.
"""

from __future__ import annotations

import errno
import ipaddress
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from msgspec import Struct

from flannel_dp.errors import KernelError
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.route_messages import next_hops, parse_route
from flannel_dp.kernel.socket import NetlinkSocket

#: What a rule does (FR_ACT_*): look a table up, jump, nothing, or drop.
LOOKUP, GOTO, NOP = 1, 2, 3
DROPS: Final = {6: "blackhole", 7: "unreachable", 8: "prohibit"}


#: Types of routes as ``ip route`` names them; those of unicast routes are left out.
_TYPES = {
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
    9: "throw",
    10: "nat",
}
_TABLES = {253: "default", 254: "main", 255: "local"}

_HEADER = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr
_INVERT = 0x2
_DST, _SRC, _IIFNAME, _GOTO, _PRIORITY, _FWMARK = 1, 2, 3, 4, 6, 10
_TUN_ID, _SUPPRESS_PREFIXLEN, _TABLE, _FWMASK, _OIFNAME, _L3MDEV = 12, 14, 15, 16, 17, 19
_UID_RANGE, _IP_PROTO, _SPORT, _DPORT, _DSCP, _FLOWLABEL = 20, 22, 23, 24, 25, 26

#: Selectors of some of a flow's packets, and what ``ip rule`` calls them.
_PARTIAL = {_IP_PROTO: "ipproto", _SPORT: "sport", _DPORT: "dport", _DSCP: "dscp", _FLOWLABEL: ""}


class PolicyRule(Struct, frozen=True):
    """One rule of ``ip rule``; ``source``, ``destination``, ``iif`` and ``oif`` are "" for any.

    ``suppress`` is suppress_prefixlength, -1 without. ``mask`` 0 means that no mark is asked for.
    ``partial`` names selectors that some packets of any flow may match: ports, protocol, TOS.
    ``special`` says that the rule is for a VRF, a user or a tunnel's metadata: never for pods.
    """

    family: int
    priority: int
    action: int
    table: int
    invert: bool = False
    source: str = ""
    destination: str = ""
    iif: str = ""
    oif: str = ""
    mark: int = 0
    mask: int = 0
    target: int = 0
    suppress: int = -1
    partial: tuple[str, ...] = ()
    special: bool = False

    def __str__(self) -> str:
        """Return the selectors and the action, as ``ip rule add`` takes them."""
        words = ["not"] * self.invert + [f"from {self.source or 'all'}"]
        words += [f"to {self.destination}"] * bool(self.destination)
        words += [f"iif {self.iif}"] * bool(self.iif) + [f"oif {self.oif}"] * bool(self.oif)
        if self.mask:
            mask = "" if self.mask == 0xFFFFFFFF else f"/{self.mask:#x}"
            words.append(f"fwmark {self.mark:#x}{mask}")
        words += self.partial
        if self.action == LOOKUP:
            words.append(f"lookup {table_name(self.table)}")
            words += [f"suppress_prefixlength {self.suppress}"] * (self.suppress >= 0)
        elif self.action == GOTO:
            words.append(f"goto {self.target}")
        else:
            words.append(DROPS.get(self.action, "nop"))
        return " ".join(words)


class TableRoute(Struct, frozen=True):
    """One route of a table; ``kind`` is its type as ``ip route`` prints it, "" for unicast."""

    prefix: str
    kind: str
    device: int
    gateway: str
    nexthop: int
    tos: int
    metric: int

    @property
    def throws(self) -> bool:
        """Whether the look-up goes on with the next rule."""
        return self.kind == "throw"


def table_name(table: int) -> str:
    """Return the name that ``ip`` prints for a table of the kernel's own, else its number."""
    return _TABLES.get(table, str(table))


@lru_cache(256)
def parse_rule(data: bytes, what: str) -> PolicyRule:
    """Decode one RTM_NEWRULE. Raises KernelError (EBADMSG) for one that is cut short.

    Each pass reads the same rules: what they say is remembered.
    """
    if len(data) < _HEADER.size:
        raise nl.malformed(what)
    af, dst_len, src_len, tos, table, _, _, action, flags = _HEADER.unpack_from(data)
    attrs = nl.attributes(data, _HEADER.size, what)
    family = 4 if af == nl.af(4) else 6
    mark, mask = nl.u32(attrs.get(_FWMARK)), nl.u32(attrs.get(_FWMASK))
    partial = [f"tos {tos:#x}"] * bool(tos)
    partial += [_selector(kind, attrs[kind]) for kind in _PARTIAL if any(attrs.get(kind, b""))]
    suppress = attrs.get(_SUPPRESS_PREFIXLEN)
    return PolicyRule(
        family,
        nl.u32(attrs.get(_PRIORITY)),
        action,
        nl.u32(attrs.get(_TABLE)) or table,
        bool(flags & _INVERT),
        _prefix(attrs.get(_SRC, b""), src_len, family, what) if src_len else "",
        _prefix(attrs.get(_DST, b""), dst_len, family, what) if dst_len else "",
        text_of(attrs.get(_IIFNAME, b"")),
        text_of(attrs.get(_OIFNAME, b"")),
        mark,
        mask if mark or mask else 0,
        nl.u32(attrs.get(_GOTO)),
        struct.unpack("=i", suppress)[0] if suppress and len(suppress) == 4 else -1,
        tuple(partial),
        any(any(attrs.get(kind, b"")) for kind in (_TUN_ID, _L3MDEV, _UID_RANGE)),
    )


def text_of(value: bytes) -> str:
    """Return a name that the kernel ends with a zero byte."""
    return value.split(b"\0", 1)[0].decode("utf-8", "replace")


def _selector(kind: int, value: bytes) -> str:
    name = _PARTIAL[kind]
    if kind in (_SPORT, _DPORT) and len(value) == 4:
        first, last = struct.unpack("=HH", value)
        return f"{name} {first}" + (f"-{last}" if last != first else "")
    return f"{name} {value[0]}" if name else "flowlabel"


def _prefix(base: bytes, length: int, family: int, what: str) -> str:
    """Return a prefix in text. Raises KernelError (EBADMSG) for one of another size."""
    size = 4 if family == 4 else 16
    if len(base) != size or length > 8 * size:
        raise nl.malformed(what)
    return f"{ipaddress.ip_address(base)}/{length}"


def read_routes(kernel: NetlinkSocket, family: int, table: int) -> Iterator[tuple[int, bytes]]:
    """Yield the routes of one table, undecoded; none where there is no such table.

    A caller that does not read to the end has to ``abandon`` the dump. :func:`parse_table_route`
    decodes one. Equivalent: ``ip [-4|-6] route show table TABLE``. Raises KernelError,
    DumpInterrupted where the table changed meanwhile.
    """
    if not kernel.filters_dumps:
        return  # it would be a dump of all tables
    what = f"dump IPv{family} routes of table {table}"
    body = nl.RTMSG.pack(nl.af(family), 0, 0, 0, 0, 0, 0, 0, 0) + nl.attr_u32(nl.RTA_TABLE, table)
    try:
        yield from kernel.begin_dump(nl.RTM_GETROUTE, body, what)
    except KernelError as error:
        # "FIB table does not exist": a rule may name one that has no routes.
        if error.errno != errno.ENOENT:
            raise


def parse_table_route(
    reply: tuple[int, bytes], family: int, table: int, what: str = "read a route"
) -> TableRoute | None:
    """Decode one RTM_NEWROUTE; None for a dead route. Raises KernelError (EBADMSG)."""
    route = parse_route(reply, what)
    attrs = route.attrs
    if nl.u32(attrs.get(nl.RTA_TABLE)) != table or route.dead:
        return None
    device, gateway = next_hops(attrs, what)[0]
    base = attrs.get(nl.RTA_DST) or bytes(4 if family == 4 else 16)
    return TableRoute(
        _prefix(base, route.prefixlen, family, what),
        _TYPES.get(route.kind, ""),
        device,
        gateway or "",
        nl.u32(attrs.get(nl.RTA_NH_ID)),
        reply[1][3],
        nl.u32(attrs.get(nl.RTA_PRIORITY)),
    )
