"""What is sent, read by decoders that are not ours; what is received, in every broken form."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flannel_dp._core import ADD, REMOVE, REPLACE, Table, decode
from flannel_dp.tables.entries import UNICAST, Entry, Fdb, Neighbour, Nexthop, Route, Scope
from tests.lib.strategies import KINDS, entries

# linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h, linux/nexthop.h
NLM_F_REQUEST, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x100, 0x200, 0x400
RTM_NEWROUTE, RTM_DELROUTE, RTM_NEWNEIGH, RTM_DELNEIGH = 24, 25, 28, 29
RTM_NEWNEXTHOP, RTM_DELNEXTHOP = 104, 105
AF_BRIDGE, NTF_SELF, NTF_PROXY, RTNH_F_ONLINK, RTM_F_CLONED = 7, 0x2, 0x8, 0x4, 0x200
NDA_DST, NDA_LLADDR, NDA_PORT, NDA_VNI, NDA_IFINDEX, NDA_NH_ID = 1, 2, 6, 7, 8, 13
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_TABLE, RTA_NH_ID = 1, 4, 5, 6, 15, 30
RTA_METRICS, RTA_MULTIPATH, RTAX_MTU = 8, 9, 2
NHA_ID, NHA_GROUP, NHA_OIF, NHA_GATEWAY = 1, 2, 5, 6
NLA_F_NESTED, NLA_F_NET_BYTEORDER = 0x8000, 0x4000

TYPES = {
    "neighbour": (RTM_NEWNEIGH, RTM_DELNEIGH),
    "fdb": (RTM_NEWNEIGH, RTM_DELNEIGH),
    "nexthop": (RTM_NEWNEXTHOP, RTM_DELNEXTHOP),
    "route": (RTM_NEWROUTE, RTM_DELROUTE),
}
HEADS = {"neighbour": "=BxxxIHBB", "fdb": "=BxxxIHBB", "nexthop": "=BBBxI", "route": "=8BI"}
KIND_OF = {Neighbour: "neighbour", Fdb: "fdb", Nexthop: "nexthop", Route: "route"}

CREATED = NLM_F_CREATE | NLM_F_EXCL
REPLACED = NLM_F_CREATE | NLM_F_REPLACE
FLAGS = {
    ("neighbour", ADD): REPLACED,
    ("fdb", ADD): REPLACED,
    ("nexthop", ADD): CREATED,
    ("route", ADD): CREATED,
}

#: Of each kind: IPv4, IPv6, and the odd ones.
SAMPLES: list[Entry] = [
    Neighbour(7, "10.244.7.0", "02:00:00:00:00:07"),
    Neighbour(7, "fd00:10:244:7::", "02:00:00:00:00:07", 0x40),
    Fdb(7, "02:00:00:00:00:07", "192.0.2.7"),
    Fdb(7, "02:00:00:00:00:07", "2001:db8::7", vni=9, port=8472, via=3),
    Fdb(7, "02:00:00:00:00:07", "", nexthop=1002),
    Nexthop(7, "10.244.7.0", 3),
    Nexthop(7, "fd00:10:244:7::", 3, False, 4),
    Route("10.244.7.0/24", nexthop=7),
    Route("10.244.7.0/24", gateway="10.244.7.0", device=3, onlink=True, metric=50, tos=4),
    Route("10.244.7.0/24", gateway="192.0.2.7", device=2, table=1000),
    Route("10.244.7.0/24", device=3),
    Route("fd00:10:244:7::/64", gateway="fd00:10:244:7::", device=3, onlink=True, metric=1024),
    Route("fd00:10:244:7::/64", nexthop=7, metric=1024),
    Route("0.0.0.0/0", gateway="192.0.2.7", device=2),
]


@dataclass
class Message:
    """One netlink message, taken apart with nothing but struct."""

    type: int
    flags: int
    seq: int
    port: int
    head: tuple[int, ...]
    attributes: dict[int, bytes]


def take_apart(kind: str, data: bytes) -> Message:
    size, type_, flags, seq, port = struct.unpack_from("=IHHII", data)
    assert size == len(data)
    head = struct.unpack_from(HEADS[kind], data, 16)
    at, attributes = 16 + struct.calcsize(HEADS[kind]), dict[int, bytes]()
    while at < size:
        length, number = struct.unpack_from("=HH", data, at)
        assert length >= 4
        assert number not in attributes
        attributes[number] = data[at + 4 : at + length]
        at += length + 3 & ~3
    assert at == size
    return Message(type_, flags, seq, port, head, attributes)


def encode(entry: Entry, op: int = ADD, seq: int = 1) -> bytes:
    table = Table(KIND_OF[type(entry)])
    table.add(entry)
    return table.encode(0, op, seq)


def raw(address: str) -> bytes:
    return socket.inet_pton(family_of(address), address)


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def given_ones(attributes: dict[int, bytes | int]) -> dict[int, bytes]:
    """Attributes that carry something; numbers as the kernel's native 32 bits."""
    return {
        number: value if isinstance(value, bytes) else u32(value)
        for number, value in attributes.items()
        if value
    }


