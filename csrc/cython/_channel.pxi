# The netlink socket (csrc/channel.c, csrc/kinds.c); included by _core.pyx.

cdef struct collected:
    fdp_table *table
    fdp_table *extra


cdef int _feed(void *context, const fdp_row *rows, const uint8_t *owners,
               uint32_t count) noexcept nogil:
    return fdp_diff_feed_many(<fdp_diff *>context, rows, sizeof(fdp_row), owners, count)


cdef bint _is_kernels(int kind, const fdp_row *row) noexcept nogil:
    """A route that the kernel or a router advertisement made: fe80::/64 is on every device,
    and several routers announce themselves."""
    return kind == FDP_ROUTE and row.route.protocol in (1, 2, 9)


cdef int _collect(void *context, const fdp_row *rows, const uint8_t *owners,
                  uint32_t count) noexcept nogil:
    cdef collected *to = <collected *>context
    cdef fdp_table *into = to.table
    cdef fdp_row copy
    cdef uint32_t i
    cdef int64_t at
    cdef int err
    for i in range(count):
        memcpy(&copy, &rows[i], into.layout.row)
        fdp_row_tag(into.layout, &copy)[0] = owners[i]
        if fdp_row_misfits(<fdp_kind>into.kind, &copy):
            err = fdp_table_put(to.extra, &copy)
            if err < 0:
                return err
        at = fdp_table_find(into, &copy) if into.layout.many else -1
        if (at >= 0 and fdp_rows_differ(into.layout, fdp_table_row(into, <uint32_t>at), &copy)
                and not (_is_kernels(into.kind, &copy)
                         and _is_kernels(into.kind, <fdp_row *>fdp_table_row(into, <uint32_t>at)))):
            err = fdp_table_put(to.extra, fdp_table_row(into, <uint32_t>at))
            if err < 0:
                return err
        err = fdp_table_put(into, &copy)
        if err < 0:
            return err
    return 0


def dump_request(scope, uint32_t seq=1):
    """Return the netlink message (bytes) that asks the kernel for what is in a scope."""
    cdef uint8_t message[160]
    cdef fdp_scope raw
    _by_netlink(_kind_of(scope))
    _fill_scope(scope, &raw)
    return <bytes>message[:fdp_encode_dump(&raw, seq, message)]


