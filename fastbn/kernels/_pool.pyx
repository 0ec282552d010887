"""The thread pool, compiled once and shared by the kernels of all ISA levels."""

cdef extern from "pool.hpp" namespace "fastbn" nogil:
    void c_parallel "fastbn::parallel"(unit_fn unit, void* job, Py_ssize_t units, int threads) noexcept
    void* c_scratch "fastbn::scratch"(size_t nbytes) noexcept


cdef void parallel(unit_fn unit, void* job, Py_ssize_t units, int threads) noexcept nogil:
    c_parallel(unit, job, units, threads)


cdef void* scratch(size_t nbytes) noexcept nogil:
    return c_scratch(nbytes)
