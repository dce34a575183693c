# A small change of several tables, compared and written in one call; included by _core.pyx.

cdef enum:
    MOST_TABLES = 8
    MOST_TAGS = 1 << 24


cdef struct written_table:
    # A table on its way to the kernel.
    fdp_job job
    uint32_t writes, all_ops
    uint8_t removes_first
    int err


cdef int _send_tables(fdp_socket *sock, written_table *tables, int count) noexcept nogil:
    """Write in the order of the tables, then remove in the reverse; the number of the table
    that this ended at with an error, or -1. A table that has to be removed from first is."""
    cdef int i
    for i in range(count):
        if tables[i].removes_first:
            tables[i].err = fdp_apply(sock, &tables[i].job, tables[i].writes, tables[i].all_ops)
            if tables[i].err:
                return i
    for i in range(count):
        if tables[i].writes:
            tables[i].err = fdp_apply(sock, &tables[i].job, 0, tables[i].writes)
            if tables[i].err:
                return i
    for i in range(count - 1, -1, -1):
        if tables[i].all_ops > tables[i].writes and not tables[i].removes_first:
            tables[i].err = fdp_apply(sock, &tables[i].job, tables[i].writes, tables[i].all_ops)
            if tables[i].err:
                return i
    return -1


cdef class _Written:
    """The memory of ``write_change``."""

    cdef written_table tables[MOST_TABLES]
    cdef int count
    cdef void *block

    def __dealloc__(self):
        heap(self.block, 0)

    cdef int _prepare(self, list diffs, uint32_t tags) except -1:
        cdef uint32_t ops = 0
        cdef int i
        cdef Diff diff
        cdef written_table *table
        cdef fdp_complaint *complaints
        cdef int32_t *results
        cdef uint8_t *broken
        self.count = <int>len(diffs)
        if self.count > MOST_TABLES:
            raise ValueError(f"{self.count} tables, {MOST_TABLES} at most")
        if tags > MOST_TAGS:
            raise ValueError(f"{tags} tags, {MOST_TAGS} at most")
        for i in range(self.count):
            ops += <uint32_t>len(<Diff>diffs[i])
        self.block = heap(NULL, self.count * 16 * sizeof(fdp_complaint)
                          + <size_t>ops * sizeof(int32_t) + tags + 1)
        if self.block == NULL:
            raise MemoryError()
        complaints = <fdp_complaint *>self.block
        results = <int32_t *>(complaints + self.count * 16)
        broken = <uint8_t *>(results + ops)
        memset(broken, 0, tags)
        for i in range(<int>ops):
            results[i] = FDP_UNSENT
        for i in range(self.count):
            diff = diffs[i]
            table = &self.tables[i]  # all zero, as all memory of a new object
            table.writes = diff.diff.writes
            table.removes_first = diff.diff.removes_first
            table.all_ops = diff.diff.writes + diff.diff.removes
            table.job.desired, table.job.old = diff.diff.desired, diff.diff.old
            table.job.ops, table.job.results = diff.diff.ops, results
            table.job.broken, table.job.tags = broken, tags
            table.job.complaints, table.job.complaint_room = complaints + i * 16, 16
            results += table.all_ops
        return 0

    cdef tuple _outcome(self, int number, Diff diff):
        """A table's results as an array, and the kernel's words about the first failures."""
        cdef written_table *table = &self.tables[number]
        cdef uint32_t i
        results = array("i", [table.job.results[i] for i in range(table.all_ops)])
        said = [(table.job.complaints[i].op, table.job.complaints[i].error,
                 (<bytes>table.job.complaints[i].text).decode("utf-8", "replace"))
                for i in range(table.job.complaint_count)]
        return diff, results, tuple(said)


def write_change(Channel channel not None, list before not None, list after not None,
                 uint32_t tags):
    """Make the kernel's tables, which are as ``before``, as ``after``: lists of the same kinds.

    In order and in batches as ``Kernel.apply``, with the mask of broken peers for ``tags``
    different tags. Returns ``(counts, failed)``: of each table that has entries its counts
    (added, replaced, removed, unchanged, failed) by kind, and None, or, where an operation failed,
    ``(diff, results, words)`` of each of them. Raises NotPermitted and KernelError.
    """
    cdef _Written work
    cdef Diff diff
    cdef Table new, old
    cdef list diffs = []
    cdef dict counts = {}
    cdef uint32_t tally[7]
    cdef uint32_t not_done, failed = 0
    cdef int stopped, i
    channel._require_open()
    for i in range(<int>len(after)):
        new, old = after[i], before[i]
        if new is None or old is None:
            raise TypeError(f"table {i} is None")
        if new.table.count or old.table.count:
            diffs.append(_diff_of(new, old))
    if not diffs:
        return counts, None
    work = _Written()
    work._prepare(diffs, tags)
    for i in range(work.count):
        diff = diffs[i]
        diff._use()  # a table may have been changed while the next was compared
    _borrow(&channel.opened, "channel")
    for i in range(work.count):
        diff = diffs[i]
        diff.busy = True
        diff.table.readers += 1
    with nogil:
        stopped = _send_tables(&channel.sock, work.tables, work.count)
    for i in range(work.count):
        diff = diffs[i]
        diff._give_back()
    _give_back(&channel.opened)
    if stopped >= 0:
        diff = diffs[stopped]
        raise kernel_error(-work.tables[stopped].err, f"change {diff.kind} table", channel._text())
    for i in range(work.count):
        diff = diffs[i]
        _tally(diff, work.tables[i].job.results, tally)
        not_done = tally[4] + tally[5] + tally[6]
        failed += not_done
        counts[diff.kind] = {
            "added": tally[1], "replaced": tally[2], "removed": tally[3],
            "unchanged": diff.diff.unchanged, "failed": not_done}
    if not failed:
        return counts, None
    return counts, [work._outcome(i, diffs[i]) for i in range(work.count)]
