"""Netlink messages: their parts, and the decoding of those about devices and addresses.

Pure functions over bytes, no socket: :mod:`flannel_dp.kernel.links` asks the questions, and
:mod:`flannel_dp.kernel.route_messages` decodes what is said of routes.
Every length is checked before it is used; what does not fit raises KernelError
(EBADMSG), so that a damaged reply is never used in part.

Source of the layouts: include/uapi/linux/{netlink,rtnetlink,if_link,if_addr}.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from functools import lru_cache
from typing import Final

from msgspec import Struct

from flannel_dp import _core
from flannel_dp._core import split_attributes, split_messages
from flannel_dp.errors import ConfigError, KernelError, kernel_error

IFF_UP: Final = 0x1
IFF_LOWER_UP: Final = 0x10000
IFA_F_NODAD: Final = 0x02
IFA_F_DADFAILED: Final = 0x08
IFA_F_TENTATIVE: Final = 0x40
SCOPE_LINK: Final = 253

NLMSGHDR = struct.Struct("=IHHII")
NLATTR = struct.Struct("=HH")
IFINFOMSG = struct.Struct("=BxHiII")
IFADDRMSG = struct.Struct("=BBBBI")
RTMSG = struct.Struct("=BBBBBBBBI")
_TCMSG = struct.Struct("=BxxxiIII")
NDTMSG = struct.Struct("=BxH")
NHMSG = struct.Struct("=BBBxI")
RULE_HEADER = struct.Struct("=B11x")  # struct fib_rule_hdr, of which a dump gives the family

NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 2, 3, 4
NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x2, 0x4, 0x10, 0x300
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEXTHOP, RTM_GETNEXTHOP = 104, 106
RTM_GETRULE, RTM_GETNEIGHTBL = 34, 66
#: RTM_*QDISC and RTM_*TFILTER: programs on a device come and go with these.
PROGRAMS = frozenset({36, 37, 44, 45})
#: RTM_NEWRULE and RTM_DELRULE.
RULES = frozenset({32, 33})
RTN_UNICAST, RTN_LOCAL = 1, 2
RT_TABLE_MAIN: Final = 254
RT_TABLE_LOCAL: Final = 255
#: Who configures routes by hand or by DHCP (RTPROT_BOOT, _STATIC, _DHCP): ``ip route``, network
#: managers, DHCP clients (RFC 3442).
RTPROT_DHCP: Final = 16
STATIC_PROTOCOLS: Final = (3, 4, RTPROT_DHCP)
ANY: Final = {4: "0.0.0.0", 6: "::"}
RTN_REFUSING = frozenset({6, 7, 8, 9})  # blackhole, unreachable, prohibit, throw

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 29, 37
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFA_ADDRESS, IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
RTA_DST, RTA_SRC, RTA_IIF = 1, 2, 3
RTA_PRIORITY, RTA_PREFSRC = 6, 7
RTA_TABLE, RTA_NH_ID = 15, 30
NHA_ID: Final = 1
VX_ID, VX_GROUP, VX_LINK, VX_LOCAL, VX_TTL, VX_LEARNING, VX_PROXY = 1, 2, 3, 4, 5, 7, 11
VX_RSC, VX_L2MISS, VX_L3MISS, VX_PORT, VX_GROUP6, VX_LOCAL6 = 12, 13, 14, 15, 16, 17
VX_UDP_CSUM, VX_ZERO_TX, VX_ZERO_RX, VX_GBP, VX_METADATA, VX_GPE = 18, 19, 20, 23, 25, 27


class VxlanInfo(Struct, frozen=True):
    """What ``ip -d link`` prints after the word ``vxlan``.

    ``lower`` is an ifindex, 0 for none; ``port`` is the UDP port; ``ttl`` 0 is ``auto``.
    ``local`` and ``group`` are addresses in text, None when not set.
    """

    vni: int
    lower: int
    local: str | None
    group: str | None
    port: int
    learning: bool
    collect_metadata: bool
    gbp: bool
    gpe: bool
    proxy: bool
    rsc: bool
    l2miss: bool
    l3miss: bool
    ttl: int
    udp_csum: bool
    udp_zero_csum6_tx: bool
    udp_zero_csum6_rx: bool


class Link(Struct, frozen=True):
    """One device as ``ip -d link show`` sees it; ``mtu`` in bytes, ``mac`` in lower case.

    ``lower`` is the ifindex of the device this one sits on, 0 for none; it lives in
    another namespace when ``lower_elsewhere`` is set. ``up`` is the administrative state;
    ``master`` the ifindex of the bridge, bond or VRF that it belongs to, 0 for none.
    """

    index: int
    name: str
    kind: str
    mtu: int
    mac: str
    up: bool
    carrier: bool
    lower: int
    lower_elsewhere: bool
    vxlan: VxlanInfo | None
    master: int = 0


class Address(Struct, frozen=True):
    """One address of a device; ``family`` is 4 or 6, ``flags`` the IFA_F_* bits. ``peer`` is the
    other end of a point-to-point link, which the prefix is then that of, and ``broadcast`` what
    ``ip address`` shows as ``brd``; "" for none."""

    index: int
    family: int
    address: str
    prefixlen: int
    scope: int
    flags: int
    peer: str = ""
    broadcast: str = ""


def messages(data: bytes, seq: int, what: str) -> list[tuple[int, int, bytes]]:
    """Split a datagram: (type, flags, payload) of each message with this sequence number."""
    found = split_messages(data, seq)
    if found is None:
        raise malformed(what)
    if any(message[0] == NLMSG_OVERRUN for message in found):
        raise kernel_error(errno.ENOBUFS, what)
    return found


def attributes(data: bytes, offset: int, what: str) -> dict[int, bytes]:
    """Split attributes into {type: value}; of two with one type the last counts."""
    found = split_attributes(data, offset)
    if found is None:
        raise malformed(what)
    return found


def raise_error(payload: bytes, flags: int, what: str, *, done: bool = False) -> None:
    """Raise what an NLMSG_ERROR (or the end of a dump) says; 0 is an acknowledgement."""
    if len(payload) < 4:
        raise malformed(what)
    code = -struct.unpack_from("=i", payload)[0]
    if code == 0:
        return
    offset = 4
    if not done:
        echoed = 0 if flags & NLM_F_CAPPED else _echo_size(payload)
        offset = 4 + NLMSGHDR.size + echoed
    text = ""
    if flags & NLM_F_ACK_TLVS:
        text = _text(attributes(payload, offset, what).get(1, b""))
    raise kernel_error(code, what, text)


def _echo_size(payload: bytes) -> int:
    """Return how much of the request, after its header, an error message repeats."""
    if len(payload) < 4 + NLMSGHDR.size:
        return 0
    length: int = NLMSGHDR.unpack_from(payload, 4)[0]
    return max(0, ((length + 3) & ~3) - NLMSGHDR.size)


def only(replies: list[tuple[int, bytes]], kind: int, what: str) -> tuple[int, bytes]:
    if len(replies) != 1 or replies[0][0] != kind:
        raise malformed(what)
    return replies[0]


def parse_device_of_program(data: bytes, what: str) -> int:
    """Return the ifindex of a device whose qdisc or filter a message is about (struct tcmsg)."""
    if len(data) < _TCMSG.size:
        raise malformed(what)
    return int(_TCMSG.unpack_from(data)[1])


@lru_cache(maxsize=16)
def parse_link(reply: tuple[int, bytes], what: str) -> Link:
    data = reply[1]
    if len(data) < IFINFOMSG.size:
        raise malformed(what)
    _, _, index, flags, _ = IFINFOMSG.unpack_from(data)
    attrs = attributes(data, IFINFOMSG.size, what)
    info = attributes(attrs.get(IFLA_LINKINFO, b""), 0, what)
    kind = _text(info.get(IFLA_INFO_KIND, b""))
    vxlan = _parse_vxlan(info.get(IFLA_INFO_DATA, b""), what) if kind == "vxlan" else None
    return Link(
        index=index,
        name=_text(attrs.get(IFLA_IFNAME, b"")),
        kind=kind,
        mtu=u32(attrs.get(IFLA_MTU)),
        mac=attrs.get(IFLA_ADDRESS, b"").hex(":"),
        up=bool(flags & IFF_UP),
        carrier=bool(flags & IFF_LOWER_UP),
        # For vxlan IFLA_LINK is missing, or the device's own index in another namespace.
        lower=vxlan.lower if vxlan else u32(attrs.get(_IFLA_LINK)),
        lower_elsewhere=_IFLA_LINK_NETNSID in attrs,
        vxlan=vxlan,
        master=u32(attrs.get(_IFLA_MASTER)),
    )


def _parse_vxlan(data: bytes, what: str) -> VxlanInfo:
    """Decode IFLA_INFO_DATA as vxlan_fill_info() in drivers/net/vxlan/vxlan_core.c wrote it."""
    attrs = attributes(data, 0, what)

    def on(kind: int) -> bool:
        return attrs.get(kind, b"\0")[:1] != b"\0"

    return VxlanInfo(
        vni=u32(attrs.get(VX_ID)),
        lower=u32(attrs.get(VX_LINK)),
        local=address_text(attrs.get(VX_LOCAL) or attrs.get(VX_LOCAL6)),
        group=address_text(attrs.get(VX_GROUP) or attrs.get(VX_GROUP6)),
        port=int.from_bytes(attrs.get(VX_PORT, b""), "big"),
        learning=on(VX_LEARNING),
        collect_metadata=on(VX_METADATA),
        gbp=VX_GBP in attrs,
        gpe=VX_GPE in attrs,
        proxy=on(VX_PROXY),
        rsc=on(VX_RSC),
        l2miss=on(VX_L2MISS),
        l3miss=on(VX_L3MISS),
        ttl=int.from_bytes(attrs.get(VX_TTL, b""), "big"),
        udp_csum=on(VX_UDP_CSUM),
        udp_zero_csum6_tx=on(VX_ZERO_TX),
        udp_zero_csum6_rx=on(VX_ZERO_RX),
    )


@lru_cache(maxsize=64)
def parse_address(reply: tuple[int, bytes], what: str) -> Address:
    kind, data = reply
    if kind != RTM_NEWADDR or len(data) < IFADDRMSG.size:
        raise malformed(what)
    family, prefixlen, flags, scope, index = IFADDRMSG.unpack_from(data)
    attrs = attributes(data, IFADDRMSG.size, what)
    # On a point-to-point device IFA_ADDRESS is the other end; IFA_LOCAL is ours.
    text = address_text(attrs.get(IFA_LOCAL) or attrs.get(IFA_ADDRESS))
    if text is None:
        raise malformed(what)
    flags |= u32(attrs.get(_IFA_FLAGS))
    peer = address_text(attrs.get(IFA_ADDRESS)) or text
    return Address(
        index,
        4 if family == socket.AF_INET else 6,
        text,
        prefixlen,
        scope,
        flags,
        peer if peer != text else "",
        address_text(attrs.get(_IFA_BROADCAST)) or "",
    )


def address_text(packed: bytes | None) -> str | None:
    """Return an address in text; None for none, for a length that is no address, and for all
    zeros."""
    if not packed or len(packed) not in (4, 16) or not any(packed):
        return None
    return _core.address_text(packed)


def u32(value: bytes | None) -> int:
    return int(struct.unpack_from("=I", value)[0]) if value is not None and len(value) >= 4 else 0


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode("utf-8", "replace")


def attr(kind: int, value: bytes) -> bytes:
    size = NLATTR.size + len(value)
    return NLATTR.pack(size, kind) + value + bytes(-size % 4)


def attr_u32(kind: int, value: int) -> bytes:
    return attr(kind, struct.pack("=I", value))


def name_bytes(name: str) -> bytes:
    encoded = name.encode("utf-8", "surrogateescape")
    if not 0 < len(encoded) <= 15 or b"\0" in encoded:
        raise ConfigError(
            f"interface name {name!r} has {len(encoded)} bytes", hint="the kernel takes 1 to 15"
        )
    return encoded + b"\0"


def af(family: int) -> int:
    return int(socket.AF_INET if family == 4 else socket.AF_INET6)


def malformed(what: str) -> KernelError:
    return KernelError(
        errno.EBADMSG,
        what,
        "the reply is cut short or not what was asked for",
        hint="try again; if it stays, the kernel and this program disagree about a format",
    )
