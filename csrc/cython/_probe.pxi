# Probes of peers (csrc/probe.c); included by _core.pyx.

PROBE_FRAME, PROBE_TUNNEL, PROBE_ECHO = FDP_PROBE_FRAME, FDP_PROBE_TUNNEL, FDP_PROBE_ECHO
PROBE_PATHS, PROBE_LARGEST = FDP_PROBE_PATHS, FDP_PROBE_LARGEST


cdef object _no_socket(int error):
    made = kernel_error(error, "open a socket for probes")
    if error == EPERM:
        made.hint = "run as root or grant CAP_NET_RAW"
    return made


cdef class ProbeOrigin:
    """Where probes leave this node and come back, and how: ``how`` is one of PROBE_*, ``source``
    this node's address in the overlay, ``ifindex`` and ``mac`` those of the device, ``local`` its
    address in the underlay, ``tunnel_port`` and ``vni`` those of VXLAN. Addresses and MACs are
    bytes. ValueError for what cannot be.
    """

    cdef fdp_probe like

    def __init__(self, int how, bytes source not None, *, uint32_t ifindex=0, bytes mac=bytes(6),
                 bytes local=b"", uint16_t tunnel_port=0, uint32_t vni=0):
        if how not in (PROBE_FRAME, PROBE_TUNNEL, PROBE_ECHO):
            raise ValueError(f"how is {how}: give one of the constants PROBE_*")
        if len(source) not in (4, 16) or len(mac) != 6:
            raise ValueError("source takes 4 or 16 bytes, and mac 6")
        if len(local) not in (4, 16) and (local or how == PROBE_TUNNEL):
            raise ValueError("local takes 4 or 16 bytes")
        self.like.how, self.like.ifindex = how, ifindex
        self.like.family = INET if len(source) == 4 else INET6
        self.like.endpoint_family = INET if len(local) == 4 else INET6
        self.like.tunnel_port, self.like.vni = tunnel_port, vni
        memcpy(self.like.mac, <const char *>mac, 6)
        memcpy(self.like.source, <const char *>source, len(source))
        memcpy(self.like.local, <const char *>local, len(local))

    cdef int put(self, fdp_probe *probe, bytes key, unsigned int paths) except -1:
        if len(key) != 16:
            raise ValueError("key takes 16 bytes")
        if not 1 <= paths <= PROBE_PATHS:
            raise ValueError("paths takes 1 to 16")
        probe.how, probe.ifindex, probe.family = self.like.how, self.like.ifindex, self.like.family
        probe.endpoint_family, probe.vni = self.like.endpoint_family, self.like.vni
        probe.tunnel_port, probe.paths = self.like.tunnel_port, paths
        memcpy(probe.mac, self.like.mac, 6)
        memcpy(probe.source, self.like.source, 16)
        memcpy(probe.local, self.like.local, 16)
        memcpy(probe.key, <const char *>key, 16)
        return 0


