# The fields of leases, which are msgspec structs; included by _core.pyx.

cdef extern from "Python.h":
    # An ordinary call would make a tuple of the argument: the stable ABI has no vectorcall.
    object PyObject_CallFunctionObjArgs(object function, void *argument, void *end)

cdef object _as_tuple = None


cdef inline tuple _fields_of(object struct):
    """Return the fields of a msgspec.Struct: one call instead of ten look-ups."""
    return PyObject_CallFunctionObjArgs(_as_tuple, <void *>struct, NULL)


cdef inline bint _same_text(str one, str other) except -1:
    cdef Py_ssize_t size, other_size
    cdef const char *text = PyUnicode_AsUTF8AndSize(one, &size)
    cdef const char *other_text = PyUnicode_AsUTF8AndSize(other, &other_size)
    return size == other_size and memcmp(text, other_text, size) == 0


cdef int _load_fields() except -1:
    """Return the order of a Lease's fields is relied on; say so rather than mix them up."""
    global _as_tuple
    from msgspec.structs import astuple

    from flannel_dp.cluster.lease import BackendData, Lease
    if (Lease.__struct_fields__ != (
            "subnet", "ipv6_subnet", "public_ip", "public_ipv6", "backend_type",
            "backend_data", "backend_v6_data", "name", "revision",
            "expiration", "moved")
            or BackendData.__struct_fields__ != ("vni", "vtep_mac")):
        raise TypeError(
            "flannel_dp.cluster.lease and its compiled reader are of different versions")
    _as_tuple = astuple
    return 0
