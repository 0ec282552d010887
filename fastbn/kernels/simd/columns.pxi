"""Columns (nspc): the loops over rows of channels."""

cdef inline void sum_rows(
    TypedCall[Sum, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t n, void* k, void* sums, void* dots,
    Py_ssize_t first, Py_ssize_t j
) noexcept nogil:
    """Add a few rows of n columns, at most a block, from column first + j on to the accumulators from index j on."""
    cdef Block[T] sum = Block[T].constant(0), dot = Block[T].constant(0)
    cdef Parameters[T] p
    load_parameters(job, first + j, &p)
    if Sum is Stats:
        p.mean = Block[T].get(k, j)
    sum_blocks(job, a, at + j, job.columns, rows, n, &p, &sum, &dot)
    (Block[T].get(sums, j) + sum).put(sums, j)
    (Block[T].get(dots, j) + dot).put(dots, j)


cdef inline void put_run(void* vector, Py_ssize_t first, Py_ssize_t run, Block[T] same) noexcept nogil:
    """Fill a run of columns, and what the next run overwrites."""
    cdef Py_ssize_t i = 0
    while i < run:
        same.put(vector, first + i)
        i += Block[T].width()


cdef inline double run_total(TypedCall[Sum, T]* job, void* sums, Py_ssize_t first) noexcept nogil:
    """The sum of the columns of one channel."""
    cdef Py_ssize_t W = Block[T].width(), i = 0
    cdef Block[T] total = Block[T].constant(0)
    while i < job.run:
        total = total + Block[T].get_first(sums, first + i, min(W, job.run - i))
        i += W
    return total.total()


cdef inline Block[T] sample_sum(const T* x, const Py_ssize_t* places) noexcept nogil:
    """The sum of a block of columns in four rows."""
    return (Block[T].load(x + places[0]) + Block[T].load(x + places[1])) + (Block[T].load(x + places[2]) + Block[T].load(x + places[3]))


cdef Block[T] sample_pivot(const T* x, const Py_ssize_t* places, Py_ssize_t sample) noexcept nogil:
    """The pivots of a block of columns, from a sample of 8 or 16 rows."""
    cdef Block[T] early = sample_sum(x, places), late = sample_sum(x, places + sample // 2)
    if sample == 16:
        early = early + sample_sum(x, places + 4)
        late = late + sample_sum(x, places + 12)
    return Block[T].pivot(
        early, late,
        Block[T].minimum(
            Block[T].minimum(Block[T].load(x + places[0]), Block[T].load(x + places[sample // 4])),
            Block[T].minimum(Block[T].load(x + places[sample // 2]), Block[T].load(x + places[sample * 3 // 4])),
        ),
        1.0 / sample,
    )


cdef Block[T] sample_pivot_of_few(const T* x, const Py_ssize_t* places, Py_ssize_t sample, Py_ssize_t n) noexcept nogil:
    """The same of fewer columns than a block has: from a copy, because one cannot read on."""
    cdef Columns room
    cdef T* rows = <T*> &room
    cdef Py_ssize_t at[16]
    cdef Py_ssize_t i
    for i in range(sample):
        at[i] = i * Block[T].width()
        Block[T].load_part(x + places[i], n, Block[T].constant(0)).store(rows + at[i])
    return sample_pivot(<const T*> rows, at, sample)


cdef inline void choose_pivots(
    TypedCall[Sum, T]* job, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t columns, void* k, T* tag
) noexcept nogil:
    """The pivots of the columns of a tile from an offset on: of each channel, from a sample."""
    cdef Py_ssize_t W = Block[T].width(), run = job.run, sample = 16 if rows > FEW_VALUES and run == 1 else 8, j = 0, i
    cdef const T* x = job.arrays().x + at
    cdef Py_ssize_t places[16]
    for i in range(sample):
        places[i] = (2 * i + 1) * rows // (2 * sample) * job.columns + (2 * i + 1) * run // (2 * sample)
    while run == 1 and j < columns:
        if j + W <= columns:
            sample_pivot(x + j, places, sample).put(k, j)
        else:
            sample_pivot_of_few(x + j, places, sample, columns - j).put(k, j)
        j += W
    while j < columns:
        put_run[T](k, j, run, Block[T].constant(Block[T].pivot_at(x + j, places)))
        j += run


cdef inline void add_columns(
    TypedCall[Sum, T]* job, Py_ssize_t tile, Py_ssize_t first, Py_ssize_t start, Py_ssize_t columns, void* k, void* sums, void* dots
) noexcept nogil:
    """The sums of the columns of a tile from first + start to first + columns, around their pivots; by index from `first` on."""
    cdef Py_ssize_t W = Block[T].width(), K = job.columns, rows = tile_rows(job, tile), at = tile_offset(job, tile) + first
    cdef Py_ssize_t r = 0, j = start, n, ahead
    cdef Arrays[T] a = job.arrays()
    cdef Block[T] zero = Block[T].constant(0)
    while j < columns:
        zero.put(sums, j)
        zero.put(dots, j)
        j += W
    while r < rows:
        n = min(<Py_ssize_t> BATCH, rows - r)
        j = start
        if n == BATCH:
            while j + W <= columns:
                if job.exceeds_l3:  # the next rows, one behind the other
                    ahead = at + (r + BATCH + j * BATCH // columns) * K + j * BATCH % columns
                    Block[T].prefetch(a.x + ahead, W * BATCH)
                    if Sum in Gradient:
                        Block[T].prefetch(a.dy + ahead, W * BATCH)
                sum_rows(job, &a, at + r * K, BATCH, W, k, sums, dots, first, j)
                j += W
        while j < columns:
            sum_rows(job, &a, at + r * K, n, min(W, columns - j), k, sums, dots, first, j)
            j += W
        r += BATCH


cdef inline bint store_totals(
    TypedCall[Sum, T]* job, Py_ssize_t index, double count, Py_ssize_t j, Py_ssize_t columns, void* k, void* sums, void* dots, T* tag
) noexcept nogil:
    """Store the sums of the columns from index j on by channels, from an index on; whether all may have kept their digits.

    The count is that of the values in a channel's sum.
    """
    cdef Py_ssize_t W = Block[T].width(), run = job.run, n
    cdef Block[T] sum, dot
    cdef bint fine = True
    while run == 1 and j < columns:
        n = min(W, columns - j)
        sum = Block[T].get(sums, j)
        dot = Block[T].get(dots, j)
        sum.put_double(job.sums + index, n)
        dot.put_double(job.dots + index, n)
        if Sum is Stats:
            Block[T].get(k, j).put_double(job.pivots + index, n)
            fine = fine and Block[T].is_near(sum, dot, allowance(count))
            fine = fine and Block[T].in_range(dot, sum, Block[T].get(k, j))
        else:
            fine = fine and Block[T].in_range(dot, Block[T].constant(0), Block[T].constant(1))
        index += n
        j += W
    while j < columns:
        job.sums[index] = run_total(job, sums, j)
        job.dots[index] = run_total(job, dots, j)
        if Sum is Stats:
            job.pivots[index] = Block[T].value(k, j)
            fine = fine and is_near(job.sums[index], job.dots[index], count)
        fine = fine and not out_of_range(job, index)
        index += 1
        j += run
    return fine


cdef void sum_columns(TypedCall[Sum, T]* job, Py_ssize_t tile, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """The sums of columns first ... last of one tile."""
    cdef Py_ssize_t run = job.run, step = Block[T].width() if run == 1 else run
    cdef Py_ssize_t rows = tile_rows(job, tile), at = tile_offset(job, tile) + first, index = tile * job.width + first // run
    cdef Py_ssize_t columns = min(last, tile_columns(job, tile)) - first, start = 0, end, j
    cdef Columns k, sums, dots
    cdef Parameters[T] p
    cdef bint moved
    if Sum is Stats:
        choose_pivots(job, at, rows, columns, &k, <T*> NULL)
    add_columns(job, tile, first, 0, columns, &k, &sums, &dots)
    if store_totals(job, index, rows * run, 0, columns, &k, &sums, &dots, <T*> NULL):
        return
    while start < columns:
        end = min(start + step, columns)
        moved = False
        for j in range(start, end):
            # All columns of a run share a pivot; the sums in `sums` may be those of the run before.
            if move_pivot(job, index + j // run, rows * run) if j % run == 0 else moved:
                moved = True
            if moved:
                Block[T].set_value(&k, j, job.pivots[index + j // run])
        if moved:
            add_columns(job, tile, first, start, end, &k, &sums, &dots)
            store_totals(job, index + start // run, rows * run, start, end, &k, &sums, &dots, <T*> NULL)
        start = end
    for j in range(columns // run):
        if out_of_range(job, index + j):
            load_parameters(job, first + j * run, &p)
            sum_in_double(job, index + j, at + j * run, rows, job.columns, run, &p)


cdef inline void map_rows(
    TypedCall[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t j, Py_ssize_t n, bint nontemporal
) noexcept nogil:
    """Map n columns from j on, at most a block, of a few rows."""
    cdef Parameters[T] p
    load_parameters(job, j, &p)
    map_blocks(job, a, at + j, job.columns, rows, n, nontemporal, &p)


cdef void map_columns(TypedCall[Map, T]* job, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Map columns first ... last of several rows."""
    cdef Py_ssize_t W = Block[T].width(), at = job.peel + row * job.columns, batch, j
    cdef Arrays[T] a = job.arrays()
    while rows > 0:
        batch = min(MAP_ROWS, rows)
        if job.exceeds_l3 and last - first <= COLUMNS // BLOCK * W and not job.activation.is_smooth():
            batch = 1  # whose parameters stay in L1
        j = first
        if batch < MAP_ROWS:
            while j + W <= last:
                map_rows(job, &a, at, batch, j, W, job.nontemporal)
                j += W
        else:
            while j + W <= last:
                map_rows(job, &a, at, MAP_ROWS, j, W, job.nontemporal)
                j += W
        if j < last:
            map_rows(job, &a, at, batch, j, last - j, False)
        at += batch * job.columns
        rows -= batch
