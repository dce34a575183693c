# Pinned BPF maps and programs (csrc/bpfmap.c); included by _core.pyx.

cdef bytes _path(object path):
    return os.fsencode(path)


cdef class BpfMap:
    """A map of the kernel's, by descriptor. Takes the descriptor over and closes it.

    Keys and values are bytes of the sizes that ``key_size`` and ``value_size`` say;
    of a per-CPU map a value has ``value_size`` bytes for each possible processor.
    """

    cdef int fd
    cdef fdp_map_info info

    def __cinit__(self, int fd):
        cdef int err
        self.fd = fd
        with nogil:
            err = fdp_map_describe(fd, &self.info)
        if err:
            raise kernel_error(-err, "read a BPF map's properties")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

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
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def fileno(self):
        """Return the descriptor. ValueError once it is closed."""
        self._require_open()
        return self.fd

    def _require_open(self):
        if self.fd < 0:
            raise ValueError("the map is closed")

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
        cdef int err = fdp_bpf_pin(self.fd, raw)
        if err:
            raise kernel_error(-err, f"pin a BPF map at {path}")

    def lookup(self, const uint8_t[::1] key not None, uint32_t cpus=1):
        """Return the value of a key as bytes, or None; of a per-CPU map ``cpus`` values."""
        cdef uint32_t size = self.info.value_size * cpus
        if cpus > 1:
            size = ((self.info.value_size + 7) & ~7) * cpus
        cdef bytes value = bytes(size)
        cdef char *to = value
        self._require_open()
        self._check_key(key.shape[0])
        cdef int err = fdp_map_lookup(self.fd, &key[0], to)
        if err == -ENOENT:
            return None
        if err:
            raise kernel_error(-err, f"read the BPF map {self.name}")
        return value

    def update(self, const uint8_t[::1] key not None, const uint8_t[::1] value not None):
        """Write one entry. KernelError (E2BIG or ENOSPC: the map is full)."""
        self._require_open()
        self._check_key(key.shape[0])
        if value.shape[0] < <Py_ssize_t>self.info.value_size:
            raise ValueError(f"a value of {self.name} has {self.info.value_size} bytes")
        cdef int err = fdp_map_update(self.fd, &key[0], &value[0], 0)
        if err:
            raise kernel_error(-err, f"write to the BPF map {self.name}")

    def delete(self, const uint8_t[::1] key not None):
        """Delete one entry; False where there was none."""
        self._require_open()
        self._check_key(key.shape[0])
        cdef int err = fdp_map_delete(self.fd, &key[0])
        if err and err != -ENOENT:
            raise kernel_error(-err, f"delete from the BPF map {self.name}")
        return err == 0

    def _check_key(self, Py_ssize_t size):
        if size != <Py_ssize_t>self.info.key_size:
            raise ValueError(f"a key of {self.name} has {self.info.key_size} bytes, not {size}")

    def read(self, uint32_t cpus=1, uint32_t step=4096, int attempts=10):
        """Return all entries: ``(count, keys, values)``, keys and values as bytes in a row.

        In batches of ``step``; a reading that the kernel calls interrupted is begun again,
        ``attempts`` times at most. For a per-CPU map ``cpus`` is the number of possible
        processors. KernelError.
        """
        cdef uint32_t value = self.info.value_size
        cdef int err
        if cpus > 1:
            value = ((value + 7) & ~7) * cpus
        self._require_open()
        for _ in range(attempts):
            keys, values, total = [], [], 0
            err = self._read(value, step, keys, values)
            if err != -EINTR:
                break
        if err:
            raise kernel_error(-err, f"read the BPF map {self.name}")
        found = b"".join(keys)
        return len(found) // self.info.key_size, found, b"".join(values)

    cdef int _read(self, uint32_t value, uint32_t step, list keys, list values) except 1:
        cdef fdp_map_reading reading
        cdef uint32_t count
        cdef int more = 1
        cdef uint8_t *room
        memset(&reading, 0, sizeof(reading))
        while more == 1:
            count = step
            room = <uint8_t *>heap(NULL, <size_t>count * (self.info.key_size + value))
            if room == NULL:
                raise MemoryError()
            with nogil:
                more = fdp_map_read(self.fd, &reading, room,
                                    room + <size_t>step * self.info.key_size, &count)
            if more >= 0 and count:
                keys.append(<bytes>room[:count * self.info.key_size])
                at = step * self.info.key_size
                values.append(<bytes>room[at:at + <size_t>count * value])
            heap(room, 0)
            if more == -ENOSPC:  # more of the hash's entries in one bucket than that
                step, more = step * 2, 1
        return more

    def update_many(self, const uint8_t[::1] keys not None, const uint8_t[::1] values not None):
        """Write entries, given one after another (BPF_MAP_UPDATE_BATCH, Linux 5.6).

        Returns how many. KernelError for the first that cannot be written.
        """
        cdef uint32_t count = <uint32_t>(keys.shape[0] // self.info.key_size)
        cdef int err
        self._require_open()
        if keys.shape[0] != <Py_ssize_t>count * self.info.key_size or (
                values.shape[0] < <Py_ssize_t>count * self.info.value_size):
            raise ValueError(f"keys and values do not fit the map {self.name}")
        if not count:
            return 0
        with nogil:
            err = fdp_map_update_many(self.fd, &keys[0], &values[0], &count)
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
