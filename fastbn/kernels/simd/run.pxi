"""Units of work, whole calls made of them, and the table of these that the module exports."""

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


cdef inline bint only_scales(Job[Backward, T]* job) noexcept nogil:
    """Whether the map of a frozen backward needs nothing but dy before the activation."""
    return job.frozen and (Backward is InputGradient or job.kept != NULL)


cdef Job[Normalize, T] of_constants(Job[Backward, T]* job) noexcept nogil:
    """What is left to do there: a multiplication with the scale, around a mean of 0."""
    cdef Job[Normalize, T] after = (<Job[Normalize, T]*> job)[0]
    after.x = job.dy if job.kept == NULL else job.kept
    after.dy = after.residual = after.dresidual = NULL
    after.mean, after.shift = job.grad_offset, job.grad_slope
    after.at_mean, after.at_shift = after.mean, after.shift
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
    cdef Job[Normalize, T] scaling
    if only_scales(job):
        scaling = of_constants(job)
    elif job.kept != NULL:
        after = of_kept(job)
    while first < last:
        end = min(first + job.turn, last)
        if Backward is InputGradient:
            sum_channels(<Job[GradSums, T]*> job, first, end)
        else:
            sum_channels(<Job[ActiveSums, T]*> job, first, end)
        merge_sums(job, first, end)
        fold_gradient(<Job[GradSums, T]*> job, first, end)
        if only_scales(job):
            map_group(&scaling, first, end)
        elif job.kept != NULL:
            map_group(&after, first, end)
        else:
            map_group(job, first, end)
        first = end
    if job.streams:
        fence()


cdef inline bint is_active(const Call* call) noexcept nogil:
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


cdef bint allocate(Job[Op, T]* job, bint sums) noexcept nogil:
    """Give a call its scratch memory; False where there is none."""
    cdef Py_ssize_t size = job.tiles * job.width * sizeof(double) if sums else 0, vector = job.channels * sizeof(double)
    cdef Py_ssize_t for_columns = 5 * (job.columns + 2 * Block[T].width()) * sizeof(double)
    cdef char* free = <char*> scratch(3 * size + 11 * vector + for_columns + job.channels)
    if free == NULL:
        return False
    job.shifts, job.sums, job.squares = <double*> free, <double*> (free + size), <double*> (free + 2 * size)
    job.spread = <double*> (free + 3 * size)
    free += 3 * size + for_columns
    job.invstds = <double*> room(&free, NULL, vector)
    job.grad_offset, job.grad_slope = room(&free, NULL, vector), room(&free, NULL, vector)
    # What the caller did not bring.
    job.first, job.second = <double*> room(&free, job.first, vector), <double*> room(&free, job.second, vector)
    job.low = <double*> room(&free, job.low, vector)
    if Op in Forward:
        job.mean, job.mean_lo, job.invstd = room(&free, job.mean, vector), room(&free, job.mean_lo, vector), room(&free, job.invstd, vector)
    if Op in Map:
        job.scale, job.shift = room(&free, job.scale, vector), room(&free, job.shift, vector)
    job.left = free
    return True


