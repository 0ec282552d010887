# cython: cdivision=True, freethreading_compatible=True
"""How a call is cut: into numeric tiles by its shape alone, and into units of work by the machine. Numbers only.

Tiles decide the bits of a result, so that no cache, thread or ISA may have a say in them. Units are whole numbers of tiles.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset

cdef extern from "pages.hpp" namespace "fastbn" nogil:
    bint has_pages(uintptr_t begin, Py_ssize_t nbytes) noexcept

cdef enum:
    MANY_ROWS = 32       # images from which small planes are summed and mapped as columns
    LONG_ROW = 2048      # gather rows up to this many columns
    FAR = 3              # arrays of more than this part of L3, which others use too, do not stay in it
    LEAST_RUN = 1024     # bytes of an image that are worth a turn
    MOST_L3 = 32 << 20   # bytes of an L3 that one program has to itself, however large that of the whole processor is
    UNITS = 4            # units for each thread, so that none waits long for the last
    WHOLE_UNITS = 8      # the same of whole channels, whose last unit takes the longest
    WIDE_UNITS = 2       # the same of columns, which are read the faster the longer the pieces of their rows are
    MOST_THREADS = 4096  # of one call; the pool has fewer

cdef Py_ssize_t L1 = 32 << 10, L2 = 512 << 10, L3 = 8 << 20


def set_caches(Py_ssize_t l1, Py_ssize_t l2, Py_ssize_t l3):
    """Set the sizes of the caches, in bytes, that the units of work are cut for."""
    global L1, L2, L3
    L1, L2, L3 = l1, l2, min(l3, <Py_ssize_t> MOST_L3)


cdef inline Py_ssize_t balance(Py_ssize_t n, Py_ssize_t most, Py_ssize_t step) noexcept nogil:
    """The size of equal parts of n, of at most `most` each, in whole steps."""
    return div_up(div_up(n, div_up(n, most)), step) * step


cdef Py_ssize_t common_divisor(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a


cdef inline Py_ssize_t lanes(const Task* t) noexcept nogil:
    """Elements of a block."""
    return BLOCK // max(t.item, <Py_ssize_t> 4)


cdef inline Py_ssize_t size_of(const Task* t) noexcept nogil:
    """Bytes of an array, of all tasks that follow each other."""
    return t.outer * t.channels * t.inner * t.item * max(t.together, <Py_ssize_t> 1)


cdef inline bint exceeds(Py_ssize_t cache, const Task* t, Py_ssize_t arrays) noexcept nogil:
    """Whether so many arrays are more than a cache."""
    return size_of(t) * arrays > cache


cdef bint are_columns(const Task* t) noexcept nogil:
    """Whether sums take the memory as columns: also planes of less than two blocks, of many images.

    These are rows of short runs: without tails, and without tiny loops.
    """
    cdef Py_ssize_t W = lanes(t)
    return t.inner == 1 or (t.inner < 2 * W and t.inner % W != 0 and t.outer >= MANY_ROWS)


cdef void set_tiles(Tiles* p, Units* u, const Task* t) noexcept nogil:
    """Fix the numeric tiles."""
    cdef Py_ssize_t C = t.channels, R = t.outer, W = lanes(t)
    p.count = <double> t.outer * t.inner
    p.images = p.pieces = p.repeats = p.run = 1
    p.piece = t.inner
    p.columns = p.width = C
    u.by_columns = are_columns(t)
    if not u.by_columns:
        if t.inner > TILE:
            p.piece = balance(t.inner, TILE, W)
            p.pieces = div_up(t.inner, p.piece)
            p.tiles = t.outer * p.pieces
        else:
            p.images = max(<Py_ssize_t> 1, min(CHAIN, TILE // t.inner))
            p.tiles = div_up(t.outer, p.images)
        return
    p.run = t.inner
    p.repeats = W // common_divisor(C, W)
    if p.run > 1 or p.repeats * C > LONG_ROW or R < 4 * p.repeats:
        p.repeats = 1
    p.width = p.repeats * C
    p.columns = p.width * p.run
    u.rows = R // p.repeats
    u.tail_columns = R % p.repeats * C
    p.tiles = div_up(u.rows, TILE_ROWS) + (u.tail_columns > 0)


cdef void plan_sums(Units* u, const Tiles* p, const Task* t) noexcept nogil:
    """Cut the sums into units: tiles of groups of channels."""
    cdef Py_ssize_t W = lanes(t), room = COLUMNS // BLOCK * W
    cdef Py_ssize_t each = WIDE_UNITS if u.by_columns else UNITS
    cdef Py_ssize_t enough = div_up(each * t.threads, p.tiles)  # groups that keep every thread busy
    if not u.by_columns:
        u.exceeds_l3 = False  # long runs need no help
        u.channels_per_unit = max(<Py_ssize_t> 1, min(PLANES, t.channels // enough))
        u.units = p.tiles * div_up(t.channels, u.channels_per_unit)
        return
    u.exceeds_l3 = exceeds(L3 // FAR, t, t.reads)
    if p.run > 1:
        u.channels_per_unit = min(room // p.run, div_up(t.channels, enough)) * p.run
    else:
        u.channels_per_unit = balance(p.columns, min(room, div_up(p.columns, enough)), W)
    u.units = p.tiles * div_up(p.columns, u.channels_per_unit)


cdef void plan_map(Units* u, const Tiles* p, const Task* t) noexcept nogil:
    """Cut the map into units: rows, planes, or pieces of a plane."""
    cdef Py_ssize_t W = lanes(t), size = t.outer * t.channels * t.inner
    cdef Py_ssize_t elements = max(W, min(L2 // 2 // (t.arrays * t.item), div_up(size, UNITS * t.threads)))
    if 2 * t.inner >= 3 * W:
        u.by_columns = False  # long runs need no parameters for each column
    if u.by_columns and p.columns * t.item % LINE == 0:
        # Let rows start on cache lines, wherever the array starts: columns are the same from there, only rotated.
        u.peel = min(size, <Py_ssize_t> ((0 - t.place) % LINE) // t.item)
        u.rows = (size - u.peel) // p.columns
        u.tail_columns = (size - u.peel) % p.columns
    u.reverse = t.reads > 0
    u.nontemporal = is_streamed(u, p, t, t.arrays)
    u.exceeds_l3 = exceeds(L3, t, t.arrays)
    if u.by_columns:
        u.channels_per_unit = balance(p.columns, elements, W)
        u.rows_per_unit = div_up(max(<Py_ssize_t> 1, elements // p.columns), MAP_ROWS) * MAP_ROWS
        u.units = (div_up(u.rows, u.rows_per_unit) + (u.tail_columns > 0)) * div_up(p.columns, u.channels_per_unit)
    elif elements >= t.inner:
        u.elements_per_unit = elements // t.inner * t.inner
        u.units = div_up(t.outer * t.channels, elements // t.inner)
    else:
        u.elements_per_unit = balance(t.inner, elements, W)
        u.units = t.outer * t.channels * div_up(t.inner, u.elements_per_unit)


cdef bint is_streamed(const Units* u, const Tiles* p, const Task* t, int arrays) noexcept nogil:
    """Whether the output is written past the caches: when it is far too large for them, in long aligned runs, and no new memory.

    A plane has a block at least: of smaller ones, more than two could meet in one.
    """
    if not t.streamable or not exceeds(L3, t, arrays) or not has_pages(t.place, size_of(t)):
        return False
    return p.columns * t.item % LINE == 0 if u.by_columns else t.inner >= lanes(t)


cdef bint plan_resident(Units* u, const Tiles* p, const Task* t) noexcept nogil:
    """Whether whole channels are the units of work, and if so how many make one unit.

    Then a thread makes for itself what it needs to map them: what another core has written takes long to arrive. Threads that
    share rows also fetch each other's lines ahead of time. That costs less only than to start a host's threads a second time.
    """
    cdef Py_ssize_t W = lanes(t), channel = t.reads * t.outer * t.inner * t.item, run, each
    if t.reads == 0:
        return False
    u.exceeds_l3 = exceeds(L3 // FAR, t, t.touched)
    if u.by_columns:
        if not t.hosted or t.threads == 1 or u.rows > FEW_ROWS:
            return False
        if p.columns != t.channels or t.channels % W or t.channels < 2 * t.threads * W:
            return False
        u.channels_per_pass = min(COLUMNS // BLOCK * W, div_up(div_up(t.channels, WIDE_UNITS * t.threads), W) * W)
        u.channels_per_unit = u.channels_per_pass
    elif t.threads > 1 and t.channels < UNITS * t.threads:
        return False
    else:
        each = t.channels if t.threads == 1 else t.channels // (WHOLE_UNITS * t.threads)
        u.channels_per_unit = max(<Py_ssize_t> 1, min(L2 // 2 // channel, each))
        # What L1 holds beside its output, and beside what the system writes where pages are new, takes its turn; but of several
        # images no shorter runs than memory is read well in.
        run = div_up(LEAST_RUN, t.inner * t.item) if t.outer > 1 else 1
        u.channels_per_pass = min(u.channels_per_unit, max(L1 // t.reads // channel, run))
        u.nontemporal = is_streamed(u, p, t, t.touched)
    u.units = div_up(t.channels, u.channels_per_unit)
    # A store that waits for its line holds up all that follow.
    u.early = not u.nontemporal and u.channels_per_pass * t.outer * t.inner * t.item <= L2 // 8
    return True


cdef void make_plan(Plan* p, const Task* t) noexcept nogil:
    cdef Py_ssize_t size = t.outer * t.channels * t.inner * t.item
    memset(p, 0, sizeof(Plan))
    set_tiles(&p.tiles, &p.sums, t)
    p.map = p.sums
    p.resident = t.arrays > 0 and not t.apart and plan_resident(&p.sums, &p.tiles, t)
    if p.resident:
        p.sums.bytes = t.touched * size
        return
    if t.reads > 0:
        plan_sums(&p.sums, &p.tiles, t)
        p.sums.bytes = t.reads * size
    if t.arrays > 0:
        plan_map(&p.map, &p.tiles, t)
        p.map.bytes = t.arrays * size


# Rows of a tile of columns; and how many arrays like x each operation reads and writes: by the sums, by the map, by both.
ROWS = TILE_ROWS
MOST_BYTES = 1 << 56  # of an array: more could not be counted with
TRAFFIC = {"stats": (1, 0, 1), "normalize": (0, 2, 2), "forward": (1, 2, 2), "backward": (2, 3, 3)}


def plan(str op, dims, Py_ssize_t itemsize, threads, bint hosted=False, uintptr_t place=0):
    """The plan of a call, into an output of its own.

    Parameters
    ----------
    op : str
        "stats", "normalize", "forward" or "backward".
    dims : tuple of int
        ``(outer, channels, inner)``.
    itemsize : int
        Bytes of an element.
    threads : int
    hosted : bool
        Whether they are a host's.
    place : int
        Where the output lies; 0 stands for memory that starts on a cache line and was written before.

    Returns
    -------
    dict
        The numbers of a plan by name; "sums" and "map" are dicts of those of their units, or None.
    """
    cdef Task t
    cdef Plan p
    outer, channels, inner = dims
    if min(outer, channels, inner, itemsize) < 1 or outer * channels * inner * itemsize > MOST_BYTES:
        raise ValueError(f"a plan is for some elements, and for at most {MOST_BYTES} bytes, got {dims} elements of {itemsize} bytes")
    memset(&t, 0, sizeof(Task))
    t.outer, t.channels, t.inner = outer, channels, inner
    t.item, t.threads, t.streamable, t.hosted, t.place = itemsize, thread_count(threads), True, hosted, place
    t.reads, t.arrays, t.touched = TRAFFIC[op]
    make_plan(&p, &t)
    return {
        "count": p.tiles.count, "tiles": p.tiles.tiles, "width": p.tiles.width, "images": p.tiles.images,
        "pieces": p.tiles.pieces, "piece": p.tiles.piece, "columns": p.tiles.columns, "repeats": p.tiles.repeats,
        "run": p.tiles.run, "resident": bool(p.resident), "sums": numbers(&p.sums) if t.reads else None,
        "map": None if not t.arrays or p.resident else numbers(&p.map),
    }


cdef dict numbers(const Units* u):
    return {
        "by_columns": bool(u.by_columns), "reverse": bool(u.reverse), "nontemporal": bool(u.nontemporal),
        "early": bool(u.early), "exceeds_l3": bool(u.exceeds_l3), "rows": u.rows, "tail_columns": u.tail_columns, "peel": u.peel,
        "channels_per_unit": u.channels_per_unit, "channels_per_pass": u.channels_per_pass, "rows_per_unit": u.rows_per_unit,
        "elements_per_unit": u.elements_per_unit, "units": u.units, "bytes": u.bytes,
    }


cdef int thread_count(threads) except -1:
    """A number of threads that C can count with; what is more than there can be makes no difference."""
    return max(1, min(threads, MOST_THREADS))
