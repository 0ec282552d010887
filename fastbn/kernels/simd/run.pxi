"""Units of work, and whole calls made of them."""

cdef void sum_unit(TypedCall[Sum, T]* job, Py_ssize_t unit) noexcept nogil:
    """One tile of a group of channels or columns: of columns all groups of a tile, so that a thread has the rows that it maps."""
    cdef Py_ssize_t groups, tile, first, last
    if job.by_columns:
        groups = div_up(job.columns, job.channels_per_unit)
        tile, first = unit // groups, unit % groups * job.channels_per_unit
        sum_columns(job, tile, first, min(first + job.channels_per_unit, job.columns))
    else:
        tile, first = unit % job.tiles, unit // job.tiles * job.channels_per_unit
        last = min(first + job.channels_per_unit, job.channels)
        if Sum is Stats:
            find_pivots(job, first, last, tile)
        sum_planes(job, first, last, tile)


cdef void map_unit(TypedCall[Map, T]* job, Py_ssize_t unit) noexcept nogil:
    """Several rows, several planes, or a piece of one plane."""
    cdef Py_ssize_t pieces, first, groups
    cdef Arrays[T] a = job.arrays()
    if job.by_columns:
        groups = div_up(job.columns, job.channels_per_unit)
        first = unit % groups * job.channels_per_unit
        if unit == 0 and job.peel > 0:
            map_rows(job, &a, job.peel, 1, -job.peel, job.peel, False)
        unit = unit // groups * job.rows_per_unit
        if unit < job.rows:
            map_columns(job, unit, min(job.rows_per_unit, job.rows - unit), first, min(first + job.channels_per_unit, job.columns))
        elif first < job.tail_columns:
            map_columns(job, job.rows, 1, first, min(first + job.channels_per_unit, job.tail_columns))
    elif job.elements_per_unit >= job.inner:
        first = unit * (job.elements_per_unit // job.inner)
        map_planes(job, first, min(job.elements_per_unit // job.inner, job.outer * job.channels - first), 0, job.inner)
    else:
        pieces = div_up(job.inner, job.elements_per_unit)
        first = unit % pieces * job.elements_per_unit
        map_planes(job, unit // pieces, 1, first, min(job.elements_per_unit, job.inner - first))
    if job.nontemporal:
        fence()


cdef void sum_channels(TypedCall[Sum, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """All tiles of channels first ... last; columns have but one."""
    cdef Py_ssize_t tile
    if job.by_columns:
        sum_columns(job, 0, first, last)
        return
    while first < last:
        for tile in range(job.tiles):
            sum_planes(job, first, min(first + PLANES, last), tile)
        first += PLANES


cdef inline void sum_gradient(TypedCall[Backward, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """The same for a gradient, of which a call of both is known by its map."""
    if Backward is GradInput:
        sum_channels(<TypedCall[GradSums, T]*> job, first, last)
    else:
        sum_channels(<TypedCall[FusedGradSums, T]*> job, first, last)


cdef void map_group(TypedCall[Map, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """All planes of channels first ... last, those read last before the others."""
    cdef Py_ssize_t n, piece = MAP_PIECE
    if job.by_columns:
        map_columns(job, 0, job.rows, first, last)
        return
    if job.outer == 1 and job.channels_per_pass == 1 and not job.exceeds_l3:
        for n in range(div_up(job.inner, piece) - 1, -1, -1):
            map_planes(job, first, 1, n * piece, min(piece, job.inner - n * piece))
        return
    for n in range(job.outer - 1, -1, -1):
        map_planes(job, n * job.channels + first, last - first, 0, job.inner)


cdef inline void expect_outputs(TypedCall[Map, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Ask for the lines that a pass will write, before its sums."""
    cdef Py_ssize_t row = job.channels * job.inner, at = first * job.inner, end = job.outer * row
    cdef Arrays[T] a = job.arrays()
    while job.early and at < end:
        Block[T].prefetch_written(a.out + at, (last - first) * job.inner)
        if Map in Backward and a.dresidual != NULL:
            Block[T].prefetch_written(a.dresidual + at, (last - first) * job.inner)
        at += row


cdef TypedCall[GradInput, T] to_grad_input(TypedCall[Backward, T]* job) noexcept nogil:
    """What is left to do where the sums kept dy before the activation."""
    cdef TypedCall[GradInput, T] after = (<TypedCall[GradInput, T]*> job)[0]
    after.dy = job.dz
    after.residual = after.dresidual = NULL
    return after


cdef inline bint only_scales(TypedCall[Backward, T]* job) noexcept nogil:
    """Whether the map of a frozen backward needs nothing but dy before the activation."""
    return job.frozen and (Backward is GradInput or job.dz != NULL)


cdef TypedCall[Normalize, T] to_scaling(TypedCall[Backward, T]* job) noexcept nogil:
    """What is left to do there: a multiplication with the scale, around a mean of 0."""
    cdef TypedCall[Normalize, T] after = (<TypedCall[Normalize, T]*> job)[0]
    after.x = job.dy if job.dz == NULL else job.dz
    after.dy = after.residual = after.dresidual = NULL
    after.mean, after.shift = job.grad_offset, job.grad_slope
    after.at_mean, after.at_shift = after.mean, after.shift
    return after


cdef void forward_unit(TypedCall[Forward, T]* job, Py_ssize_t unit) noexcept nogil:
    """All planes of a group of channels: statistics, then, while they are in the cache, the map."""
    cdef Py_ssize_t first = unit * job.channels_per_unit, last = min(first + job.channels_per_unit, job.channels), tile, end
    if not job.by_columns:
        for tile in range(job.tiles):
            find_pivots(<TypedCall[Stats, T]*> job, first, last, tile)
    while first < last:
        end = min(first + job.channels_per_pass, last)
        expect_outputs(job, first, end)
        sum_channels(<TypedCall[Stats, T]*> job, first, end)
        merge_stats(job, first, end)
        if fold_batch(job, first, end, <T*> NULL):
            map_group(job, first, end)
        else:
            job.any_left = True
        if job.threads > 1:
            move_early(job, first, end)
        first = end
    if job.nontemporal:
        fence()


cdef void backward_unit(TypedCall[Backward, T]* job, Py_ssize_t unit) noexcept nogil:
    """All planes of a group of channels: sums, then, while they are in the cache, the map."""
    cdef Py_ssize_t first = unit * job.channels_per_unit, last = min(first + job.channels_per_unit, job.channels), end
    cdef TypedCall[GradInput, T] after
    cdef TypedCall[Normalize, T] scaling
    if only_scales(job):
        scaling = to_scaling(job)
    elif job.dz != NULL:
        after = to_grad_input(job)
    while first < last:
        end = min(first + job.channels_per_pass, last)
        if job.folds:
            fold_given(job, first, end, <T*> NULL)
        expect_outputs(job, first, end)
        sum_gradient(job, first, end)
        merge_sums(job, first, end)
        fold_gradient(<TypedCall[GradSums, T]*> job, first, end)
        if only_scales(job):
            map_group(&scaling, first, end)
        elif job.dz != NULL:
            map_group(&after, first, end)
        else:
            map_group(job, first, end)
        first = end
    if job.nontemporal:
        fence()


cdef inline int reads_of(const Call* call) noexcept nogil:
    """Arrays that a gradient reads."""
    return 2 + (call.residual != NULL)


cdef inline bint is_fused(const Call* call) noexcept nogil:
    """Whether something follows the normalization."""
    return call.activation.kind != 0 or call.residual != NULL or call.dresidual != NULL


cdef inline bint is_fresh(const Call* call) noexcept nogil:
    """Whether the outputs are memory of their own, with cache lines at the same elements."""
    if call.out == call.x or call.out == call.dy or call.out == call.residual:
        return False
    return call.dresidual == NULL or (<char*> call.dresidual - <char*> call.out) % LINE == 0


cdef inline void* room(char** free, void* given, Py_ssize_t size) noexcept nogil:
    """The place of a vector: the caller's, or else scratch memory."""
    cdef void* place = given
    if given == NULL:
        place = free[0]
        free[0] += size
    return place


cdef bint allocate(TypedCall[Op, T]* job, bint sums) noexcept nogil:
    """Give a call its scratch memory; False where there is none."""
    cdef Py_ssize_t size = job.tiles * job.width * sizeof(double) if sums else 0, vector = job.channels * sizeof(double)
    cdef Py_ssize_t for_columns = 5 * (job.columns + 2 * Block[T].width()) * sizeof(double)
    cdef Py_ssize_t for_planes = job.planes * sizeof(double)
    cdef char* free = <char*> scratch(3 * size + 12 * vector + for_columns + 3 * for_planes + job.channels)
    if free == NULL:
        return False
    job.pivots, job.sums, job.dots = <double*> free, <double*> (free + size), <double*> (free + 2 * size)
    job.expanded = <double*> (free + 3 * size)
    free += 3 * size + for_columns
    job.plane_mean, job.plane_scale, job.plane_shift = free, free + for_planes, free + 2 * for_planes
    free += 3 * for_planes
    job.grad_offset, job.grad_slope = room(&free, NULL, vector), room(&free, NULL, vector)
    # What the caller did not bring.
    if Op in Gradient:
        job.sum_dy, job.sum_dy_xmu = <double*> room(&free, job.sum_dy, vector), <double*> room(&free, job.sum_dy_xmu, vector)
    else:
        job.batch_mean, job.batch_m2 = <double*> room(&free, job.batch_mean, vector), <double*> room(&free, job.batch_m2, vector)
        job.batch_mean_lo = <double*> room(&free, job.batch_mean_lo, vector)
    if Op in Forward:
        job.mean, job.invstd = room(&free, job.mean, vector), room(&free, job.invstd, vector)
    if Op in Forward and sums:
        job.mean_lo = room(&free, job.mean_lo, vector)
        job.kept_mean, job.kept_var = room(&free, NULL, vector), room(&free, NULL, vector)
    if Op in Map:
        job.scale, job.shift = room(&free, job.scale, vector), room(&free, job.shift, vector)
    job.left = free
    return True


cdef Task task(TypedCall[Op, T]* job, int reads, int arrays, int touched) noexcept nogil:
    """What a call is cut by."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    t.outer, t.channels, t.inner, t.item, t.threads = job.outer, job.channels, job.inner, sizeof(T), job.threads
    t.reads, t.arrays, t.touched = reads, arrays, touched
    t.streamable = is_fresh(job) and (job.dz == NULL or job.dz != job.out)
    t.place = <uintptr_t> job.out
    t.together, t.apart, t.hosted = job.batch, job.apart, job.host != NULL
    return t


cdef bint plan(TypedCall[Op, T]* job, Plan* p, int reads, int arrays, int touched) noexcept nogil:
    """Cut a call, and give it its scratch memory; False where there is none."""
    cdef Task t = task(job, reads, arrays, touched)
    make_plan(p, &t)
    job.follow(p.tiles, p.sums)
    return allocate(job, reads > 0)


cdef const void* expand(TypedCall[Op, T]* job, const void* vector, Py_ssize_t index) noexcept nogil:
    """A vector of channels as one of columns, from `peel` on, with room behind it; planes take it as it is."""
    if not job.by_columns:
        return vector
    # What a training forward has found is copied even so: lines that other cores read are slow to write in the next call.
    if job.columns == job.channels and job.channels % Block[T].width() == 0 and job.peel == 0 and not (Op in Forward and job.reverse):
        return vector
    cdef Py_ssize_t W = Block[T].width(), size = Block[T].item(), repeat, c
    cdef char* p = <char*> (job.expanded + index * (job.columns + 2 * W))
    if job.run == 1:
        for repeat in range(job.repeats):
            memcpy(p + repeat * job.channels * size, vector, job.channels * size)
    else:
        for c in range(job.channels):
            put_run[T](p, c * job.run, job.run, Block[T].splat(vector, c))
    memcpy(p + job.columns * size, p, job.peel * size)
    memset(p + (job.columns + job.peel) * size, 0, BLOCK)
    return p + job.peel * size


cdef void run_sums(TypedCall[Sum, T]* job) noexcept nogil:
    if Sum is not Stats:
        job.at_mean = expand(job, job.mean, 0)
    if Sum is FusedGradSums:
        job.at_scale = expand(job, job.scale, 1)
        job.at_bias = expand(job, job.shift, 2)
    parallel(<unit_fn> sum_unit[Sum, T], job, job.units, job.threads, False, job.bytes, job.host)
    if Sum is Stats:
        merge_stats(job, 0, job.channels)
    else:
        merge_sums(job, 0, job.channels)


cdef inline void run_gradient_sums(TypedCall[Backward, T]* job) noexcept nogil:
    """The same for a gradient, of which a call of both is known by its map."""
    if Backward is GradInput:
        run_sums(<TypedCall[GradSums, T]*> job)
    else:
        run_sums(<TypedCall[FusedGradSums, T]*> job)


cdef void set_parameters(TypedCall[Map, T]* job, bint as_they_are) noexcept nogil:
    """Set the vectors of the map, for columns one of each column."""
    cdef const void* shift = job.grad_offset if Map in Backward else job.shift
    if as_they_are:
        job.at_mean, job.at_scale, job.at_shift, job.at_slope, job.at_bias = job.mean, job.scale, shift, job.grad_slope, job.shift
        return
    job.at_mean = expand(job, job.mean, 0)
    job.at_scale = expand(job, job.scale, 1)
    job.at_shift = expand(job, shift, 2)
    if Map in Backward:
        job.at_slope = expand(job, job.grad_slope, 3)
    if Map is FusedGradInput:
        job.at_bias = expand(job, job.shift, 4)


cdef void run_map(TypedCall[Map, T]* job, const Plan* p) noexcept nogil:
    job.follow(p.tiles, p.map)
    set_parameters(job, False)
    parallel(<unit_fn> map_unit[Map, T], job, job.units, job.threads, job.reverse, job.bytes, job.host)


cdef Status sum_call(TypedCall[Sum, T]* job) noexcept nogil:
    cdef Plan p
    if not plan(job, &p, 1 + (job.dy != NULL) + (job.residual != NULL), 0, 0):
        return NO_MEMORY
    run_sums(job)
    if Sum is not Stats:
        fold_gradient(<TypedCall[GradSums, T]*> job, 0, job.channels)
    return DONE


cdef Status map_call(TypedCall[Map, T]* job) noexcept nogil:
    cdef Plan p
    cdef Py_ssize_t c
    cdef int arrays = 2 + (job.dy != NULL) + (job.residual != NULL) + (job.dresidual != NULL)
    if not plan(job, &p, 0, arrays, arrays):
        return NO_MEMORY
    if Map in Backward:
        job.frozen = True
        for c in range(job.channels):
            Block[T].set_value(job.grad_offset, c, Block[T].value(job.g0, c))
            Block[T].set_value(job.grad_slope, c, -Block[T].value(job.g1, c))
            job.frozen = job.frozen and Block[T].value(job.g0, c) == 0 and Block[T].value(job.g1, c) == 0
    run_map(job, &p)
    return DONE


cdef Status inference_call(TypedCall[Forward, T]* job) noexcept nogil:
    cdef Plan p
    cdef int arrays = 2 + (job.residual != NULL)
    if not plan(job, &p, 0, arrays, arrays):
        return NO_MEMORY
    fold_given(job, 0, job.channels, <T*> NULL)
    run_map(job, &p)
    return DONE


cdef Status forward_call(TypedCall[Forward, T]* job) noexcept nogil:
    cdef Plan p
    cdef int arrays = 2 + (job.residual != NULL)
    if not plan(job, &p, 1, arrays, arrays):
        return NO_MEMORY
    if p.resident:
        set_parameters(job, True)
        parallel(<unit_fn> forward_unit[Forward, T], job, job.units, job.threads, False, job.bytes, job.host)
    else:
        run_sums(<TypedCall[Stats, T]*> job)
        if fold_batch(job, 0, job.channels, <T*> NULL):
            run_map(job, &p)
        else:
            job.any_left = True
    if job.any_left:
        if p.resident and job.threads > 1:
            take_back(job)
        return LEFT
    if not p.resident or job.threads == 1:
        move_running(job)
    return DONE


cdef void* choose_workspace(Call* job, Py_ssize_t item) noexcept nogil:
    """Where to keep dy before the activation, if it pays, and nothing is lost by it: the residual's gradient, or dx."""
    if item < 4:
        return NULL  # the map would read it rounded
    if job.dresidual != NULL:
        return job.dresidual
    if not job.activation.is_smooth() or not is_fresh(job):
        return NULL
    return job.out


cdef void run_backward_map(TypedCall[Backward, T]* job, const Plan* p) noexcept nogil:
    cdef TypedCall[GradInput, T] after
    cdef TypedCall[Normalize, T] scaling
    if only_scales(job):
        scaling = to_scaling(job)
        run_map(&scaling, p)
    elif job.dz != NULL:
        after = to_grad_input(job)
        run_map(&after, p)
    else:
        run_map(job, p)


cdef Status backward_call(TypedCall[Backward, T]* job) noexcept nogil:
    cdef Plan p
    cdef Py_ssize_t c
    cdef bint sums = not job.frozen or job.dweight != NULL or job.dbias != NULL or job.sum_dy != NULL
    cdef bint given = job.scale != NULL
    cdef int reads = reads_of(job), touched = reads + 1 + (job.dresidual != NULL), arrays = touched
    if sums and job.invstd != NULL and is_far(job):
        return LEFT
    if Backward is FusedGradInput and sums and job.out != NULL:
        job.dz = choose_workspace(job, sizeof(T))
    if job.dz != NULL:
        arrays = 2 if job.frozen else 3
    elif job.frozen and Backward is GradInput:
        arrays = 2
    if not plan(job, &p, reads if sums else 0, arrays if job.out != NULL else 0, touched):
        return NO_MEMORY
    job.folds = not given and job.invstd != NULL
    if job.folds and not p.resident:
        fold_given(job, 0, job.channels, <T*> NULL)
    if job.frozen:
        for c in range(job.channels):
            Block[T].set_value(job.grad_offset, c, 0)
            Block[T].set_value(job.grad_slope, c, -0.0)
    if p.resident:
        set_parameters(job, True)
        parallel(<unit_fn> backward_unit[Backward, T], job, job.units, job.threads, False, job.bytes, job.host)
        return DONE
    if sums:
        run_gradient_sums(job)
        fold_gradient(<TypedCall[GradSums, T]*> job, 0, job.channels)
    if job.out != NULL:
        run_backward_map(job, &p)
    return DONE
