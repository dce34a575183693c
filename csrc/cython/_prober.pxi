# Peers that are probed again and again (csrc/prober.c); included by _core.pyx.

LIFE_NEW, LIFE_ALIVE = FDP_LIFE_NEW, FDP_LIFE_ALIVE
LIFE_LOSSY, LIFE_DEAD = FDP_LIFE_LOSSY, FDP_LIFE_DEAD
#: Upper bounds in seconds of the buckets of round trips; the last one has none.
TRIP_BOUNDS = tuple(fdp_prober_bounds[i] / 1e7 for i in range(FDP_PROBER_BUCKETS - 1))


cdef uint64_t _monotonic():
    return <uint64_t>time.monotonic_ns()


cdef class PeerProber:
    """Probes many peers, each once in ``interval`` seconds, and keeps what came of it.

    Peers are entries of a ``Table("peer")``; one without a MAC is not probed. ``packet`` is an
    AF_PACKET socket that was opened before (-1: open one). Some probes are of ``large`` bytes, the
    device's MTU (0: none), and where they are lost it is searched for how much the path takes; with
    ``narrow_is_well`` such a peer is not lossy. The interval is stretched where the thread would
    take more than the share ``most_used`` of a processor (0: it may). ``run_probers`` does the
    work. What is known may be read meanwhile; a change of the peers is a BufferError then, and
    ``close`` is done afterwards. Raises KernelError; NotPermitted without CAP_NET_RAW.
    """

    cdef fdp_prober prober
    cdef bint busy, closing  # without the GIL; and it is to be closed afterwards

    def __cinit__(self):
        fdp_prober_init(&self.prober, _seed(), heap)

    cdef int _change(self) except -1:
        if self.busy:
            raise BufferError("the prober is in use by another thread")
        return 0

    cdef void _give_back(self) noexcept:
        self.busy = False
        if self.closing:
            fdp_probe_close(&self.prober.probe)

    def __init__(self, ProbeOrigin origin not None, uint32_t size, *, bytes key not None,
                 unsigned int paths=8, double interval=1.0, int packet=-1, uint32_t large=0,
                 bint narrow_is_well=False, double most_used=0.0):
        cdef int err
        cdef fdp_probe *probe = &self.prober.probe
        if probe.receiver >= 0:
            raise ValueError("the prober is open")
        if origin.like.how == PROBE_ECHO:
            raise ValueError("give an origin of PROBE_FRAME or PROBE_TUNNEL")
        if not (52 if origin.like.family == INET else 72) <= size <= PROBE_LARGEST:
            raise ValueError("size takes 52 (IPv6: 72) to 9216")
        if large and not size <= large <= PROBE_LARGEST:
            raise ValueError("large takes size to 9216")
        origin.put(probe, key, paths)
        probe.ttl, probe.packet = 2, packet
        if not 0 <= most_used <= 1:
            raise ValueError("most_used takes 0 to 1")
        self.prober.size, self.prober.large = size, large
        self.prober.narrow_is_well = narrow_is_well
        self.prober.most_used = <uint32_t>(most_used * 1e6)
        self.set_interval(interval)
        self._change()
        self.busy = True
        with nogil:
            err = fdp_probe_open(probe)
        self._give_back()
        if err:
            raise _no_socket(-err)

    def __dealloc__(self):
        fdp_prober_free(&self.prober)

    def __len__(self):
        return self.prober.used

    def close(self):
        """Close the sockets; what is known of peers stays."""
        if self.busy:
            self.closing = True
        else:
            fdp_probe_close(&self.prober.probe)

    @property
    def interval(self):
        """Seconds between two probes of a peer, stretched where that is needed."""
        return fdp_prober_interval(&self.prober) / 1e9

    def set_interval(self, double seconds):
        """Set ``interval``, before it is stretched, to 0.05 to 3600 seconds. ValueError."""
        if not 0.05 <= seconds <= 3600:
            raise ValueError("interval takes 0.05 to 3600 seconds")
        self.prober.interval = <uint64_t>(seconds * 1e9)

    def set_large_rate(self, uint32_t rate):
        """Set how many bytes a second large probes may take."""
        self.prober.large_rate = rate

    @property
    def silent(self):
        """Whether no peer answers at all, which says something of this node."""
        return bool(self.prober.silent)

    @property
    def error(self):
        """The errno of the last sending, 0 where it went well."""
        return -self.prober.error

    @property
    def lives(self):
        """How many peers are new, alive, lossy and dead."""
        cdef int i
        return tuple([self.prober.lives[i] for i in range(4)])

    @property
    def totals(self):
        """Probes sent and answered so far, the answers by bucket of TRIP_BOUNDS (and one more),
        and the sum of their round trips in seconds."""
        cdef int i
        buckets = tuple([self.prober.trips[i] for i in range(FDP_PROBER_BUCKETS)])
        return self.prober.sent, self.prober.answered, buckets, self.prober.trip_sum / 1e7

    @property
    def strange(self):
        """How many packets looked like answers and were none, copies and late ones included."""
        return self.prober.probe.strange

    cdef int _peers_only(self, Table table) except -1:
        if table.table.kind != FDP_PEER:
            raise ValueError("peers are entries of a table of peers")
        table._look()
        return 0

    def put(self, Table peers not None, const uint8_t[:] ways=None, uint8_t way=0):
        """Add these peers, or change where they are. With ``ways``, those whose byte there, at
        their tag, is ``way``."""
        cdef uint32_t i
        cdef uint64_t now = _monotonic()
        cdef fdp_peer *row
        self._change()
        self._peers_only(peers)
        for i in range(peers.table.count):
            row = <fdp_peer *>fdp_table_row(&peers.table, i)
            if ways is None or (row.tag < ways.shape[0] and ways[row.tag] == way):
                _check(min(fdp_prober_put(&self.prober, row, now), 0))

    def keep(self, Table peers not None, const uint8_t[:] ways=None, uint8_t way=0):
        """Have exactly these peers: add those that are new, forget the others."""
        cdef uint32_t i
        cdef fdp_peer key
        self._change()
        for i in range(self.prober.high):
            self.prober.peers[i].mark = 0
        self.put(peers, ways, way)
        memset(&key, 0, sizeof(key))
        for i in range(self.prober.high):
            if self.prober.peers[i].used and not self.prober.peers[i].mark:
                self._key(i, &key)
                fdp_prober_remove(&self.prober, &key)

    def remove(self, Table peers not None):
        """Forget these peers; those that are not known are passed over."""
        cdef uint32_t i
        cdef fdp_peer key
        self._change()
        self._peers_only(peers)
        for i in range(peers.table.count):
            memcpy(&key, fdp_table_row(&peers.table, i), sizeof(key))
            key.map = 0
            fdp_prober_remove(&self.prober, &key)

    cdef int _key(self, uint32_t number, fdp_peer *key) except -1:
        memset(key, 0, sizeof(fdp_peer))
        key.family = self.prober.probe.family
        key.length = self.prober.peers[number].length
        memcpy(key.prefix, self.prober.peers[number].prefix, 16)
        return 0

    cdef fdp_prober_peer *_at(self, uint32_t number) except NULL:
        if number >= self.prober.high or not self.prober.peers[number].used:
            raise IndexError(f"there is no peer {number}")
        return &self.prober.peers[number]

    def set_mac(self, uint32_t number, bytes mac not None):
        """Set the MAC of a peer; with another one than before it is new again. IndexError."""
        self._change()
        self._at(number)
        if len(mac) != 6:
            raise ValueError("mac takes 6 bytes")
        fdp_prober_set_mac(&self.prober, number, <const uint8_t *><const char *>mac, _monotonic())

    def find(self, str subnet not None):
        """Return the number of the peer with this subnet, -1 where there is none. ValueError."""
        cdef fdp_prefix prefix
        cdef fdp_peer key
        if _read_prefix(subnet, &prefix) != self.prober.probe.family:
            return -1
        memset(&key, 0, sizeof(key))
        key.family, key.length = self.prober.probe.family, prefix.length
        memcpy(key.prefix, prefix.address, 16)
        return fdp_prober_find(&self.prober, &key)

    def numbers(self, int life=-1, uint32_t most=0xffffffff):
        """Return the numbers of at most ``most`` peers, of all or of those with this ``life``."""
        cdef uint32_t i
        found = []
        for i in range(self.prober.high):
            if len(found) >= most:
                break
            if self.prober.peers[i].used and life in (-1, self.prober.peers[i].life):
                found.append(i)
        return found

    def peer(self, uint32_t number):
        """Return what is known of a peer: its subnet, endpoint and MAC, its life, the smoothed
        round trip in seconds, the smoothed share that is lost, how many probes were sent and
        answered, the seconds since its last answer (-1: none yet), the source ports of which none
        is answered as bits, the round trips by bucket, whether large ones are lost, and the path
        MTU in bytes (0: not known). IndexError."""
        cdef fdp_prober_peer *one = self._at(number)
        cdef fdp_probe_peer *to = &self.prober.probe.peers[number]
        cdef int width = 4 if self.prober.probe.family == INET else 16
        cdef int i
        age = (_monotonic() - one.answered_at) / 1e9 if one.answered_at else -1.0
        prefix = address_text((<const char *>one.prefix)[:width])
        end = <bytes>(<const char *>to.address)[:4 if to.family == INET else 16]
        return (f"{prefix}/{one.length}", address_text(end),
                (<bytes>(<const char *>to.mac)[:6]).hex(":"), one.life, one.rtt / 1e7,
                one.loss / 65535, one.sent, one.answered, age, one.silent_paths,
                tuple([one.trips[i] for i in range(FDP_PROBER_BUCKETS)]), bool(one.fails),
                one.mtu or (one.takes if not one.fails else 0))

    def changes(self):
        """Return the peers whose life has changed since this was called last: number, the life
        that was told before, and the present one."""
        cdef uint32_t i
        cdef fdp_prober_peer *one
        found = []
        self._change()
        if not self.prober.changed:
            return found
        for i in range(self.prober.high):
            one = &self.prober.peers[i]
            if one.changed:
                one.changed = 0
                if one.used and one.life != one.told:
                    found.append((i, one.told, one.life))
                one.told = one.life
        self.prober.changed = 0
        return found

    # ---- path MTUs

    def note_mtu(self, uint32_t number, uint16_t mtu):
        """Take it as known how much the path of a peer takes, until it is measured. IndexError."""
        self._change()
        self._at(number).mtu = mtu

    def mtu_changes(self):
        """Return the numbers of the peers whose path MTU is not what it was when this was called
        last. That a path takes what the device does is a change where it took less."""
        cdef uint32_t i
        found = []
        self._change()
        if not self.prober.mtu_changed:
            return found
        for i in range(self.prober.high):
            if self.prober.peers[i].mtu_changed:
                self.prober.peers[i].mtu_changed = 0
                found.append(i)
        self.prober.mtu_changed = 0
        return found

    def narrow(self):
        """Return the numbers of the peers whose path takes less than ``large`` bytes."""
        cdef uint32_t i
        return [i for i in range(self.prober.high) if self.prober.peers[i].used
                and 0 < self.prober.peers[i].mtu < self.prober.large]


def run_probers(list probers not None, int wake, double seconds):
    """Have ``probers`` work until a life has changed, ``wake`` can be read, or for ``seconds``.
    Returns True where ``wake`` can be read. KernelError."""
    cdef fdp_prober *all[16]
    cdef unsigned int count = 0
    cdef int done
    cdef uint64_t end = _monotonic() + <uint64_t>(max(0.0, min(seconds, 1e6)) * 1e9)
    cdef tuple kept = tuple(probers)  # another thread may change the list
    if len(kept) > 16:
        raise ValueError("at most 16 probers")
    for one in kept:
        (<PeerProber?>one)._change()
    for one in kept:
        (<PeerProber>one).busy = True
        (<PeerProber>one).prober.silent_told = (<PeerProber>one).prober.silent
        all[count] = &(<PeerProber>one).prober
        count += 1
    with nogil:
        done = fdp_prober_run(all, count, wake, end)
    for one in kept:
        (<PeerProber>one)._give_back()
    if done < 0:
        raise kernel_error(-done, "wait for answers to probes")
    return done == 2
