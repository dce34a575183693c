# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True, embedsignature=False
"""The compiled unit: packed tables, their difference, netlink batches, admission.

The C sources in csrc/ do the work and know nothing of Python; this file is the
bridge. Objects here are not locked: one thread at a time may use a Table,
Diff, Claims or Channel (the GIL is released while the kernel works).
"""

from libc.errno cimport EINTR, ENOMEM
from libc.string cimport memcmp, memcpy, memset
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

import os
import time

from flannel_dp.entries import Fdb, Neighbour, Nexthop, Route
from flannel_dp.errors import kernel_error


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from "<arpa/inet.h>" nogil:
    const char *inet_ntop(int family, const void *address, char *to, uint32_t size)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    INET = 2
    INET6 = 10
    UNICAST = 1

KINDS = ("neighbour", "fdb", "nexthop", "route")
cdef dict _NUMBERS = {"neighbour": 0, "fdb": 1, "nexthop": 2, "route": 3}
ADD, REPLACE, REMOVE = FDP_ADD, FDP_REPLACE, FDP_REMOVE
UNKNOWN, SKIPPED, UNSENT = FDP_UNKNOWN, FDP_SKIPPED, FDP_UNSENT

# C compares with it; a literal in nogil code would become a Python object.
cdef uint32_t NONE = <uint32_t>0xffffffff


cdef void *heap(void *old, size_t size) noexcept nogil:
    return fdp_heap(old, size)


cdef uint64_t _seed():
    return int.from_bytes(os.urandom(8), "little")


cdef int _check(int err) except -1:
    if err == -ENOMEM:
        raise MemoryError()
    return 0


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


def parse_mac(str text not None):
    """The six bytes of ``aa:bb:cc:dd:ee:ff`` (or with dashes). ValueError otherwise."""
    cdef uint8_t raw[6]
    _read_mac(text, raw)
    return <bytes>raw[:6]


# ---- rows and entries ----------------------------------------------------

cdef object _entry(int kind, const uint8_t *raw):
    cdef fdp_row *row = <fdp_row *>raw
    if kind == FDP_NEIGHBOUR:
        return Neighbour(row.neighbour.ifindex,
                         _address_text(row.neighbour.family, row.neighbour.address),
                         _mac_text(row.neighbour.mac), row.neighbour.state)
    if kind == FDP_FDB:
        return Fdb(row.fdb.ifindex, _mac_text(row.fdb.mac),
                   _address_text(row.fdb.family, row.fdb.endpoint), row.fdb.vni, row.fdb.port,
                   row.fdb.via, row.fdb.nexthop, row.fdb.state)
    if kind == FDP_NEXTHOP:
        return Nexthop(row.nexthop.id, _address_text(row.nexthop.family, row.nexthop.gateway),
                       row.nexthop.ifindex, bool(row.nexthop.onlink), row.nexthop.protocol)
    prefix = f"{_address_text(row.route.family, row.route.prefix)}/{row.route.length}"
    return Route(prefix, row.route.nexthop,
                 _address_text(row.route.gateway_family, row.route.gateway), row.route.ifindex,
                 bool(row.route.onlink), row.route.metric, row.route.table, row.route.protocol,
                 row.route.tos, row.route.type)


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
        if entry.nexthop:
            (<uint8_t *>row)[10] = 1
    elif kind == FDP_NEXTHOP:
        entry = entry if isinstance(entry, Nexthop) else Nexthop(*entry)
        if not entry.id:
            raise ValueError("a nexthop's id is 1 or more")
        row.nexthop.id = entry.id
        row.nexthop.family = _read_address(entry.gateway, row.nexthop.gateway)
        row.nexthop.ifindex = entry.device
        row.nexthop.onlink, row.nexthop.protocol = bool(entry.onlink), entry.protocol
    else:
        entry = entry if isinstance(entry, Route) else Route(*entry)
        row.route.family = _read_prefix(entry.prefix, &prefix)
        memcpy(row.route.prefix, prefix.address, 16)
        row.route.length = prefix.length
        row.route.tos, row.route.table, row.route.metric = entry.tos, entry.table, entry.metric
        row.route.type, row.route.protocol = entry.type, entry.protocol
        row.route.nexthop = entry.nexthop
        if not entry.nexthop:
            row.route.ifindex, row.route.onlink = entry.device, bool(entry.onlink)
            if entry.gateway:
                row.route.gateway_family = _read_address(entry.gateway, row.route.gateway)
        if row.route.family == INET6 and not row.route.metric:
            row.route.metric = 1024  # IP6_RT_PRIO_USER: what the kernel makes of 0
    return 0