cdef class Channel:
    """A NETLINK_ROUTE socket in the namespace of ``netns_fd`` (-1: the caller's).

    Everything that reads or writes the tables goes through one of these; the
    socket is opened on a thread of its own, so the caller's namespace never
    changes. ``rcvbuf`` (bytes) is for tests. Raises KernelError, and BufferError while
    another thread waits for the kernel with it.
    """

    cdef fdp_socket sock
    cdef descriptor opened

    def __cinit__(self, int netns_fd=-1, int rcvbuf=0):
        self.opened.fd = -1
        self.sock.rx = <uint8_t *>heap(NULL, FDP_RX_SIZE)
        self.sock.tx = <uint8_t *>heap(NULL, FDP_TX_SIZE)
        if self.sock.rx == NULL or self.sock.tx == NULL:
            raise MemoryError()
        cdef int fd
        with nogil:
            fd = fdp_open(netns_fd, rcvbuf)
        if fd < 0:
            raise kernel_error(-fd, "open a netlink socket")
        self.sock.fd = self.opened.fd = fd

    def __dealloc__(self):
        self.close()
        heap(self.sock.rx, 0)
        heap(self.sock.tx, 0)

    def close(self):
        """Close the socket, or have the thread that waits for the kernel with it do so; a second
        time does nothing."""
        _close(&self.opened)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def fileno(self):
        """Return the socket's file descriptor. ValueError once it is closed."""
        self._require_open()
        return self.sock.fd

    @property
    def port(self):
        """What the kernel calls the author of this socket's changes (nlmsg_pid)."""
        self._require_open()
        return fdp_port(self.sock.fd)

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
        _require(&self.opened, "channel")

    def fetch(self, scopes, size_t expected=0, size_t most=33554432):
        """Receive the dumps of scopes and keep them for a later ``diff``: a list of Pages.

        For another thread: the GIL is released until the kernel has said it all.
        Each may have about ``expected`` bytes; one of over ``most`` is received and
        not kept. KernelError.
        """
        cdef list found = [Pages(scope, expected, most) for scope in scopes]
        cdef Py_ssize_t count = len(found), i
        cdef int err = 0
        cdef fdp_scope *raw = <fdp_scope *>heap(NULL, (count + 1) * sizeof(fdp_scope))
        cdef fdp_pages **pages = <fdp_pages **>heap(NULL, (count + 1) * sizeof(fdp_pages *))
        try:
            if raw == NULL or pages == NULL:
                raise MemoryError()
            self._require_open()
            for i in range(count):
                _by_netlink(_kind_of((<Pages>found[i]).scope))
                _fill_scope((<Pages>found[i]).scope, &raw[i])
                pages[i] = &(<Pages>found[i]).pages
            _borrow(&self.opened, "channel")
            with nogil:
                for i in range(count):
                    err = fdp_fetch(&self.sock, &raw[i], pages[i], heap)
                    if err:
                        break
            _give_back(&self.opened)
        finally:
            heap(raw, 0)
            heap(pages, 0)
        _check(err)
        if err:
            raise kernel_error(-err, "dump tables")
        return found

    cdef int _dump(self, fdp_scope *scope, Pages fetched, Diff diff) except? -1:
        """Take a dump that was received, or else the kernel's. 0 or negative errno."""
        cdef int err
        if fetched is not None and fetched.pages.used:
            diff._borrow()
            try:
                fetched._borrow(READERS)
                fetched.users += 1
                with nogil:
                    err = fdp_replay(&fetched.pages, scope, _feed, &diff.diff)
                fetched.users -= 1
            finally:
                diff._give_back()
            return err
        return self._ask(scope, _feed, &diff.diff, diff)

    cdef int _ask(self, fdp_scope *scope, fdp_sink sink, void *context,
                  Diff diff=None) except? -1:
        """Have the kernel dump a scope. 0 or negative errno."""
        cdef int err
        if diff is not None:
            diff._borrow()
        try:
            _borrow(&self.opened, "channel")
            with nogil:
                err = fdp_dump(&self.sock, scope, sink, context)
            _give_back(&self.opened)
        finally:
            if diff is not None:
                diff._give_back()
        return err

    cdef int _replay(self, Pages whole, list scopes, fdp_sink sink, void *context,
                     Diff diff=None) except? -1:
        """Take the routes in ``scopes`` from a dump of their whole table. 0 or negative errno."""
        cdef fdp_scope raw[FDP_SCOPES]
        cdef uint32_t count = 0
        cdef int err
        if len(scopes) > FDP_SCOPES:
            return -EINVAL
        for one in scopes:
            if one[:2] != whole.scope[:2] or one.table != whole.scope.table:
                raise ValueError(f"{one} is no part of {whole.scope}")
            _fill_scope(one, &raw[count])
            count += 1
        if diff is not None:
            diff._borrow()
        try:
            whole._borrow(READERS)
            whole.users += 1
            with nogil:
                err = fdp_replay_routes(&whole.pages, raw, count, sink, context)
            whole.users -= 1
        finally:
            if diff is not None:
                diff._give_back()
        return err

    def diff(self, Table table not None, scopes, int attempts=10, fetched=None,
             Pages whole=None):
        """Read the kernel's tables in ``scopes`` and compare them with ``table``.

        A dump that the kernel calls interrupted is forgotten and repeated, at
        most ``attempts`` times (then DumpInterrupted). ``ip -j route show`` and
        its sisters, filtered in the kernel. ``fetched(scope)`` returns Pages that
        were received before. ``whole`` is a dump of the routing table that all of
        ``scopes`` are in; where it does not say enough the kernel is asked.
        """
        cdef Diff diff = Diff(table)
        cdef fdp_scope scope
        cdef list asked_for = list(scopes)
        cdef int err = 0
        cdef double waited = 0.0
        started = time.perf_counter()
        self._require_open()
        if attempts < 1:
            raise ValueError("at least one attempt is needed to read a table")
        self.sock.recv_ns = 0
        if whole is not None:
            err = self._replay(whole, asked_for, _feed, &diff.diff, diff)
            if not err:
                attempts = 0
            else:
                diff._restart()
        for _attempt in range(attempts):
            err = 0
            for one in asked_for:
                if _kind_of(one) != table.kind:
                    raise ValueError(f"a scope of {one.kind} for a {table.kind} table")
                _fill_scope(one, &scope)
                asked = time.perf_counter()
                pages = fetched(one) if fetched else None
                waited += time.perf_counter() - asked
                err = self._dump(&scope, pages, diff)
                if err:
                    break
            if err != -EINTR:
                break
            fetched = None  # interrupted: ask again
            diff._restart()
        _check(err)
        if err:
            raise kernel_error(-err, f"dump {table.kind} table", self._text())
        diff._finish()
        diff.snapshot_seconds = self.sock.recv_ns / 1e9
        diff.diff_seconds = time.perf_counter() - started - waited - diff.snapshot_seconds
        return diff

    def read(self, kind, scopes, int attempts=10, Pages whole=None):
        """Return the kernel's entries in ``scopes`` as a Table; tags: 1 ours, 2 foreign, 3 yields,
        4 ours where it is as wanted.

        Of several values under one key the last is held, and ``misfit`` says so. ``whole`` as
        for ``diff``.
        """
        cdef Table table = Table(kind)
        cdef collected into
        cdef fdp_scope scope
        cdef list asked_for = list(scopes)
        cdef int err = 0
        self._require_open()
        if attempts < 1:
            raise ValueError("at least one attempt is needed to read a table")
        if whole is not None:
            into.table, into.extra = &table.table, &table.extra
            if not self._replay(whole, asked_for, _collect, &into):
                return table
            table = Table(kind)
        for _attempt in range(attempts):
            err = 0
            for one in asked_for:
                if _kind_of(one) != table.kind:
                    raise ValueError(f"a scope of {one.kind} for a {kind} table")
                _fill_scope(one, &scope)
                into.table, into.extra = &table.table, &table.extra
                err = self._ask(&scope, _collect, &into)
                if err:
                    break
            if err != -EINTR:
                break
            table = Table(kind)
        _check(err)
        if err:
            raise kernel_error(-err, f"dump {kind} table", self._text())
        return table

    def look_up(self, Table table not None, scope, Table others=None):
        """As ``diff``, by asking for the keys of ``table`` and ``others`` (of the same
        kind, none of them wanted) and for no other: not for routes.

        For FDBs that are too large to be dumped: that costs the square of their size.
        """
        cdef Diff diff = Diff(table)
        cdef fdp_scope raw
        cdef int err
        if _kind_of(scope) != table.kind or table.table.kind in (FDP_ROUTE, FDP_FDB_ANY):
            raise ValueError(f"{scope.kind} entries cannot be looked up for a {table.kind} table")
        _by_netlink(_kind_of(scope))
        self._require_open()
        _fill_scope(scope, &raw)
        started = time.perf_counter()
        self.sock.recv_ns = 0
        if others is not None:
            if others.table.kind != table.table.kind:
                raise ValueError(f"others is a {others.kind} table, not a {table.kind} table")
            others._look()
        diff._borrow()
        try:
            _borrow(&self.opened, "channel")
            if others is not None:
                others.readers += 1
            with nogil:
                err = fdp_look_up(&self.sock, &raw, &table.table, _feed, &diff.diff)
                if not err and others is not None:
                    err = fdp_look_up(&self.sock, &raw, &others.table, _feed, &diff.diff)
            if others is not None:
                others.readers -= 1
            _give_back(&self.opened)
        finally:
            diff._give_back()
        _check(err)
        if err:
            raise kernel_error(-err, f"look up {table.kind} entries", self._text())
        diff._finish()
        diff.snapshot_seconds = time.perf_counter() - started
        return diff

    def confirm(self, Diff diff not None, scopes, uint32_t most=1024):
        """Ask the kernel for each entry that ``diff`` would add; correct the diff.

        A dump of an FDB that is changed meanwhile misses entries that are
        there, and the kernel does not say so. Nothing is asked where over ``most``
        are missing, or where the dump showed nothing. Returns how many were there.
        """
        cdef fdp_scope scope
        cdef int there = 0
        if not 0 < diff.diff.adds <= most or not diff.diff.observed:
            return 0
        self._require_open()
        for one in list(scopes):
            if _kind_of(one) != diff.table.kind:
                raise ValueError(f"a scope of {one.kind} for a {diff.kind} table")
            _by_netlink(_kind_of(one))
            _fill_scope(one, &scope)
            diff._borrow()
            try:
                there += self._confirm(diff, &scope)
            finally:
                diff._give_back()
        if there:
            diff._finish()
        return there

    cdef int _confirm(self, Diff diff, fdp_scope *scope) except -1:
        cdef fdp_row row
        cdef uint32_t i
        cdef int found, there = 0
        for i in range(diff.diff.writes):
            if diff.diff.ops[i].kind != FDP_ADD:
                continue
            _borrow(&self.opened, "channel")
            with nogil:
                found = fdp_get(&self.sock, scope,
                                fdp_table_row(&diff.table.table, diff.diff.ops[i].desired), &row)
            _give_back(&self.opened)
            if found < 0:
                raise kernel_error(-found, f"get {diff.kind}", self._text())
            if found:
                _check(fdp_diff_feed(&diff.diff, &row, FDP_OURS))
                there += 1
        return there

    def get(self, scope, entry):
        """Return the kernel's entry with this entry's key, or None (neighbour, fdb, nexthop)."""
        cdef fdp_scope raw
        cdef fdp_row key
        cdef fdp_row row
        cdef int found
        self._require_open()
        if _kind_of(scope) in ("route", "fdb_any"):
            raise ValueError(f"{scope.kind}s are asked for by address, not by key")
        _by_netlink(_kind_of(scope))
        _fill_scope(scope, &raw)
        _take_row(raw.kind, entry, &key)
        _borrow(&self.opened, "channel")
        with nogil:
            found = fdp_get(&self.sock, &raw, &key, &row)
        _give_back(&self.opened)
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
        cdef fdp_job job
        cdef fdp_complaint complaints[16]
        cdef int err
        cdef uint32_t i
        self._require_open()
        diff._use()
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
        diff._borrow()
        try:
            _borrow(&self.opened, "channel")
            with nogil:
                err = fdp_apply(&self.sock, &job, start, stop)
            _give_back(&self.opened)
        finally:
            diff._give_back()
        if err:
            raise kernel_error(-err, f"change {diff.kind} table", self._text())
        return [(complaints[i].op, complaints[i].error,
                 (<bytes>complaints[i].text).decode("utf-8", "replace"))
                for i in range(job.complaint_count)]


