# Packed tables (csrc/table.c); included by _core.pyx.

cdef int _take_row(int kind, object entry, fdp_row *row) except -1:
    """An entry in any form that callers have it in into a row. Raises ConfigError, which names the
    value that does not fit. What is in the table's own form already is read at once."""
    try:
        return _fill_row(kind, entry, row)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, FlannelDPError):
            raise
    from flannel_dp.tables.plain import plain_entry
    try:
        return _fill_row(kind, plain_entry(KINDS[kind], entry), row)
    except ConfigError as error:
        raise type(error)(f"this cannot be a {KINDS[kind]} entry: {_shown(entry)}: "
                          f"{error.message}", hint=error.hint) from error
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, FlannelDPError):
            raise
        raise ConfigError(f"this cannot be a {KINDS[kind]} entry: {_shown(entry)}: {error}",
                          hint="see flannel_dp.tables.entries") from error


cdef class Table:
    """A packed table of one kind: desired state, keyed as the kernel keys it.

    ``Table(kind)`` is empty; :meth:`add` takes entries (or tuples like them),
    the ``extend_*`` methods take columns: any two-dimensional buffer of bytes
    (n rows of 4 or 16 address bytes, 6 MAC bytes), strided ones included. An
    entry whose key is already there replaces the earlier one. Memory per entry
    is the row (40 to 96 bytes) and two to four index slots of four bytes.
    """

    cdef fdp_table table
    cdef fdp_table extra  # what a reader met and this table cannot hold, one row a key
    cdef int readers  # that have released the GIL
    cdef bint filling  # without the GIL: its rows may move
    cdef uint64_t changes  # so far: a Diff is of the table before the next one
    cdef object __weakref__

    def __cinit__(self, kind):
        if type(kind) is not str or kind not in _NUMBERS:
            raise ConfigError(f"unknown kind of table: {_shown(kind)}",
                              hint="kind: give one of " + ", ".join(KINDS))
        fdp_table_init(&self.table, <fdp_kind><int>_NUMBERS[kind], _seed(), heap)
        fdp_table_init(&self.extra, <fdp_kind><int>_NUMBERS[kind], _seed(), heap)

    def __dealloc__(self):
        fdp_table_free(&self.table)
        fdp_table_free(&self.extra)

    cdef int _change(self) except -1:
        """Count a change. Raises BufferError where another thread needs the rows as they are."""
        if self.filling or self.readers:
            raise BufferError("the table is in use by another thread")
        self.changes += 1
        return 0

    cdef int _look(self) except -1:
        if self.filling:
            raise BufferError("the table is in use by another thread")
        return 0

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
        self._look()
        if i < 0:
            i += self.table.count
        if not 0 <= i < self.table.count:
            raise IndexError(f"{self.kind} table has {self.table.count} entries, not {number}")
        return _entry(self.table.kind, fdp_table_row(&self.table, <uint32_t>i))

    def __iter__(self):
        cdef uint32_t i = 0
        while i < self.table.count:
            self._look()
            yield _entry(self.table.kind, fdp_table_row(&self.table, i))
            i += 1

    def add(self, entry, uint32_t tag=0xffffffff):
        """Put one entry in; ``tag`` is the caller's number for it (default: its position).

        Raises Unsupported for an entry of the kernel's that has more than a table
        holds (``other``; ``src_vni``, ``flags``, ``vlan`` and ``master`` where the kind is
        "fdb", all of which "fdb_any" holds): what could be written would not be that entry.
        ConfigError for one that cannot be one. A Diff of this table can be used no more
        (BufferError).
        """
        cdef fdp_row row
        cdef int64_t at = -1
        if self.table.kind != FDP_FDB_ANY:
            _require_plain(self.kind, entry)
        self._fill(entry, &row)
        if self.table.kind == FDP_FDB_ANY:
            _require_lasting(entry, &row.fdb_any)
        self._change()
        if tag == NONE:
            at = fdp_table_find(&self.table, &row)
            tag = self.table.count if at < 0 else <uint32_t>at
        fdp_row_tag(self.table.layout, &row)[0] = tag
        _check(fdp_table_put(&self.table, &row))

    cdef int _fill(self, object entry, fdp_row *row) except -1:
        """An entry into a row. Raises ConfigError, which names it."""
        return _take_row(self.table.kind, entry, row)

    def misfit(self):
        """Return what the kernel held and this table, read from it, cannot hold; or None.

        ``(entry, None)`` for an entry with more to it than the table has fields for,
        ``(entry, second)`` where one key had several values.
        """
        cdef int64_t at
        self._look()
        if not self.extra.count:
            return None
        row = fdp_table_row(&self.extra, 0)
        if fdp_row_misfits(<fdp_kind>self.table.kind, row):
            return _misfit(self.table.kind, row, NULL)
        at = fdp_table_find(&self.table, row)
        return _misfit(self.table.kind, row, fdp_table_row(&self.table, <uint32_t>at))

    def find(self, entry):
        """Return the number of the entry with this entry's key, or -1."""
        cdef fdp_row row
        self._fill(entry, &row)
        self._look()
        return fdp_table_find(&self.table, &row)

    def tag(self, uint32_t number):
        """Return the tag of entry ``number``."""
        self._look()
        if number >= self.table.count:
            raise IndexError(number)
        return fdp_row_tag(self.table.layout, fdp_table_row(&self.table, number))[0]

    def discard(self, entry):
        """Take the entry with this entry's key out, if it is there; say whether it was."""
        cdef fdp_row row
        self._fill(entry, &row)
        self._change()
        return bool(fdp_table_remove(&self.table, &row))

    def merge(self, Table other not None, const uint32_t[:] tags=None):
        """Put every entry of ``other`` in; an entry tagged t gets ``tags[t]``."""
        cdef uint32_t i
        cdef fdp_row row
        if other.table.kind != self.table.kind:
            raise ValueError(f"a {other.kind} table does not fit into a {self.kind} table")
        self._change()
        other._look()
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
        cdef fdp_row row
        if other.table.kind != self.table.kind:
            raise ValueError(f"a {other.kind} table does not fit into a {self.kind} table")
        self._change()
        other._look()
        if other is self:
            while self.table.count:
                memcpy(&row, fdp_table_row(&self.table, self.table.count - 1),
                       self.table.layout.row)
                fdp_table_remove(&self.table, &row)
            return
        for i in range(other.table.count):
            fdp_table_remove(&self.table, fdp_table_row(&other.table, i))

    def matching(self, Table other not None):
        """Return a table of those entries whose key ``other``, a table of the same kind, has, too.
        """
        cdef Table found = Table(self.kind)
        cdef Table few = other if other.table.count < self.table.count else self
        cdef Table many = self if few is other else other
        cdef uint32_t i
        cdef int64_t at
        if other.table.kind != self.table.kind:
            raise ValueError(f"a {other.kind} table has no keys of a {self.kind} table")
        self._look()
        other._look()
        for i in range(few.table.count):
            at = fdp_table_find(&many.table, fdp_table_row(&few.table, i))
            if at >= 0:
                _check(fdp_table_put(&found.table, fdp_table_row(
                    &self.table, <uint32_t>at if many is self else i)))
        return found

    def take_mtus(self, Table other not None):
        """Give each route the MTU of the one in ``other`` with its key; those that ``other`` lacks
        keep theirs."""
        cdef Table concerned = self.matching(other)
        cdef uint32_t i
        cdef int64_t at
        cdef fdp_row *row
        if self.table.kind != FDP_ROUTE:
            raise ValueError("MTUs are those of routes")
        self._change()
        for i in range(concerned.table.count):
            row = <fdp_row *>fdp_table_row(&concerned.table, i)
            at = fdp_table_find(&other.table, row)
            row.route.mtu = (<fdp_row *>fdp_table_row(&other.table, <uint32_t>at)).route.mtu
            _check(fdp_table_put(&self.table, row))

    def extend_neighbours(self, uint32_t device, const uint8_t[:, :] addresses,
                          const uint8_t[:, :] macs, const uint8_t[:] ways=None,
                          uint8_t way=0):
        """Permanent neighbours of one device from columns, tagged 0, 1, 2 ...

        With ``ways``, only rows whose byte there is ``way`` are taken; tags
        count all rows. The same holds for the other columns.
        """
        cdef fdp_row row
        cdef Py_ssize_t i, n = _same_length(self, 0, addresses, macs)
        cdef int family = _width_family(addresses), err = 0
        cdef bint some = _selects(ways, n)
        self._change()
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        self.filling = True
        with nogil:
            memset(&row, 0, sizeof(row))
            row.neighbour.ifindex = device
            row.neighbour.family = family
            row.neighbour.state = 0x80
            for i in range(n):
                if some and ways[i] != way:
                    continue
                _copy_cell(row.neighbour.address, &addresses[i, 0], addresses.strides[1],
                           addresses.shape[1])
                _copy_cell(row.neighbour.mac, &macs[i, 0], macs.strides[1], 6)
                row.neighbour.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        self.filling = False
        _check(err)

    def extend_fdb(self, uint32_t device, const uint8_t[:, :] macs,
                   const uint8_t[:, :] endpoints, const uint8_t[:] ways=None,
                   uint8_t way=0):
        """Permanent FDB entries of one device from columns, tagged 0, 1, 2 ..."""
        cdef fdp_row row
        cdef Py_ssize_t i, n = _same_length(self, 1, endpoints, macs)
        cdef int family = _width_family(endpoints), err = 0
        cdef bint some = _selects(ways, n)
        self._change()
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        self.filling = True
        with nogil:
            memset(&row, 0, sizeof(row))
            row.fdb.ifindex = device
            row.fdb.family = family
            row.fdb.state = 0x80
            for i in range(n):
                if some and ways[i] != way:
                    continue
                _copy_cell(row.fdb.endpoint, &endpoints[i, 0], endpoints.strides[1],
                           endpoints.shape[1])
                _copy_cell(row.fdb.mac, &macs[i, 0], macs.strides[1], 6)
                row.fdb.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        self.filling = False
        _check(err)

    def extend_fdb_any(self, uint32_t device, const uint8_t[:, :] macs,
                       const uint8_t[:, :] endpoints, uint32_t[:] vnis=None,
                       uint32_t[:] src_vnis=None):
        """As ``extend_fdb``, for an fdb_any table; ``vnis`` and ``src_vnis`` may be 0."""
        cdef fdp_row row
        cdef fdp_remote remote
        cdef Py_ssize_t i, n = _same_length(self, FDP_FDB_ANY, endpoints, macs)
        cdef int err = 0
        cdef bint by_vni = vnis is not None, by_source = src_vnis is not None
        if (by_vni and vnis.shape[0] != n) or (by_source and src_vnis.shape[0] != n):
            raise ValueError("columns of different length")
        memset(&remote, 0, sizeof(remote))
        memset(&row, 0, sizeof(row))
        remote.family = _width_family(endpoints)
        row.fdb_any.ifindex, row.fdb_any.place, row.fdb_any.state = device, FDP_SELF, 0x80
        for i in range(n):
            if (vnis[i] if by_vni else 0) >> 24 or (src_vnis[i] if by_source else 0) >> 24:
                raise ValueError("a VNI is at most 16777215")
        self._change()
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        self.filling = True
        with nogil:
            for i in range(n):
                _copy_cell(remote.endpoint, &endpoints[i, 0], endpoints.strides[1],
                           endpoints.shape[1])
                _copy_cell(row.fdb_any.mac, &macs[i, 0], macs.strides[1], 6)
                remote.vni = vnis[i] if by_vni else 0
                row.fdb_any.src_vni = src_vnis[i] if by_source else 0
                fdp_fdb_settle(&row.fdb_any, &remote)
                row.fdb_any.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        self.filling = False
        _check(err)

    def extend_nexthops(self, uint32_t device, const uint32_t[:] ids,
                        const uint8_t[:, :] gateways, uint8_t protocol, bint onlink=True,
                        const uint8_t[:] ways=None, uint8_t way=0):
        """Nexthop objects on one device from columns, tagged 0, 1, 2 ..."""
        cdef fdp_row row
        cdef Py_ssize_t i, n = gateways.shape[0]
        cdef int family = _width_family(gateways), err = 0
        if self.table.kind != FDP_NEXTHOP or ids.shape[0] != n:
            raise ValueError("columns of different length, or not a nexthop table")
        cdef bint some = _selects(ways, n)
        self._change()
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        self.filling = True
        with nogil:
            memset(&row, 0, sizeof(row))
            row.nexthop.ifindex = device
            row.nexthop.family = family
            row.nexthop.onlink, row.nexthop.protocol = onlink, protocol
            for i in range(n):
                if some and ways[i] != way:
                    continue
                row.nexthop.id = ids[i]
                _copy_cell(row.nexthop.gateway, &gateways[i, 0], gateways.strides[1],
                           gateways.shape[1])
                row.nexthop.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        self.filling = False
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
        cdef Py_ssize_t i, n = prefixes.shape[0]
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
        self._change()
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        self.filling = True
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
                _copy_cell(row.route.prefix, &prefixes[i, 0], prefixes.strides[1],
                           prefixes.shape[1])
                if objects:
                    row.route.nexthop = nexthops[i]
                else:
                    _copy_cell(row.route.gateway, &gateways[i, 0], gateways.strides[1],
                               gateways.shape[1])
                row.route.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        self.filling = False
        _check(err)

    def extend_peers(self, uint32_t map, const uint8_t[:, :] prefixes,
                     const uint8_t[:] lengths, const uint8_t[:, :] macs,
                     const uint8_t[:, :] endpoints):
        """Peers in a BPF map (its descriptor) from columns, tagged 0, 1, 2 ..."""
        cdef fdp_row row
        cdef Py_ssize_t i, n = _same_length(self, 4, endpoints, macs)
        cdef int family = _width_family(prefixes), err = 0
        if prefixes.shape[0] != n or lengths.shape[0] != n:
            raise ValueError("columns of different length")
        self._change()
        _check(fdp_table_reserve(&self.table, self.table.count + <uint32_t>n))
        self.filling = True
        with nogil:
            memset(&row, 0, sizeof(row))
            row.peer.map, row.peer.family = map, family
            row.peer.endpoint_family = 2 if endpoints.shape[1] == 4 else 10
            for i in range(n):
                row.peer.length = lengths[i]
                _copy_cell(row.peer.prefix, &prefixes[i, 0], prefixes.strides[1],
                           prefixes.shape[1])
                _copy_cell(row.peer.endpoint, &endpoints[i, 0], endpoints.strides[1],
                           endpoints.shape[1])
                _copy_cell(row.peer.mac, &macs[i, 0], macs.strides[1], 6)
                row.peer.tag = <uint32_t>i
                err = fdp_table_put(&self.table, &row)
                if err < 0:
                    break
        self.filling = False
        _check(err)

    def encode(self, uint32_t number, int op, uint32_t seq=1):
        """Return the netlink message (bytes) that would add, replace or remove entry ``number``."""
        cdef uint8_t message[160]
        cdef size_t size
        self._look()
        if number >= self.table.count or op not in (ADD, REPLACE, REMOVE):
            raise IndexError(number)
        _by_netlink(self.kind)
        size = fdp_encode(<fdp_kind>self.table.kind, <fdp_op_kind>op,
                          fdp_table_row(&self.table, number), seq, 0, message)
        return <bytes>message[:size]

    def encoded_size(self, int op):
        """Return the bytes of the messages that would do this to every entry: all are encoded, and
        none is kept."""
        cdef uint8_t message[160]
        cdef size_t size = 0
        cdef uint32_t i
        if op not in (ADD, REPLACE, REMOVE):
            raise ValueError(f"{op} is no operation")
        _by_netlink(self.kind)
        self._look()
        self.readers += 1
        with nogil:
            for i in range(self.table.count):
                size += fdp_encode(<fdp_kind>self.table.kind, <fdp_op_kind>op,
                                   fdp_table_row(&self.table, i), i, 0, message)
        self.readers -= 1
        return size


cdef str _shown(object value):
    """A value in a message, whatever its repr does."""
    try:
        return repr(value)[:120].encode("utf-8", "backslashreplace").decode()
    except Exception:
        return f"a {type(value).__name__}"


cdef inline void _copy_cell(uint8_t *to, const uint8_t *cell, Py_ssize_t step,
                            Py_ssize_t width) noexcept nogil:
    """One address of a column; of a width that is known here, it is a move or two."""
    cdef Py_ssize_t j
    if step == 1 and width == 4:
        memcpy(to, cell, 4)
    elif step == 1 and width == 16:
        memcpy(to, cell, 16)
    else:
        for j in range(width):
            to[j] = cell[j * step]


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
