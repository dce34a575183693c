# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: embedsignature=False
"""The compiled unit: packed tables, their difference, netlink batches, admission.

The C sources in csrc/ do the work and know nothing of Python; this file is the
bridge. Objects here are not locked: one thread at a time may use a Table,
Diff, Claims or Channel. The GIL is released while C and the kernel work; who uses
such an object meanwhile gets BufferError, and who closes it closes it afterwards
(csrc/cython/_descriptor.pxi).
"""

cimport cython
from libc.errno cimport (E2BIG, EBUSY, EINTR, EINVAL, ENOENT, ENOMEM, ENOSPC, EPERM,
                         errno)
from libc.string cimport memcmp, memcpy, memset
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

import os
import time

from flannel_dp.tables.entries import EventFilter, Fdb, Neighbour, Nexthop, Peer, Route
from flannel_dp.errors import ConfigError, FlannelDPError, Unsupported, kernel_error


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from "<arpa/inet.h>" nogil:
    const char *inet_ntop(int family, const void *address, char *to, uint32_t size)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sched.h>" nogil:
    int c_setns "setns" (int fd, int kind)

cdef enum:
    CLONE_NEWNET = 0x40000000
    INET = 2
    INET6 = 10
    BRIDGE = 7
    UNICAST = 1
    NLMSG_OVERRUN = 4

KINDS = ("neighbour", "fdb", "nexthop", "route", "peer", "fdb_any")
cdef dict _NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
ADD, REPLACE, REMOVE = FDP_ADD, FDP_REPLACE, FDP_REMOVE
UNKNOWN, SKIPPED, UNSENT = FDP_UNKNOWN, FDP_SKIPPED, FDP_UNSENT

# C compares with it; a literal in nogil code would become a Python object.
cdef uint32_t NONE = <uint32_t>0xffffffff


cdef void *heap(void *old, size_t size) noexcept nogil:
    return fdp_heap(old, size)


cdef uint64_t _seeds = 0