cdef bint plan(Job[Op, T]* job, Plan* p, int reads, int arrays, int touched) noexcept nogil:
    """Cut a call, and give it its scratch memory; False where there is none."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    t.outer, t.channels, t.inner, t.item, t.threads = job.outer, job.channels, job.inner, sizeof(T), job.threads
    t.reads, t.arrays, t.touched = reads, arrays, touched
    t.two_outputs = job.dresidual != NULL and job.kept == NULL
    t.streamable = is_fresh(job) and (job.kept == NULL or job.kept != job.out)
    t.to_line = Block[T].to_line(job.arrays().out, job.outer * job.channels * job.inner)
    make_plan(p, &t)
    job.follow(p.tiles, p.sums)
    return allocate(job, reads > 0)


cdef const void* spread(Job[Op, T]* job, const void* vector, Py_ssize_t index) noexcept nogil:
    """A vector of channels as one of columns, from `skip` on, with room behind it; planes take it as it is."""
    if not job.by_columns:
        return vector
    # What a training forward has found is copied even so: lines that other cores read are slow to write in the next call.
    if job.columns == job.channels and job.channels % Block[T].width() == 0 and job.skip == 0 and not (Op in Forward and job.backwards):
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
    if Sum is not Stats:
        job.at_mean = spread(job, job.mean, 0)
    if Sum is ActiveSums:
        job.at_scale = spread(job, job.scale, 1)
        job.at_bias = spread(job, job.shift, 2)
    parallel(<unit_fn> sum_unit[Sum, T], job, job.units, job.threads, False, job.bytes, job.host)
    if Sum is Stats:
        merge_stats(job, 0, job.channels)
    else:
        merge_sums(job, 0, job.channels)


cdef void take_vectors(Job[Map, T]* job, bint as_they_are) noexcept nogil:
    """Set the vectors of the map, for columns one of each column."""
    cdef const void* shift = job.grad_offset if Map in Backward else job.shift
    if as_they_are:
        job.at_mean, job.at_scale, job.at_shift, job.at_slope, job.at_bias = job.mean, job.scale, shift, job.grad_slope, job.shift
        return
    job.at_mean = spread(job, job.mean, 0)
    job.at_scale = spread(job, job.scale, 1)
    job.at_shift = spread(job, shift, 2)
    if Map in Backward:
        job.at_slope = spread(job, job.grad_slope, 3)
    if Map is ActiveGradient:
        job.at_bias = spread(job, job.shift, 4)


cdef void run_map(Job[Map, T]* job, const Plan* p) noexcept nogil:
    job.follow(p.tiles, p.map)
    take_vectors(job, False)
    parallel(<unit_fn> map_unit[Map, T], job, job.units, job.threads, job.backwards, job.bytes, job.host)


cdef Status sum_call(Job[Sum, T]* job) noexcept nogil:
    cdef Plan p
    if not plan(job, &p, 1 + (job.dy != NULL) + (job.residual != NULL), 0, 0):
        return NO_MEMORY
    run_sums(job)
    if Sum is not Stats:
        fold_gradient(<Job[GradSums, T]*> job, 0, job.channels)
    return DONE


cdef Status map_call(Job[Map, T]* job) noexcept nogil:
    cdef Plan p
    cdef Py_ssize_t c
    cdef int arrays = 2 + (job.dy != NULL) + (job.residual != NULL) + (job.dresidual != NULL)
    if not plan(job, &p, 0, arrays, arrays):
        return NO_MEMORY
    if Map in Backward and not job.frozen:
        for c in range(job.channels):
            Block[T].set_value(job.grad_offset, c, Block[T].value(job.g0, c))
            Block[T].set_value(job.grad_slope, c, -Block[T].value(job.g1, c))
    run_map(job, &p)
    return DONE


cdef Status inference_call(Job[Forward, T]* job) noexcept nogil:
    cdef Plan p
    cdef double invstd
    cdef Py_ssize_t c
    cdef int arrays = 2 + (job.residual != NULL)
    cdef const void* low = job.mean_lo
    if not plan(job, &p, 0, arrays, arrays):
        return NO_MEMORY
    for c in range(job.channels):
        if job.var != NULL:
            invstd = 1 / sqrt(Block[T].value(job.var, c) + job.eps)
            Block[T].set_value(job.invstd, c, invstd)
        else:
            invstd = Block[T].value(job.invstd, c)
        fold_channel(job, c, 0 if low == NULL else Block[T].value(low, c), invstd)
    run_map(job, &p)
    return DONE


cdef Status forward_call(Job[Forward, T]* job) noexcept nogil:
    cdef Plan p
    cdef int arrays = 2 + (job.residual != NULL)
    if not plan(job, &p, 1, arrays, arrays):
        return NO_MEMORY
    if p.together:
        take_vectors(job, True)
        parallel(<unit_fn> forward_unit[Forward, T], job, job.units, job.threads, False, job.bytes, job.host)
    else:
        run_sums(<Job[Stats, T]*> job)
        if fold_batch(job, 0, job.channels):
            run_map(job, &p)
    if memchr(job.left, 1, job.channels) != NULL:
        return LEFT
    move_running(job)
    return DONE


cdef void* place_to_keep(Call* job, Py_ssize_t item) noexcept nogil:
    """Where to keep dy before the activation, if it pays, and nothing is lost by it: the residual's gradient, or dx."""
    if item < 4:
        return NULL  # the map would read it rounded
    if job.dresidual != NULL:
        return job.dresidual
    if not job.activation.is_smooth() or not is_fresh(job):
        return NULL
    return job.out


cdef inline bint any_outside(const C* values, Py_ssize_t n, double limit) noexcept nogil:
    """Whether any of several numbers is not between a limit and its reciprocal."""
    cdef C high = <C> limit, low = <C> (0.5 / limit)
    cdef Py_ssize_t c
    cdef bint outside = False
    for c in range(n):
        outside |= (values[c] >= high) | (values[c] < low)
    return outside


cdef inline bint is_far(Job[Op, T]* job) noexcept nogil:
    """Whether a standard deviation is so far from 1 that a backward must be made of operations (`extremes.far_from_one`)."""
    if T is double:
        return any_outside(<const double*> job.invstd, job.channels, FAR_DOUBLE)
    else:
        return any_outside(<const float*> job.invstd, job.channels, FAR_FLOAT)


cdef void run_backward_map(Job[Backward, T]* job, const Plan* p) noexcept nogil:
    cdef Job[InputGradient, T] after
    cdef Job[Normalize, T] scaling
    if only_scales(job):
        scaling = of_constants(job)
        run_map(&scaling, p)
    elif job.kept != NULL:
        after = of_kept(job)
        run_map(&after, p)
    else:
        run_map(job, p)