def expected(entry: Any, op: int) -> tuple[tuple[int, ...], dict[int, bytes]]:
    """Fixed part and attributes of the message for one entry."""
    remove = op == REMOVE
    if isinstance(entry, Neighbour):
        head = (family_of(entry.address), entry.device, 0 if remove else entry.state, 0, 1)
        mac = b"" if remove else bytes.fromhex(entry.mac.replace(":", ""))
        return head, given_ones({NDA_DST: raw(entry.address), NDA_LLADDR: mac})
    if isinstance(entry, Fdb):
        head = (AF_BRIDGE, entry.device, entry.state, NTF_SELF, 0)
        return head, given_ones(
            {
                NDA_LLADDR: bytes.fromhex(entry.mac.replace(":", "")),
                NDA_DST: raw(entry.endpoint) if entry.endpoint else b"",
                NDA_PORT: struct.pack(">H", entry.port) if entry.port else b"",
                NDA_VNI: entry.vni,
                NDA_IFINDEX: entry.via,
                NDA_NH_ID: 0 if remove else entry.nexthop,
            }
        )
    if isinstance(entry, Nexthop):
        if remove:
            return (0, 0, 0, 0), given_ones({NHA_ID: entry.id})
        flags = RTNH_F_ONLINK if entry.onlink else 0
        return (family_of(entry.gateway), 0, entry.protocol, flags), given_ones(
            {NHA_ID: entry.id, NHA_OIF: entry.device, NHA_GATEWAY: raw(entry.gateway)}
        )
    address, length = entry.prefix.split("/")
    link = entry.type == UNICAST and not (entry.gateway or entry.nexthop)
    fixed = (
        family_of(address),
        int(length),
        0,
        entry.tos,
        entry.table if entry.table < 256 else 252,
        entry.protocol,
        255 if remove else 253 if link else 0,
        0 if remove else entry.type,
        RTNH_F_ONLINK if entry.onlink and not remove else 0,
    )
    # Without metrics the kernel takes those of another route by the same nexthop object.
    told = entry.mtu or (op == REPLACE and entry.nexthop and family_of(address) == socket.AF_INET)
    metrics = struct.pack("=HHI", 8, RTAX_MTU, entry.mtu) if told else b""
    return fixed, given_ones(
        {
            RTA_DST: raw(address),
            RTA_TABLE: entry.table if entry.table > 255 else 0,
            RTA_PRIORITY: entry.metric,
            RTA_NH_ID: entry.nexthop,
            RTA_GATEWAY: raw(entry.gateway) if entry.gateway else b"",
            RTA_OIF: entry.device,
            RTA_METRICS: metrics if not remove else b"",
        }
    )


def scope_for(entry: Entry) -> Scope:
    """A scope that takes everything like this entry for ours."""
    kind = KIND_OF[type(entry)]
    text = {"neighbour": "address", "nexthop": "gateway", "route": "prefix"}.get(kind)
    family = family_of(getattr(entry, text)) if text else AF_BRIDGE
    return Scope(kind, family, protocol=0, table=0)


def owner_of(entry: Entry) -> int:
    """1 ours; 2 a route that the kernel made; 3 a neighbour that it found out by itself."""
    if isinstance(entry, Neighbour):
        return 1 if entry.state & 0x80 else 3
    return 2 if isinstance(entry, Route) and entry.protocol in (1, 2, 9) else 1


