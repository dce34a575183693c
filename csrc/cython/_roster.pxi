# The accepted peers of one family, and a change of a few of them; included by _core.pyx.

cdef extern from "Python.h":
    char *PyByteArray_AsString(object bytes) except NULL


@cython.nonecheck(True)
cdef class PeerChange:
    """A change of peers that can be made without asking what other claims make of it.

    ``old`` and ``new`` are the accepted leases concerned, before and after, ``rejected`` those of
    the newcomers that are rejected. ``numbers`` are the places of the new ones, ``gone`` those of
    the old ones that have no successor, the last one first.
    """

    cdef readonly Claims old, new, rejected
    cdef readonly list gone
    cdef uint32_t *places
    cdef uint32_t placed  # how many there are, and old ones with a successor
    cdef uint32_t renewed

    def __dealloc__(self):
        heap(self.places, 0)

    @property
    def numbers(self):
        return array("I", [self.places[i] for i in range(self.placed)])

    @property
    def renews(self):
        """Whether nothing of it is written: each lease is published as it was before."""
        cdef uint32_t i
        if self.old.count != self.new.count or self.gone:
            return False
        for i in range(self.new.count):
            if not _same_claim(&self.old.rows[i], &self.new.rows[i]):
                return False
        return True


cdef bint _same_claim(const fdp_claim *one, const fdp_claim *other) noexcept:
    return (memcmp(one.subnet, other.subnet, 16) == 0 and one.length == other.length
            and memcmp(one.endpoint, other.endpoint, 16) == 0
            and memcmp(one.mac, other.mac, 6) == 0)


