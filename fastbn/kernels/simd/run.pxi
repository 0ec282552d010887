"""Units of work, whole calls made of them, and the tables of whole calls by dtype."""

cdef void sum_unit(Job[Sum, T]* job, Py_ssize_t unit) noexcept nogil:
    """One tile of a group of channels or columns."""
    cdef Py_ssize_t tile = unit % job.tiles, first = unit // job.tiles * job.group, last
    if job.by_columns:
        sum_columns(job, tile, first, min(first + job.group, job.columns))
    else:
        last = min(first + job.group, job.channels)
        if Sum is Stats:
            find_shifts(job, first, last, tile)
        sum_planes(job, first, last, tile)


cdef void map_unit(Job[Map, T]* job, Py_ssize_t unit) noexcept nogil:
    """Several rows, several planes, or a piece of one plane."""
    cdef Py_ssize_t pieces, first, groups
    cdef Arrays[T] a = job.arrays()
    if job.by_columns:
        groups = (job.columns + job.group - 1) // job.group
        first = unit % groups * job.group
        if unit == 0 and job.skip > 0:
            map_rows(job, &a, job.skip, 1, -job.skip, job.skip, False)
        unit = unit // groups * job.unit
        if unit < job.rows:
            map_columns(job, unit, min(job.unit, job.rows - unit), first, min(first + job.group, job.columns))
        elif first < job.rest:
            map_columns(job, job.rows, 1, first, min(first + job.group, job.rest))
    elif job.unit >= job.inner:
        first = unit * (job.unit // job.inner)
        map_whole(job, first, min(job.unit // job.inner, job.outer * job.channels - first))
    else:
        pieces = (job.inner + job.unit - 1) // job.unit
        first = unit % pieces * job.unit
        map_planes(job, unit // pieces, 1, first, min(job.unit, job.inner - first))
    if job.streams:
        fence()


cdef void sum_channels(Job[Sum, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """All tiles of channels first ... last; columns have but one."""
    cdef Py_ssize_t tile
    if job.by_columns:
        sum_columns(job, 0, first, last)
        return
    while first < last:
        for tile in range(job.tiles):
            sum_planes(job, first, min(first + PLANES, last), tile)
        first += PLANES


cdef void map_group(Job[Map, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """All planes of channels first ... last, those read last before the others."""
    cdef Py_ssize_t n, piece = MAP_PIECE
    if job.by_columns:
        map_columns(job, 0, job.rows, first, last)
        return
    if job.outer == 1 and job.turn == 1 and not job.far:
        for n in range(up(job.inner, piece) - 1, -1, -1):
            map_planes(job, first, 1, n * piece, min(piece, job.inner - n * piece))
        return
    for n in range(job.outer - 1, -1, -1):
        map_whole(job, n * job.channels + first, last - first)


cdef Job[InputGradient, T] of_kept(Job[Backward, T]* job) noexcept nogil:
    """What is left to do where the sums kept dy before the activation."""
    cdef Job[InputGradient, T] after = (<Job[InputGradient, T]*> job)[0]
    after.dy = job.kept
    after.residual = after.dresidual = NULL
    return after


cdef void forward_unit(Job[Forward, T]* job, Py_ssize_t unit) noexcept nogil:
    """All planes of a group of channels: statistics, then, while they are in the cache, the map."""
    cdef Py_ssize_t first = unit * job.group, last = min(first + job.group, job.channels), tile, end
    if not job.by_columns:
        for tile in range(job.tiles):
            find_shifts(<Job[Stats, T]*> job, first, last, tile)
    while first < last:
        end = min(first + job.turn, last)
        sum_channels(<Job[Stats, T]*> job, first, end)
        merge_stats(job, first, end)
        if fold_batch(job, first, end):
            map_group(job, first, end)
        first = end
    if job.streams:
        fence()


cdef void backward_unit(Job[Backward, T]* job, Py_ssize_t unit) noexcept nogil:
    """All planes of a group of channels: sums, then, while they are in the cache, the map."""
    cdef Py_ssize_t first = unit * job.group, last = min(first + job.group, job.channels), end
    cdef Job[InputGradient, T] after
    if job.kept != NULL:
        after = of_kept(job)
    while first < last:
        end = min(first + job.turn, last)
        if Backward is InputGradient:
            sum_channels(<Job[GradSums, T]*> job, first, end)
        else:
            sum_channels(<Job[ActiveSums, T]*> job, first, end)
        merge_sums(job, first, end)
        fold_gradient(job, first, end)
        if job.kept != NULL:
            map_group(&after, first, end)
        else:
            map_group(job, first, end)
        first = end
    if job.streams:
        fence()


cdef bint allocate(Call* job, Py_ssize_t W, Py_ssize_t tiles) noexcept nogil:
    """Give a call its scratch memory; False where there is none."""
    cdef Py_ssize_t C = job.channels, size = tiles * job.width
    cdef double* p = <double*> scratch((3 * size + 6 * C + 5 * (job.columns + 2 * W)) * sizeof(double) + C)
    if p == NULL:
        return False
    job.shifts, job.sums, job.squares = p, p + size, p + 2 * size
    p += 3 * size
    # What the caller did not bring.
    if job.first == NULL:
        job.first, job.second = p, p + C
    if job.low == NULL:
        job.low = p + 2 * C
    if job.scale == NULL:
        job.scale = p + 3 * C
    if job.shift == NULL:
        job.shift = p + 4 * C
    job.slope = p + 5 * C
    job.spread = p + 6 * C
    job.left = <char*> (job.spread + 5 * (job.columns + 2 * W))
    return True


cdef const void* spread(Job[Op, T]* job, const void* vector, Py_ssize_t index) noexcept nogil:
    """A vector of channels as one of columns, from `skip` on, with room behind it; planes take it as it is."""
    if not job.by_columns:
        return vector
    # What a training forward has found is copied even so: lines that other cores read are slow to write in the next call.
    if is_spread(job, Block[T].width()) and job.skip == 0 and not (Op in Forward and job.backwards):
        return vector
    cdef Py_ssize_t W = Block[T].width(), size = BLOCK // W, repeat, c
    cdef char* p = <char*> (job.spread + index * (job.columns + 2 * W))
    if job.run == 1:
        for repeat in range(job.repeats):
            memcpy(p + repeat * job.channels * size, vector, job.channels * size)
    else:
        for c in range(job.channels):
            put_run[T](p, c * job.run, job.run, Block[T].splat(vector, c))
    memcpy(p + job.columns * size, p, job.skip * size)
    memset(p + (job.columns + job.skip) * size, 0, BLOCK)
    return p + job.skip * size


cdef void run_sums(Job[Sum, T]* job) noexcept nogil:
    cdef Py_ssize_t units = sum_units(job, Block[T].width(), sizeof(T))
    if Sum is not Stats:
        job.at_mean = spread(job, job.mean, 0)
    if Sum is ActiveSums:
        job.at_scale = spread(job, job.scale, 1)
        job.at_bias = spread(job, job.bias, 2)
    parallel(<unit_fn> sum_unit[Sum, T], job, units, job.threads, False)
    if Sum is Stats:
        merge_stats(job, 0, job.channels)
    else:
        merge_sums(job, 0, job.channels)


cdef void run_map(Job[Map, T]* job) noexcept nogil:
    cdef Py_ssize_t W = Block[T].width(), size = job.outer * job.channels * job.inner
    choose_map(job, W)
    if job.by_columns and job.columns * <Py_ssize_t> sizeof(T) % LINE == 0:
        # Let rows start on cache lines, wherever the array starts: columns are the same from there, only rotated.
        job.skip = Block[T].to_line(job.arrays().out, size)
        job.rows = (size - job.skip) // job.columns
        job.rest = (size - job.skip) % job.columns
    job.at_mean = spread(job, job.mean, 0)
    job.at_scale = spread(job, job.scale, 1)
    job.at_shift = spread(job, job.shift, 2)
    if Map in Backward:
        job.at_slope = spread(job, job.slope, 3)
    if Map is ActiveGradient:
        job.at_bias = spread(job, job.bias, 4)
    map_units(job, W, sizeof(T), touched(job))
    parallel(<unit_fn> map_unit[Map, T], job, job.units, job.threads, job.backwards)


cdef bint sum_call(Job[Sum, T]* job) noexcept nogil:
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), job.tiles):
        return False
    run_sums(job)
    return True


cdef bint map_call(Job[Map, T]* job) noexcept nogil:
    cdef const void* slope = job.slope
    cdef Py_ssize_t c
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), 0):
        return False
    if Map in Backward:
        for c in range(job.channels):
            Block[T].set_value(job.slope, c, -Block[T].value(slope, c))
    run_map(job)
    return True


cdef bint inference_call(Job[Forward, T]* job) noexcept nogil:
    """`invstd` holds the variances or, where they are `inverted`, one over the deviations."""
    cdef double invstd
    cdef Py_ssize_t c
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), 0):
        return False
    for c in range(job.channels):
        invstd = Block[T].value(job.invstd, c)
        if not job.inverted:
            invstd = 1 / sqrt(invstd + job.eps)
        fold_channel(job, c, 0 if job.mean_lo == NULL else Block[T].value(job.mean_lo, c), invstd)
    run_map(job)
    return True


cdef bint forward_call(Job[Forward, T]* job) noexcept nogil:
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), job.tiles):
        return False
    if grouped(job, Block[T].width(), sizeof(T)):
        parallel(<unit_fn> forward_unit[Forward, T], job, job.units, job.threads, False)
    else:
        run_sums(<Job[Stats, T]*> job)
        job.backwards = True
        if fold_batch(job, 0, job.channels):
            run_map(job)
    return True