cdef uint64_t _seed():
    """A number that authors of leases cannot know, another one at each call (splitmix64).

    Only the first is asked of the kernel: the call takes as long as filling a small table.
    """
    global _seeds
    cdef uint64_t mixed
    if not _seeds:
        _seeds = int.from_bytes(os.urandom(8), "little") | 1
    _seeds += <uint64_t>0x9e3779b97f4a7c15
    mixed = _seeds
    mixed = (mixed ^ (mixed >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    mixed = (mixed ^ (mixed >> 27)) * <uint64_t>0x94d049bb133111eb
    return mixed ^ (mixed >> 31)


cdef int _check(int err) except -1:
    if err == -ENOMEM:
        raise MemoryError()
    return 0


def trim_heap():
    """Give the system back the memory that large work has left unused."""
    with nogil:
        fdp_heap_trim()


def setns(int fd):
    """setns(2) of this thread into a network namespace; Python has it from 3.12 on."""
    if c_setns(fd, CLONE_NEWNET) < 0:
        raise OSError(errno, os.strerror(errno))


cdef bint _dropping = False


def drop_in_thread(int tid, uint64_t keep, bint no_new_privs, int wait_ms):
    """Have another thread of this process give up all capabilities but the mask ``keep``.

    ``wait_ms`` is how long it may take. One thread of a process may call this at a time. Raises
    OSError, with ETIMEDOUT for a thread that blocks signals and EBUSY beside another call.
    """
    global _dropping
    cdef int err
    if _dropping:
        raise OSError(EBUSY, os.strerror(EBUSY))
    _dropping = True
    with nogil:
        err = fdp_drop_in_thread(tid, keep, no_new_privs, wait_ms)
    _dropping = False
    if err < 0:
        raise OSError(-err, os.strerror(-err))


# ---- text and bytes ------------------------------------------------------

cdef str _address_text(int family, const uint8_t *address):
    cdef char text[64]
    if family == 0:
        return ""
    inet_ntop(family, address, text, sizeof(text))
    return (<bytes>text).decode("ascii")


cdef str _mac_text(const uint8_t *mac):
    return "%02x:%02x:%02x:%02x:%02x:%02x" % (mac[0], mac[1], mac[2], mac[3], mac[4], mac[5])


cdef int _family_of(const char *text, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(size):
        if text[i] == c':':
            return INET6
    return INET


cdef int _read_address(str text, uint8_t *to) except -1:
    """Parse an address of either family; return the family."""
    cdef Py_ssize_t size
    cdef const char *raw = PyUnicode_AsUTF8AndSize(text, &size)
    cdef int family = _family_of(raw, size)
    if fdp_parse_address(family, raw, size, to):
        raise ValueError(f"not an IP address: {text!r}")
    return family


cdef int _read_prefix(str text, fdp_prefix *to) except -1:
    cdef Py_ssize_t size
    cdef const char *raw = PyUnicode_AsUTF8AndSize(text, &size)
    cdef int family = _family_of(raw, size)
    if fdp_parse_prefix(family, raw, size, to):
        raise ValueError(f"not a prefix (ADDRESS/LENGTH): {text!r}")
    return family


cdef int _read_mac(str text, uint8_t *to) except -1:
    cdef Py_ssize_t size
    cdef const char *raw = PyUnicode_AsUTF8AndSize(text, &size)
    if fdp_parse_mac(raw, size, to):
        raise ValueError(f"not a MAC address: {text!r}")
    return 0


def parse_address(str text not None):
    """``(family, bytes)`` of an IPv4 or IPv6 address in text. ValueError otherwise."""
    cdef uint8_t raw[16]
    cdef int family = _read_address(text, raw)
    return family, <bytes>raw[:16 if family == INET6 else 4]


def parse_prefix(str text not None):
    """``(family, bytes, length)`` of ADDRESS/LENGTH, host bits cleared. ValueError otherwise."""
    cdef fdp_prefix prefix
    cdef int family = _read_prefix(text, &prefix)
    return family, <bytes>prefix.address[:16 if family == INET6 else 4], prefix.length


def prefix_holds(str prefix not None, str address not None):
    """Return whether an address is inside a prefix; one of the other family is not. ValueError for
    what is no prefix or no address."""
    cdef fdp_prefix outer
    cdef uint8_t raw[16]
    cdef int family = _read_prefix(prefix, &outer)
    memset(raw, 0, sizeof(raw))
    return (_read_address(address, raw) == family
            and fdp_prefix_holds(outer.address, outer.length, raw) != 0)


def prefixes_overlap(str one not None, str other not None):
    """Return whether two prefixes have an address in common. ValueError for what is no prefix."""
    cdef fdp_prefix first, second
    return (_read_prefix(one, &first) == _read_prefix(other, &second)
            and fdp_prefix_overlaps(first.address, first.length,
                                    second.address, second.length) != 0)


def parse_mac(str text not None):
    """The six bytes of ``aa:bb:cc:dd:ee:ff`` (or with dashes). ValueError otherwise."""
    cdef uint8_t raw[6]
    _read_mac(text, raw)
    return <bytes>raw[:6]


def address_text(bytes raw not None):
    """Return 4 or 16 bytes as an address in text, as the kernel prints it (inet_ntop(3)).

    ValueError for another length.
    """
    cdef Py_ssize_t size = len(raw)
    if size != 4 and size != 16:
        raise ValueError(f"an address has 4 or 16 bytes, not {size}")
    return _address_text(INET if size == 4 else INET6, raw)


def split_attributes(bytes data not None, Py_ssize_t offset=0):
    """Split netlink attributes from ``offset`` on into ``{type: value}``; of two with one type the
    last counts. None where one does not fit."""
    cdef const uint8_t *at = data
    cdef Py_ssize_t size = len(data)
    cdef uint16_t head[2]
    cdef dict found = {}
    if offset < 0:
        return None
    while offset + 4 <= size:
        memcpy(head, at + offset, 4)
        if head[0] < 4 or offset + head[0] > size:
            return None
        found[head[1] & 0x3fff] = (<const char *>at)[offset + 4:offset + head[0]]
        offset += (head[0] + 3) & ~3
    return found


def split_messages(bytes data not None, uint32_t seq):
    """Split a netlink datagram into ``(type, flags, payload)`` of each message with this sequence
    number. None where one does not fit; the type of a message NLMSG_OVERRUN counts, whatever its
    number."""
    cdef const uint8_t *at = data
    cdef Py_ssize_t size = len(data), offset = 0, length
    cdef uint32_t words[4]
    cdef list found = []
    while offset + 16 <= size:
        memcpy(words, at + offset, 16)
        length = words[0]
        if length < 16 or offset + length > size:
            return None
        if words[2] == seq or words[1] & 0xffff == NLMSG_OVERRUN:
            found.append((words[1] & 0xffff, words[1] >> 16,
                          (<const char *>at)[offset + 16:offset + length]))
        offset += (length + 3) & ~3
    return found


# ---- rows and entries ----------------------------------------------------

#: The words for bits of a row that no table can hold, per kind, as `ip` and `bridge` have them.
cdef dict _OTHER = {
    FDP_NEIGHBOUR: ((0x10, "extern_learn"),),
    FDP_FDB: ((0x10, "extern_learn"), (0x40, "sticky"), (0x80, "router")),
    FDP_FDB_ANY: ((1, "an attribute that is not known"), (2, "locked"), (4, "activity_notify"),
                  (8, "inactive"), (0x20, "offload")),
    FDP_NEXTHOP: ((1, "group"), (2, "blackhole"), (4, "encap"), (8, "fdb")),
    FDP_ROUTE: ((2, "multipath"), (4, "via the other family"), (8, "encap"), (16, "from"),
                (1, "src or metrics")),
}


cdef str _other(int kind, int bits):
    if not bits:
        return ""
    return ", ".join([word for bit, word in _OTHER[kind] if bits & bit])


cdef object _misfit(int kind, const uint8_t *row, const uint8_t *second):
    return _entry(kind, row), _entry(kind, second) if second != NULL else None


cdef object _entry(int kind, const uint8_t *raw):
    cdef fdp_row copy  # making objects can run code that changes the table
    cdef fdp_row *row = &copy
    memcpy(row, raw, fdp_layouts[kind].row)
    if kind == FDP_NEIGHBOUR:
        return Neighbour(row.neighbour.ifindex,
                         _address_text(row.neighbour.family, row.neighbour.address),
                         _mac_text(row.neighbour.mac), row.neighbour.state,
                         _other(kind, row.neighbour.other))
    if kind == FDP_FDB:
        return Fdb(row.fdb.ifindex, _mac_text(row.fdb.mac),
                   _address_text(row.fdb.family, row.fdb.endpoint), row.fdb.vni, row.fdb.port,
                   row.fdb.via, row.fdb.nexthop, row.fdb.state, row.fdb.src_vni,
                   _other(kind, row.fdb.other))
    if kind == FDP_FDB_ANY:
        return _any_fdb_entry(&row.fdb_any)
    if kind == FDP_NEXTHOP:
        return Nexthop(row.nexthop.id, _address_text(row.nexthop.family, row.nexthop.gateway),
                       row.nexthop.ifindex, bool(row.nexthop.onlink), row.nexthop.protocol,
                       _other(kind, row.nexthop.other))
    if kind == FDP_PEER:
        prefix = f"{_address_text(row.peer.family, row.peer.prefix)}/{row.peer.length}"
        return Peer(prefix, _address_text(row.peer.endpoint_family, row.peer.endpoint),
                    _mac_text(row.peer.mac), row.peer.map)
    prefix = f"{_address_text(row.route.family, row.route.prefix)}/{row.route.length}"
    return Route(prefix, row.route.nexthop,
                 _address_text(row.route.gateway_family, row.route.gateway), row.route.ifindex,
                 bool(row.route.onlink), row.route.metric, row.route.table, row.route.protocol,
                 row.route.tos, row.route.type, _other(kind, row.route.other), row.route.mtu)


cdef int _fill_row(int kind, object entry, fdp_row *row) except -1:
    """An entry (the NamedTuple of the kind, or a tuple like it) into a row."""
    cdef fdp_prefix prefix
    memset(row, 0, sizeof(fdp_row))
    if kind == FDP_NEIGHBOUR:
        entry = entry if isinstance(entry, Neighbour) else Neighbour(*entry)
        row.neighbour.ifindex = entry.device
        row.neighbour.family = _read_address(entry.address, row.neighbour.address)
        _read_mac(entry.mac, row.neighbour.mac)
        row.neighbour.state = entry.state
    elif kind == FDP_FDB:
        entry = entry if isinstance(entry, Fdb) else Fdb(*entry)
        row.fdb.ifindex = entry.device
        _read_mac(entry.mac, row.fdb.mac)
        if entry.endpoint:
            row.fdb.family = _read_address(entry.endpoint, row.fdb.endpoint)
        row.fdb.vni, row.fdb.port, row.fdb.via = entry.vni, entry.port, entry.via
        row.fdb.nexthop = entry.nexthop
        row.fdb.state = entry.state
        row.fdb.src_vni = entry.src_vni
        row.fdb.on_nexthop = entry.nexthop != 0
    elif kind == FDP_FDB_ANY:
        _fill_any_fdb(entry if isinstance(entry, Fdb) else Fdb(*entry), &row.fdb_any)
    elif kind == FDP_NEXTHOP:
        entry = entry if isinstance(entry, Nexthop) else Nexthop(*entry)
        if not entry.id:
            raise ValueError("a nexthop's id is 1 or more")
        row.nexthop.id = entry.id
        row.nexthop.family = _read_address(entry.gateway, row.nexthop.gateway)
        row.nexthop.ifindex = entry.device
        row.nexthop.onlink, row.nexthop.protocol = bool(entry.onlink), entry.protocol
    elif kind == FDP_PEER:
        entry = entry if isinstance(entry, Peer) else Peer(*entry)
        row.peer.family = _read_prefix(entry.prefix, &prefix)
        memcpy(row.peer.prefix, prefix.address, 16)
        row.peer.length, row.peer.map = prefix.length, entry.map
        row.peer.endpoint_family = _read_address(entry.endpoint, row.peer.endpoint)
        _read_mac(entry.mac, row.peer.mac)
    else:
        entry = entry if isinstance(entry, Route) else Route(*entry)
        row.route.family = _read_prefix(entry.prefix, &prefix)
        memcpy(row.route.prefix, prefix.address, 16)
        row.route.length = prefix.length
        row.route.tos, row.route.table, row.route.metric = entry.tos, entry.table, entry.metric
        row.route.type, row.route.protocol = entry.type, entry.protocol
        row.route.nexthop, row.route.mtu = entry.nexthop, entry.mtu
        if not entry.nexthop:
            row.route.ifindex, row.route.onlink = entry.device, bool(entry.onlink)
            if entry.gateway:
                row.route.gateway_family = _read_address(entry.gateway, row.route.gateway)
        if row.route.family == INET6 and not row.route.metric:
            row.route.metric = 1024  # IP6_RT_PRIO_USER: what the kernel makes of 0
    return 0


include "../csrc/cython/_descriptor.pxi"
include "../csrc/cython/_fdb.pxi"
include "../csrc/cython/_table.pxi"
include "../csrc/cython/_diff.pxi"
include "../csrc/cython/_pages.pxi"
include "../csrc/cython/_channel.pxi"
include "../csrc/cython/_events.pxi"
include "../csrc/cython/_bpf.pxi"
include "../csrc/cython/_column.pxi"
include "../csrc/cython/_fields.pxi"
include "../csrc/cython/_policy.pxi"
include "../csrc/cython/_claims.pxi"
include "../csrc/cython/_rows.pxi"
include "../csrc/cython/_roster.pxi"
include "../csrc/cython/_change.pxi"
include "../csrc/cython/_probe.pxi"
include "../csrc/cython/_prober.pxi"
