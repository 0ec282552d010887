"""The numbers of the loops, and where a tile lies."""

cdef enum:
    SMALL_PLANE = 16     # blocks of a plane below which several images are summed together
    REACH = 4096         # bytes of a plane up to which a gradient's sums ask for the next image's early
    TOGETHER = 4         # images summed together
    BATCH = 8            # rows summed before they are added to the accumulators
    LINED = 16           # blocks of a run of planes from which its map begins at a cache line, and of a plane from which gradients join it
    MAP_PIECE = 2048     # elements of a long plane mapped before those that lie before them
    FEW = 4              # blocks that a smooth activation takes at once
    FOLDED = 64          # channels whose parameters are made at once
    FEW_VALUES = 64      # values of a channel in a tile up to which its sums round so seldom that the pivot may be farther away

# The ends of the range, as in extremes.py.
cdef double LARGE_M2 = 2.0 ** 1000, LARGE_INVSTD = 2.0 ** 450, FAR_DOUBLE = 2.0 ** 400, FAR_FLOAT = 2.0 ** 100


cdef inline Py_ssize_t tile_rows(Work* job, Py_ssize_t tile) noexcept nogil:
    """Rows of a tile; the last tile is the short row, where there is one."""
    cdef Py_ssize_t row = tile * TILE_ROWS
    return min(TILE_ROWS, job.rows - row) if row < job.rows else 1


cdef inline Py_ssize_t tile_offset(Work* job, Py_ssize_t tile) noexcept nogil:
    return min(tile * TILE_ROWS, job.rows) * job.columns


cdef inline Py_ssize_t tile_columns(Work* job, Py_ssize_t tile) noexcept nogil:
    return job.columns if tile * TILE_ROWS < job.rows else job.tail_columns


cdef inline double tile_count(Work* job, Py_ssize_t tile) noexcept nogil:
    """Values of one channel or column in a tile."""
    if job.by_columns:
        return tile_rows(job, tile) * job.run
    cdef Py_ssize_t images = min(job.images, job.outer - tile // job.pieces * job.images)
    return images * min(job.piece, job.inner - tile % job.pieces * job.piece)


cdef inline Py_ssize_t tile_last(Work* job, Py_ssize_t tile, Py_ssize_t repeat, Py_ssize_t last) noexcept nogil:
    """Channels before `last` that a tile has in one of the repeats of a gathered row."""
    return min(last, tile_columns(job, tile) - repeat * job.channels) if job.repeats > 1 else last
