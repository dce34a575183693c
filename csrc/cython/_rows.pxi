# How a table of peers makes its entries (csrc/rows.c); included by _core.pyx.


cdef class Recipe:
    """How one table of peers makes its entry of a claim.

    ``tunnel`` is the device of peers that are reached through the tunnel, ``direct`` that of those
    that are reached on the underlay; None: those have no entry. Gateways are the first address of
    the subnet through the tunnel (onlink), and the public address on the underlay. With ``base``
    nexthop objects have an id of this plus the low 28 bits of the subnet, and routes name them.
    ``map`` is the descriptor of the map that peers are in.
    """

    cdef fdp_recipe raw

    def __cinit__(self, str kind not None, int family, *, tunnel=None, direct=None,
                  uint8_t protocol=0, uint32_t base=0, uint32_t map=0):
        memset(&self.raw, 0, sizeof(self.raw))
        if family not in (4, 6):
            raise ValueError("family is 4 or 6")
        if kind == "fdb_any":
            raise ValueError("peers have one destination: they are in a table of kind fdb")
        self.raw.kind = _NUMBERS[kind]
        self.raw.family = INET if family == 4 else INET6
        self.raw.protocol, self.raw.base, self.raw.map = protocol, base, map
        self.raw.by_object, self.raw.table = base != 0, 254
        if tunnel is not None:
            self.raw.legs[<int>FDP_TUNNEL].used = True
            self.raw.legs[<int>FDP_TUNNEL].onlink = True
            self.raw.legs[<int>FDP_TUNNEL].ifindex = tunnel
        if direct is not None:
            self.raw.legs[<int>FDP_DIRECT].used = True
            self.raw.legs[<int>FDP_DIRECT].to_endpoint = True
            self.raw.legs[<int>FDP_DIRECT].ifindex = direct

    @property
    def kind(self):
        return KINDS[self.raw.kind]

    def table(self, Claims peers not None, const uint8_t[::1] ways=None):
        """Return the entries of ``peers``, tagged by their numbers. ``ways`` has a byte for each, 1
        for those that are reached directly; without it all are reached the same way."""
        if ways is not None and ways.shape[0] != peers.count:
            raise ValueError(f"columns of different length: {ways.shape[0]}, {peers.count}")
        return self._table(peers, &ways[0] if ways is not None and peers.count else NULL)

    cdef Table _table(self, Claims peers, const uint8_t *ways):
        cdef Table table = Table(KINDS[self.raw.kind])
        cdef int err
        if peers.inet != self.raw.family:
            raise ValueError("peers of the other family")
        if not peers.count:
            return table
        peers.exports += 1
        if peers.count < 64:
            err = fdp_fill_table(&self.raw, peers.rows, peers.count, ways, &table.table)
        else:
            with nogil:
                err = fdp_fill_table(&self.raw, peers.rows, peers.count, ways, &table.table)
        peers.exports -= 1
        _check(err)
        return table


cdef int _replace_rows(Table known, Table before, Table after, const uint32_t *places) except -1:
    """Take the rows of ``before`` out and put those of ``after`` in; one tagged t gets
    ``places[t]``."""
    cdef uint32_t i
    cdef fdp_row row
    cdef uint32_t *tag
    if not (before.table.count or after.table.count):
        return 0
    known._change()
    for i in range(before.table.count):
        fdp_table_remove(&known.table, fdp_table_row(&before.table, i))
    for i in range(after.table.count):
        memcpy(&row, fdp_table_row(&after.table, i), after.table.layout.row)
        tag = fdp_row_tag(known.table.layout, &row)
        tag[0] = places[tag[0]]
        _check(fdp_table_put(&known.table, &row))
    return 0