# ---- writing ------------------------------------------------------------------


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), op=st.sampled_from((ADD, REPLACE, REMOVE)), data=st.data())
def test_every_field_of_every_message(kind: str, op: int, data: st.DataObject) -> None:
    entry, seq = data.draw(entries(kind)), data.draw(st.integers(0, 0xFFFFFFFF))

    message = take_apart(kind, encode(entry, op, seq))

    head, attributes = expected(entry, op)
    assert message.type == TYPES[kind][op == REMOVE]
    how = 0 if op == REMOVE else FLAGS.get((kind, op), REPLACED)
    assert message.flags == NLM_F_REQUEST | how
    assert (message.seq, message.port) == (seq, 0)
    assert (message.head, message.attributes) == (head, attributes)


@pytest.mark.parametrize("entry", [e for e in SAMPLES if isinstance(e, Neighbour | Fdb)], ids=str)
def test_pyroute2_reads_neighbours(entry: Neighbour | Fdb) -> None:
    from pyroute2.netlink.rtnl.ndmsg import ndmsg

    message: Any = ndmsg(encode(entry, REPLACE))
    message.decode()

    assert message["header"]["type"] == RTM_NEWNEIGH
    assert (message["ifindex"], message["state"]) == (entry.device, entry.state)
    assert message.get_attr("NDA_LLADDR") == entry.mac
    if isinstance(entry, Neighbour):
        assert message["family"] == family_of(entry.address)
        assert message.get_attr("NDA_DST") == entry.address
        return
    assert (message["family"], message["flags"]) == (AF_BRIDGE, NTF_SELF)
    assert (message.get_attr("NDA_DST") or "") == entry.endpoint
    assert (message.get_attr("NDA_PORT") or 0) == entry.port
    assert (message.get_attr("NDA_VNI") or 0) == entry.vni
    assert (message.get_attr("NDA_IFINDEX") or 0) == entry.via


@pytest.mark.parametrize("entry", [e for e in SAMPLES if isinstance(e, Route)], ids=str)
def test_pyroute2_reads_routes(entry: Route) -> None:
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    message: Any = rtmsg(encode(entry, ADD))
    message.decode()

    assert f"{message.get_attr('RTA_DST')}/{message['dst_len']}" == entry.prefix
    assert (message["proto"], message["tos"], message["type"]) == (entry.protocol, entry.tos, 1)
    assert (message.get_attr("RTA_TABLE") or message["table"]) == entry.table
    assert (message.get_attr("RTA_GATEWAY") or "") == entry.gateway
    assert (message.get_attr("RTA_OIF") or 0) == entry.device
    assert (message.get_attr("RTA_PRIORITY") or 0) == entry.metric
    # pyroute2 has no name for RTA_NH_ID.
    unknown = [value["header"]["type"] for name, value in message["attrs"] if name == "UNKNOWN"]
    assert unknown == ([RTA_NH_ID] if entry.nexthop else [])
    assert bool(message["flags"] & RTNH_F_ONLINK) == entry.onlink


# ---- reading --------------------------------------------------------------------


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_what_was_written_is_read_back(kind: str, data: st.DataObject) -> None:
    found = data.draw(st.lists(entries(kind, data.draw(st.sampled_from((4, 6)))), max_size=5))
    page = b"".join(encode(entry) for entry in found)

    for entry in found[:1]:
        assert decode(encode(entry), scope_for(entry)) == [(owner_of(entry), entry)]
        assert [one for _, one in decode(page, scope_for(entry))] == found


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_size_of_all_messages(kind: str, data: st.DataObject) -> None:
    table = Table(kind)
    for entry in data.draw(st.lists(entries(kind), max_size=5)):
        table.add(entry)
    for op in (ADD, REPLACE, REMOVE):
        sizes = [len(table.encode(number, op)) for number in range(len(table))]
        assert table.encoded_size(op) == sum(sizes)
    with pytest.raises(ValueError, match="operation"):
        table.encoded_size(0)


def test_other_messages_are_passed_over() -> None:
    entry = SAMPLES[0]
    page = b"".join(encode(sample) for sample in SAMPLES) + encode(entry, REMOVE)

    assert decode(page, scope_for(entry)) == [(1, entry)]
    assert decode(page, scope_for(entry)._replace(device=8)) == []