def is_benign(int op, int error):
    """Return whether this errno means that the operation's end is already there (gone, say)."""
    return bool(fdp_benign(<fdp_op_kind>op, error))


def summarise(Diff diff not None, const int32_t[::1] results):
    """Counts of what became of a diff's operations.

    ``(added, replaced, removed, failed, unknown, skipped)``; a benign error
    counts as done, operations never tried count nowhere.
    """
    cdef uint32_t counts[7]
    if results.shape[0] < len(diff):
        raise IndexError("fewer results than operations")
    _tally(diff, &results[0] if results.shape[0] else NULL, counts)
    return counts[1], counts[2], counts[3], counts[4], counts[5], counts[6]


cdef void _tally(Diff diff, const int32_t *results, uint32_t *counts) noexcept:
    """Counts of operations: done, by FDP_ADD and so on (1 to 3), failed, unknown and skipped."""
    cdef uint32_t i
    cdef fdp_op op
    memset(counts, 0, 7 * sizeof(uint32_t))
    for i in range(diff.diff.writes + diff.diff.removes):
        op = diff.diff.ops[i]
        if results[i] == 0 or (results[i] > 0
                               and fdp_benign(<fdp_op_kind>op.kind, results[i])):
            counts[op.kind & 3] += 1
        elif results[i] > 0:
            counts[4] += 1
        elif results[i] == FDP_UNKNOWN:
            counts[5] += 1
        elif results[i] == FDP_SKIPPED:
            counts[6] += 1


def decode(bytes data not None, scope):
    """Every entry of a scope's kind in a buffer of netlink messages: ``[(owner, entry)]``.

    Owners are 1 ours, 2 foreign, 3 yields, 4 ours where as wanted. ValueError where the buffer
    is no sequence of whole, well-formed messages.
    """
    cdef fdp_scope raw
    cdef fdp_message message
    cdef fdp_row row
    cdef const uint8_t *at = data
    cdef const uint8_t *end = at + len(data)
    cdef int more, owner
    _by_netlink(_kind_of(scope))
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
