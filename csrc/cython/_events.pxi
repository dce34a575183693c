# What others change (csrc/events.c); included by _core.pyx.

cdef int _fill_filter(object given, fdp_filter *to) except -1:
    cdef fdp_prefix prefix
    cdef int family, six
    cdef tuple tunnels = tuple(given.tunnels), uplinks = tuple(given.uplinks)
    cdef tuple ports = tuple(given.ports)
    cdef Py_ssize_t i
    memset(to, 0, sizeof(fdp_filter))
    if len(tunnels) > 8 or len(uplinks) > 8 or len(ports) > 4:
        raise ValueError("a filter takes 8 devices of a kind and 4 ports")
    for i in range(len(tunnels)):
        to.tunnels[i] = tunnels[i]
    for i in range(len(uplinks)):
        to.uplinks[i] = uplinks[i]
    for i in range(len(ports)):
        to.ports[i] = ports[i]
    to.tunnel_count, to.uplink_count = <uint32_t>len(tunnels), <uint32_t>len(uplinks)
    to.port_count = <uint32_t>len(ports)
    to.programs = bool(given.programs)
    to.every_link, to.protocol = bool(given.every_link), given.protocol
    to.id_nibble = given.id_nibble
    for network in given.networks:
        family = _read_prefix(network, &prefix)
        six = family == INET6
        to.has[six], to.length[six] = 1, prefix.length
        memcpy(to.prefix[six], prefix.address, 16)
    return 0


cdef int _keep_message(void *context, const fdp_message *message) noexcept with gil:
    try:
        (<list>context).append((message.type, <bytes>message.body[:message.size], message.port))
        return 0
    except BaseException:
        return -ENOMEM


cdef class Authors:
    """The programs that touched a table, by the ports of their netlink sockets (``nlmsg_pid``)."""

    cdef Table touched
    cdef uint32_t ports[16]

    def __cinit__(self, Watched watched not None):
        self.touched = watched._touched
        memcpy(self.ports, watched.watched.ports, sizeof(self.ports))

    def port(self, entry):
        """Return the port that asked the kernel for its last change of the entry with this
        entry's key; 0 where the kernel named none, as of its own doing and of FDB entries."""
        cdef fdp_row row
        cdef int64_t at
        _fill_row(self.touched.table.kind, entry, &row)
        at = fdp_table_find(&self.touched.table, &row)
        if at < 0:
            return 0
        return fdp_touched_port(self.ports, fdp_row_tag(
            self.touched.table.layout, fdp_table_row(&self.touched.table, <uint32_t>at))[0])


cdef class Watched:
    """A table as it should be, and where the kernel may have come to differ from it.

    Events (``Events.read``) are compared with ``table``, as far as they are about one
    of ``scopes``; what differs is *touched*, until an event says that it does no
    longer. ``table`` may change meanwhile; its writer's own events must be read after
    each change, before the next one, or they look like another program's.
    """

    cdef readonly Table table
    cdef readonly tuple scopes
    cdef Table _touched
    cdef int users  # that read events without the GIL
    cdef fdp_scope *raw
    cdef fdp_watched watched

    def __cinit__(self, Table table not None, scopes):
        cdef Py_ssize_t i
        self.table, self.scopes = table, tuple(scopes)
        self._touched = Table(table.kind)
        self.raw = <fdp_scope *>heap(NULL, (len(self.scopes) + 1) * sizeof(fdp_scope))
        if self.raw == NULL:
            raise MemoryError()
        for i in range(len(self.scopes)):
            if _kind_of(self.scopes[i]) != table.kind:
                raise ValueError(f"a scope of {self.scopes[i].kind} for a {table.kind} table")
            _fill_scope(self.scopes[i], &self.raw[i])
        self._bind()

    cdef _bind(self):
        self.watched.desired, self.watched.touched = &self.table.table, &self._touched.table
        self.watched.scopes, self.watched.scope_count = self.raw, <uint32_t>len(self.scopes)

    def __dealloc__(self):
        heap(self.raw, 0)

    cdef int _use(self) except -1:
        if self.users:
            raise BufferError("the watched table is in use by another thread")
        return self.table._look()

    @property
    def kind(self):
        return self.table.kind

    @property
    def touched(self):
        """How many keys are touched."""
        return self._touched.table.count

    @property
    def events(self):
        """Events that were about this table, echoes of our own changes included."""
        return self.watched.events

    def touch(self, entry):
        """Take the entry with this entry's key for gone, as an event would."""
        cdef fdp_row row
        _take_row(self.table.table.kind, entry, &row)
        self._use()
        fdp_row_tag(self.table.table.layout, &row)[0] = 0
        _check(fdp_table_put(&self._touched.table, &row))

    def orphan(self, Watched nexthops not None):
        """Touch the routes of this table whose nexthop object is gone: IPv4 routes go with
        it, and the kernel sends no event (fib_table_flush in net/ipv4/fib_trie.c)."""
        if self.kind != "route" or nexthops.kind != "nexthop":
            raise ValueError("routes are orphaned by nexthops")
        self._use()
        nexthops._use()
        _check(fdp_watch_orphans(&nexthops.watched, &self.watched))

    def forget(self):
        """Forget all touched keys."""
        self._use()
        self._touched = Table(self.table.kind)
        self.watched.port_count = 0
        self._bind()

    def authors(self):
        """Return which programs touched the keys that are touched now; None where the kernel named
        no program. To be called before they are taken or forgotten, and as good as then
        afterwards."""
        self._use()
        return Authors(self) if self.watched.port_count else None

    def take(self):
        """Return what it takes to undo what touched this table: a Diff of those keys alone.

        Nothing is touched afterwards.
        """
        cdef Table wanted = Table(self.table.kind)
        cdef Diff diff
        cdef fdp_table *touched
        cdef uint8_t *row
        cdef uint32_t i, owner
        cdef int64_t at
        self._use()
        touched = &self._touched.table
        for i in range(touched.count):
            row = fdp_table_row(touched, i)
            at = fdp_table_find(&self.table.table, row)
            if at >= 0:
                _check(fdp_table_put(&wanted.table,
                                     fdp_table_row(&self.table.table, <uint32_t>at)))
        diff = Diff(wanted)
        for i in range(touched.count):
            row = fdp_table_row(touched, i)
            owner = fdp_touched_owner(fdp_row_tag(touched.layout, row)[0])
            if owner:
                _check(fdp_diff_feed(&diff.diff, row, <fdp_owner>owner))
        diff._finish()
        self.forget()
        return diff