@pytest.mark.parametrize("entry", SAMPLES, ids=str)
def test_bits_of_attribute_types_are_tolerated(entry: Entry) -> None:
    """Newer kernels mark nested and big-endian attributes in the type."""
    data = bytearray(encode(entry))
    at = 16 + struct.calcsize(HEADS[KIND_OF[type(entry)]])
    while at < len(data):
        length, number = struct.unpack_from("=HH", data, at)
        struct.pack_into("=H", data, at + 2, number | NLA_F_NESTED | NLA_F_NET_BYTEORDER)
        at += length + 3 & ~3

    assert [one for _, one in decode(bytes(data), scope_for(entry))] == [entry]


@pytest.mark.parametrize("entry", SAMPLES, ids=str)
def test_unknown_attributes_are_passed_over(entry: Entry) -> None:
    data = encode(entry) + struct.pack("=HHI", 8, 999, 7) + struct.pack("=HH", 4, 1000)
    data = u32(len(data)) + data[4:]

    assert [one for _, one in decode(data, scope_for(entry))] == [entry]


@pytest.mark.parametrize("entry", SAMPLES, ids=str)
def test_a_message_cut_off_anywhere_is_refused(entry: Entry) -> None:
    data, scope = encode(entry), scope_for(entry)

    assert decode(b"", scope) == []
    for size in range(1, len(data)):
        with pytest.raises(ValueError, match="malformed"):
            decode(data[:size], scope)
        with pytest.raises(ValueError, match="malformed"):
            decode(data + data[:size], scope)


@pytest.mark.parametrize("entry", SAMPLES, ids=str)
def test_a_message_whose_length_ends_anywhere(entry: Entry) -> None:
    """The header says less than the attributes need: refused, or read up to there."""
    data, scope, kind = encode(entry), scope_for(entry), KIND_OF[type(entry)]
    least = 16 + struct.calcsize(HEADS[kind])
    ends = {least, len(data)}  # between two attributes
    at = least
    while at < len(data):
        at += struct.unpack_from("=H", data, at)[0] + 3 & ~3
        ends.add(at)
    for size in range(16, len(data)):
        short = u32(size) + data[4:size]
        if size < least:
            with pytest.raises(ValueError, match="malformed"):
                decode(short, scope)
        elif size in ends and kind != "nexthop":
            assert len(decode(short, scope)) <= 1
        else:
            _decode_anyhow(short, scope)


def _decode_anyhow(data: bytes, scope: Scope) -> bool:
    """Whether the data was taken for well-formed; anything but ValueError is a failure."""
    try:
        found = decode(data, scope)
    except ValueError:
        return False
    assert all(owner in (1, 2, 3) for owner, _ in found)
    return True


@pytest.mark.parametrize("entry", SAMPLES, ids=str)
def test_any_byte_may_be_any_other(entry: Entry) -> None:
    data, scope = encode(entry), scope_for(entry)
    outcomes = set()
    for at in range(len(data)):
        for value in (0, 1, 2, 3, 4, 5, 8, 0x7F, 0x80, 0xFE, 0xFF, data[at] ^ 1, data[at] ^ 0x80):
            changed = data[:at] + bytes([value]) + data[at + 1 :]
            outcomes.add(_decode_anyhow(changed, scope))

    assert outcomes == {True, False}


@given(
    entry=st.sampled_from(SAMPLES),
    changes=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=6),
    tail=st.binary(max_size=40),
)
def test_any_bytes_may_be_any_others(
    entry: Entry, changes: list[tuple[int, int]], tail: bytes
) -> None:
    data = bytearray(encode(entry) * 2 + tail)
    for at, value in changes:
        data[at % len(data)] = value

    _decode_anyhow(bytes(data), scope_for(entry))


@given(garbage=st.binary(max_size=200), entry=st.sampled_from(SAMPLES))
def test_garbage(garbage: bytes, entry: Entry) -> None:
    scope, kind = scope_for(entry), KIND_OF[type(entry)]
    _decode_anyhow(garbage, scope)
    framed = struct.pack("=IHHII", 16 + len(garbage), TYPES[kind][0], 0, 1, 0) + garbage
    _decode_anyhow(framed, scope)
    headed = encode(entry)[16 : 16 + struct.calcsize(HEADS[kind])] + garbage
    _decode_anyhow(struct.pack("=IHHII", 16 + len(headed), TYPES[kind][0], 0, 1, 0) + headed, scope)


