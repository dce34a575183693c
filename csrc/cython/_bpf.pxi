# Pinned BPF maps and programs (csrc/bpfmap.c); included by _core.pyx.

#: Types of maps with a value for each processor (linux/bpf.h: PERCPU_HASH, PERCPU_ARRAY,
#: LRU_PERCPU_HASH, PERCPU_CGROUP_STORAGE), and entries that are read at once.
cdef tuple PER_CPU = (5, 6, 10, 21)
cdef enum:
    MOST_AT_ONCE = 1 << 20

cdef uint32_t _cpus = 0


cdef bytes _path(object path):
    return os.fsencode(path)


def possible_cpus():
    """Return how many values an entry of a per-CPU map has, one for each processor that the kernel
    has made room for (libbpf's libbpf_num_possible_cpus). OSError without sysfs."""
    global _cpus
    if not _cpus:
        with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
            ends = [part.partition("-") for part in file.read().strip().split(",")]
        _cpus = sum([int(last or first) - int(first) + 1 for first, _, last in ends])
    return _cpus


cdef class BpfMap:
    """A map of the kernel's, by descriptor. Takes the descriptor over and closes it.

    Keys and values are bytes of the sizes that ``key_size`` and ``value_size`` say;
    of a per-CPU map a value has ``value_size`` bytes for each possible processor.
    """

    cdef descriptor opened
    cdef fdp_map_info info

    def __cinit__(self, int fd):
        cdef int err
        self.opened.fd = fd
        with nogil:
            err = fdp_map_describe(fd, &self.info)
        if err:
            raise kernel_error(-err, "read a BPF map's properties")

    def __dealloc__(self):
        _close(&self.opened)

    @classmethod
    def open(cls, path):
        """Return what is pinned at ``path`` (``bpftool map show pinned PATH``). KernelError."""
        cdef bytes raw = _path(path)
        cdef int fd = fdp_bpf_open(raw)
        if fd < 0:
            raise kernel_error(-fd, f"open the BPF map {path}")
        return cls(fd)

    @classmethod
    def create(cls, uint32_t type, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
               uint32_t flags=0, str name=""):
        """A new map that is pinned nowhere (``bpftool map create``). KernelError."""
        cdef bytes raw = name.encode()
        cdef int fd = fdp_map_create(type, key_size, value_size, max_entries, flags, raw)
        if fd < 0:
            raise kernel_error(-fd, f"create a BPF map for {max_entries} entries")
        return cls(fd)

    def close(self):
        """Close the descriptor; the map stays where it is pinned or used."""
        _close(&self.opened)

    def fileno(self):
        """Return the descriptor. ValueError once it is closed."""
        self._require_open()
        return self.opened.fd

    def _require_open(self):
        _require(&self.opened, "map")

    @property
    def id(self):
        """The kernel's number of the map."""
        return self.info.id

    @property
    def type(self):
        """BPF_MAP_TYPE_* of linux/bpf.h."""
        return self.info.type

    @property
    def key_size(self):
        return self.info.key_size

    @property
    def value_size(self):
        return self.info.value_size

    @property
    def max_entries(self):
        """How many entries there is room for."""
        return self.info.max_entries

    @property
    def flags(self):
        """BPF_F_* that the map was made with."""
        return self.info.flags

    @property
    def name(self):
        return (<bytes>self.info.name[:16]).split(b"\0")[0].decode("ascii", "replace")

    def pin(self, path):
        """Pin the map at ``path`` (``bpftool map pin``). Conflict where something is."""
        cdef bytes raw = _path(path)
        self._require_open()
        cdef int err = fdp_bpf_pin(self.opened.fd, raw)
        if err:
            raise kernel_error(-err, f"pin a BPF map at {path}")

    def lookup(self, const uint8_t[::1] key not None, uint32_t cpus=1):
        """Return the value of a key as bytes, or None; of a per-CPU map ``cpus`` values.

        ValueError unless ``cpus`` is the number of possible processors for such a map.
        """
        cdef bytes value = bytes(self._value_bytes(cpus))
        cdef char *to = value
        self._require_open()
        self._check_key(key.shape[0])
        cdef int err = fdp_map_lookup(self.opened.fd, &key[0], to)
        if err == -ENOENT:
            return None
        if err:
            raise kernel_error(-err, f"read the BPF map {self.name}")
        return value

    def update(self, const uint8_t[::1] key not None, const uint8_t[::1] value not None):
        """Write one entry. KernelError (E2BIG or ENOSPC: the map is full)."""
        self._require_open()
        self._check_key(key.shape[0])
        cdef size_t needed = self._value_bytes(self._values())
        if <size_t>value.shape[0] < needed:
            raise ValueError(f"a value of {self.name} has {needed} bytes")
        cdef int err = fdp_map_update(self.opened.fd, &key[0], &value[0], 0)
        if err:
            raise kernel_error(-err, f"write to the BPF map {self.name}")

    def delete(self, const uint8_t[::1] key not None):
        """Delete one entry; False where there was none."""
        self._require_open()
        self._check_key(key.shape[0])
        cdef int err = fdp_map_delete(self.opened.fd, &key[0])
        if err and err != -ENOENT:
            raise kernel_error(-err, f"delete from the BPF map {self.name}")
        return err == 0

    cdef uint32_t _values(self) except 0:
        """How many values the kernel holds under one key."""
        return possible_cpus() if self.info.type in PER_CPU else 1

    cdef size_t _value_bytes(self, uint32_t cpus) except? 1:
        """Bytes that the kernel writes for one key (bpf_map_value_size in kernel/bpf/syscall.c),
        whatever room there is."""
        cdef size_t one = self.info.value_size
        if cpus != self._values():
            raise ValueError(f"{self.name} has {self._values()} values under a key, not {cpus}")
        return ((one + 7) & ~<size_t>7) * cpus if self.info.type in PER_CPU else one

    def _check_key(self, Py_ssize_t size):
        if size != <Py_ssize_t>self.info.key_size:
            raise ValueError(f"a key of {self.name} has {self.info.key_size} bytes, not {size}")

    def read(self, uint32_t cpus=1, uint32_t step=4096, int attempts=10):
        """Return all entries: ``(count, keys, values)``, keys and values as bytes in a row.

        In batches of ``step``; a reading that the kernel calls interrupted is begun again,
        ``attempts`` times at most. For a per-CPU map ``cpus`` is the number of possible
        processors. KernelError.
        """
        cdef size_t value = self._value_bytes(cpus)
        cdef int err = 0
        self._require_open()
        if not 1 <= step <= MOST_AT_ONCE or attempts < 1:
            raise ValueError(f"step takes 1 to {MOST_AT_ONCE}, attempts 1 or more")
        if not self.info.key_size:
            raise ValueError(f"{self.name} has no keys, and cannot be read by them")
        for _ in range(attempts):
            keys, values, total = [], [], 0
            err = self._read(value, step, keys, values)
            if err != -EINTR:
                break
        if err:
            raise kernel_error(-err, f"read the BPF map {self.name}")
        found = b"".join(keys)
        return len(found) // self.info.key_size, found, b"".join(values)

    cdef int _read(self, size_t value, uint32_t step, list keys, list values) except 1:
        cdef fdp_map_reading reading
        cdef uint32_t count
        cdef size_t at
        cdef int more = 1
        cdef uint8_t *room
        memset(&reading, 0, sizeof(reading))
        while more == 1:
            count = step
            room = <uint8_t *>heap(NULL, <size_t>count * (self.info.key_size + value))
            if room == NULL:
                raise MemoryError()
            self._begin(room)
            with nogil:
                more = fdp_map_read(self.opened.fd, &reading, room,
                                    room + <size_t>step * self.info.key_size, &count)
            _give_back(&self.opened)
            if more >= 0 and count:
                keys.append(<bytes>room[:<size_t>count * self.info.key_size])
                at = <size_t>step * self.info.key_size
                values.append(<bytes>room[at:at + <size_t>count * value])
            heap(room, 0)
            if more == -ENOSPC and step < MOST_AT_ONCE:  # more entries in one bucket than that
                step, more = step * 2, 1
        return more

    cdef int _begin(self, void *room) except -1:
        """Use the descriptor without the GIL; where that is impossible ``room`` is freed."""
        try:
            return _borrow(&self.opened, "map")
        except BaseException:
            heap(room, 0)
            raise

    def update_many(self, const uint8_t[::1] keys not None, const uint8_t[::1] values not None):
        """Write entries, given one after another (BPF_MAP_UPDATE_BATCH, Linux 5.6).

        Returns how many. KernelError for the first that cannot be written.
        """
        cdef size_t key = self.info.key_size, value = self._value_bytes(self._values())
        cdef uint32_t count = <uint32_t>(<size_t>keys.shape[0] // key) if key else 0
        cdef int err
        self._require_open()
        if <size_t>keys.shape[0] != count * key or <size_t>values.shape[0] < count * value:
            raise ValueError(f"keys and values do not fit the map {self.name}")
        if not count:
            return 0
        _borrow(&self.opened, "map")
        with nogil:
            err = fdp_map_update_many(self.opened.fd, &keys[0], &values[0], &count)
        _give_back(&self.opened)
        if err:
            raise kernel_error(-err, f"write entry {count} to the BPF map {self.name}")
        return count


cdef class BpfProgram:
    """A program of the kernel's, by descriptor. Takes the descriptor over and closes it."""

    cdef int fd
    cdef fdp_prog_info info

    def __cinit__(self, int fd):
        self.fd = fd
        self.refresh()

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    @classmethod
    def open(cls, path):
        """Return what is pinned at ``path`` (``bpftool prog show pinned PATH``). KernelError."""
        cdef bytes raw = _path(path)
        cdef int fd = fdp_bpf_open(raw)
        if fd < 0:
            raise kernel_error(-fd, f"open the BPF program {path}")
        return cls(fd)

    def close(self):
        """Close the descriptor; the program stays where it is pinned or attached."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def fileno(self):
        """Return the descriptor. ValueError once it is closed."""
        if self.fd < 0:
            raise ValueError("the program is closed")
        return self.fd

    def pin(self, path):
        """Pin the program at ``path`` (``bpftool prog pin``). Conflict where something is."""
        cdef bytes raw = _path(path)
        cdef int err = fdp_bpf_pin(self.fileno(), raw)
        if err:
            raise kernel_error(-err, f"pin a BPF program at {path}")

    def refresh(self):
        """Read the kernel's account of it again."""
        cdef int err = fdp_prog_describe(self.fileno(), &self.info)
        if err:
            raise kernel_error(-err, "read a BPF program's properties")

    @property
    def id(self):
        """The kernel's number of the program (``tc filter show`` prints it)."""
        return self.info.id

    @property
    def type(self):
        """BPF_PROG_TYPE_* of linux/bpf.h."""
        return self.info.type

    @property
    def name(self):
        return (<bytes>self.info.name[:16]).split(b"\0")[0].decode("ascii", "replace")

    @property
    def maps(self):
        """The ids of the maps that it uses."""
        return [self.info.maps[i] for i in range(self.info.map_count)]

    @property
    def cost(self):
        """``(runs, nanoseconds)`` since kernel.bpf_stats_enabled was set to 1."""
        return self.info.runs, self.info.run_ns


def merge_percpu(values, uint32_t cpus, uint32_t fields, uint32_t newest=0):
    """Per-CPU values of 64-bit ``fields`` each, as ``BpfMap.read`` returns them, summed up.

    Bit i of ``newest`` takes the largest of field i instead. Returns an array("Q") of
    ``fields`` numbers for each entry.
    """
    cdef const uint64_t[::1] raw = memoryview(values).cast("Q")
    cdef Py_ssize_t count = raw.shape[0] // (cpus * fields) if cpus * fields else 0, i
    if count * cpus * fields != raw.shape[0]:
        raise ValueError("these are no values of so many processors and fields")
    merged = array("Q", bytes(8 * count * fields))
    cdef uint64_t[::1] to = merged
    if count:
        with nogil:
            for i in range(count):
                fdp_percpu_merge(&raw[i * cpus * fields], cpus, fields, newest, &to[i * fields])
    return merged
