# cython: freethreading_compatible=True
"""The thread pool, compiled once and shared by the kernels of all ISA levels."""

cimport numpy as cnp
from libc.stdint cimport uint32_t, uintptr_t
from libc.string cimport memcpy

cnp.import_array()

cdef extern from "Python.h":
    ctypedef struct PyInterpreterState
    PyInterpreterState* PyInterpreterState_Get()
    PyInterpreterState* PyInterpreterState_Main()

cdef extern from "pool.hpp" namespace "fastbn" nogil:
    void run_units "fastbn::parallel"(
        unit_fn unit, void* job, Py_ssize_t units, int threads, bint reverse, Py_ssize_t nbytes, const Host* host
    ) noexcept
    int count_workers "fastbn::workers"() noexcept
    int count_awake "fastbn::awake"() noexcept
    cppclass Waking:
        double cost
        double delay
        double worth
    Waking measured_waking "fastbn::waking"() noexcept

cdef extern from "float_mode.hpp" namespace "fastbn" nogil:
    const uint32_t DEFAULT_MODE
    const uint32_t MODES
    uint32_t read_mode() noexcept
    void write_mode(uint32_t mode) noexcept

cdef extern from "scratch.hpp" namespace "fastbn" nogil:
    void* own_memory "fastbn::scratch"(size_t nbytes) noexcept
    void end_own_memory "fastbn::end_scratch"() noexcept
    void* withdraw_own_memory "fastbn::withdraw_scratch"() noexcept
    void restore_own_memory "fastbn::restore_scratch"(void* withdrawn) noexcept
    size_t release_own_memory "fastbn::release_scratch"() noexcept

cdef extern from "pages.hpp" namespace "fastbn" nogil:
    void want_large_pages "fastbn::ask_for_large_pages"(void* memory, Py_ssize_t nbytes) noexcept


cdef void parallel(
    unit_fn unit, void* job, Py_ssize_t units, int threads, bint reverse, Py_ssize_t nbytes, const Host* host
) noexcept nogil:
    run_units(unit, job, units, threads, reverse, nbytes, host)


cdef void* scratch(size_t nbytes) noexcept nogil:
    return own_memory(nbytes)


cdef void end_scratch() noexcept nogil:
    end_own_memory()


cdef void* withdraw_scratch() noexcept nogil:
    return withdraw_own_memory()


cdef void restore_scratch(void* withdrawn) noexcept nogil:
    restore_own_memory(withdrawn)


def release_scratch():
    """Give back the scratch memory that the kernels keep for this thread, and that of other threads at their next call.

    Returns
    -------
    int
        How many bytes this thread gave.
    """
    return release_own_memory()


def ask_for_large_pages(uintptr_t address, Py_ssize_t nbytes):
    """Let an output have large pages, if it is large, and its memory new."""
    want_large_pages(<void*> address, nbytes)


def in_main_interpreter():
    """Whether Python runs here as usual, and not in a subinterpreter, as in mod_wsgi."""
    return PyInterpreterState_Get() == PyInterpreterState_Main()


def set_float_mode(mode=None):
    """Set this thread's floating-point mode: for kernels that are not compiled here, and for tests.

    Parameters
    ----------
    mode : int, optional
        What an earlier call returned; None is the default mode: round to nearest, subnormal numbers, no traps.

    Returns
    -------
    int
        The mode until now, as the processor encodes it.
    """
    cdef uint32_t before = read_mode(), after = DEFAULT_MODE if mode is None else mode & MODES
    if after != before:
        write_mode(after)
    return before


def workers():
    """Number of threads that the pool of this process has started.

    Returns
    -------
    int
    """
    return count_workers()


def awake():
    """Number of these threads that do not sleep: they run units, or spin for a moment in case that more come.

    Returns
    -------
    int
    """
    return count_awake()


def waking():
    """What it has cost lately to wake a thread of the pool.

    Returns
    -------
    dict
        Seconds: the "cost" to the caller, the "delay" until the thread runs, and the "worth": what a call must have to
        share for each thread that takes part, before it wakes one that sleeps. Until one was woken, what is common.
    """
    cdef Waking found = measured_waking()
    return {"cost": found.cost, "delay": found.delay, "worth": found.worth}


cdef struct Copy:
    char* to
    const char* source
    Py_ssize_t size
    Py_ssize_t piece


cdef void copy_piece(void* job, Py_ssize_t unit) noexcept nogil:
    cdef Copy* c = <Copy*> job
    cdef Py_ssize_t start = unit * c.piece
    memcpy(c.to + start, c.source + start, min(c.piece, c.size - start))


def copy(cnp.ndarray source not None, cnp.ndarray to not None, int threads):
    """Copy an array: the floor that benchmarks compare with.

    Parameters
    ----------
    source, to : ndarray
        C-contiguous, of the same size in bytes, of plain numbers; `to` can be written.
    threads : int
        Each copies one piece by memcpy.
    """
    cdef bint contiguous = cnp.PyArray_IS_C_CONTIGUOUS(source) and cnp.PyArray_IS_C_CONTIGUOUS(to)
    if not contiguous or cnp.PyArray_NBYTES(source) != cnp.PyArray_NBYTES(to):
        raise ValueError("source and to must be C-contiguous and of the same size in bytes")
    if not cnp.PyArray_ISWRITEABLE(to) or source.dtype.hasobject or to.dtype.hasobject:
        raise ValueError("to must be writable, and no array may hold objects")
    cdef Copy job = Copy(<char*> cnp.PyArray_DATA(to), <char*> cnp.PyArray_DATA(source), cnp.PyArray_NBYTES(source), 0)
    job.piece = ((job.size + threads - 1) // threads + 63) // 64 * 64 if threads > 1 else job.size
    if job.size > 0:
        with nogil:
            run_units(copy_piece, &job, (job.size + job.piece - 1) // job.piece, threads, False, 2 * job.size, NULL)
