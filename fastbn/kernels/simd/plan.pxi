"""How a call is cut: into numeric tiles by its shape alone, and into units of work by the machine. No loops over data.

Tiles decide the bits of a result, so that no cache, thread or ISA may have a say in them. Units are whole numbers of tiles.
"""

# Numeric tiles: fixed by the shape, never by the machine.
cdef enum:
    TILE = 16384         # elements of a tile of planes
    CHAIN = 64           # additions to one accumulator, before it is added to another: long chains lose digits
    TILE_ROWS = 256      # rows of a tile of columns
    MANY_ROWS = 32       # images from which small planes are summed and mapped as columns
    SMALL_PLANE = 16     # blocks of a plane below which several images are summed together
    REACH = 4096         # bytes of a plane up to which a gradient's sums ask for the next image's early
    TOGETHER = 4         # images summed together
    BATCH = 8            # rows summed before they are added to the accumulators
    FAR = 3              # arrays of more than this part of L3, which others use too, do not stay in it
    FEW_ROWS = 128       # rows up to which groups of columns are summed and mapped at once
    LONG_ROW = 2048      # gather rows up to this many columns
    MAP_PIECE = 2048     # elements of a long plane mapped before those that lie before them
    MAP_ROWS = 4         # rows mapped with one load of the parameters
    FEW = 4              # blocks that a smooth activation takes at once
    FEW_VALUES = 64      # values of a channel in a tile up to which its sums round so seldom that the shift may be farther away
    MOST_THREADS = 4096  # of one call; the pool has fewer

# The ends of the range, as in extremes.py.
cdef double LARGE_M2 = 2.0 ** 1000, LARGE_INVSTD = 2.0 ** 450, FAR_DOUBLE = 2.0 ** 400, FAR_FLOAT = 2.0 ** 100

cdef Py_ssize_t L1 = 32 << 10, L2 = 512 << 10, L3 = 8 << 20


cdef inline Py_ssize_t up(Py_ssize_t n, Py_ssize_t step) noexcept nogil:
    """Number of steps that cover n."""
    return (n + step - 1) // step


cdef inline Py_ssize_t even_part(Py_ssize_t n, Py_ssize_t most, Py_ssize_t step) noexcept nogil:
    """The size of equal parts of n, of at most `most` each, in whole steps."""
    return up(up(n, up(n, most)), step) * step


