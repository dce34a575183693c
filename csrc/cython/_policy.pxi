# What a node knows of itself when it validates claims (csrc/claim.h); included by _core.pyx.


cdef class Policy:
    """What a node knows of itself, read once for any number of admissions.

    ``family`` is 4 or 6, ``network`` the pod network, ``own_addresses`` (texts) belong to this
    node, ``underlay`` are prefixes it reaches directly and ``routes`` those of static
    routes, which only a narrower subnet overrules. ``no_hosts`` are addresses that no
    host can have (broadcast). ``pods`` is the first and the last address of pods where
    nodes have other ones of the network, ``subnet_length`` that of an ordinary subnet,
    and with ``link_local`` nodes may be published with IPv4 link-local addresses.
    """

    cdef fdp_policy raw
    cdef fdp_prefix *locals
    cdef uint8_t *known

    def __cinit__(self, int family, str network not None, own_addresses, underlay,
                  str own_subnet="", str own_mac="", bint need_mac=True, routes=(), no_hosts=(),
                  tuple pods=None, int subnet_length=0, bint link_local=False):
        memset(&self.raw, 0, sizeof(self.raw))
        self.raw.family = INET if family == 4 else INET6
        _read_prefix(network, &self.raw.network)
        if own_subnet:
            self.raw.has_own_subnet = True
            _read_prefix(own_subnet, &self.raw.own_subnet)
        if own_mac:
            self.raw.has_own_mac = True
            _read_mac(own_mac, self.raw.own_mac)
        self.raw.need_mac, self.raw.link_local = need_mac, link_local
        self.raw.subnet_length = subnet_length
        if pods is not None:
            self.set_pods(pods[0], pods[1])
        own = list(own_addresses)
        bits = 32 if family == 4 else 128
        self.set_locals([f"{address}/{bits}" for address in own] + list(underlay), list(routes))
        self.set_endpoints(own, list(no_hosts))

    def __dealloc__(self):
        heap(self.locals, 0)
        heap(self.known, 0)

    cdef int set_pods(self, str first, str last) except -1:
        self.raw.has_pods = True
        self._read(first, self.raw.pods_first)
        self._read(last, self.raw.pods_last)
        return 0

    cdef int set_locals(self, list networks, list routes) except -1:
        """Prefixes of networks, and of routes that only a narrower subnet overrules."""
        cdef size_t room = (<size_t>len(networks) + <size_t>len(routes) + 1) * sizeof(fdp_prefix)
        cdef fdp_prefix prefix
        cdef uint32_t n = 0
        self.locals = <fdp_prefix *>heap(NULL, room)
        if self.locals == NULL:
            raise MemoryError()
        for over, texts in ((False, networks), (True, routes)):
            for text in texts:
                if _read_prefix(text, &prefix) != self.raw.family:
                    raise ValueError(f"{text} is of the other family")
                prefix.over = over
                # A claim has to be inside the network, so that nothing else meets it.
                if fdp_prefix_overlaps(self.raw.network.address, self.raw.network.length,
                                       prefix.address, prefix.length):
                    self.locals[n] = prefix
                    n += 1
        self.raw.locals, self.raw.local_count = self.locals, n
        return 0

    cdef int set_endpoints(self, list own, list no_hosts) except -1:
        """Addresses of this node, and those that no host can have."""
        cdef size_t n = 0
        self.known = <uint8_t *>heap(NULL, (<size_t>len(own) + <size_t>len(no_hosts) + 1) * 16)
        if self.known == NULL:
            raise MemoryError()
        for text in own + no_hosts:
            self._read(text, self.known + 16 * n)
            n += 1
        self.raw.own, self.raw.own_count = <uint8_t (*)[16]>self.known, len(own)
        self.raw.no_hosts = <uint8_t (*)[16]>(self.known + 16 * <size_t>len(own))
        self.raw.no_host_count = len(no_hosts)
        fdp_policy_seal(&self.raw)
        return 0

    cdef int _read(self, str text, uint8_t *to) except -1:
        cdef Py_ssize_t size
        cdef const char *at = PyUnicode_AsUTF8AndSize(text, &size)
        if fdp_parse_address(self.raw.family, at, size, to):
            raise ValueError(f"{text!r} is not an address of this family")
        return 0
