"""Which entry of the routing table carries an address: ``ip route get ADDRESS fibmatch``."""

from __future__ import annotations

import errno
import socket
from typing import Final

from msgspec import Struct

from flannel_dp._core import parse_address
from flannel_dp.errors import KernelError
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.links import LinkReader

_RTM_F_FIB_MATCH: Final = 0x2000
_RTA_NH_ID: Final = 30

# fib_props[] in net/ipv4/fib_semantics.c: blackhole answers EINVAL, prohibit EACCES,
# unreachable EHOSTUNREACH, throw EAGAIN; no route at all ENETUNREACH.
_REFUSALS: Final = frozenset(
    {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EAGAIN, errno.EINVAL}
)


class Match(Struct, frozen=True):
    """The table entry that carries a packet: ``device`` is an ifindex, 0 when the entry
    names none, ``gateway`` "" when there is none, ``nexthop`` the id of its object or 0."""

    prefix: str
    gateway: str
    device: int
    device_name: str
    nexthop: int
    protocol: int
    local: bool


class FibReader(LinkReader):
    """A LinkReader that also tells which route carries an address."""

    def __enter__(self) -> FibReader:
        return self

    def match(self, address: str) -> Match | None:
        """The matching entry, None when no route carries the address or one refuses it.

        Linux 4.15 and later. Equivalent: ``ip route get ADDRESS fibmatch``. Raises
        ValueError for a text that is no address, KernelError.
        """
        family, packed = parse_address(address)
        what = f"look up the route to {address}"
        bits = 8 * len(packed)
        body = nl.RTMSG.pack(family, bits, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
        body += nl.attr(nl.RTA_DST, packed)
        try:
            replies = list(self._ask(nl.RTM_GETROUTE, 0, body, what))
        except KernelError as error:
            if error.errno in _REFUSALS and not error.kernel_message:
                return None
            raise
        _, data = nl.only(replies, nl.RTM_NEWROUTE, what)
        if len(data) < nl.RTMSG.size:
            raise nl.malformed(what)
        _, length, _, _, _, protocol, _, kind, _ = nl.RTMSG.unpack_from(data)
        if kind in nl.RTN_REFUSING:
            return None
        attrs = nl.attributes(data, nl.RTMSG.size, what)
        device, gateway = nl.next_hops(attrs, what)[0]
        if not device:  # a nexthop object with sysctl net.ipv4.nexthop_compat_mode=0
            answer = self.route_to(address)
            device, gateway = (answer.oif, answer.gateway) if answer else (0, None)
        link = self.link(device) if device else None
        base = attrs.get(nl.RTA_DST) or bytes(len(packed))
        return Match(
            f"{socket.inet_ntop(family, base)}/{length}",
            gateway or "",
            device,
            link.name if link else "",
            nl.u32(attrs.get(_RTA_NH_ID)),
            protocol,
            kind == nl.RTN_LOCAL,
        )
