"""Rows, along which the weights run: layer normalization. Sums are those of planes, in a loop without their cases; the map is its own."""

cdef enum:
    ROWS = 8             # rows at most that are summed before they are mapped: the last steps of their sums go on at once
    ROW_BYTES = 4096     # of floats at most; of halves, which take longer to compute for a byte, twice, of doubles half as many
    BACK_BYTES = 16384   # of each array of a backward
    ROW_TILE = 64        # rows whose columns are summed before they are merged in double
    FEW_COLUMNS = 128    # that are merged together


cdef inline Block[T] along(
    TypedCall[Forward, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t j, Py_ssize_t n, Block[T] mean, Block[T] scale, Block[T] shift,
    const void* weight, const void* bias
) noexcept nogil:
    """A block of a row before its activation; weight and bias, which may be NULL, lie from j on."""
    cdef Block[T] z = Block[T].fma(load(a.x + at, n, mean) - mean, scale, shift)
    if weight != NULL:
        z = Block[T].fma(z, Block[T].get(weight, j), Block[T].get(bias, j))
    if Forward is FusedNormalize:
        if job.residual != NULL:
            z = z + load(a.residual + at, n, mean)
    return z


cdef inline void map_row(
    TypedCall[Forward, T]* job, Arrays[T] a, Py_ssize_t at, Py_ssize_t j, Py_ssize_t end, Block[T] mean, Block[T] scale, Block[T] shift,
    const void* weight, const void* bias, bint nontemporal
) noexcept nogil:
    """Map a row that ends at `end`, and whose weights lie from j on. What the loop needs is in variables: stores may be anywhere."""
    cdef Py_ssize_t W = Block[T].width(), i, few
    cdef Block[T] z
    cdef Block[T] several[FEW]
    if Forward is FusedNormalize:
        while job.activation.is_smooth() and at + W <= end:
            few = min(<Py_ssize_t> FEW, (end - at) // W)
            for i in range(few):
                several[i] = along(job, &a, at + i * W, j + i * W, W, mean, scale, shift, weight, bias)
            Block[T].smooth(several, few, job.activation, False)
            for i in range(few):
                store(a.out + at + i * W, several[i], W, nontemporal)
            at += few * W
            j += few * W
    while at + W <= end:
        z = along(job, &a, at, j, W, mean, scale, shift, weight, bias)
        if Forward is FusedNormalize:
            z = Block[T].activation_forward(z, job.activation)
        store(a.out + at, z, W, nontemporal)
        at += W
        j += W
    if at < end:
        z = along(job, &a, at, j, end - at, mean, scale, shift, weight, bias)
        if Forward is FusedNormalize:
            z = Block[T].activation_forward(z, job.activation)
        z.store_part(a.out + at, end - at)


cdef void map_along(TypedCall[Forward, T]* job, Py_ssize_t rows, Py_ssize_t number, Py_ssize_t ahead) noexcept nogil:
    """Map rows that are not left, with a mean and a scale of each, and weight and bias along them; `number` is that of the first.

    So many rows ahead are asked for meanwhile, of long ones the beginning: the processor foresees no row by itself.
    """
    cdef Py_ssize_t k = job.inner, r, j
    cdef Arrays[T] a = job.arrays()
    cdef Block[T] mean, scale, shift
    cdef bint affine = job.weight != NULL or job.bias != NULL
    cdef const void* weight = job.at_scale
    cdef const void* bias = job.at_shift
    cdef bint nontemporal = job.nontemporal and k * <Py_ssize_t> sizeof(T) % LINE == 0 and Block[T].to_line(a.out, 1) == 0
    for r in range(rows):
        if r < ahead:
            Block[T].prefetch_near(a.x + (rows + r) * k, min(k, ROW_BYTES // <Py_ssize_t> sizeof(T)))
        if Block[T].value(job.invstd, r) < 0:
            continue  # it is left
        mean, scale, shift = Block[T].splat(job.mean, r), Block[T].splat(job.scale, r), Block[T].splat(job.shift, r)
        j = (number + r) * k % job.period
        if Forward is FusedNormalize:  # its code is long
            map_row(job, a, r * k, j, r * k + k, mean, scale, shift, weight if affine else NULL, bias, nontemporal)
        elif not affine:
            map_row(job, a, r * k, 0, r * k + k, mean, scale, shift, NULL, NULL, nontemporal)
        elif nontemporal:
            map_row(job, a, r * k, j, r * k + k, mean, scale, shift, weight, bias, True)
        else:
            map_row(job, a, r * k, j, r * k + k, mean, scale, shift, weight, bias, False)


cdef inline void sum_row(TypedCall[Forward, T]* job, const T* x, Py_ssize_t c) noexcept nogil:
    """The sums over a row around its pivot, which is 0 where the mean is taken to be."""
    cdef Py_ssize_t W = Block[T].width(), j = 0, end
    cdef Block[T] zero = Block[T].constant(0), pivot = Block[T].constant(job.pivots[c]), sum, dot, d
    job.sums[c] = job.dots[c] = 0
    while j < job.inner:
        sum = dot = zero
        end = min(job.inner, j + CHAIN * W)
        while j + W <= end:
            d = Block[T].load(x + j) - pivot
            sum = sum + d
            dot = Block[T].fma(d, d, dot)
            j += W
        if j < end:
            d = load(x + j, end - j, pivot) - pivot
            sum = sum + d
            dot = Block[T].fma(d, d, dot)
            j = end
        job.sums[c] += sum.total()
        job.dots[c] += dot.total()


cdef void sum_few_rows(TypedCall[Forward, T]* job, Py_ssize_t rows) noexcept nogil:
    """The merged sums of rows. What is not of one tile, with a pivot that is near and sums in range, is summed as planes are."""
    cdef TypedCall[GradSums, T] squares
    cdef Py_ssize_t c, tile
    if job.uncentered:  # x^2 is summed as a gradient's dy (x - mean) is, with x as dy and no mean
        squares = (<TypedCall[GradSums, T]*> job)[0]
        squares.dy, squares.at_mean = job.x, job.at_mean
        squares.sum_dy, squares.sum_dy_xmu = job.batch_mean, job.batch_m2
        memset(job.pivots, 0, rows * sizeof(double))
    else:
        for tile in range(job.tiles):
            find_pivots(<TypedCall[Stats, T]*> job, 0, rows, tile)
    if job.tiles == 1:
        for c in range(rows):
            sum_row(job, job.arrays().x + c * job.inner, c)
        for c in range(rows):
            if job.uncentered:
                if out_of_range(&squares, c):
                    sum_planes(&squares, c, c + 1, 0)
            elif out_of_range(<TypedCall[Stats, T]*> job, c) or not is_near(job.sums[c], job.dots[c], job.inner):
                sum_planes(<TypedCall[Stats, T]*> job, c, c + 1, 0)
    elif job.uncentered:
        sum_channels(&squares, 0, rows)
    else:
        sum_channels(<TypedCall[Stats, T]*> job, 0, rows)
    if job.uncentered:
        merge_sums(&squares, 0, rows)
    else:
        merge_stats(job, 0, rows)


cdef void rows_unit(TypedCall[Forward, T]* job, Py_ssize_t unit) noexcept nogil:
    """Several rows: a few at a time, statistics, then the map."""
    cdef Py_ssize_t first = unit * job.channels_per_unit, last = min(first + job.channels_per_unit, job.channels), n, c, size
    cdef Py_ssize_t together = min(<Py_ssize_t> ROWS, ROW_BYTES * 4 // <Py_ssize_t> sizeof(T) // (job.inner * <Py_ssize_t> sizeof(T)))
    cdef Py_ssize_t item = Block[T].item()
    cdef double partial[3 * MOST_TILES]
    cdef double vectors[6 * ROWS]
    cdef double low, invstd
    cdef TypedCall[Forward, T] own = job[0]
    together = max(<Py_ssize_t> 1, min(together, MOST_TILES // job.tiles))
    own.pivots, own.sums, own.dots = partial, partial + MOST_TILES, partial + 2 * MOST_TILES
    own.batch_mean, own.batch_m2, own.batch_mean_lo = vectors, vectors + ROWS, vectors + 2 * ROWS
    own.scale, own.shift = vectors + 3 * ROWS, vectors + 4 * ROWS
    own.at_mean = vectors + 5 * ROWS
    memset(vectors + 5 * ROWS, 0, ROWS * sizeof(double))
    while first < last:
        n = min(together, last - first)
        size = first * job.inner * sizeof(T)
        own.x, own.out, own.residual = further(job.x, size), further(job.out, size), further(job.residual, size)
        own.mean, own.mean_lo = further(job.mean, first * item), further(job.mean_lo, first * item)
        own.invstd = further(job.invstd, first * item)
        own.channels = own.width = n
        sum_few_rows(&own, n)
        for c in range(n):
            fold_part(&own, c, &low, &invstd)
            Block[T].set_value(own.scale, c, narrow(invstd, Block[T].largest()))
            Block[T].set_value(own.shift, c, 0 - lost(low, invstd))
            if is_unusual(own.batch_m2[c], invstd, invstd, <T*> NULL):
                leave(&own, c, c + 1)
                job.any_left = True
        map_along(&own, n, first, min(n, last - first - n))
        first += n
    if own.nontemporal:
        fence()


cdef const void* padded(const void* vector, double instead, Py_ssize_t n, Py_ssize_t row, char* room, T* tag) noexcept nogil:
    """A vector of channels, with what a block may read behind it if rows are not whole blocks; a number where there is none."""
    cdef Py_ssize_t item = Block[T].item(), c
    if vector != NULL and row % Block[T].width() == 0:
        return vector  # a copy would have to be fetched by the other threads
    if vector == NULL:
        for c in range(n):
            Block[T].set_value(room, c, instead)
    else:
        memcpy(room, vector, n * item)
    memset(room + n * item, 0, BLOCK)
    return room


cdef Status forward_rows(TypedCall[Forward, T]* job) noexcept nogil:
    """A forward of rows, along which the weights run."""
    cdef Plan p
    cdef Task t
    cdef int arrays = 2 + (job.residual != NULL)
    cdef Py_ssize_t size = job.period * Block[T].item() + BLOCK
    cdef char* room = <char*> scratch(2 * size)
    if room == NULL:
        return NO_MEMORY
    job.at_scale = padded(job.weight, 1, job.period, job.group, room, <T*> NULL)
    job.at_shift = padded(job.bias, 0, job.period, job.group, room + size, <T*> NULL)
    job.channels, job.inner = job.batch * job.channels // job.group, job.group
    job.batch = 1
    t = task(job, 1, arrays, arrays)
    make_plan(&p, &t)
    job.follow(p.tiles, p.sums)
    if not p.resident:
        job.channels_per_unit = div_up(job.channels, job.threads)
        job.channels_per_pass = 1
        job.units = div_up(job.channels, job.channels_per_unit)
        job.bytes = arrays * job.channels * job.inner * sizeof(T)
    parallel(<unit_fn> rows_unit[Forward, T], job, job.units, job.threads, False, job.bytes, job.host)
    return LEFT if job.any_left else DONE


cdef void sum_row_gradient(TypedCall[GradInput, T]* job, Arrays[T]* a, Py_ssize_t at, Block[T] mean, double* sums) noexcept nogil:
    """Sums over a row of the gradient times the weight, and of that times x - mean."""
    cdef Py_ssize_t W = Block[T].width(), j = 0, end
    cdef Block[T] zero = Block[T].constant(0), sum, dot, g
    sums[0] = sums[1] = 0
    while j < job.inner:
        sum = dot = zero
        end = min(job.inner, j + CHAIN * W)
        while j + W <= end:
            g = Block[T].load(a.dy + at + j) * Block[T].get(job.at_scale, j)
            sum = sum + g
            dot = Block[T].fma(g, Block[T].load(a.x + at + j) - mean, dot)
            j += W
        if j < end:
            g = load(a.dy + at + j, end - j, zero) * Block[T].get(job.at_scale, j)
            sum = sum + g
            dot = Block[T].fma(g, load(a.x + at + j, end - j, mean) - mean, dot)
            j = end
        sums[0] += sum.total()
        sums[1] += dot.total()


cdef inline void sum_along(
    TypedCall[GradInput, T]* job, Arrays[T]* a, Py_ssize_t first, Py_ssize_t rows, Py_ssize_t j, Py_ssize_t n, char* dweight, char* dbias
) noexcept nogil:
    """Add a few rows of n columns, at most a block, to the gradients of weight and bias."""
    cdef Block[T] of_weight = Block[T].get(dweight, j), of_bias = Block[T].get(dbias, j), zero = Block[T].constant(0), dy, d
    cdef Py_ssize_t r
    for r in range(first, first + rows):
        d = Block[T].splat(job.mean, r)
        d = load(a.x + r * job.inner + j, n, d) - d
        dy = load(a.dy + r * job.inner + j, n, zero)
        of_bias = of_bias + dy
        of_weight = Block[T].fma(dy, Block[T].fma(d, Block[T].splat(job.at_slope, r), Block[T].splat(job.at_shift, r)), of_weight)
    of_weight.put(dweight, j)
    of_bias.put(dbias, j)


cdef inline void map_row_gradient(
    TypedCall[GradInput, T]* job, Arrays[T]* a, Py_ssize_t at, Block[T] mean, Block[T] scale, Block[T] offset, Block[T] slope
) noexcept nogil:
    """Map a row. What the loop needs is in variables: stores may be anywhere."""
    cdef Py_ssize_t W = Block[T].width(), k = job.inner, j = 0
    cdef const T* x = a.x + at
    cdef const T* dy = a.dy + at
    cdef T* out = a.out + at
    cdef const void* weight = job.at_scale
    cdef Block[T] g
    while j + W <= k:
        g = Block[T].fma(Block[T].load(x + j) - mean, slope, Block[T].load(dy + j) * Block[T].get(weight, j) - offset)
        store(out + j, scale * g, W, False)
        j += W
    if j < k:
        g = Block[T].fma(load(x + j, k - j, mean) - mean, slope, load(dy + j, k - j, mean) * Block[T].get(weight, j) - offset)
        store(out + j, scale * g, k - j, False)


cdef void undo_row(
    TypedCall[FusedGradInput, T]* job, Arrays[T]* a, Py_ssize_t at, Block[T] mean, Block[T] scale, Block[T] shift
) noexcept nogil:
    """Leave dy before the activation, of a row that begins at `at`, in dz."""
    cdef TypedCall[FusedNormalize, T]* of_z = <TypedCall[FusedNormalize, T]*> job
    cdef Py_ssize_t W = Block[T].width(), j = 0, i, few
    cdef Block[T] z
    cdef Block[T] several[FEW]
    while job.activation.is_smooth() and j + W <= job.inner:
        few = min(<Py_ssize_t> FEW, (job.inner - j) // W)
        for i in range(few):
            several[i] = along(of_z, a, at + j + i * W, j + i * W, W, mean, scale, shift, job.at_scale, job.at_bias)
        Block[T].smooth(several, few, job.activation, True)
        for i in range(few):
            store(a.dz + at + j, Block[T].load(a.dy + at + j) * several[i], W, False)
            j += W
    while j < job.inner:
        few = min(W, job.inner - j)
        z = along(of_z, a, at + j, j, few, mean, scale, shift, job.at_scale, job.at_bias)
        store(a.dz + at + j, Block[T].activation_backward(load(a.dy + at + j, few, mean), z, job.activation), few, False)
        j += few


cdef void backward_rows_unit(TypedCall[GradInput, T]* job, Py_ssize_t unit) noexcept nogil:
    """A tile of rows, a few at a time: sums along each, sums of each column, and then, because dx may be dy, the map."""
    cdef bint fused = sizeof(T) >= 4 and job.dz != NULL
    cdef Py_ssize_t together = max(<Py_ssize_t> 2, min(<Py_ssize_t> ROWS, BACK_BYTES // (job.inner * <Py_ssize_t> sizeof(T))))
    cdef Py_ssize_t first = unit * ROW_TILE, last = min(first + ROW_TILE, job.channels), W = Block[T].width(), n, r, j
    cdef Py_ssize_t size = job.inner * Block[T].item() + BLOCK
    cdef char* dweight = <char*> job.expanded + 2 * unit * size
    cdef double sums[2 * ROWS]
    cdef double g0, g1, invstd, low
    cdef Arrays[T] whole = job.arrays(), a = whole
    if fused:
        a.dy = whole.dz
    memset(dweight, 0, 2 * size)
    while first < last:
        n = min(together, last - first)
        for r in range(n):
            if fused:
                undo_row(
                    <TypedCall[FusedGradInput, T]*> job, &whole, (first + r) * job.inner, Block[T].splat(job.mean, first + r),
                    Block[T].splat(job.invstd, first + r), Block[T].splat(job.at_shift, first + r)
                )
            sum_row_gradient(job, &a, (first + r) * job.inner, Block[T].splat(job.mean, first + r), sums + 2 * r)
        j = 0
        while j + W <= job.inner:
            sum_along(job, &a, first, n, j, W, dweight, dweight + size)
            j += W
        if j < job.inner:
            sum_along(job, &a, first, n, j, job.inner - j, dweight, dweight + size)
        for r in range(n if job.out != NULL else 0):
            low, invstd = Block[T].value(job.mean_lo, first + r), Block[T].value(job.invstd, first + r)
            g1 = invstd * (invstd * (sums[2 * r + 1] - lost(low, sums[2 * r])) / job.inner)
            g0 = (0 if job.uncentered else sums[2 * r] / job.inner) - lost(low, g1)
            map_row_gradient(
                job, &a, (first + r) * job.inner, Block[T].splat(job.mean, first + r), Block[T].splat(job.invstd, first + r),
                Block[T].constant(g0), Block[T].constant(-g1)
            )
        first += n


cdef void merge_columns(TypedCall[GradInput, T]* job, Py_ssize_t tiles, Py_ssize_t size) noexcept nogil:
    """The gradients of weight and bias, from those of tiles, in double; a few columns of all tiles at a time."""
    cdef char* room = <char*> job.expanded
    cdef double dweight[FEW_COLUMNS]
    cdef double dbias[FEW_COLUMNS]
    cdef Py_ssize_t first = 0, tile, n, c
    while first < job.inner:
        n = min(<Py_ssize_t> FEW_COLUMNS, job.inner - first)
        memset(dweight, 0, sizeof(dweight))
        memset(dbias, 0, sizeof(dbias))
        for tile in range(tiles):
            for c in range(n):
                dweight[c] += Block[T].value(room + 2 * tile * size, first + c)
            for c in range(n):
                dbias[c] += Block[T].value(room + 2 * tile * size + size, first + c)
        for c in range(n):
            Block[T].set_value(job.dweight, first + c, dweight[c])
            Block[T].set_value(job.dbias, first + c, dbias[c])
        first += n


cdef Status backward_rows(TypedCall[Backward, T]* job) noexcept nogil:
    """Gradients of rows along which the weights run."""
    cdef Py_ssize_t rows = job.batch, k = job.channels, item = Block[T].item(), size = k * item + BLOCK
    cdef Py_ssize_t tiles = div_up(rows, ROW_TILE), c, bytes, kept = 0
    cdef Py_ssize_t total = 2 * size + rows * item + BLOCK + 2 * tiles * size
    cdef char* room
    cdef double low
    if Backward is FusedGradInput:
        job.dz = job.out if job.dresidual == NULL else job.dresidual
        if sizeof(T) < 4:
            return LEFT  # dy before the activation would be rounded
        if job.dz == NULL or job.dz == job.x:
            kept = rows * k * sizeof(T)  # it lies nowhere else
    room = <char*> scratch(total + kept)
    if room == NULL:
        return NO_MEMORY
    if kept > 0:
        job.dz = room + total
    job.at_scale = padded(job.weight, 1, k, k, room, <T*> NULL)
    job.at_shift, job.at_slope = room + size, job.invstd  # of the normalized value
    if Backward is FusedGradInput:
        job.at_bias = padded(job.bias, 0, k, k, room + size + rows * item + BLOCK, <T*> NULL)
    job.expanded = <double*> (room + 2 * size + rows * item + BLOCK)
    for c in range(rows):
        low = Block[T].value(job.mean_lo, c)
        Block[T].set_value(room + size, c, 0 - lost(low, Block[T].value(job.invstd, c)))
    job.channels, job.inner = rows, k
    bytes = (reads_of(job) + (job.out != NULL) + (job.dresidual != NULL)) * rows * k * sizeof(T)
    parallel(<unit_fn> backward_rows_unit[T], job, tiles, job.threads, False, bytes, job.host)
    merge_columns(<TypedCall[GradInput, T]*> job, tiles, size)
    return DONE
