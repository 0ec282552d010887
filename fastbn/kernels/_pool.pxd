"""The thread pool, for the other compiled modules."""

from libc.stdint cimport uint32_t

cdef extern from "float_mode.hpp" namespace "fastbn" nogil:
    uint32_t enter_default_mode() noexcept
    void leave_default_mode(uint32_t before) noexcept

cdef extern from "pool.hpp" namespace "fastbn" nogil:
    cppclass Host:
        pass

ctypedef void (*unit_fn)(void* job, Py_ssize_t unit) noexcept nogil

cdef void parallel(
    unit_fn unit, void* job, Py_ssize_t units, int threads, bint reverse, Py_ssize_t nbytes, const Host* host
) noexcept nogil
cdef void* scratch(size_t nbytes) noexcept nogil
cdef void end_scratch() noexcept nogil
cdef void* withdraw_scratch() noexcept nogil
cdef void restore_scratch(void* withdrawn) noexcept nogil