cdef class Table:
    """A packed table of one kind: desired state, keyed as the kernel keys it.

    ``Table(kind)`` is empty; :meth:`add` takes entries (or tuples like them),
    the ``extend_*`` methods take columns: any two-dimensional buffer of bytes
    (n rows of 4 or 16 address bytes, 6 MAC bytes), strided ones included. An
    entry whose key is already there replaces the earlier one. Memory per entry
    is the row (40 to 72 bytes) and two to four index slots of four bytes.
    """

    cdef fdp_table table
    cdef object __weakref__

    def __cinit__(self, str kind not None):
        if kind not in _NUMBERS:
            raise ValueError(f"unknown kind of table: {kind!r}, one of {', '.join(KINDS)}")
        fdp_table_init(&self.table, <fdp_kind><int>_NUMBERS[kind], _seed(), heap)

    def __dealloc__(self):
        fdp_table_free(&self.table)

    @property
    def kind(self):
        return KINDS[self.table.kind]

    @property
    def nbytes(self):
        """Bytes held: rows and index."""
        return (self.table.room * <size_t>self.table.layout.row
                + (<size_t>self.table.mask + 1) * 4)

    def __len__(self):
        return self.table.count

    def __repr__(self):
        return f"<Table {self.kind}: {len(self)} entries>"

    def __getitem__(self, number):
        cdef int64_t i = number
        if i < 0:
            i += self.table.count
        if not 0 <= i < self.table.count:
            raise IndexError(f"{self.kind} table has {self.table.count} entries, not {number}")
        return _entry(self.table.kind, fdp_table_row(&self.table, <uint32_t>i))

    def __iter__(self):
        cdef uint32_t i = 0
        while i < self.table.count:
            yield _entry(self.table.kind, fdp_table_row(&self.table, i))
            i += 1

    def add(self, entry, uint32_t tag=0xffffffff):
        """Put one entry in; ``tag`` is the caller's number for it (default: its position)."""
        cdef fdp_row row
        cdef int64_t at = -1
        _fill_row(self.table.kind, entry, &row)
        if tag == NONE:
            at = fdp_table_find(&self.table, &row)
            tag = self.table.count if at < 0 else <uint32_t>at
        fdp_row_tag(self.table.layout, &row)[0] = tag
        _check(fdp_table_put(&self.table, &row))

    def find(self, entry):
        """The number of the entry with this entry's key, or -1."""
        cdef fdp_row row
        _fill_row(self.table.kind, entry, &row)
        return fdp_table_find(&self.table, &row)

    def tag(self, uint32_t number):
        """The tag of entry ``number``."""
        if number >= self.table.count:
            raise IndexError(number)
        return fdp_row_tag(self.table.layout, fdp_table_row(&self.table, number))[0]

    def discard(self, entry):
        """Take the entry with this entry's key out, if it is there; say whether it was."""
        cdef fdp_row row
        _fill_row(self.table.kind, entry, &row)
        return bool(fdp_table_remove(&self.table, &row))

    def merge(self, Table other not None, const uint32_t[:] tags=None):
        """Put every entry of ``other`` in; an entry tagged t gets ``tags[t]``."""
        cdef uint32_t i
        cdef fdp_row row
        if other.table.kind != self.table.kind:
            raise ValueError(f"a {other.kind} table does not fit into a {self.kind} table")
        for i in range(other.table.count):
            memcpy(&row, fdp_table_row(&other.table, i), other.table.layout.row)
            if tags is not None:
                if fdp_row_tag(self.table.layout, &row)[0] >= tags.shape[0]:
                    raise IndexError("a tag without a number in tags")
                fdp_row_tag(self.table.layout, &row)[0] = (
                    tags[fdp_row_tag(self.table.layout, &row)[0]])
            _check(fdp_table_put(&self.table, &row))

    def subtract(self, Table other not None):
        """Take every key of ``other`` out."""
        cdef uint32_t i
        if other.table.kind != self.table.kind:
            raise ValueError(f"a {other.kind} table does not fit into a {self.kind} table")
        for i in range(other.table.count):
            fdp_table_remove(&self.table, fdp_table_row(&other.table, i))

    def extend_neighbours(self, uint32_t device, const uint8_t[:, :] addresses,
                          const uint8_t[:, :] macs, const uint8_t[:] ways=None,
                          uint8_t way=0):
        """Permanent neighbours of one device from columns, tagged 0, 1, 2 ...

        With ``ways``, only rows whose byte there is ``way`` are taken; tags
        count all rows. The same holds for the other columns.
        """
        cdef fdp_row row
        cdef Py_ssize_t i, j, n = _same_length(self, 0, addresses, macs)
        cdef int family = _width_family(addresses), err = 0
        cdef bint some = _selects(ways, n)
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        with nogil:
            memset(&row, 0, sizeof(row))
            row.neighbour.ifindex = device
            row.neighbour.family = family
            row.neighbour.state = 0x80
            for i in range(n):
                if some and ways[i] != way:
                    continue
                for j in range(addresses.shape[1]):
                    row.neighbour.address[j] = addresses[i, j]
                for j in range(6):
                    row.neighbour.mac[j] = macs[i, j]
                row.neighbour.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        _check(err)

    def extend_fdb(self, uint32_t device, const uint8_t[:, :] macs,
                   const uint8_t[:, :] endpoints, const uint8_t[:] ways=None,
                   uint8_t way=0):
        """Permanent FDB entries of one device from columns, tagged 0, 1, 2 ..."""
        cdef fdp_row row
        cdef Py_ssize_t i, j, n = _same_length(self, 1, endpoints, macs)
        cdef int family = _width_family(endpoints), err = 0
        cdef bint some = _selects(ways, n)
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        with nogil:
            memset(&row, 0, sizeof(row))
            row.fdb.ifindex = device
            row.fdb.family = family
            row.fdb.state = 0x80
            for i in range(n):
                if some and ways[i] != way:
                    continue
                for j in range(endpoints.shape[1]):
                    row.fdb.endpoint[j] = endpoints[i, j]
                for j in range(6):
                    row.fdb.mac[j] = macs[i, j]
                row.fdb.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        _check(err)

    def extend_nexthops(self, uint32_t device, const uint32_t[:] ids,
                        const uint8_t[:, :] gateways, uint8_t protocol, bint onlink=True,
                        const uint8_t[:] ways=None, uint8_t way=0):
        """Nexthop objects on one device from columns, tagged 0, 1, 2 ..."""
        cdef fdp_row row
        cdef Py_ssize_t i, j, n = gateways.shape[0]
        cdef int family = _width_family(gateways), err = 0
        if self.table.kind != FDP_NEXTHOP or ids.shape[0] != n:
            raise ValueError("columns of different length, or not a nexthop table")
        cdef bint some = _selects(ways, n)
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        with nogil:
            memset(&row, 0, sizeof(row))
            row.nexthop.ifindex = device
            row.nexthop.family = family
            row.nexthop.onlink, row.nexthop.protocol = onlink, protocol
            for i in range(n):
                if some and ways[i] != way:
                    continue
                row.nexthop.id = ids[i]
                for j in range(gateways.shape[1]):
                    row.nexthop.gateway[j] = gateways[i, j]
                row.nexthop.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        _check(err)

    def extend_routes(self, const uint8_t[:, :] prefixes, const uint8_t[:] lengths,
                      uint8_t protocol, uint32_t[:] nexthops=None,
                      const uint8_t[:, :] gateways=None, uint32_t device=0, bint onlink=True,
                      uint32_t table=254, uint32_t metric=0, const uint8_t[:] ways=None,
                      uint8_t way=0):
        """Routes from columns, tagged 0, 1, 2 ...

        Either through ``nexthops`` (ids of nexthop objects) or through
        ``gateways`` on ``device``.
        """
        cdef fdp_row row
        cdef Py_ssize_t i, j, n = prefixes.shape[0]
        cdef int family = _width_family(prefixes), err = 0
        cdef int gateway_family = 0
        cdef bint objects = nexthops is not None
        if self.table.kind != FDP_ROUTE or lengths.shape[0] != n:
            raise ValueError("columns of different length, or not a route table")
        if objects == (gateways is not None):
            raise ValueError("routes lead to nexthops or to gateways: give one of them")
        if (nexthops.shape[0] if objects else gateways.shape[0]) != n:
            raise ValueError("columns of different length")
        if not objects:
            gateway_family = _width_family(gateways)
        cdef bint some = _selects(ways, n)
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        with nogil:
            memset(&row, 0, sizeof(row))
            row.route.family = family
            row.route.table = table
            row.route.metric = 1024 if family == INET6 and metric == 0 else metric
            row.route.type, row.route.protocol = UNICAST, protocol
            if not objects:
                row.route.gateway_family, row.route.onlink = gateway_family, onlink
                row.route.ifindex = device
            for i in range(n):
                if some and ways[i] != way:
                    continue
                row.route.length = lengths[i]
                for j in range(prefixes.shape[1]):
                    row.route.prefix[j] = prefixes[i, j]
                if objects:
                    row.route.nexthop = nexthops[i]
                else:
                    for j in range(gateways.shape[1]):
                        row.route.gateway[j] = gateways[i, j]
                row.route.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        _check(err)

    def encode(self, uint32_t number, int op, uint32_t seq=1):
        """The netlink message (bytes) that would add, replace or remove entry ``number``."""
        cdef uint8_t message[160]
        cdef size_t size
        if number >= self.table.count or op not in (ADD, REPLACE, REMOVE):
            raise IndexError(number)
        size = fdp_encode(<fdp_kind>self.table.kind, <fdp_op_kind>op,
                          fdp_table_row(&self.table, number), seq, 0, message)
        return <bytes>message[:size]


