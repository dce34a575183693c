# The fields of leases, which are msgspec structs; included by _core.pyx.

cdef extern from "Python.h":
    # An ordinary call would make a tuple of the argument: the stable ABI has no vectorcall.
    object PyObject_CallFunctionObjArgs(object function, void *argument, void *end)

cdef object _as_tuple = None
cdef object _ZERO = 0


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


cdef object _refuse(fdp_claim *claim, int reason, object before, object detail):
    """What is wrong with a claim first: ``before``, or else this."""
    if claim.reason != FDP_ACCEPTED:
        return before
    claim.reason = reason
    return detail


cdef object _read_claim(fdp_claim *claim, int inet, tuple fields, str subnet, str endpoint,
                        object data, str backend, object vni, bint need_mac):
    """Parse the fields of a lease; return what is wrong with them, or None."""
    cdef str mac, kind = fields[4]
    cdef object vni_said, fault = None
    cdef tuple published
    cdef fdp_prefix prefix
    cdef Py_ssize_t size
    cdef const char *text
    if fields[8] is not _ZERO:  # to make a number of it takes as long as to parse an address
        claim.revision = fields[8]
    if fields[10] is not _ZERO:
        claim.moved = fields[10]
    text = PyUnicode_AsUTF8AndSize(subnet, &size)
    if fdp_parse_prefix(inet, text, size, &prefix):
        fault = _refuse(claim, FDP_BAD_SUBNET, fault, f"subnet {subnet[:80]!r} is not a prefix")
    else:
        memcpy(claim.subnet, prefix.address, 16)
        claim.length = prefix.length
    if not _same_text(kind, backend) and kind.lower() != backend:
        fault = _refuse(claim, FDP_WRONG_BACKEND, fault,
                        f"backend type is {kind[:80]!r}, this network runs {backend!r}")
    text = PyUnicode_AsUTF8AndSize(endpoint, &size)
    if fdp_parse_address(inet, text, size, claim.endpoint):
        fault = _refuse(claim, FDP_BAD_PUBLIC_IP, fault,
                        f"public address {endpoint[:80]!r} is not an address of this family")
    if not need_mac:
        return fault
    if data is None:
        return _refuse(claim, FDP_BAD_MAC, fault, "no VtepMAC was published for this family")
    published = _fields_of(data)
    vni_said, mac = published[0], published[1]
    text = PyUnicode_AsUTF8AndSize(mac, &size)
    if fdp_parse_mac(text, size, claim.mac):
        fault = _refuse(claim, FDP_BAD_MAC, fault, f"VtepMAC {mac[:80]!r} is not a MAC address")
    # 0: not stated. flannel publishes 16 bits of it (vxlanLeaseAttrs.VNI).
    if (vni_said is not vni and vni_said and vni_said != vni
            and vni_said != (vni & 0xffff)):
        fault = _refuse(claim, FDP_WRONG_VNI, fault,
                        f"VNI is {vni_said}, this network's is {vni}")
    return fault


cdef void _write_name(uint8_t *to, const char *text, Py_ssize_t size, const char *other_text,
                      Py_ssize_t other_size, bint is_key) noexcept:
    """A name, or flannel's key of two prefixes: 10.244.7.0-24&fd00:10:244:7::-64."""
    cdef Py_ssize_t i = 0
    memcpy(to, text, size)
    if other_size:
        if size:
            to[size] = c'&'
            i = 1
        memcpy(to + size + i, other_text, other_size - i)
    if is_key:
        for i in range(size + other_size):
            if to[i] == c'/':
                to[i] = c'-'