cdef Py_ssize_t common_divisor(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a


cdef void cut(Call* job, Py_ssize_t W) noexcept nogil:
    """Fix the numeric tiles, from the shape and the lanes of a block."""
    cdef Py_ssize_t C = job.channels, R = job.outer
    job.count = <double> job.outer * job.inner
    job.images = job.pieces = job.repeats = job.run = 1
    job.piece = job.inner
    job.columns = job.width = C
    job.rows = job.rest = 0
    # Planes of less than two blocks, of many images, are rows of short runs: without tails, and without tiny loops.
    job.by_columns = job.inner == 1 or (job.inner < 2 * W and job.inner % W != 0 and job.outer >= MANY_ROWS)
    if not job.by_columns:
        if job.inner > TILE:
            job.piece = even_part(job.inner, TILE, W)
            job.pieces = up(job.inner, job.piece)
            job.tiles = job.outer * job.pieces
        else:
            job.images = max(<Py_ssize_t> 1, min(<Py_ssize_t> CHAIN, TILE // job.inner))
            job.tiles = up(job.outer, job.images)
        return
    job.run = job.inner
    job.repeats = W // common_divisor(C, W)
    if job.run > 1 or job.repeats * C > LONG_ROW or R < 4 * job.repeats:
        job.repeats = 1
    job.width = job.repeats * C
    job.columns = job.width * job.run
    job.rows = R // job.repeats
    job.rest = R % job.repeats * C
    job.tiles = up(job.rows, TILE_ROWS) + (job.rest > 0)


cdef inline Py_ssize_t tile_rows(Call* job, Py_ssize_t tile) noexcept nogil:
    """Rows of a tile; the last tile is the short row, where there is one."""
    cdef Py_ssize_t row = tile * TILE_ROWS
    return min(<Py_ssize_t> TILE_ROWS, job.rows - row) if row < job.rows else 1


cdef inline Py_ssize_t tile_offset(Call* job, Py_ssize_t tile) noexcept nogil:
    return min(tile * TILE_ROWS, job.rows) * job.columns


cdef inline Py_ssize_t tile_columns(Call* job, Py_ssize_t tile) noexcept nogil:
    return job.columns if tile * TILE_ROWS < job.rows else job.rest


cdef inline double tile_count(Call* job, Py_ssize_t tile) noexcept nogil:
    """Values of one channel or column in a tile."""
    if job.by_columns:
        return tile_rows(job, tile) * job.run
    cdef Py_ssize_t images = min(job.images, job.outer - tile // job.pieces * job.images)
    return images * min(job.piece, job.inner - tile % job.pieces * job.piece)


cdef inline Py_ssize_t tile_last(Call* job, Py_ssize_t tile, Py_ssize_t repeat, Py_ssize_t last) noexcept nogil:
    """Channels before `last` that a tile has in one of the repeats of a gathered row."""
    return min(last, tile_columns(job, tile) - repeat * job.channels) if job.repeats > 1 else last


cdef inline bint is_staged(Call* job, Py_ssize_t item) noexcept nogil:
    """Whether planes that are streamed are too short to be so one by one: their first and last lines would not be."""
    return job.inner * item <= <Py_ssize_t> sizeof(Stage) - LINE


cdef inline bint exceeds(Py_ssize_t cache, Call* job, Py_ssize_t item, Py_ssize_t arrays) noexcept nogil:
    """Whether so many arrays are more than a cache."""
    return job.outer * job.channels * job.inner * item * arrays > cache


cdef Py_ssize_t sum_units(Call* job, Py_ssize_t W, Py_ssize_t item) noexcept nogil:
    """Cut the sums into units of work; return their number."""
    cdef Py_ssize_t room, enough = up(4 * job.threads, job.tiles)  # groups that keep every thread busy
    if job.by_columns:
        job.far = exceeds(L3 // FAR, job, item, 1 + (job.dy != NULL) + (job.residual != NULL))
        room = COLUMNS // BLOCK * W
        if job.run > 1:
            job.group = min(room // job.run, up(job.channels, enough)) * job.run
        else:
            job.group = even_part(job.columns, min(room, up(job.columns, enough)), W)
        return job.tiles * up(job.columns, job.group)
    job.far = False  # long runs need no help
    job.group = max(<Py_ssize_t> 1, min(PLANES, job.channels // enough))
    return job.tiles * up(job.channels, job.group)


cdef void choose_map(Call* job, Py_ssize_t W) noexcept nogil:
    """Map long runs by planes, though they were summed by columns: no parameters are needed for each column."""
    if 2 * job.inner >= 3 * W:
        job.by_columns = False


cdef Py_ssize_t map_units(Call* job, Py_ssize_t W, Py_ssize_t item, Py_ssize_t arrays) noexcept nogil:
    """Cut the map into units of work; return their number."""
    cdef Py_ssize_t size = job.outer * job.channels * job.inner
    cdef Py_ssize_t elements = max(W, min(L2 // 2 // (arrays * item), up(size, 4 * job.threads)))
    job.streams = is_streamed(job, item, arrays)
    job.far = exceeds(L3 // FAR, job, item, arrays)
    if job.by_columns:
        job.group = even_part(job.columns, elements, W)
        job.unit = up(max(<Py_ssize_t> 1, elements // job.columns), MAP_ROWS) * MAP_ROWS
        job.units = (up(job.rows, job.unit) + (job.rest > 0)) * up(job.columns, job.group)
    elif elements >= job.inner:
        job.unit = elements // job.inner * job.inner
        job.units = up(job.outer * job.channels, elements // job.inner)
    else:
        job.unit = even_part(job.inner, elements, W)
        job.units = job.outer * job.channels * up(job.inner, job.unit)
    return job.units


cdef bint is_streamed(Call* job, Py_ssize_t item, Py_ssize_t arrays) noexcept nogil:
    """Whether the output is written past the caches: when it is far too large for them, in long aligned runs."""
    cdef Py_ssize_t run = job.columns if job.by_columns else job.inner
    if job.out == job.x or job.out == job.dy or job.out == job.residual:
        return False
    if job.dresidual != NULL and (<char*> job.dresidual - <char*> job.out) % LINE:
        return False
    if not exceeds(L3, job, item, arrays):
        return False
    return run * item % LINE == 0 if job.by_columns else not is_staged(job, item) or job.dresidual == NULL


cdef Py_ssize_t touched(Call* job) noexcept nogil:
    """How many arrays the map of a call reads and writes."""
    return 2 + (job.dy != NULL) + (job.residual != NULL) + (job.dresidual != NULL)


cdef inline bint is_spread(Call* job, Py_ssize_t W) noexcept nogil:
    """Whether a vector of channels is one of columns as it is."""
    return job.columns == job.channels and job.channels % W == 0


cdef bint grouped(Call* job, Py_ssize_t W, Py_ssize_t item) noexcept nogil:
    """Whether whole channels are the units of work, and if so how many make one unit."""
    cdef Py_ssize_t read = 1 + (job.dy != NULL) + (job.dy != NULL and job.residual != NULL)  # by the sums
    cdef Py_ssize_t channel = read * job.outer * job.inner * item
    job.far = exceeds(L3 // FAR, job, item, touched(job))
    if job.by_columns:
        # Of a few rows: the threads need not wait for each other, nor fetch what the others found.
        if job.rows > FEW_ROWS or not is_spread(job, W) or job.channels < 2 * job.threads * W:
            return False
        job.group = job.turn = min(COLUMNS // BLOCK * W, up(up(job.channels, 4 * job.threads), W) * W)
    elif job.threads > 1 and job.channels < 4 * job.threads:
        return False
    elif job.outer > 1 and job.far and not exceeds(L3, job, item, touched(job)):
        return False  # long runs from L3 take less time than short ones
    else:
        job.group = max(<Py_ssize_t> 1, min(L2 // 2 // channel, job.channels // (4 * job.threads)))
        # Several images would be read in short runs, if only a few channels took their turn.
        job.turn = max(L1 // 2 // channel, <Py_ssize_t> 1) if job.outer == 1 else job.group
        job.streams = job.kept != job.out and is_streamed(job, item, touched(job))
    job.units = up(job.channels, job.group)
    job.at_mean, job.at_scale, job.at_shift, job.at_slope = job.mean, job.scale, job.shift, job.slope
    job.at_bias = job.bias
    return True