cdef Py_ssize_t _same_length(Table table, int kind, const uint8_t[:, :] addresses,
                             const uint8_t[:, :] macs) except -1:
    if table.table.kind != kind:
        raise ValueError(f"this is a {table.kind} table")
    if addresses.shape[0] != macs.shape[0]:
        raise ValueError(f"columns of different length: {addresses.shape[0]}, {macs.shape[0]}")
    if macs.shape[1] != 6:
        raise ValueError(f"a MAC has 6 bytes, the column {macs.shape[1]}")
    return addresses.shape[0]


cdef bint _selects(const uint8_t[:] ways, Py_ssize_t n) except -1:
    if ways is None:
        return False
    if ways.shape[0] != n:
        raise ValueError(f"columns of different length: {ways.shape[0]}, {n}")
    return True


cdef int _width_family(const uint8_t[:, :] addresses) except -1:
    if addresses.shape[1] == 4:
        return INET
    if addresses.shape[1] == 16:
        return INET6
    raise ValueError(f"an address has 4 or 16 bytes, the column {addresses.shape[1]}")


# ---- difference ------------------------------------------------------------

cdef class Diff:
    """What it takes to turn what the kernel holds into ``table``.

    ``added``, ``replaced``, ``removed`` and ``unchanged`` are counts of
    entries; ``conflicts`` counts the wanted ones whose place somebody else
    holds: they are left out of the operations. Operations are numbered:
    ``range(writes)`` add or replace, in the order of the table, and
    ``range(writes, len(diff))`` remove. The table must not be changed while
    its diff is in use.
    """

    cdef fdp_diff diff
    cdef readonly Table table
    cdef readonly double snapshot_seconds
    cdef readonly double diff_seconds

    def __cinit__(self, Table table not None):
        self.table = table
        _check(fdp_diff_begin(&self.diff, &table.table, heap))

    def __dealloc__(self):
        fdp_diff_free(&self.diff)

    @property
    def kind(self):
        return self.table.kind

    @property
    def writes(self):
        return self.diff.writes

    @property
    def added(self):
        return self.diff.adds

    @property
    def replaced(self):
        return self.diff.writes - self.diff.adds

    @property
    def removed(self):
        return self.diff.removes

    @property
    def unchanged(self):
        return self.diff.unchanged

    @property
    def observed(self):
        """Entries of ours and foreign ones that the kernel showed."""
        return self.diff.observed

    @property
    def ours(self):
        """Entries of ours that the kernel held."""
        return self.diff.observed - self.diff.foreign

    @property
    def frees_places(self):
        """Whether it removes FDB entries on nexthop groups.

        The kernel answers 0 to an attempt to replace one by an entry with a
        remote and changes nothing: another pass has to add it.
        """
        cdef uint32_t i
        if self.table.table.kind != FDP_FDB:
            return False
        for i in range(self.diff.writes, self.diff.writes + self.diff.removes):
            if (<fdp_row *>fdp_diff_old(&self.diff, self.diff.ops[i].old)).fdb.nexthop:
                return True
        return False

    def __len__(self):
        return self.diff.writes + self.diff.removes

    def operation(self, uint32_t number):
        """``(op, new, old)`` of operation ``number``: entries, or None where there is none."""
        cdef fdp_op op
        if number >= <uint32_t>len(self):
            raise IndexError(number)
        op = self.diff.ops[number]
        new = old = None
        if op.desired != NONE:
            new = _entry(self.table.table.kind, fdp_table_row(&self.table.table, op.desired))
        if op.old != NONE:
            old = _entry(self.table.table.kind, fdp_diff_old(&self.diff, op.old))
        return <int>op.kind, new, old

    def tag(self, uint32_t number):
        """The tag of the wanted entry of operation ``number``; -1 for a removal."""
        cdef fdp_op op
        if number >= <uint32_t>len(self):
            raise IndexError(number)
        op = self.diff.ops[number]
        if op.desired == NONE:
            return -1
        return fdp_row_tag(self.table.table.layout,
                           fdp_table_row(&self.table.table, op.desired))[0]

    def conflicts(self):
        """``(wanted, foreign)`` for every wanted entry whose place somebody else holds."""
        cdef uint32_t at = fdp_diff_next_conflict(&self.diff, 0)
        cdef int64_t number
        found = []
        while at != NONE:
            raw = fdp_diff_old(&self.diff, at)
            number = fdp_table_find(&self.table.table, raw)
            found.append((_entry(self.table.table.kind,
                                 fdp_table_row(&self.table.table, <uint32_t>number)),
                          _entry(self.table.table.kind, raw)))
            at = fdp_diff_next_conflict(&self.diff, at + 1)
        return found

    def adopt(self, is_ours):
        """Replace what holds the place of a wanted entry after all.

        ``is_ours(tag, foreign)`` is asked for every conflict, with the wanted
        entry's tag; where it says yes, the conflict becomes a replacement.
        Returns how many did.
        """
        cdef uint32_t at = fdp_diff_next_conflict(&self.diff, 0)
        cdef int64_t number
        cdef uint32_t tag
        adopted = 0
        while at != NONE:
            raw = fdp_diff_old(&self.diff, at)
            number = fdp_table_find(&self.table.table, raw)
            tag = fdp_row_tag(self.table.table.layout,
                              fdp_table_row(&self.table.table, <uint32_t>number))[0]
            if is_ours(tag, _entry(self.table.table.kind, raw)):
                fdp_diff_adopt(&self.diff, at)
                adopted += 1
            at = fdp_diff_next_conflict(&self.diff, at + 1)
        if adopted:
            self._finish()
        return adopted

    cdef _finish(self):
        _check(fdp_diff_finish(&self.diff))


