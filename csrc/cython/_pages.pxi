# Scopes, and dumps as they were received (csrc/channel.c); included by _core.pyx.

cdef enum:
    READERS = 1 << 20  # of a dump, more than there are threads


cdef str _kind_of(object scope):
    """Return the kind of table that a scope is of. ConfigError for what is none."""
    kind = getattr(scope, "kind", None)
    if type(kind) is not str or kind not in _NUMBERS:
        raise ConfigError(f"kind {_shown(kind)} of {_shown(scope)} is no table of the kernel",
                          hint="kind: give one of " + ", ".join(KINDS))
    return kind


cdef int _fill_scope(object scope, fdp_scope *to) except -1:
    """A scope as C has it. ConfigError for one that the kernel could not be asked about."""
    cdef str kind = _kind_of(scope)
    try:
        return _read_scope(scope, kind, to)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, FlannelDPError):
            raise
    from flannel_dp.tables.plain import plain_scope
    try:
        return _read_scope(plain_scope(scope), kind, to)
    except ConfigError as error:
        raise type(error)(f"this cannot be a {kind} scope: {_shown(scope)}: {error.message}",
                          hint=error.hint) from error
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, FlannelDPError):
            raise
        raise ConfigError(f"this cannot be a {kind} scope: {_shown(scope)}: {error}",
                          hint="see flannel_dp.tables.entries.Scope") from error


cdef int _read_scope(object scope, str kind, fdp_scope *to) except -1:
    cdef fdp_prefix prefix
    cdef object family = scope.family
    cdef bint fdb = kind in ("fdb", "fdb_any")
    if not fdb and family in (4, 6):  # as everywhere else in this library
        family = INET if family == 4 else INET6
    memset(to, 0, sizeof(fdp_scope))
    cdef str name = "fdb" if fdb else kind
    if family not in ((BRIDGE, BRIDGE) if fdb else (INET, INET6)):
        names = "AF_BRIDGE (7)" if fdb else "socket.AF_INET (2) or AF_INET6 (10)"
        raise ConfigError(f"family {_shown(family)} of {_shown(scope)} is not that of a {kind} "
                          "table", hint=f"family: give {names}, or use {name}_scope()")
    to.kind = _NUMBERS[kind]
    to.family, to.protocol = family, scope.protocol
    to.exclusive, to.marked = bool(scope.exclusive), bool(scope.marked)
    to.type = scope.type
    to.ifindex = scope.device
    to.table = scope.table if kind == "route" else 0
    if fdb:
        _read_fdb_scope(scope, kind, to)
    to.id_first, to.id_last = scope.ids
    if to.id_first > to.id_last:
        raise ConfigError(f"ids {_shown(scope.ids)} of {_shown(scope)} end before they begin",
                          hint="ids: give the first and the last id")
    if scope.within:
        if _read_prefix(scope.within, &prefix) != to.family:
            raise ConfigError(f"within {scope.within!r} is not of family {family}",
                              hint="within: give a prefix of the scope's family")
        memcpy(to.prefix, prefix.address, 16)
        to.length = prefix.length
    return 0


cdef int _by_netlink(str kind) except -1:
    if kind == "peer":
        raise ValueError("peers are in a BPF map, which netlink does not know")
    return 0


cdef class Pages:
    """One dump as it came from the kernel, not decoded yet: see ``Channel.fetch``."""

    cdef fdp_pages pages
    cdef int users  # that read it without the GIL; -1: one that fills it
    cdef readonly object scope
    cdef readonly double seconds

    cdef int _borrow(self, int most) except -1:
        """BufferError beside a thread that fills it; with ``most`` 0, beside one that reads it."""
        if not 0 <= self.users <= most:
            raise BufferError("the dump is in use by another thread")
        return 0

    def __cinit__(self, scope, size_t expected=0, size_t most=33554432):
        self.scope = scope
        self.pages.expected, self.pages.most = min(expected, most), most

    def __dealloc__(self):
        heap(self.pages.data, 0)

    @property
    def nbytes(self):
        """Bytes that were received and kept; 0 when there were too many."""
        return self.pages.used

    @property
    def room(self):
        """Bytes of memory that it has."""
        return self.pages.room

    @property
    def interrupted(self):
        """Whether the table changed meanwhile."""
        return self.pages.interrupted != 0

    def written(self, bytes protocols not None, devices=()):
        """Return the routes with one of ``protocols`` (a byte each), without those out of one of
        ``devices`` (ifindexes) alone: the payloads of their messages.

        ``ip route show table TABLE proto PROTOCOL``, from what was received.
        """
        cdef const uint8_t *wanted = protocols
        cdef tuple given = tuple(devices)
        cdef size_t count = <size_t>len(given), i
        cdef uint32_t left_out[8]
        if count > 8:
            raise ValueError("8 devices at most")
        for i in range(count):
            left_out[i] = given[i]
        self._borrow(READERS)
        self.users += 1
        try:
            return self._written(wanted, <size_t>len(protocols), left_out, count)
        finally:
            self.users -= 1

    cdef list _written(self, const uint8_t *wanted, size_t size, const uint32_t *left_out,
                       size_t count):
        cdef const uint8_t *at = self.pages.data
        cdef const uint8_t *end = at + self.pages.used
        cdef fdp_message message
        cdef list found = []
        cdef int more, state
        while True:
            with nogil:
                state = 0
                while not state:
                    more = fdp_next_message(&at, end, &message)
                    if more <= 0:
                        break
                    if message.seq == self.pages.seq:
                        state = fdp_route_is_written(&message, wanted, size, left_out, count)
            if more < 0 or state < 0:
                raise kernel_error(-(more if more < 0 else state), "read a dump of routes")
            if not more:
                return found
            found.append(<bytes>(<const char *>message.body)[:message.size])


def fetch_dump(int fd, uint32_t seq, scope, size_t expected=0, size_t most=33554432,
               Pages spare=None):
    """Receive one dump on a socket of the caller's, with a sequence number of its own.

    Of a dump of over ``most`` bytes nothing is kept (``nbytes`` is 0), and its rest is left in the
    socket, which cannot be used any more then. An ``interrupted`` one has to be repeated.
    ``spare`` is an earlier one that is of no more use: its memory is taken. Raises KernelError.
    """
    cdef Pages found = spare if spare is not None else Pages(scope, expected, most)
    cdef fdp_socket sock
    cdef fdp_scope raw
    cdef uint8_t request[160]
    cdef int err
    _by_netlink(_kind_of(scope))
    _fill_scope(scope, &raw)
    memset(&sock, 0, sizeof(sock))
    sock.fd, sock.seq, sock.tx = fd, seq - 1, request
    found._borrow(0)
    found.scope, found.pages.most, found.pages.stops = scope, most, 1
    found.users = -1
    with nogil:
        err = fdp_fetch(&sock, &raw, &found.pages, heap)
    found.users = 0
    found.seconds = sock.recv_ns / 1e9
    _check(err)
    if err and err != -E2BIG:
        raise kernel_error(-err, "dump tables")
    return found