# ---- whose an entry is ----------------------------------------------------------

OURS, FOREIGN = 1, 2
V4 = Scope("route", socket.AF_INET)


@pytest.mark.parametrize(
    ("scope", "entry", "owner"),
    [
        (V4, Route("10.244.7.0/24", nexthop=7), OURS),
        (V4, Route("10.244.7.0/24", nexthop=7, protocol=4), FOREIGN),
        (V4._replace(within="10.244.0.0/16"), Route("10.244.7.0/24", nexthop=7), OURS),
        (V4._replace(within="10.244.0.0/17"), Route("10.244.128.0/24", nexthop=7), FOREIGN),
        (V4._replace(within="10.244.0.0/16"), Route("10.0.0.0/8", nexthop=7), FOREIGN),
        (V4._replace(exclusive=True), Route("10.9.0.0/24", nexthop=7, protocol=3), OURS),
        (V4._replace(exclusive=True), Route("10.9.0.0/24", device=3, protocol=2), FOREIGN),
        (V4._replace(exclusive=True), Route("10.9.0.0/24", device=3, protocol=9), FOREIGN),
        (V4._replace(device=3), Route("10.244.7.0/24", device=3), OURS),
        (V4._replace(device=3), Route("10.244.7.0/24", device=4), FOREIGN),
        (V4._replace(protocol=0), Route("10.244.7.0/24", device=4, protocol=4), OURS),
        (Scope("nexthop", 2, ids=(5, 7)), Nexthop(7, "10.244.7.0", 3), OURS),
        (Scope("nexthop", 2, ids=(5, 7)), Nexthop(8, "10.244.7.0", 3), FOREIGN),
        (Scope("nexthop", 2, ids=(5, 7)), Nexthop(4, "10.244.7.0", 3), FOREIGN),
        (Scope("nexthop", 2), Nexthop(7, "10.244.7.0", 3, protocol=4), FOREIGN),
        (Scope("nexthop", 2, device=4), Nexthop(7, "10.244.7.0", 3), FOREIGN),
    ],
)
def test_whose_an_entry_is(scope: Scope, entry: Entry, owner: int) -> None:
    assert decode(encode(entry), scope) == [(owner, entry)]


@pytest.mark.parametrize(
    ("scope", "entry", "patch"),
    [
        (V4, Route("10.244.7.0/24", nexthop=7, table=255), {}),
        (V4, Route("10.244.7.0/24", nexthop=7), {25: RTM_F_CLONED >> 8}),
        (V4, Route("fd00::/64", nexthop=7), {}),
        (Scope("neighbour", 2), Neighbour(7, "10.244.7.0", "02:00:00:00:00:07"), {26: NTF_PROXY}),
        (Scope("neighbour", 10), Neighbour(7, "10.244.7.0", "02:00:00:00:00:07"), {}),
        (Scope("fdb", 7), Fdb(7, "02:00:00:00:00:07", "192.0.2.7"), {26: 0}),
    ],
)
def test_what_is_none_of_the_table(scope: Scope, entry: Entry, patch: dict[int, int]) -> None:
    data = bytearray(encode(entry))
    for at, value in patch.items():
        data[at] = value

    assert decode(bytes(data), scope) == []


def test_a_route_with_more_than_we_set_is_not_equal() -> None:
    """Several nexthops, say: the entry shows what it can, the value differs all the same."""
    entry = Route("10.244.7.0/24", device=3)
    data = encode(entry) + struct.pack("=HH", 4, RTA_MULTIPATH)

    assert decode(u32(len(data)) + data[4:], V4) == [(OURS, entry._replace(other="multipath"))]


def test_a_group_is_a_nexthop_of_nowhere() -> None:
    body = struct.pack("=BBBxI", 0, 0, 138, 0)
    body += struct.pack("=HHI", 8, NHA_ID, 9) + struct.pack("=HHIBBH", 12, NHA_GROUP, 7, 0, 0, 0)
    data = struct.pack("=IHHII", 16 + len(body), RTM_NEWNEXTHOP, 0, 1, 0) + body

    assert decode(data, Scope("nexthop", 2)) == [(OURS, Nexthop(9, "", 0, False, other="group"))]
