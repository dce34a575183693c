# The difference of two tables (csrc/table.c); included by _core.pyx.

cdef class Diff:
    """What it takes to turn what the kernel holds into ``table``.

    ``added``, ``replaced``, ``removed`` and ``unchanged`` are counts of
    entries; ``conflicts`` counts the wanted ones whose key a foreign entry
    holds: they are left out of the operations. Operations are numbered:
    ``range(writes)`` add or replace, in the order of the table, and
    ``range(writes, len(diff))`` remove. A diff whose
    table was changed since cannot be used: BufferError.
    """

    cdef fdp_diff diff
    cdef bint busy  # without the GIL
    cdef uint64_t changes  # of the table, when it was compared
    cdef readonly Table table
    cdef readonly double snapshot_seconds
    cdef readonly double diff_seconds

    def __cinit__(self, Table table not None):
        table._look()
        _check(fdp_diff_begin(&self.diff, &table.table, heap))
        self.table, self.changes = table, table.changes

    def __dealloc__(self):
        fdp_diff_free(&self.diff)

    cdef int _use(self) except -1:
        """Raise BufferError where the table is not the one that was compared any more, or another
        thread is at work with this."""
        if self.busy:
            raise BufferError("the difference is in use by another thread")
        return self._same()

    cdef int _borrow(self) except -1:
        """Begin to use it, and its table, without the GIL."""
        self._use()
        self.busy = True
        self.table.readers += 1
        return 0

    cdef void _give_back(self) noexcept:
        self.busy = False
        self.table.readers -= 1

    cdef int _same(self) except -1:
        if self.changes != self.table.changes or self.table.filling:
            raise BufferError(f"the {self.table.kind} table was changed after this Diff of it was "
                              "made: compare again")
        return 0

    @property
    def kind(self):
        """The kernel's table: "fdb" for a table of either kind of FDB entries."""
        return "fdb" if self.table.table.kind == FDP_FDB_ANY else self.table.kind

    @property
    def removes_first(self):
        """Whether the kernel takes some of what it adds only after what it removes."""
        return bool(self.diff.removes_first)

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
        self._use()
        for i in range(self.diff.writes, self.diff.writes + self.diff.removes):
            if (<fdp_row *>fdp_diff_old(&self.diff, self.diff.ops[i].old)).fdb.nexthop:
                return True
        return False

    def __len__(self):
        return self.diff.writes + self.diff.removes

    def operation(self, uint32_t number):
        """Return ``(op, new, old)`` of operation ``number``: entries, or None."""
        cdef fdp_op op
        self._use()
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
        """Return the tag of the wanted entry of operation ``number``; -1 for a removal."""
        cdef fdp_op op
        self._use()
        if number >= <uint32_t>len(self):
            raise IndexError(number)
        op = self.diff.ops[number]
        if op.desired == NONE:
            return -1
        return fdp_row_tag(self.table.table.layout,
                           fdp_table_row(&self.table.table, op.desired))[0]

    @property
    def conflicting(self):
        """Whether another owner holds the place of an entry that is wanted."""
        self._use()
        return fdp_diff_next_conflict(&self.diff, 0) != NONE

    def conflicts(self):
        """Return ``(wanted, foreign)`` for every wanted entry whose key a foreign entry holds."""
        self._borrow()  # making objects can run other code
        try:
            return self._conflicts()
        finally:
            self._give_back()

    cdef list _conflicts(self):
        cdef uint32_t at = fdp_diff_next_conflict(&self.diff, 0)
        cdef int64_t number
        cdef list found = []
        while at != NONE:
            raw = fdp_diff_old(&self.diff, at)
            number = fdp_table_find(&self.table.table, raw)
            found.append((_entry(self.table.table.kind,
                                 fdp_table_row(&self.table.table, <uint32_t>number)),
                          _entry(self.table.table.kind, raw)))
            at = fdp_diff_next_conflict(&self.diff, at + 1)
        return found

    def misfit(self):
        """Return what this would change although no table can hold it; None where there is nothing.

        ``(entry, None)`` for an entry with more to it than a table has fields for,
        ``(entry, second)`` where the kernel holds several values under its key.
        """
        cdef const uint8_t *row = NULL
        cdef const uint8_t *second = NULL
        self._use()
        cdef int found = fdp_diff_misfit(&self.diff, &row, &second)
        _check(found)
        return _misfit(self.table.table.kind, row, second) if found else None

    def adopt(self, is_ours):
        """Replace what holds the place of a wanted entry after all.

        ``is_ours(tag, foreign)`` is asked for every conflict, with the wanted
        entry's tag; where it says yes, the conflict becomes a replacement.
        Returns how many did.
        """
        cdef int64_t number
        cdef uint32_t tag, at
        adopted = 0
        self._use()
        at = fdp_diff_next_conflict(&self.diff, 0)
        while at != NONE:
            raw = fdp_diff_old(&self.diff, at)
            number = fdp_table_find(&self.table.table, raw)
            tag = fdp_row_tag(self.table.table.layout,
                              fdp_table_row(&self.table.table, <uint32_t>number))[0]
            wanted = is_ours(tag, _entry(self.table.table.kind, raw))
            self._use()  # it is the caller's code that was called
            if wanted:
                fdp_diff_adopt(&self.diff, at)
                adopted += 1
            at = fdp_diff_next_conflict(&self.diff, at + 1)
        if adopted:
            self._finish()
        return adopted

    cdef int _finish(self) except -1:
        self._use()
        return _check(fdp_diff_finish(&self.diff))

    cdef int _restart(self) except -1:
        self._use()
        fdp_diff_restart(&self.diff)
        return 0


def diff_tables(Table desired not None, Table held not None):
    """Return the difference from one table in memory to another: ``held`` plays the kernel."""
    return _diff_of(desired, held)


cdef Diff _diff_of(Table desired, Table held):
    cdef Diff diff = Diff(desired)
    cdef int err
    if desired.table.kind != held.table.kind:
        raise ValueError(f"a {held.kind} table cannot become a {desired.kind} table")
    held._look()
    diff._borrow()
    held.readers += 1
    with nogil:
        err = fdp_diff_feed_many(&diff.diff, held.table.rows, held.table.layout.row, NULL,
                                 held.table.count)
    held.readers -= 1
    diff._give_back()
    _check(err)
    diff._finish()
    return diff