cdef class ProbeSocket:
    """Sends probes to many peers and matches the answers.

    ``peers`` are packed MACs (6 bytes, and 2 of padding) and addresses (16 bytes, IPv4 in the first
    4), 24 bytes each; ``rounds`` is how many probes each of them may get. Opened in the caller's
    network namespace. Raises KernelError, NotPermitted without CAP_NET_RAW, and BufferError while
    another thread sends or receives.
    """

    cdef fdp_probe probe
    cdef bytes peers
    cdef bint busy, closing  # without the GIL; and it is to be closed afterwards

    def __cinit__(self):
        fdp_probe_init(&self.probe)

    cdef int _borrow(self) except -1:
        if self.busy:
            raise BufferError("the socket is in use by another thread")
        self.busy = True
        return 0

    cdef void _give_back(self) noexcept:
        self.busy = False
        if self.closing:
            fdp_probe_close(&self.probe)

    def __init__(self, ProbeOrigin origin not None, bytes peers not None, uint32_t rounds, *,
                 bytes key not None, uint8_t ttl=2, unsigned int paths=1, uint8_t hops=1):
        cdef int err
        cdef size_t cells
        if self.probe.times != NULL:
            raise ValueError("the socket is open")
        if len(peers) % 24 or not 1 <= rounds <= 65535:
            raise ValueError("peers takes 24 bytes each, rounds 1 to 65535")
        if len(peers) // 24 > 1 << 24:
            raise ValueError("peers takes at most 16777216")
        origin.put(&self.probe, key, paths)
        self.peers = peers
        self.probe.ttl, self.probe.hops = ttl, hops
        self.probe.peers = <fdp_probe_peer *><const char *>peers
        cells = <size_t>rounds * <size_t>(len(peers) // 24) + 1
        self.probe.times = <uint32_t *>heap(NULL, cells * 4)
        if self.probe.times == NULL:
            raise MemoryError()
        memset(self.probe.times, 0, cells * 4)
        self.probe.count, self.probe.rounds = len(peers) // 24, rounds
        self._borrow()
        with nogil:
            err = fdp_probe_open(&self.probe)
        self._give_back()
        if err:
            raise _no_socket(-err)

    def __dealloc__(self):
        fdp_probe_close(&self.probe)
        if self.probe.times != NULL:
            heap(self.probe.times, 0)

    def __len__(self):
        return self.probe.count  # peers

    def close(self):
        """Close the sockets, or have the thread that waits for answers do so; the results stay."""
        if self.busy:
            self.closing = True
        else:
            fdp_probe_close(&self.probe)

    @property
    def port(self):
        """The UDP port that is reserved for answers, which tells this socket's probes."""
        return self.probe.port

    @property
    def sent(self):
        """How many probes were sent."""
        return self.probe.sent

    @property
    def answered(self):
        """How many were answered."""
        return self.probe.answered

    @property
    def strange(self):
        """How many packets came that looked like answers and were none."""
        return self.probe.strange

    def send(self, const uint32_t[::1] which not None, uint32_t round, uint32_t size,
             unsigned int path=0):
        """Send one probe of ``size`` bytes (the inner packet's) to each peer numbered in ``which``;
        returns how many could be sent before the socket was full. KernelError (EMSGSIZE: larger
        than the device's MTU; ENETDOWN)."""
        cdef int done
        cdef uint32_t count = which.shape[0]
        if not count:
            return 0
        self._borrow()
        with nogil:
            done = fdp_probe_send(&self.probe, &which[0], count, round, size, path)
        self._give_back()
        if done < 0:
            if done == -22:
                raise ValueError(f"round {round}, size {size}, path {path} or a peer's number is "
                                 "out of range, or the socket is closed")
            raise kernel_error(-done, f"send probes of {size} bytes")
        return done

    def receive(self, int wait_ms):
        """Wait for answers, at most ``wait_ms``; returns how many new ones came. KernelError."""
        cdef int found
        self._borrow()
        with nogil:
            found = fdp_probe_receive(&self.probe, wait_ms)
        self._give_back()
        if found < 0:
            raise kernel_error(-found, "receive answers to probes")
        return found

    def trip(self, uint32_t peer, uint32_t round):
        """Return the round trip of one probe in seconds; 0.0 where no answer came. IndexError."""
        if peer >= self.probe.count or round >= self.probe.rounds:
            raise IndexError(f"peer {peer}, round {round}")
        return self.probe.times[<size_t>peer * self.probe.rounds + round] / 1e7

    cdef int _check_rounds(self, const uint32_t[::1] rounds) except -1:
        cdef Py_ssize_t i
        for i in range(rounds.shape[0]):
            if rounds[i] >= self.probe.rounds:
                raise IndexError(f"round {rounds[i]}")
        return 0

    def trips(self, uint32_t peer, const uint32_t[::1] rounds not None):
        """Return the round trips of a peer in seconds, of those of ``rounds`` that were answered.
        IndexError."""
        cdef Py_ssize_t i
        cdef const uint32_t *times
        self._check_rounds(rounds)
        if peer >= self.probe.count:
            raise IndexError(f"peer {peer}")
        times = self.probe.times + <size_t>peer * self.probe.rounds
        return [times[rounds[i]] / 1e7 for i in range(rounds.shape[0]) if times[rounds[i]]]

    def counts(self, const uint32_t[::1] rounds not None):
        """Return how many of ``rounds`` each peer has answered: a list. IndexError."""
        cdef Py_ssize_t i
        cdef uint32_t peer, count
        cdef const uint32_t *times
        cdef list found = []
        self._check_rounds(rounds)
        for peer in range(self.probe.count):
            times = self.probe.times + <size_t>peer * self.probe.rounds
            count = 0
            for i in range(rounds.shape[0]):
                count += times[rounds[i]] != 0
            found.append(count)
        return found

    def is_complete(self, const uint32_t[::1] which not None, uint32_t round):
        """Return whether all peers numbered in ``which`` have answered a round. IndexError."""
        cdef Py_ssize_t i
        if round >= self.probe.rounds:
            raise IndexError(f"round {round}")
        for i in range(which.shape[0]):
            if which[i] >= self.probe.count:
                raise IndexError(f"peer {which[i]}")
            if not self.probe.times[<size_t>which[i] * self.probe.rounds + round]:
                return False
        return True

    def match(self, const uint8_t[::1] packet not None, uint64_t now):
        """Take ``packet`` as an answer that came at ``now`` (ns); return whether it is a new one.
        What ``receive`` does with each, for tests."""
        if not packet.shape[0]:
            return False
        return bool(fdp_probe_match(&self.probe, &packet[0], packet.shape[0], now))