def diff_tables(Table desired not None, Table held not None):
    """The difference from one table in memory to another: ``held`` plays the kernel."""
    cdef Diff diff = Diff(desired)
    cdef int err
    if desired.table.kind != held.table.kind:
        raise ValueError(f"a {held.kind} table cannot become a {desired.kind} table")
    with nogil:
        err = fdp_diff_feed_many(&diff.diff, held.table.rows, held.table.layout.row, NULL,
                                 held.table.count)
    _check(err)
    diff._finish()
    return diff


# ---- netlink ---------------------------------------------------------------

cdef int _feed(void *context, const fdp_row *rows, const uint8_t *owners,
               uint32_t count) noexcept nogil:
    return fdp_diff_feed_many(<fdp_diff *>context, rows, sizeof(fdp_row), owners, count)


cdef int _collect(void *context, const fdp_row *rows, const uint8_t *owners,
                  uint32_t count) noexcept nogil:
    cdef fdp_table *into = <fdp_table *>context
    cdef fdp_row copy
    cdef uint32_t i
    cdef int err
    for i in range(count):
        memcpy(&copy, &rows[i], into.layout.row)
        fdp_row_tag(into.layout, &copy)[0] = owners[i]
        err = fdp_table_put(into, &copy)
        if err < 0:
            return err
    return 0


