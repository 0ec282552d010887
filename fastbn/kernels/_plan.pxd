"""Plans, for the modules that follow them; plan.hpp says what the numbers mean."""

from libc.stdint cimport uintptr_t

cdef extern from "plan.hpp" namespace "fastbn" nogil:
    const Py_ssize_t LINE, BLOCK, COLUMNS, PLANES, CHAIN, TILE_ROWS, MAP_ROWS, TILE, FEW_ROWS

    enum:
        MOST_TILES

    cdef cppclass Task:
        Py_ssize_t outer, channels, inner, item
        int threads, reads, arrays, touched
        bint streamable
        uintptr_t place
        Py_ssize_t together
        bint apart, hosted

    cdef cppclass Tiles:
        double count
        Py_ssize_t tiles, width, images, pieces, piece, columns, repeats, run

    cdef cppclass Units:
        bint by_columns, reverse, nontemporal, early, exceeds_l3
        Py_ssize_t rows, tail_columns, peel, channels_per_unit, channels_per_pass, rows_per_unit, elements_per_unit, units, bytes

    cdef cppclass Plan:
        Tiles tiles
        bint resident
        Units sums, map

cdef void make_plan(Plan* p, const Task* t) noexcept nogil
cdef int thread_count(threads) except -1


cdef inline Py_ssize_t div_up(Py_ssize_t n, Py_ssize_t step) noexcept nogil:
    """Number of steps that cover n."""
    return (n + step - 1) // step