@cython.nonecheck(True)
cdef class Roster:
    """The accepted peers of one family with all that finds one of them: by subnet in the table that
    has all peers, by MAC, by name.

    ``peers`` and ``refused`` are the accepted and the rejected claims, ``tables`` and ``recipes``
    the tables of the peers and what makes an entry of each, ``listed`` the number of the table that
    has all peers. ``macs`` is the number of the table that has all MACs, -1 where a table apart is
    kept for them, None where peers have none. ``own_name`` and ``own_subnet`` are those of this
    node's lease. A change is followed in two steps, as the paths of new peers may have to be asked
    for in between.
    """

    cdef readonly Claims peers, refused
    cdef readonly Policy policy
    cdef readonly set lengths
    cdef list tables, recipes
    cdef Table listed, macs
    cdef Recipe list_recipe, mac_recipe
    cdef bint macs_apart
    cdef uint8_t used[129]  # the lengths, as an array
    cdef uint32_t used_count
    cdef str own_name, own_subnet
    cdef fdp_names names
    cdef uint64_t edits  # of the peers, when their names were indexed

    def __init__(self, Claims peers not None, Claims refused not None, Policy policy not None,
                 list tables not None, list recipes not None, int listed, macs,
                 str own_name not None, str own_subnet not None):
        self.peers, self.refused, self.policy = peers, refused, policy
        self.tables, self.recipes = tables, recipes
        self.listed, self.list_recipe = tables[listed], recipes[listed]
        if macs is not None and macs >= 0:
            self.macs, self.mac_recipe = tables[macs], recipes[macs]
        elif macs is not None:
            self.macs_apart = True
        self.own_name, self.own_subnet = own_name, own_subnet
        self.lengths = set()
        for length in peers.lengths_in_use():
            self._note_length(length)
        self.names.key[0], self.names.key[1] = _seed(), _seed()

    def __dealloc__(self):
        fdp_names_free(&self.names, heap)

    cdef int _note_length(self, uint8_t length) except -1:
        cdef uint32_t i
        for i in range(self.used_count):
            if self.used[i] == length:
                return 0
        self.used[self.used_count] = length
        self.used_count += 1
        self.lengths.add(length)
        return 0

    # ---- finding

    cdef fdp_claims _raw(self) noexcept:
        cdef fdp_claims raw
        raw.rows, raw.names, raw.count = self.peers.rows, self.peers.names, self.peers.count
        return raw

    cdef int64_t _with_name(self, str name) except -2:
        """The number of the first peer of this name, or -1. All are indexed when it is first asked
        for."""
        cdef Py_ssize_t size
        cdef const char *text = PyUnicode_AsUTF8AndSize(name, &size)
        cdef fdp_claims raw = self._raw()
        if self.names.slots == NULL or self.edits != self.peers.edits:
            fdp_names_free(&self.names, heap)
            _check(fdp_names_build(&self.names, &raw, heap))
            self.edits = self.peers.edits
        if self.names.twice:
            return self.peers.find_name(name)
        return fdp_names_find(&self.names, &raw, text, size)

    cdef int64_t _at_prefix(self, const uint8_t *address, uint8_t length) except -2:
        """The number of the peer with this very subnet, or -1: none, or one without a lease."""
        cdef fdp_claim like
        cdef fdp_row key
        memset(&like, 0, sizeof(like))
        memcpy(like.subnet, address, 16)
        like.length = length
        # The key of a row is its subnet, whatever the peer's path.
        if not (fdp_make_row(&self.list_recipe.raw, &like, FDP_TUNNEL, 0, &key)
                or fdp_make_row(&self.list_recipe.raw, &like, FDP_DIRECT, 0, &key)):
            return -1
        return self._peer_at(self.listed, fdp_table_find(&self.listed.table, &key))

    cdef int64_t _peer_at(self, Table table, int64_t row) noexcept:
        """The number of the peer that a row is tagged with; -1 for an entry kept without a lease.
        """
        cdef uint32_t tag
        if row < 0:
            return -1
        tag = fdp_row_tag(table.table.layout, fdp_table_row(&table.table, <uint32_t>row))[0]
        return tag if tag < self.peers.count else -1

    cdef int64_t _with_mac(self, const fdp_claim *claim) except -2:
        """The number of the peer with the MAC of a claim, or -1."""
        cdef fdp_row key
        if self.macs_apart and self.macs is None:
            self.mac_recipe = Recipe("fdb", self.peers.family, tunnel=0, direct=0)
            self.macs = self.mac_recipe.table(self.peers)
        if self.macs is None:
            return -1
        if not fdp_make_row(&self.mac_recipe.raw, claim, FDP_TUNNEL, 0, &key):
            return -1
        return self._peer_at(self.macs, fdp_table_find(&self.macs.table, &key))

    cdef int64_t _find(self, object lease) except -2:
        """The number of an accepted lease, by its subnet and name, or by its key or name; or -1."""
        cdef fdp_prefix prefix
        cdef Py_ssize_t size
        cdef const char *text
        cdef int64_t number
        cdef str name = _label(lease)
        cdef bint is_key = isinstance(lease, str)
        cdef list subnets
        if is_key:
            subnets = name.replace("-", "/").split("&")
        else:
            subnets = [lease.subnet if self.peers.inet == INET else lease.ipv6_subnet]
        for subnet in subnets:
            text = PyUnicode_AsUTF8AndSize(subnet, &size)
            if fdp_parse_prefix(self.peers.inet, text, size, &prefix):
                continue  # a name and no key, or nothing for this family
            number = self._at_prefix(prefix.address, prefix.length)
            if number < 0:
                continue
            if (is_key and not self.refused.count) or self.peers.name(<uint32_t>number) == name:
                return number  # by its key, whatever name it goes by
        return self._with_name(name)

    # ---- following

    def concerns_own(self, Claims packed not None, removed):
        """Whether a change may say something new of this node itself, or says of it what is known:
        its subnet, an address or its lease's name is in it."""
        cdef uint32_t i, k
        cdef fdp_claim *claim
        cdef fdp_policy *policy = &self.policy.raw
        for i in range(packed.count):
            claim = &packed.rows[i]
            for k in range(policy.own_count):
                if memcmp(policy.own[k], claim.endpoint, 16) == 0:
                    return True
            if (policy.has_own_subnet and policy.own_subnet.length == claim.length
                    and memcmp(policy.own_subnet.address, claim.subnet, 16) == 0):
                return True
        if not self.own_name:
            return False
        if packed.count and packed.find_name(self.own_name) >= 0:
            return True
        for lease in removed:
            name = _label(lease)
            if name == self.own_name or (isinstance(lease, str) and self.own_subnet
                                         in name.replace("-", "/").split("&")):
                return True
        return False

    def follow(self, Claims packed not None, list added not None, removed,
               bint may_differ=False, int ordinary=0):
        """Return the PeerChange of leases that come (``added``, and ``packed`` from them) and go;
        None where other claims have a say, so that all have to be validated again.

        ``may_differ``: the length of an ordinary subnet is what most leases have. ``ordinary`` is
        that length where the policy has none.
        """
        cdef PeerChange change = PeerChange()
        cdef Claims accepted, rejected
        cdef set leaving = None
        cdef int64_t number
        cdef uint32_t i
        for lease in removed:
            number = self._find(lease)
            if number < 0:
                if self.refused.count:
                    return None  # it may be a refused one that has to be forgotten
                continue
            if self.peers.rows[number].winner:
                return None
            if leaving is None:
                leaving = set()
            leaving.add(number)
        if packed.count:
            accepted, rejected = packed.admit_by(self.policy, ordinary)
        else:
            accepted = rejected = packed
        for i in range(rejected.count):
            if self._with_name(rejected.name(i)) >= 0:
                return None  # a peer whose renewal is rejected is a peer no more
        if self.refused.count and not self._apart_from_refused(accepted, may_differ):
            return None
        change.new, change.rejected = accepted, rejected
        return change if self._place(change, added, leaving) else None

    cdef bint _apart_from_refused(self, Claims new, bint may_differ) except -1:
        cdef uint32_t i
        for i in range(new.count):
            if self.refused.find_name(new.name(i)) >= 0:
                return False
        # Another length may be the ordinary one now, which decides between claims.
        return not may_differ or len(self.lengths | new.lengths_in_use()
                                     | self.refused.lengths_in_use()) <= 1

    cdef bint _place(self, PeerChange change, list added, set leaving) except -1:
        """Give every new claim its number: that of the lease it renews, or the next free one. False
        where it meets other claims."""
        cdef Claims new = change.new, old = Claims(self.peers.family)
        cdef uint32_t free = self.peers.count, i
        cdef uint32_t table = self.list_recipe.raw.table
        cdef int64_t same = -1, holder
        cdef bint is_free
        if self.listed.table.kind == FDP_PEER:
            table = self.list_recipe.raw.map
        change.places = <uint32_t *>heap(NULL, (<size_t>new.count + 1) * sizeof(uint32_t))
        if change.places == NULL:
            raise MemoryError()
        change.placed = new.count
        memset(change.places, 0, <size_t>new.count * sizeof(uint32_t))
        for i in range(change.placed):
            if new.rows[i].winner:
                return False
            if new._rivals(i, self.listed, self.used, self.used_count, table, 0, &same):
                return False
            same = same if same < self.peers.count else -1
            if same >= 0:
                if (self.peers.rows[same].winner or (leaving and same in leaving)
                        or not _same_name(self.peers, <uint32_t>same, new, i)):
                    return False
            else:
                # A node that goes by its own name, with another subnet than before, is known.
                is_free = self._is_unknown(added[new.rows[i].origin])
                if not is_free:
                    return False
            holder = self._with_mac(&new.rows[i])
            if holder != -1 and holder != same:
                return False
            if same >= 0:
                old._take(self.peers, <uint32_t>same)
                change.renewed += 1
                change.places[i] = <uint32_t>same
            else:
                change.places[i] = free
                free += 1
        change.gone = sorted(leaving, reverse=True) if leaving else []
        for number in change.gone:
            old._take(self.peers, number)
        change.old = old
        return True

    cdef bint _is_unknown(self, object lease) except -1:
        """Whether no peer has the name that a node goes by, if that is not its subnet's."""
        cdef str name = lease.name
        return not name or name == lease.key or self._with_name(name) < 0

    def store(self, PeerChange change not None, bytearray ways, bytearray new_ways):
        """Make a change part of what is wanted; return the tables of the peers concerned before and
        after it, no tables where nothing is to be written.

        ``ways`` has the paths of all peers (a byte each, changed in place), ``new_ways`` those of
        the new ones; None where all are reached the same way.
        """
        cdef uint32_t n = change.new.count, i
        cdef list before = [], after = []
        cdef Table old, new
        cdef Recipe recipe
        cdef bytearray old_ways = None
        cdef bint writes = True
        self._fits(change, ways, new_ways)
        if ways is not None:
            old_ways = bytearray([ways[change.places[i]] for i in range(n)
                                  if change.places[i] < self.peers.count]
                                 + [ways[place] for place in change.gone])
        if change.renews and old_ways == new_ways:
            writes = False
        if writes:
            for i in range(<uint32_t>len(self.recipes)):
                recipe = self.recipes[i]
                before.append(recipe._table(change.old, _column_of(old_ways)))
                after.append(recipe._table(change.new, _column_of(new_ways)))
        for i in range(n):
            self._put(change, i, change.places[i], ways, new_ways)
        if writes:
            for i in range(<uint32_t>len(self.tables)):
                _replace_rows(self.tables[i], before[i], after[i], change.places)
            if self.macs_apart and self.macs is not None:
                old = self.mac_recipe._table(change.old, NULL)
                new = self.mac_recipe._table(change.new, NULL)
                _replace_rows(self.macs, old, new, change.places)
        for number in change.gone:
            self._remove(number, ways)
        return before, after

    cdef int _fits(self, PeerChange change, bytearray ways, bytearray new_ways) except -1:
        """Raise ValueError for a change that was not made of these peers as they are."""
        cdef uint32_t count = self.peers.count, n = change.new.count, i
        cdef bint fits = n == change.placed and (
            change.old.count == change.renewed + <uint32_t>len(change.gone))
        if fits:
            for i in range(n):
                fits = fits and change.places[i] <= count
                count += change.places[i] == count
        for number in change.gone:
            fits = fits and 0 <= number < count
            count -= 1
        if ways is not None:
            fits = fits and new_ways is not None and (
                <uint32_t>len(ways) == self.peers.count and <uint32_t>len(new_ways) == n)
        if not fits:
            raise ValueError("the change is of other peers")
        return 0

    cdef int _put(self, PeerChange change, uint32_t i, uint32_t place, bytearray ways,
                  bytearray new_ways) except -1:
        cdef fdp_claims raw
        if place < self.peers.count:
            self.peers.replace(place, change.new, i)
            if ways is not None:
                ways[place] = new_ways[i]
            return 0
        self.peers._take(change.new, i)
        self._note_length(self.peers.rows[place].length)
        if ways is not None:
            ways.append(new_ways[i])
        if self.names.slots != NULL and self.edits + 1 == self.peers.edits:
            raw = self._raw()
            _check(fdp_names_add(&self.names, &raw, place, heap))
            self.edits += 1
        return 0

    cdef int _remove(self, uint32_t number, bytearray ways) except -1:
        """Remove a peer; the last one takes its number."""
        cdef fdp_claims raw = self._raw()
        cdef uint32_t last = self.peers.count - 1, i
        self.peers._at(number)
        if (self.names.slots != NULL and not self.names.twice
                and self.edits == self.peers.edits):
            fdp_names_remove(&self.names, &raw, number, last)
            self.edits += 1
        self.peers.swap_remove(number)
        if self.refused.count:
            self.refused.renumber_rival(last, number)
        if ways is not None:
            way = ways.pop()
            if number < last:
                ways[number] = way
        if number == last:
            return 0
        for i in range(<uint32_t>len(self.tables)):
            self._tag(self.tables[i], self.recipes[i], number, ways)
        if self.macs_apart and self.macs is not None:
            self._tag(self.macs, self.mac_recipe, number, None)
        return 0

    cdef int _tag(self, Table table, Recipe recipe, uint32_t number, bytearray ways) except -1:
        """Tag the entry of a peer with the number that it has now."""
        cdef fdp_row row
        cdef fdp_way way = fdp_way_of(&recipe.raw, NULL, 0)
        if ways is not None:
            way = FDP_DIRECT if ways[number] else FDP_TUNNEL
        if fdp_make_row(&recipe.raw, &self.peers.rows[number], way, number, &row):
            table._change()
            _check(fdp_table_put(&table.table, &row))
        return 0


cdef str _label(object lease):
    """The name that a lease, or its key or name, is known by."""
    return lease if isinstance(lease, str) else lease.name or lease.key


cdef bint _same_name(Claims one, uint32_t number, Claims other, uint32_t place) noexcept:
    cdef uint8_t *name = one.names + one.rows[number].name
    cdef uint8_t *second = other.names + other.rows[place].name
    cdef uint16_t size
    memcpy(&size, name, 2)
    return memcmp(name, second, 2 + <size_t>size) == 0 if memcmp(name, second, 2) == 0 else False


cdef const uint8_t *_column_of(bytearray ways) except? NULL:
    return <const uint8_t *>PyByteArray_AsString(ways) if ways is not None and ways else NULL