cdef int _fill_scope(object scope, fdp_scope *to) except -1:
    cdef fdp_prefix prefix
    memset(to, 0, sizeof(fdp_scope))
    to.kind = _NUMBERS[scope.kind]
    to.family, to.protocol = scope.family, scope.protocol
    to.exclusive, to.marked = bool(scope.exclusive), bool(scope.marked)
    to.type = scope.type
    to.ifindex = scope.device
    to.table = scope.table if scope.kind == "route" else 0
    to.id_first, to.id_last = scope.ids
    if scope.within:
        _read_prefix(scope.within, &prefix)
        memcpy(to.prefix, prefix.address, 16)
        to.length = prefix.length
    return 0


def dump_request(scope, uint32_t seq=1):
    """The netlink message (bytes) that asks the kernel for what is in a scope."""
    cdef uint8_t message[160]
    cdef fdp_scope raw
    _fill_scope(scope, &raw)
    return <bytes>message[:fdp_encode_dump(&raw, seq, message)]


cdef class Channel:
    """A NETLINK_ROUTE socket in the namespace of ``netns_fd`` (-1: the caller's).

    Everything that reads or writes the tables goes through one of these; the
    socket is opened on a thread of its own, so the caller's namespace never
    changes. ``rcvbuf`` (bytes) is for tests. Raises KernelError.
    """

    cdef fdp_socket sock
    cdef bint is_open

    def __cinit__(self, int netns_fd=-1, int rcvbuf=0):
        self.sock.rx = <uint8_t *>heap(NULL, FDP_RX_SIZE)
        self.sock.tx = <uint8_t *>heap(NULL, FDP_TX_SIZE)
        if self.sock.rx == NULL or self.sock.tx == NULL:
            raise MemoryError()
        cdef int fd
        with nogil:
            fd = fdp_open(netns_fd, rcvbuf)
        if fd < 0:
            raise kernel_error(-fd, "open a netlink socket")
        self.sock.fd = fd
        self.is_open = True

    def __dealloc__(self):
        self.close()
        heap(self.sock.rx, 0)
        heap(self.sock.tx, 0)

    def close(self):
        """Close the socket; a second time does nothing."""
        if self.is_open:
            close(self.sock.fd)
            self.is_open = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def fileno(self):
        """The socket's file descriptor. ValueError once it is closed."""
        self._require_open()
        return self.sock.fd

    @property
    def messages_sent(self):
        """Changes sent so far."""
        return self.sock.messages_sent

    @property
    def batches_sent(self):
        """Times that changes were handed to the kernel."""
        return self.sock.batches_sent

    @property
    def overruns(self):
        """Batches whose answers were lost."""
        return self.sock.overruns

    def _require_open(self):
        if not self.is_open:
            raise ValueError("the channel is closed")

    def diff(self, Table table not None, scopes, int attempts=10):
        """Read the kernel's tables in ``scopes`` and compare them with ``table``.

        A dump that the kernel calls interrupted is forgotten and repeated, at
        most ``attempts`` times (then DumpInterrupted). ``ip -j route show`` and
        its sisters, filtered in the kernel.
        """
        cdef Diff diff = Diff(table)
        cdef fdp_scope scope
        cdef int err = 0
        started = time.perf_counter()
        self._require_open()
        if attempts < 1:
            raise ValueError("at least one attempt is needed to read a table")
        self.sock.recv_ns = 0
        for _attempt in range(attempts):
            err = 0
            for one in scopes:
                if one.kind != table.kind:
                    raise ValueError(f"a scope of {one.kind} for a {table.kind} table")
                _fill_scope(one, &scope)
                with nogil:
                    err = fdp_dump(&self.sock, &scope, _feed, &diff.diff)
                if err:
                    break
            if err != -EINTR:
                break
            fdp_diff_restart(&diff.diff)
        _check(err)
        if err:
            raise kernel_error(-err, f"dump {table.kind} table", self._text())
        diff._finish()
        diff.snapshot_seconds = self.sock.recv_ns / 1e9
        diff.diff_seconds = time.perf_counter() - started - diff.snapshot_seconds
        return diff

    def read(self, kind, scopes, int attempts=10):
        """What the kernel holds in ``scopes``, as a Table; tags are 1 ours, 2 foreign, 3 yields."""
        cdef Table table = Table(kind)
        cdef fdp_scope scope
        cdef int err = 0
        self._require_open()
        if attempts < 1:
            raise ValueError("at least one attempt is needed to read a table")
        for _attempt in range(attempts):
            err = 0
            for one in scopes:
                _fill_scope(one, &scope)
                with nogil:
                    err = fdp_dump(&self.sock, &scope, _collect, &table.table)
                if err:
                    break
            if err != -EINTR:
                break
            table = Table(kind)
        _check(err)
        if err:
            raise kernel_error(-err, f"dump {kind} table", self._text())
        return table

    def get(self, scope, entry):
        """The kernel's entry with this entry's key, or None (neighbour, fdb, nexthop)."""
        cdef fdp_scope raw
        cdef fdp_row key
        cdef fdp_row row
        cdef int found
        self._require_open()
        if scope.kind == "route":
            raise ValueError("routes are asked for by address, not by key")
        _fill_scope(scope, &raw)
        _fill_row(raw.kind, entry, &key)
        with nogil:
            found = fdp_get(&self.sock, &raw, &key, &row)
        if found < 0:
            raise kernel_error(-found, f"get {scope.kind}", self._text())
        return _entry(raw.kind, <uint8_t *>&row) if found else None

    def _text(self):
        return (<bytes>self.sock.text).decode("utf-8", "replace")

    def apply(self, Diff diff not None, uint32_t start, uint32_t stop, int32_t[::1] results,
              uint8_t[::1] broken=None):
        """Carry out operations ``[start, stop)`` in batches; wait for all answers.

        ``results[i]`` becomes 0, a positive errno, or UNKNOWN, SKIPPED. A write
        whose tag is set in ``broken`` is skipped, one that fails sets it.
        Returns a list of ``(operation, errno, kernel's words)`` for the first
        failures. Raises NotPermitted when nothing may be written.
        """
        cdef fdp_apply_job job
        cdef fdp_complaint complaints[16]
        cdef int err
        cdef uint32_t i
        self._require_open()
        if stop > <uint32_t>len(diff) or start > stop or results.shape[0] < stop:
            raise IndexError(f"operations {start}:{stop} of {len(diff)}")
        if start == stop:
            return []
        memset(&job, 0, sizeof(job))
        job.desired, job.old, job.ops = diff.diff.desired, diff.diff.old, diff.diff.ops
        job.results = &results[0]
        if broken is not None and broken.shape[0]:
            job.broken, job.tags = &broken[0], <uint32_t>broken.shape[0]
        job.complaints, job.complaint_room = complaints, 16
        with nogil:
            err = fdp_apply(&self.sock, &job, start, stop)
        if err:
            raise kernel_error(-err, f"change {diff.kind} table", self._text())
        return [(complaints[i].op, complaints[i].error,
                 (<bytes>complaints[i].text).decode("utf-8", "replace"))
                for i in range(job.complaint_count)]