cdef void* place_to_keep(Call* job, Py_ssize_t item) noexcept nogil:
    """Where to keep dy before the activation, if it pays, and nothing is lost by it: the residual's gradient, or dx."""
    if item < 4:
        return NULL  # the map would read it rounded
    if job.dresidual != NULL:
        return job.dresidual
    if not job.activation.is_smooth() or job.out == job.x or job.out == job.dy or job.out == job.residual:
        return NULL
    return job.out


cdef bint backward_call(Job[Backward, T]* job) noexcept nogil:
    cdef Job[InputGradient, T] after
    if Backward is ActiveGradient:
        job.kept = place_to_keep(job, sizeof(T))
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), job.tiles):
        return False
    if grouped(job, Block[T].width(), sizeof(T)):
        parallel(<unit_fn> backward_unit[Backward, T], job, job.units, job.threads, False)
    else:
        if Backward is InputGradient:
            run_sums(<Job[GradSums, T]*> job)
        else:
            run_sums(<Job[ActiveSums, T]*> job)
        fold_gradient(job, 0, job.channels)
        job.backwards = True
        if job.kept != NULL:
            after = of_kept(job)
            run_map(&after)
        else:
            run_map(job)
    if job.dweight != NULL:
        gradients(<Job[GradSums, T]*> job)
    return True


