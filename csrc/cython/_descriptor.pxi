# Descriptors that threads share; included by _core.pyx.
#
# While a thread works with one and has released the GIL, another may call close(): the number
# could then be another file's. So the last thread that uses a descriptor closes it.

cdef struct descriptor:
    int fd        # -1: not open, or closed
    int users     # that have released the GIL
    bint closing  # as soon as none is left


cdef inline bint _is_open(const descriptor *of) noexcept:
    return of.fd >= 0 and not of.closing


cdef inline int _require(const descriptor *of, str what) except -1:
    if not _is_open(of):
        raise ValueError(f"the {what} is closed")
    return 0


cdef inline int _borrow(descriptor *of, str what) except -1:
    """Begin to use a descriptor without the GIL. BufferError beside another thread."""
    _require(of, what)
    if of.users:
        raise BufferError(f"the {what} is in use by another thread")
    of.users = 1
    return 0


cdef inline void _give_back(descriptor *of) noexcept:
    of.users -= 1
    if of.closing and not of.users:
        _close(of)


cdef void _close(descriptor *of) noexcept:
    """Close it, or have the last of its users do so; a second time does nothing."""
    if of.users:
        of.closing = True
    elif of.fd >= 0:
        close(of.fd)
        of.fd = -1