def is_benign(int op, int error):
    """Whether this errno means that the operation's end is already there (gone, say)."""
    return bool(fdp_benign(<fdp_op_kind>op, error))


def summarise(Diff diff not None, const int32_t[::1] results):
    """Counts of what became of a diff's operations.

    ``(added, replaced, removed, failed, unknown, skipped)``; a benign error
    counts as done, operations never tried count nowhere.
    """
    cdef uint32_t counts[4]
    cdef uint32_t failed = 0, unknown = 0, skipped = 0, i
    cdef fdp_op op
    if results.shape[0] < len(diff):
        raise IndexError("fewer results than operations")
    memset(counts, 0, sizeof(counts))
    for i in range(diff.diff.writes + diff.diff.removes):
        op = diff.diff.ops[i]
        if results[i] == 0 or (results[i] > 0
                               and fdp_benign(<fdp_op_kind>op.kind, results[i])):
            counts[op.kind & 3] += 1
        elif results[i] > 0:
            failed += 1
        elif results[i] == FDP_UNKNOWN:
            unknown += 1
        elif results[i] == FDP_SKIPPED:
            skipped += 1
    return counts[1], counts[2], counts[3], failed, unknown, skipped


def decode(bytes data not None, scope):
    """Every entry of a scope's kind in a buffer of netlink messages: ``[(owner, entry)]``.

    Owners are 1 ours, 2 foreign, 3 yields. ValueError where the buffer is no
    sequence of whole, well-formed messages.
    """
    cdef fdp_scope raw
    cdef fdp_message message
    cdef fdp_row row
    cdef const uint8_t *at = data
    cdef const uint8_t *end = at + len(data)
    cdef int more, owner
    _fill_scope(scope, &raw)
    found = []
    while True:
        more = fdp_next_message(&at, end, &message)
        if more == 0:
            return found
        owner = fdp_decode(&raw, &message, &row) if more > 0 else more
        if owner < 0:
            raise ValueError("malformed netlink message")
        if owner:
            found.append((owner, _entry(raw.kind, <uint8_t *>&row)))


include "_claims.pxi"
