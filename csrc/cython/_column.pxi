# Fields of packed claims as buffers; included by _core.pyx.

from array import array

cdef extern from "Python.h":
    enum:
        PyBUF_WRITABLE
        PyBUF_STRIDES
        PyBUF_C_CONTIGUOUS
        PyBUF_F_CONTIGUOUS
        PyBUF_ANY_CONTIGUOUS

cdef enum:
    CONTIGUOUS = PyBUF_C_CONTIGUOUS | PyBUF_F_CONTIGUOUS | PyBUF_ANY_CONTIGUOUS


cdef class Column:
    """One field of packed claims as a buffer of bytes: (n, width), or (n,) for lengths."""

    cdef Claims owner
    cdef size_t offset
    cdef Py_ssize_t shape[2]
    cdef Py_ssize_t strides[2]
    cdef int ndim

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.owner is None:
            raise BufferError("a column of no claims")
        if flags & PyBUF_WRITABLE:
            raise BufferError("columns are read-only")
        if flags & PyBUF_STRIDES != PyBUF_STRIDES or flags & (CONTIGUOUS & ~PyBUF_STRIDES):
            raise BufferError("columns are strided: take memoryview(column)")
        cdef uint8_t *start = <uint8_t *>self.owner.rows
        buffer.buf = start + self.offset if start != NULL else <void *>self.shape
        buffer.obj = self
        buffer.itemsize = 1
        buffer.len = self.shape[0] * (self.shape[1] if self.ndim == 2 else 1)
        buffer.format = b"B"
        buffer.ndim = self.ndim
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL
        buffer.readonly = 1
        buffer.internal = NULL
        self.owner.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.owner.exports -= 1


cdef Column _column(Claims owner, size_t offset, Py_ssize_t width):
    cdef Column column = Column.__new__(Column)
    column.owner = owner
    column.offset = offset
    column.shape[0], column.shape[1] = owner.count, width
    column.strides[0], column.strides[1] = sizeof(fdp_claim), 1
    column.ndim = 2 if width else 1
    return column
