# Probes of peers (csrc/probe.c); included by _core.pyx.

PROBE_FRAME, PROBE_TUNNEL, PROBE_ECHO = FDP_PROBE_FRAME, FDP_PROBE_TUNNEL, FDP_PROBE_ECHO
PROBE_PATHS, PROBE_LARGEST = FDP_PROBE_PATHS, FDP_PROBE_LARGEST


cdef object _no_socket(int error):
    made = kernel_error(error, "open a socket for probes")
    if error == EPERM:
        made.hint = "run as root or grant CAP_NET_RAW"
    return made


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

    def __init__(self, int how, bytes source not None, bytes peers not None, uint32_t rounds, *,
                 bytes key not None, uint32_t ifindex=0, bytes mac=bytes(6), bytes local=b"",
                 uint16_t tunnel_port=0, uint32_t vni=0, uint8_t ttl=2, unsigned int paths=1,
                 uint8_t hops=1):
        cdef int err
        cdef size_t cells
        if self.probe.times != NULL:
            raise ValueError("the socket is open")
        if how not in (PROBE_FRAME, PROBE_TUNNEL, PROBE_ECHO):
            raise ValueError(f"how is {how}: give one of the constants PROBE_*")
        if len(source) not in (4, 16) or len(mac) != 6 or len(key) != 16:
            raise ValueError("source takes 4 or 16 bytes, mac 6 and key 16")
        if how == PROBE_TUNNEL and len(local) not in (4, 16):
            raise ValueError("local takes 4 or 16 bytes")
        if len(peers) % 24 or not 1 <= rounds <= 65535 or not 1 <= paths <= PROBE_PATHS:
            raise ValueError("peers takes 24 bytes each, rounds 1 to 65535, paths 1 to 16")
        if len(peers) // 24 > 1 << 24:
            raise ValueError("peers takes at most 16777216")
        self.peers = peers
        self.probe.how, self.probe.ifindex, self.probe.ttl = how, ifindex, ttl
        self.probe.hops = hops
        self.probe.family = INET if len(source) == 4 else INET6
        self.probe.endpoint_family = INET if len(local) == 4 else INET6
        self.probe.tunnel_port, self.probe.vni, self.probe.paths = tunnel_port, vni, paths
        memcpy(self.probe.mac, <const char *>mac, 6)
        memcpy(self.probe.source, <const char *>source, len(source))
        if len(local) in (4, 16):
            memcpy(self.probe.local, <const char *>local, len(local))
        memcpy(self.probe.key, <const char *>key, 16)
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

    def trips(self, uint32_t peer):
        """Return the round trips of a peer in seconds, of those that were answered. IndexError."""
        cdef uint32_t i
        cdef const uint32_t *times
        if peer >= self.probe.count:
            raise IndexError(f"peer {peer}")
        times = self.probe.times + <size_t>peer * self.probe.rounds
        return [times[i] / 1e7 for i in range(self.probe.rounds) if times[i]]

    def match(self, const uint8_t[::1] packet not None, uint64_t now):
        """Take ``packet`` as an answer that came at ``now`` (ns); return whether it is a new one.
        What ``receive`` does with each, for tests."""
        if not packet.shape[0]:
            return False
        return bool(fdp_probe_match(&self.probe, &packet[0], packet.shape[0], now))
