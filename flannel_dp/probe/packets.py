"""Single packets, made here: VXLAN datagrams with an ICMP echo request inside."""

from __future__ import annotations

import struct

ECHO_REQUEST = {4: 8, 6: 128}
ECHO_REPLY = {4: 0, 6: 129}
ICMP = {4: 1, 6: 58}
_ETHERTYPE = {4: 0x0800, 6: 0x86DD}


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo_request(family: int, source: bytes, target: bytes, ident: int, body: bytes) -> bytes:
    """Return an IP packet with an ICMP echo request; it may be forwarded 63 times."""
    head = struct.pack("!BBHHH", ECHO_REQUEST[family], 0, 0, ident, 1)
    length = len(head) + len(body)
    pseudo = b"" if family == 4 else source + target + struct.pack("!IxxxB", length, ICMP[6])
    icmp = struct.pack("!BBHHH", ECHO_REQUEST[family], 0, checksum(pseudo + head + body), ident, 1)
    if family == 6:
        return struct.pack("!IHBB", 6 << 28, length, ICMP[6], 64) + source + target + icmp + body
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, ICMP[4], 0) + source + target
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    return ip + icmp + body


def vxlan(vni: int, to_mac: bytes, from_mac: bytes, family: int, packet: bytes) -> bytes:
    """Return the payload of a VXLAN datagram (RFC 7348, section 5)."""
    header = struct.pack("!II", 0x08000000, vni << 8)
    return header + to_mac + from_mac + struct.pack("!H", _ETHERTYPE[family]) + packet