cdef class Events:
    """A netlink socket in the namespace of ``netns_fd`` that receives changes.

    ``filter`` (EventFilter) is what the kernel lets through; ``rcvbuf`` is the room
    for what was not read yet, in bytes. ``ip monitor`` and ``bridge monitor``. Raises
    KernelError, and BufferError while another thread reads.
    """

    cdef descriptor opened
    cdef uint8_t *page

    def __cinit__(self, int netns_fd=-1, filter=None, int rcvbuf=33554432):
        cdef fdp_filter raw
        cdef int fd
        self.opened.fd = -1
        _fill_filter(filter or EventFilter(), &raw)
        self.page = <uint8_t *>heap(NULL, FDP_RX_SIZE)
        if self.page == NULL:
            raise MemoryError()
        with nogil:
            fd = fdp_events_open(netns_fd, rcvbuf, &raw)
        if fd < 0:
            raise kernel_error(-fd, "listen to the kernel's events")
        self.opened.fd = fd

    def __dealloc__(self):
        self.close()
        heap(self.page, 0)

    def close(self):
        """Close the socket, or have the thread that reads do so; a second time does nothing."""
        _close(&self.opened)

    def fileno(self):
        """Return the socket's file descriptor. ValueError once it is closed."""
        _require(&self.opened, "socket")
        return self.opened.fd

    def set_filter(self, filter not None):
        """Exchange the filter. No event is lost meanwhile."""
        cdef fdp_filter raw
        cdef int err
        _fill_filter(filter, &raw)
        err = fdp_events_filter(self.fileno(), &raw)
        if err:
            raise kernel_error(-err, "filter the kernel's events")

    def read(self, watched, int most=65536):
        """Compare what has come with ``watched`` tables; never waits.

        Returns ``(count, messages)``: how many events there were, and those about
        devices and addresses, as ``(type, body, port)``, the port of the netlink socket
        that asked for the change or 0. Raises Overrun when events were lost: anything may
        have changed.
        """
        cdef fdp_watched views[16]
        cdef list kept = []
        cdef tuple tables = tuple(watched)
        cdef uint32_t count = <uint32_t>len(tables), i
        cdef int done
        if count > 16:
            raise ValueError("too many tables to watch")
        for i in range(count):
            (<Watched?>tables[i])._use()
            views[i] = (<Watched>tables[i]).watched
        _borrow(&self.opened, "socket")
        for i in range(count):
            (<Watched>tables[i]).users += 1
            (<Watched>tables[i]).table.readers += 1
        with nogil:
            done = fdp_events_read(self.opened.fd, self.page, FDP_RX_SIZE, views, count, most,
                                   _keep_message, <void *>kept)
        for i in range(count):
            (<Watched>tables[i]).users -= 1
            (<Watched>tables[i]).table.readers -= 1
            (<Watched>tables[i]).watched.events = views[i].events
            (<Watched>tables[i]).watched.port_count = views[i].port_count
            memcpy((<Watched>tables[i]).watched.ports, views[i].ports, sizeof(views[i].ports))
        _give_back(&self.opened)
        _check(done)
        if done < 0:
            raise kernel_error(-done, "read the kernel's events")
        return done, kept
