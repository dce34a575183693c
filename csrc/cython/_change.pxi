# A small change of several tables, compared and written in one call; included by _core.pyx.

cdef enum:
    MOST_TABLES = 8
    MOST_TAGS = 1 << 24


cdef struct written_table:
    # A table on its way to the kernel.
    fdp_job job
    fdp_complaint complaints[16]
    uint32_t writes, all_ops
    int err


cdef class _Written:
    """The memory of ``write_change``."""

    cdef written_table tables[MOST_TABLES]
    cdef uint32_t count
    cdef int32_t *results
    cdef uint8_t *broken

    def __dealloc__(self):
        heap(self.results, 0)
        heap(self.broken, 0)

    cdef int _prepare(self, list diffs, uint32_t tags) except -1:
        cdef uint32_t ops = 0, i
        cdef Diff diff
        cdef written_table *table
        if len(diffs) > MOST_TABLES:
            raise ValueError(f"{len(diffs)} tables, {MOST_TABLES} at most")
        if tags > MOST_TAGS:
            raise ValueError(f"{tags} tags, {MOST_TAGS} at most")
        self.count = <uint32_t>len(diffs)
        for diff in diffs:
            ops += diff.diff.writes + diff.diff.removes
        self.results = <int32_t *>heap(NULL, (<size_t>ops + 1) * sizeof(int32_t))
        self.broken = <uint8_t *>heap(NULL, <size_t>tags + 1)
        if self.results == NULL or self.broken == NULL:
            raise MemoryError()
        memset(self.broken, 0, tags)
        for i in range(ops):
            self.results[i] = FDP_UNSENT
        ops = 0
        for i in range(self.count):
            diff = diffs[i]
            table = &self.tables[i]
            memset(&table.job, 0, sizeof(table.job))
            table.writes = diff.diff.writes
            table.all_ops = diff.diff.writes + diff.diff.removes
            table.job.desired, table.job.old = diff.diff.desired, diff.diff.old
            table.job.ops, table.job.results = diff.diff.ops, self.results + ops
            table.job.broken, table.job.tags = self.broken, tags
            table.job.complaints, table.job.complaint_room = table.complaints, 16
            ops += table.all_ops
        return 0

    cdef int _send(self, fdp_socket *sock) noexcept nogil:
        """Write in the order of the tables, then remove in the reverse; the number of the table
        that this ended at with an error, or -1."""
        cdef int i
        for i in range(<int>self.count):
            if self.tables[i].writes:
                self.tables[i].err = fdp_apply(sock, &self.tables[i].job, 0, self.tables[i].writes)
                if self.tables[i].err:
                    return i
        for i in range(<int>self.count - 1, -1, -1):
            if self.tables[i].all_ops > self.tables[i].writes:
                self.tables[i].err = fdp_apply(sock, &self.tables[i].job, self.tables[i].writes,
                                               self.tables[i].all_ops)
                if self.tables[i].err:
                    return i
        return -1

    cdef tuple _outcome(self, uint32_t number, Diff diff):
        """A table's results as an array, and the kernel's words about the first failures."""
        cdef written_table *table = &self.tables[number]
        cdef uint32_t i
        results = array("i", [table.job.results[i] for i in range(table.all_ops)])
        said = [(table.complaints[i].op, table.complaints[i].error,
                 (<bytes>table.complaints[i].text).decode("utf-8", "replace"))
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
    cdef _Written work = _Written()
    cdef Diff diff
    cdef Table new, old
    cdef list diffs = []
    cdef dict counts = {}
    cdef int stopped
    cdef bint failed = False
    channel._require_open()
    for new, old in zip(after, before):
        if new.table.count or old.table.count:
            diffs.append(diff_tables(new, old))
    work._prepare(diffs, tags)
    for diff in diffs:
        diff._use()  # a table may have been changed while the next was compared
    _borrow(&channel.opened, "channel")
    for diff in diffs:
        diff.busy = True
        diff.table.readers += 1
    with nogil:
        stopped = work._send(&channel.sock)
    for diff in diffs:
        diff._give_back()
    _give_back(&channel.opened)
    if stopped >= 0:
        diff = diffs[stopped]
        raise kernel_error(-work.tables[stopped].err, f"change {diff.kind} table", channel._text())
    for i, diff in enumerate(diffs):
        added, replaced, removed, *not_done = _summary(diff, work.tables[<uint32_t>i].job.results)
        failed = failed or any(not_done)
        counts[diff.kind] = {"added": added, "replaced": replaced, "removed": removed,
                             "unchanged": diff.diff.unchanged, "failed": sum(not_done)}
    if not failed:
        return counts, None
    return counts, [work._outcome(<uint32_t>i, diff) for i, diff in enumerate(diffs)]