cdef Status backward_call(Job[Backward, T]* job) noexcept nogil:
    cdef Plan p
    cdef Py_ssize_t c
    cdef bint sums = not job.frozen or job.dweight != NULL or job.dbias != NULL or job.first != NULL
    cdef bint given = job.scale != NULL
    cdef int reads = 2 + (job.residual != NULL), touched = reads + 1 + (job.dresidual != NULL), arrays = touched
    if sums and job.invstd != NULL and is_far(job):
        return LEFT
    if Backward is ActiveGradient and sums and job.out != NULL:
        job.kept = place_to_keep(job, sizeof(T))
    if job.kept != NULL:
        arrays = 2 if job.frozen else 3
    elif job.frozen and Backward is InputGradient:
        arrays = 2
    if not plan(job, &p, reads if sums else 0, arrays if job.out != NULL else 0, touched):
        return NO_MEMORY
    if not given and job.invstd != NULL:
        for c in range(job.channels):
            fold_channel(job, c, 0 if job.mean_lo == NULL else Block[T].value(job.mean_lo, c), Block[T].value(job.invstd, c))
    if job.frozen:
        for c in range(job.channels):
            Block[T].set_value(job.grad_offset, c, 0)
            Block[T].set_value(job.grad_slope, c, -0.0)
    if p.together:
        take_vectors(job, True)
        parallel(<unit_fn> backward_unit[Backward, T], job, job.units, job.threads, False, job.bytes, job.host)
        return DONE
    if sums:
        if Backward is InputGradient:
            run_sums(<Job[GradSums, T]*> job)
        else:
            run_sums(<Job[ActiveSums, T]*> job)
        fold_gradient(<Job[GradSums, T]*> job, 0, job.channels)
    if job.out != NULL:
        run_backward_map(job, &p)
    return DONE


ctypedef Status (*work_fn)(Work* job) noexcept nogil

# Of each dtype, plain and active.
cdef work_fn[4][1] STATS
cdef work_fn[4][2] GRAD_SUMS, NORMALIZE, GRAD_INPUT, INFERENCE, FORWARD, BACKWARD


cdef void register(T* tag, Dtype dtype) noexcept:
    STATS[<int> dtype][:] = [<work_fn> sum_call[Stats, T]]
    GRAD_SUMS[<int> dtype][:] = [<work_fn> sum_call[GradSums, T], <work_fn> sum_call[ActiveSums, T]]
    NORMALIZE[<int> dtype][:] = [<work_fn> map_call[Normalize, T], <work_fn> map_call[ActiveNormalize, T]]
    GRAD_INPUT[<int> dtype][:] = [<work_fn> map_call[InputGradient, T], <work_fn> map_call[ActiveGradient, T]]
    INFERENCE[<int> dtype][:] = [<work_fn> inference_call[Normalize, T], <work_fn> inference_call[ActiveNormalize, T]]
    FORWARD[<int> dtype][:] = [<work_fn> forward_call[Normalize, T], <work_fn> forward_call[ActiveNormalize, T]]
    BACKWARD[<int> dtype][:] = [<work_fn> backward_call[InputGradient, T], <work_fn> backward_call[ActiveGradient, T]]

register[float](NULL, Dtype.FLOAT32)
register[double](NULL, Dtype.FLOAT64)
register[bf16](NULL, Dtype.BFLOAT16)
register[f16](NULL, Dtype.FLOAT16)


cdef Status run(work_fn function, Call* call) noexcept nogil:
    """Run a call, in the default floating-point mode; it leaves nothing in the scratch memory that its caller does not need."""
    cdef uint32_t mode = enter_default_mode()
    cdef Work job
    cdef Status status
    memset(&job, 0, sizeof(Work))
    (<Call*> &job)[0] = call[0]
    status = function(&job)
    if status == LEFT:
        call.first, call.second, call.left = job.first, job.second, job.left
    else:
        end_scratch()
    leave_default_mode(mode)
    return status


cdef Status stats(Call* call) noexcept nogil:
    return run(STATS[<int> call.dtype][0], call)


cdef Status normalize(Call* call) noexcept nogil:
    return run(NORMALIZE[<int> call.dtype][is_active(call)], call)


cdef Status grad_sums(Call* call) noexcept nogil:
    return run(GRAD_SUMS[<int> call.dtype][is_active(call)], call)


cdef Status grad_input(Call* call) noexcept nogil:
    return run(GRAD_INPUT[<int> call.dtype][is_active(call)], call)


cdef Status inference(Call* call) noexcept nogil:
    return run(INFERENCE[<int> call.dtype][is_active(call)], call)


cdef Status forward(Call* call) noexcept nogil:
    return run(FORWARD[<int> call.dtype][is_active(call)], call)


cdef Status backward(Call* call) noexcept nogil:
    return run(BACKWARD[<int> call.dtype][is_active(call)], call)


cdef Kernels TABLE
TABLE.stats, TABLE.normalize, TABLE.grad_sums, TABLE.grad_input = stats, normalize, grad_sums, grad_input
TABLE.inference, TABLE.forward, TABLE.backward, TABLE.move_running = inference, forward, backward, move_running
KERNELS = PyCapsule_New(&TABLE, "fastbn.kernels.Kernels", NULL)
