"""Columns (nspc): the loops over rows of channels."""

cdef inline void sum_rows(
    Job[Sum, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t n, void* k, void* sums, void* squares,
    Py_ssize_t first, Py_ssize_t j
) noexcept nogil:
    """Add a few rows of n columns, at most a block, from column first + j on to the accumulators from index j on."""
    cdef Block[T] sum = Block[T].constant(0), square = Block[T].constant(0)
    cdef Parameters[T] p
    of_columns(job, first + j, &p)
    if Sum is Stats:
        p.mean = Block[T].get(k, j)
    sum_blocks(job, a, at + j, job.columns, rows, n, &p, &sum, &square)
    (Block[T].get(sums, j) + sum).put(sums, j)
    (Block[T].get(squares, j) + square).put(squares, j)


cdef inline void put_run(void* vector, Py_ssize_t first, Py_ssize_t run, Block[T] same) noexcept nogil:
    """Fill a run of columns, and what the next run overwrites."""
    cdef Py_ssize_t i = 0
    while i < run:
        same.put(vector, first + i)
        i += Block[T].width()


cdef inline double run_total(Job[Sum, T]* job, void* sums, Py_ssize_t first) noexcept nogil:
    """The sum of the columns of one channel."""
    cdef Py_ssize_t W = Block[T].width(), i = 0
    cdef Block[T] total = Block[T].constant(0)
    while i < job.run:
        total = total + Block[T].get_first(sums, first + i, min(W, job.run - i))
        i += W
    return total.total()


cdef inline Block[T] sample_sum(const T* x, const Py_ssize_t* places, Py_ssize_t n) noexcept nogil:
    """The sum of n columns in four rows."""
    cdef Block[T] zero = Block[T].constant(0)
    return (take(x + places[0], n, zero) + take(x + places[1], n, zero)) + (take(x + places[2], n, zero) + take(x + places[3], n, zero))


cdef inline Block[T] sample_shift(const T* x, const Py_ssize_t* places, Py_ssize_t sample, Py_ssize_t n) noexcept nogil:
    """The shifts of n columns, from a sample of 8 or 16 rows."""
    cdef Block[T] zero = Block[T].constant(0), early = sample_sum(x, places, n), late = sample_sum(x, places + sample // 2, n)
    if sample == 16:
        early = early + sample_sum(x, places + 4, n)
        late = late + sample_sum(x, places + 12, n)
    return Block[T].shift(
        early, late,
        Block[T].lesser(
            Block[T].lesser(take(x + places[0], n, zero), take(x + places[sample // 4], n, zero)),
            Block[T].lesser(take(x + places[sample // 2], n, zero), take(x + places[sample * 3 // 4], n, zero)),
        ),
        1.0 / sample,
    )


cdef inline void choose_shifts(
    Job[Sum, T]* job, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t columns, void* k, T* tag
) noexcept nogil:
    """The shifts of the columns of a tile from an offset on: of each channel, from a sample."""
    cdef Py_ssize_t W = Block[T].width(), run = job.run, sample = 16 if rows > FEW_VALUES and run == 1 else 8, j = 0, i
    cdef const T* x = job.arrays().x + at
    cdef Py_ssize_t places[16]
    for i in range(sample):
        places[i] = (2 * i + 1) * rows // (2 * sample) * job.columns + (2 * i + 1) * run // (2 * sample)
    while run == 1 and j < columns:
        if j + W <= columns:
            sample_shift(x + j, places, sample, W).put(k, j)
        else:
            sample_shift(x + j, places, sample, columns - j).put(k, j)
        j += W
    while j < columns:
        put_run[T](k, j, run, Block[T].constant(Block[T].shift_at(x + j, places)))
        j += run


cdef inline void add_columns(
    Job[Sum, T]* job, Py_ssize_t tile, Py_ssize_t first, Py_ssize_t start, Py_ssize_t columns, void* k, void* sums, void* squares
) noexcept nogil:
    """The sums of the columns of a tile from first + start to first + columns, around their shifts; by index from `first` on."""
    cdef Py_ssize_t W = Block[T].width(), K = job.columns, rows = tile_rows(job, tile), at = tile_offset(job, tile) + first
    cdef Py_ssize_t r = 0, j = start, n, ahead
    cdef Arrays[T] a = job.arrays()
    cdef Block[T] zero = Block[T].constant(0)
    while j < columns:
        zero.put(sums, j)
        zero.put(squares, j)
        j += W
    while r < rows:
        n = min(<Py_ssize_t> BATCH, rows - r)
        j = start
        if n == BATCH:
            while j + W <= columns:
                if job.far:  # the next rows, one behind the other
                    ahead = at + (r + BATCH + j * BATCH // columns) * K + j * BATCH % columns
                    Block[T].prefetch(a.x + ahead, W * BATCH)
                    if Sum in Gradient:
                        Block[T].prefetch(a.dy + ahead, W * BATCH)
                sum_rows(job, &a, at + r * K, BATCH, W, k, sums, squares, first, j)
                j += W
        while j < columns:
            sum_rows(job, &a, at + r * K, n, min(W, columns - j), k, sums, squares, first, j)
            j += W
        r += BATCH


cdef inline bint store_totals(
    Job[Sum, T]* job, Py_ssize_t index, double count, Py_ssize_t j, Py_ssize_t columns, void* k, void* sums, void* squares, T* tag
) noexcept nogil:
    """Store the sums of the columns from index j on by channels, from an index on; whether all may have kept their digits.

    The count is that of the values in a channel's sum.
    """
    cdef Py_ssize_t W = Block[T].width(), run = job.run, n
    cdef Block[T] sum, square
    cdef bint kept = True
    while run == 1 and j < columns:
        n = min(W, columns - j)
        sum = Block[T].get(sums, j)
        square = Block[T].get(squares, j)
        sum.put_double(job.sums + index, n)
        square.put_double(job.squares + index, n)
        if Sum is Stats:
            Block[T].get(k, j).put_double(job.shifts + index, n)
            kept = kept and Block[T].is_near(sum, square, allowance(count))
            kept = kept and Block[T].in_range(square, sum, Block[T].get(k, j))
        else:
            kept = kept and Block[T].in_range(square, Block[T].constant(0), Block[T].constant(1))
        index += n
        j += W
    while j < columns:
        job.sums[index] = run_total(job, sums, j)
        job.squares[index] = run_total(job, squares, j)
        if Sum is Stats:
            job.shifts[index] = Block[T].value(k, j)
            kept = kept and is_near(job.sums[index], job.squares[index], count)
        kept = kept and not is_lost(job, index)
        index += 1
        j += run
    return kept


cdef void sum_columns(Job[Sum, T]* job, Py_ssize_t tile, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """The sums of columns first ... last of one tile."""
    cdef Py_ssize_t run = job.run, step = Block[T].width() if run == 1 else run
    cdef Py_ssize_t rows = tile_rows(job, tile), at = tile_offset(job, tile) + first, index = tile * job.width + first // run
    cdef Py_ssize_t columns = min(last, tile_columns(job, tile)) - first, start = 0, end, j
    cdef Columns k, sums, squares
    cdef Parameters[T] p
    cdef bint moved
    if Sum is Stats:
        choose_shifts(job, at, rows, columns, &k, <T*> NULL)
    add_columns(job, tile, first, 0, columns, &k, &sums, &squares)
    if store_totals(job, index, rows * run, 0, columns, &k, &sums, &squares, <T*> NULL):
        return
    while start < columns:
        end = min(start + step, columns)
        moved = False
        for j in range(start, end):
            # All columns of a run share a shift; the sums in `sums` may be those of the run before.
            if find_nearer_shift(job, index + j // run, rows * run) if j % run == 0 else moved:
                moved = True
            if moved:
                Block[T].set_value(&k, j, job.shifts[index + j // run])
        if moved:
            add_columns(job, tile, first, start, end, &k, &sums, &squares)
            store_totals(job, index + start // run, rows * run, start, end, &k, &sums, &squares, <T*> NULL)
        start = end
    for j in range(columns // run):
        if is_lost(job, index + j):
            of_columns(job, first + j * run, &p)
            sum_exactly(job, index + j, at + j * run, rows, job.columns, run, &p)


cdef inline void map_rows(
    Job[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t j, Py_ssize_t n, bint streams
) noexcept nogil:
    """Map n columns from j on, at most a block, of a few rows."""
    cdef Parameters[T] p
    of_columns(job, j, &p)
    map_blocks(job, a, at + j, job.columns, rows, n, streams, &p)


cdef void map_columns(Job[Map, T]* job, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Map columns first ... last of several rows."""
    cdef Py_ssize_t W = Block[T].width(), at = job.skip + row * job.columns, batch, j
    cdef Arrays[T] a = job.arrays()
    while rows > 0:
        batch = min(MAP_ROWS, rows)
        if job.far and last - first <= COLUMNS // BLOCK * W and not job.activation.is_smooth():
            batch = 1  # whose parameters stay in L1
        j = first
        if batch < MAP_ROWS:
            while j + W <= last:
                map_rows(job, &a, at, batch, j, W, job.streams)
                j += W
        else:
            while j + W <= last:
                map_rows(job, &a, at, MAP_ROWS, j, W, job.streams)
                j += W
        if j < last:
            map_rows(job, &a, at, batch, j, last - j, False)
        at += batch * job.columns
        rows -= batch