cdef bint reduce_call(Job[Sum, T]* job) noexcept nogil:
    """The sums of the backward alone, corrected by the low part of the mean."""
    cdef Py_ssize_t c
    if not sum_call(job):
        return False
    if job.mean_lo != NULL:
        for c in range(job.channels):
            job.second[c] -= Block[T].value(job.mean_lo, c) * job.first[c]
    return True


ctypedef bint (*call_fn)(void* job) noexcept nogil

# Of each dtype, plain and active.
cdef call_fn[4][2] GRAD_SUMS, NORMALIZE, GRAD_INPUT, INFERENCE, FORWARD, BACKWARD, REDUCE
cdef call_fn[4] STATS


cdef void register(T* tag, int dtype) noexcept:
    STATS[dtype] = <call_fn> sum_call[Stats, T]
    GRAD_SUMS[dtype][:] = [<call_fn> sum_call[GradSums, T], <call_fn> sum_call[ActiveSums, T]]
    REDUCE[dtype][:] = [<call_fn> reduce_call[GradSums, T], <call_fn> reduce_call[ActiveSums, T]]
    NORMALIZE[dtype][:] = [<call_fn> map_call[Normalize, T], <call_fn> map_call[ActiveNormalize, T]]
    GRAD_INPUT[dtype][:] = [<call_fn> map_call[InputGradient, T], <call_fn> map_call[ActiveGradient, T]]
    INFERENCE[dtype][:] = [<call_fn> inference_call[Normalize, T], <call_fn> inference_call[ActiveNormalize, T]]
    FORWARD[dtype][:] = [<call_fn> forward_call[Normalize, T], <call_fn> forward_call[ActiveNormalize, T]]
    BACKWARD[dtype][:] = [<call_fn> backward_call[InputGradient, T], <call_fn> backward_call[ActiveGradient, T]]

register[float](NULL, 0)
register[double](NULL, 1)
register[bf16](NULL, 2)
register[f16](NULL, 3)
