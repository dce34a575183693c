# Packed claims and their admission (csrc/claim.c); included by _core.pyx.

DEF_DETAILS = 1000  # so many rejections are described in full, the rest by their code
ACCEPTED, BAD_CLAIM, BAD_SUBNET = FDP_ACCEPTED, FDP_BAD_CLAIM, FDP_BAD_SUBNET
BAD_PUBLIC_IP, BAD_MAC = FDP_BAD_PUBLIC_IP, FDP_BAD_MAC
WRONG_BACKEND, WRONG_VNI = FDP_WRONG_BACKEND, FDP_WRONG_VNI


cdef class Claims:
    """Claims of one family (4 or 6), packed: 64 bytes each, and their names.

    Columns (``subnets``, ``lengths``, ``endpoints``, ``macs``) are buffers over
    the rows; while one is in use the claims cannot grow.
    """

    cdef fdp_claim *rows
    cdef uint8_t *names
    cdef uint32_t count, room
    cdef size_t names_used, names_room, names_dead
    cdef int exports
    cdef bint admitting  # without the GIL
    cdef uint64_t edits  # claims that came or went so far: a Roster knows their numbers
    cdef int inet
    cdef readonly dict details
    cdef readonly list orphans  # origins of leases without a subnet of either family
    cdef object __weakref__

    def __cinit__(self, int family):
        if family not in (4, 6):
            raise ValueError("family is 4 or 6")
        self.inet = INET if family == 4 else INET6
        self.details = {}
        self.orphans = []

    def __dealloc__(self):
        heap(self.rows, 0)
        heap(self.names, 0)

    @property
    def family(self):
        return 4 if self.inet == INET else 6

    @property
    def nbytes(self):
        return self.room * sizeof(fdp_claim) + self.names_room

    def __len__(self):
        return self.count

    cdef int _grow(self, uint32_t count, size_t names) except -1:
        cdef void *block
        if self.exports:
            raise BufferError("claims cannot grow while a column is in use")
        if count > self.room:
            block = heap(self.rows, count * sizeof(fdp_claim))
            if block == NULL:
                raise MemoryError()
            self.rows, self.room = <fdp_claim *>block, count
        if names > self.names_room:
            block = heap(self.names, names)
            if block == NULL:
                raise MemoryError()
            self.names, self.names_room = <uint8_t *>block, names
        return 0

    cdef fdp_claim *_append(self, Py_ssize_t name_size) except NULL:
        """A blank row with room for a name of this size, whose offset is set."""
        cdef size_t needed = self.names_used + 2 + name_size
        cdef uint32_t room = self.room
        cdef size_t names_room = self.names_room
        cdef uint16_t stored = <uint16_t>name_size
        if self.count == room:
            room = room + room // 2 + 8
        if needed > names_room:
            names_room = needed + needed // 2 + 64
        if needed > 0xfffffff0:
            raise MemoryError()
        self._grow(room, names_room)
        cdef fdp_claim *row = &self.rows[self.count]
        memset(row, 0, sizeof(fdp_claim))
        row.name, row.rival = <uint32_t>self.names_used, NONE
        memcpy(self.names + self.names_used, &stored, 2)
        self.names_used = needed
        self.count += 1
        self.edits += 1
        return row

    cdef int _read(self, object lease, uint32_t origin, str backend, object vni,
                   bint need_mac) except -1:
        """Parse one lease into a row. 0 where it has nothing for this family."""
        cdef str subnet, other, endpoint, name
        cdef object data
        cdef Py_ssize_t size, other_size = 0
        cdef const char *text
        cdef const char *other_text = b""
        cdef fdp_claim claim  # what reads it may call code of others, and a row must stay
        cdef tuple fields = _fields_of(lease)
        if self.inet == INET:
            subnet, other, endpoint, data = fields[0], fields[1], fields[2], fields[5]
        else:
            subnet, other, endpoint, data = fields[1], fields[0], fields[3], fields[6]
        name = fields[7]
        if not subnet:
            if not other:
                self.orphans.append(origin)
            return 0
        memset(&claim, 0, sizeof(claim))
        claim.origin = origin
        fault = _read_claim(&claim, self.inet, fields, subnet, endpoint, data, backend, vni,
                            need_mac)
        if name:
            text = PyUnicode_AsUTF8AndSize(name, &size)
        else:
            text = PyUnicode_AsUTF8AndSize(subnet if self.inet == INET else other, &size)
            other_text = PyUnicode_AsUTF8AndSize(other if self.inet == INET else subnet,
                                                 &other_size)
            if size and other_size:
                other_size += 1  # for the '&' between them
        if size + other_size > 0xffff:
            size, other_size = min(size, 255), 0
        cdef fdp_claim *row = self._append(size + other_size)
        claim.name, claim.rival = row.name, NONE
        row[0] = claim
        _write_name(self.names + claim.name + 2, text, size, other_text, other_size, not name)
        if fault is not None and len(self.details) < DEF_DETAILS:
            self.details[claim.name] = fault
        return 1

    def extend(self, leases, str backend not None, int64_t vni, bint need_mac):
        """Pack every lease that has a subnet of this family; ``origin`` counts all of them."""
        cdef uint32_t origin = 0
        cdef object stated = vni
        if _as_tuple is None:
            _load_fields()
        if isinstance(leases, list):  # their names are mostly made of subnets
            self._grow(self.count + <uint32_t>len(leases),
                       self.names_used + 20 * <size_t>len(leases))
        for lease in leases:
            self._read(lease, origin, backend, stated, need_mac)
            origin += 1

    def find_endpoint(self, bytes address not None):
        """Return numbers of the claims that were published with this public address."""
        cdef const uint8_t *raw = address
        cdef Py_ssize_t size = 4 if self.inet == INET else 16
        cdef uint32_t i
        if len(address) != size:
            raise ValueError("an address of the other family")
        return [i for i in range(self.count) if memcmp(self.rows[i].endpoint, raw, size) == 0]

    cdef fdp_claim *_at(self, uint32_t number) except NULL:
        if number >= self.count:
            raise IndexError(f"there are {self.count} claims, not {number}")
        return &self.rows[number]

    cdef int _change(self) except -1:
        if self.admitting:
            raise BufferError("the claims are in use by another thread")
        return 0

    def mark_own(self, uint32_t number):
        """Mark a claim as this node's own: it is accepted, and is no peer."""
        self._change()
        self._at(number).reason = FDP_OWN

    def name(self, uint32_t number):
        cdef uint8_t *at = self.names + self._at(number).name
        return (<bytes>at[2:self._name_size(number)]).decode("utf-8", "replace")

    def subnet(self, uint32_t number):
        cdef fdp_claim *row = self._at(number)
        return f"{_address_text(self.inet, row.subnet)}/{row.length}"

    def length(self, uint32_t number):
        """Return the subnet's prefix length."""
        return self._at(number).length

    def endpoint(self, uint32_t number):
        return _address_text(self.inet, self._at(number).endpoint)

    def mac(self, uint32_t number):
        return _mac_text(self._at(number).mac)

    def reason(self, uint32_t number):
        return self._at(number).reason

    def revision(self, uint32_t number):
        return self._at(number).revision

    def origin(self, uint32_t number):
        """Return where the claim stood in its source's list."""
        return self._at(number).origin

    def rival(self, uint32_t number):
        """Return the accepted claim (its number among those) that this one lost to, or -1."""
        cdef uint32_t rival = self._at(number).rival
        return -1 if rival == NONE else rival

    def is_winner(self, uint32_t number):
        """Return whether another claim lost to this one."""
        return bool(self._at(number).winner)

    @property
    def subnets(self):
        return _column(self, 0, 4 if self.inet == INET else 16)

    @property
    def endpoints(self):
        return _column(self, 16, 4 if self.inet == INET else 16)

    @property
    def macs(self):
        return _column(self, 32, 6)

    @property
    def lengths(self):
        return _column(self, 38, 0)

    def nexthop_ids(self, uint32_t base):
        """Return ids of nexthop objects: ``base`` plus the low 28 bits of the (IPv4) subnet."""
        ids = array("I", bytes(4 * self.count))
        if not self.count:
            return ids
        cdef uint32_t[::1] view = ids
        cdef uint32_t i
        cdef const uint8_t *at
        for i in range(min(self.count, <uint32_t>view.shape[0])):
            at = self.rows[i].subnet
            view[i] = base + ((<uint32_t>(at[0] & 15) << 24) | (<uint32_t>at[1] << 16)
                              | (<uint32_t>at[2] << 8) | at[3])
        return ids

    def ways(self, Table underlay not None, uint32_t uplink):
        """Return how each claim's endpoint is reached: a byte each, 1 direct, 0 not.

        ``underlay`` is the routing table as read, ``uplink`` the external
        interface's ifindex.
        """
        cdef uint32_t count = self.count
        cdef bytearray ways = bytearray(count)
        cdef uint8_t[::1] view
        cdef int err
        if underlay.table.kind != FDP_ROUTE:
            raise ValueError("the underlay is a route table")
        if count:
            view = ways
            underlay._look()
            underlay.readers += 1
            self.exports += 1
            with nogil:
                err = fdp_ways(&underlay.table, self.rows, count, self.inet, uplink, &view[0], heap)
            self.exports -= 1
            underlay.readers -= 1
            _check(err)
        return ways

    def find_subnet(self, str subnet not None):
        """Return the number of the claim to this very subnet, or -1. Reads every claim."""
        cdef fdp_prefix prefix
        cdef uint32_t i
        if _read_prefix(subnet, &prefix) != self.inet:
            return -1
        for i in range(self.count):
            if (self.rows[i].length == prefix.length
                    and memcmp(self.rows[i].subnet, prefix.address, 16) == 0):
                return i
        return -1

    def find_name(self, str name not None):
        """Return the number of the claim of this name, or -1. Reads every claim."""
        cdef Py_ssize_t size
        cdef const char *text = PyUnicode_AsUTF8AndSize(name, &size)
        cdef uint16_t stored
        cdef uint8_t *at
        cdef uint32_t i
        for i in range(self.count):
            at = self.names + self.rows[i].name
            memcpy(&stored, at, 2)
            if stored == size and memcmp(at + 2, text, size) == 0:
                return i
        return -1

    def lengths_in_use(self):
        """Return the set of subnet lengths. Reads every claim, a nanosecond each."""
        cdef uint8_t seen[129]
        cdef uint32_t i
        memset(seen, 0, sizeof(seen))
        self.exports += 1
        with nogil:
            for i in range(self.count):
                seen[self.rows[i].length] = 1
        self.exports -= 1
        return {length for length in range(129) if seen[length]}

    def detail(self, uint32_t number):
        """Return what is wrong with a rejected claim's text; "" where its reason says all."""
        return self.details.get(self._at(number).name, "")

    def take(self, Claims other not None, uint32_t number):
        """Append a copy of a claim of ``other``; its number here."""
        other._at(number)
        self._take(other, number)
        return self.count - 1

    cdef int _take(self, Claims other, uint32_t number) except -1:
        cdef fdp_claim copy = other.rows[number]  # `other` may be this one, and move
        cdef uint16_t size
        memcpy(&size, other.names + copy.name, 2)
        cdef fdp_claim *row = self._append(size)
        cdef uint32_t name = row.name
        row[0] = copy
        row.name = name
        memcpy(self.names + name + 2, other.names + copy.name + 2, size)
        if other.details:
            detail = other.details.get(copy.name)
            if detail is not None:
                self.details[name] = detail
        return 0

    cdef int _take_many(self, Claims other, const uint32_t *numbers, uint32_t count) except -1:
        """Append copies of many claims of another, which has room for them here."""
        cdef uint32_t i
        cdef uint16_t size
        cdef fdp_claim *row
        cdef const uint8_t *name
        if other.details:
            for i in range(count):
                self._take(other, numbers[i])
            return 0
        with nogil:
            for i in range(count):
                row = &self.rows[self.count]
                row[0] = other.rows[numbers[i]]
                name = other.names + row.name
                memcpy(&size, name, 2)
                row.name = <uint32_t>self.names_used
                memcpy(self.names + self.names_used, name, 2 + <size_t>size)
                self.names_used += 2 + <size_t>size
                self.count += 1
        return 0

    def swap_remove(self, uint32_t number):
        """Remove a claim; the last one takes its number."""
        self._at(number)
        if self.exports:
            raise BufferError("claims cannot change while a column is in use")
        cdef uint32_t name = self.rows[number].name
        self.names_dead += self._name_size(number)
        self.edits += 1
        self.count -= 1
        if number != self.count:
            self.rows[number] = self.rows[self.count]
        self.details.pop(name, None)
        if self.names_dead > 4096 and self.names_dead > self.names_used // 2:
            self._compact()

    cdef size_t _name_size(self, uint32_t number):
        cdef uint16_t size
        memcpy(&size, self.names + self.rows[number].name, 2)
        return <size_t>size + 2

    cdef int _compact(self) except -1:
        """Drop the names of claims that left."""
        cdef uint32_t i
        cdef size_t used = 0, size
        cdef uint8_t *names = <uint8_t *>heap(NULL, self.names_used)
        if names == NULL:
            raise MemoryError()
        for i in range(self.count):
            size = self._name_size(i)
            memcpy(names + used, self.names + self.rows[i].name, size)
            self.rows[i].name = <uint32_t>used
            used += size
        heap(self.names, 0)
        self.names, self.names_room = names, self.names_used
        self.names_used, self.names_dead = used, 0
        return 0

    def renumber_rival(self, uint32_t number, uint32_t now):
        """Claims that lost to accepted claim ``number`` lost to ``now``: it moved there."""
        cdef uint32_t i
        self._change()
        for i in range(self.count):
            if self.rows[i].rival == number:
                self.rows[i].rival = now

    def replace(self, uint32_t number, Claims other not None, uint32_t source):
        """Overwrite a claim by one of ``other`` of the same name, keeping its number."""
        cdef fdp_claim *row = self._at(number)
        cdef uint32_t name = row.name, theirs = other._at(source).name
        cdef uint8_t winner = row.winner
        self._change()
        memcpy(row, other._at(source), sizeof(fdp_claim))
        row.name, row.winner = name, winner
        detail = other.details.get(theirs)
        if detail is not None:
            self.details[name] = detail
        else:
            self.details.pop(name, None)

    def reopen(self):
        """Forget the results of an admission (not those of the text itself)."""
        cdef uint32_t i
        self._change()
        for i in range(self.count):
            if self.rows[i].reason >= FDP_OUTSIDE_NETWORK and self.rows[i].reason != FDP_OWN:
                self.rows[i].reason = FDP_ACCEPTED

    def admit(self, network, own_addresses, underlay, own_subnet="", own_mac="", need_mac=True,
              routes=(), no_hosts=(), pods=None, subnet_length=0, link_local=False):
        """``(accepted, rejected)``: see csrc/claim.h for the rules, ``Policy`` for what is given.

        Accepted claims come sorted by subnet.
        """
        return self.admit_by(Policy(self.family, network, own_addresses, underlay, own_subnet,
                                    own_mac, need_mac, routes, no_hosts, pods, subnet_length,
                                    link_local))

    def admit_by(self, Policy policy not None, int subnet_length=0):
        """``admit`` by a policy that was read before; ``subnet_length``: where it has none."""
        cdef fdp_policy raw = policy.raw
        cdef fdp_claims all_claims
        cdef uint32_t accepted_count = 0
        cdef uint32_t *order
        cdef int err
        cdef uint64_t seed = _seed()
        if raw.family != self.inet:
            raise ValueError("a policy of the other family")
        raw.subnet_length = raw.subnet_length or subnet_length
        order = <uint32_t *>heap(NULL, (<size_t>self.count + 1) * sizeof(uint32_t))
        if self.exports:
            heap(order, 0)
            raise BufferError("claims cannot be validated while a column is in use")
        self.exports += 1
        try:
            if order == NULL:
                raise MemoryError()
            all_claims.rows, all_claims.names = self.rows, self.names
            all_claims.count = self.count
            self.admitting = True
            with nogil:
                err = fdp_admit(&raw, &all_claims, seed, order, &accepted_count, heap)
            self.admitting = False
            _check(err)
            return self._split(order, accepted_count)
        finally:
            self.exports -= 1
            heap(order, 0)

    cdef _split(self, uint32_t *order, uint32_t accepted_count):
        """Return copies: the accepted claims in order, and the rejected ones."""
        cdef Claims accepted = Claims(self.family)
        cdef Claims rejected = Claims(self.family)
        cdef uint32_t *place = <uint32_t *>heap(NULL, (<size_t>self.count + 1) * 4)
        cdef uint32_t i
        if place == NULL:
            raise MemoryError()
        try:
            accepted._grow(accepted_count, self.names_used if accepted_count else 0)
            for i in range(accepted_count):
                place[order[i]] = i
            accepted._take_many(self, order, accepted_count)
            for i in range(self.count):
                if self.rows[i].reason != FDP_ACCEPTED and self.rows[i].reason != FDP_OWN:
                    rejected._take(self, i)
                    if self.rows[i].rival != NONE:
                        rejected.rows[rejected.count - 1].rival = place[self.rows[i].rival]
        finally:
            heap(place, 0)
        return accepted, rejected

    def rivals(self, uint32_t number, Table routes not None, const uint8_t[::1] lengths,
               uint32_t table=254, uint32_t metric=0):
        """Tags of the entries in ``routes`` that overlap this claim's subnet.

        ``routes`` may also be a table of peers, of the map ``table``. ``lengths`` are the
        prefix lengths in use there. Returns
        ``(same, others)``: the tag of the very same prefix or -1, and whether a
        wider or narrower one may overlap. Cost does not depend on the table,
        except where a narrower length is in use.
        """
        cdef int64_t same
        cdef uint32_t n = <uint32_t>lengths.shape[0]
        others = self._rivals(number, routes, &lengths[0] if n else NULL, n, table, metric, &same)
        return same, others

    cdef bint _rivals(self, uint32_t number, Table routes, const uint8_t *lengths, uint32_t count,
                      uint32_t table, uint32_t metric, int64_t *same) except -1:
        cdef fdp_claim *claim = self._at(number)
        cdef fdp_row key
        cdef int64_t at
        cdef bint others = False
        cdef uint32_t i
        cdef int length
        cdef bint mapped = routes.table.kind == FDP_PEER
        routes._look()
        same[0] = -1
        memset(&key, 0, sizeof(key))
        if mapped:
            key.peer.map, key.peer.family = table, self.inet
        else:
            key.route.family = self.inet
            key.route.table = table
            key.route.metric = 1024 if self.inet == INET6 and metric == 0 else metric
        for i in range(count):
            length = lengths[i]
            if length > claim.length:
                others = others or self._narrower(routes, claim)
                continue
            if mapped:
                fdp_mask(claim.subnet, length, key.peer.prefix)
                key.peer.length = length
            else:
                fdp_mask(claim.subnet, length, key.route.prefix)
                key.route.length = length
            at = fdp_table_find(&routes.table, &key)
            if at >= 0 and length == claim.length:
                same[0] = fdp_row_tag(routes.table.layout,
                                      fdp_table_row(&routes.table, <uint32_t>at))[0]
            elif at >= 0:
                others = True
        return others

    cdef bint _narrower(self, Table routes, fdp_claim *claim):
        cdef uint32_t i
        cdef fdp_row *row
        for i in range(routes.table.count):
            row = <fdp_row *>fdp_table_row(&routes.table, i)
            if routes.table.kind == FDP_PEER:
                if (row.peer.length > claim.length
                        and fdp_prefix_holds(claim.subnet, claim.length, row.peer.prefix)):
                    return True
            elif (row.route.length > claim.length
                    and fdp_prefix_holds(claim.subnet, claim.length, row.route.prefix)):
                return True
        return False
