"""Parts: whole calls where each image's groups of channels, or each row, have statistics of their own.

Planes, columns and their loops are those of batch normalization. Of planes, each part is one run of memory and so a channel
to the sums, and each plane is a channel to the map. Of columns, each image is a call of its own, whose statistics are merged
by groups. Rows have weights that run along them, and so a map of their own: rows.pxi.
"""

cdef double LEAST_WEIGHT = 2.0 ** -40  # that a gradient may be divided by


cdef inline void fold_part(TypedCall[Forward, T]* job, Py_ssize_t c, double* low, double* invstd) noexcept nogil:
    """From the merged statistics of a part to those that are returned."""
    cdef double high, var = job.batch_m2[c] / job.count
    invstd[0] = 1 / sqrt(var + job.eps)
    low[0] = 0
    if job.uncentered:
        Block[T].set_value(job.mean, c, 0)
    else:
        Block[T].set_value(job.mean, c, job.batch_mean[c])
        high = Block[T].value(job.mean, c)
        low[0] = (job.batch_mean[c] - high if isfinite(high) else 0) + job.batch_mean_lo[c]
    Block[T].set_value(job.mean_lo, c, low[0])
    Block[T].set_value(job.invstd, c, invstd[0])


cdef double set_planes(Work* job, Py_ssize_t part, Py_ssize_t at, double mean, double low, double invstd, T* tag) noexcept nogil:
    """Set the parameters of the planes of a part, the first of which has weight number `at`; the largest of their scales.

    One that is infinite with its weight does not count: no unit would help it, and the others of the part need none.
    """
    cdef double scale, shift, largest = 0, most = Block[T].largest()
    cdef Py_ssize_t plane
    for plane in range(part * job.group, (part + 1) * job.group):
        scale = invstd if job.weight == NULL else invstd * Block[T].value(job.weight, at)
        shift = 0 if job.bias == NULL else Block[T].value(job.bias, at)
        Block[T].set_value(job.plane_mean, plane, mean)
        Block[T].set_value(job.plane_scale, plane, narrow(scale, most))
        Block[T].set_value(job.plane_shift, plane, shift - lost(low, scale))
        if fabs(scale) > largest and (job.weight == NULL or isfinite(Block[T].value(job.weight, at))):
            largest = fabs(scale)
        at += 1
    return largest


cdef inline Py_ssize_t next_weight(Work* job, Py_ssize_t at) noexcept nogil:
    """The number of the first weight of the next part; counted: a division takes longer than all else."""
    return at + job.group if at + job.group < job.period else 0


cdef bint fold_parts(TypedCall[Forward, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """From the merged statistics of parts to the parameters of their planes' map; whether they may be mapped."""
    cdef double low, invstd, scale
    cdef Py_ssize_t c, at = first * job.group % job.period
    cdef bint unusual = False
    for c in range(first, last):
        fold_part(job, c, &low, &invstd)
        scale = set_planes(job, c, at, Block[T].value(job.mean, c), low, invstd, <T*> NULL)
        unusual = unusual or is_unusual(job.batch_m2[c], invstd, scale, <T*> NULL)
        at = next_weight(job, at)
    if unusual:
        leave(job, first, last)
    return not unusual


cdef void leave(TypedCall[Forward, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Mark parts that the caller must compute."""
    cdef Py_ssize_t c
    job.any_left = True
    for c in range(first, last):
        Block[T].set_value(job.invstd, c, -1)


cdef TypedCall[Map, T] to_planes(TypedCall[Map, T]* job, Py_ssize_t channels, Py_ssize_t inner) noexcept nogil:
    """The map of all planes, each with parameters of its own."""
    cdef TypedCall[Map, T] maps = job[0]
    maps.channels, maps.inner = channels, inner
    maps.mean, maps.scale, maps.shift = job.plane_mean, job.plane_scale, job.plane_shift
    return maps


cdef void forward_parts_unit(TypedCall[Forward, T]* job, Py_ssize_t unit) noexcept nogil:
    """Several parts: statistics, then, while they are in the cache, the map."""
    cdef Py_ssize_t first = unit * job.channels_per_unit, last = min(first + job.channels_per_unit, job.channels), tile, end
    cdef Py_ssize_t k = job.group
    cdef TypedCall[Forward, T] maps = to_planes(job, job.planes, job.inner // k), own = job[0]
    set_parameters(&maps, True)
    for tile in range(own.tiles):
        find_pivots(<TypedCall[Stats, T]*> &own, first, last, tile)
    while first < last:
        end = min(first + own.channels_per_pass, last)
        expect_outputs(&own, first, end)
        sum_channels(<TypedCall[Stats, T]*> &own, first, end)
        merge_stats(&own, first, end)
        if not fold_parts(&own, first, end):
            job.any_left = True
        elif k == 1:
            map_group(&maps, first, end)
        else:
            map_planes(&maps, first * k, (end - first) * k, 0, maps.inner)
        first = end
    if own.nontemporal:
        fence()


cdef Status forward_planes(TypedCall[Forward, T]* job) noexcept nogil:
    """A forward where each part is one run of memory."""
    cdef Plan p
    cdef Task t
    cdef int arrays = 2 + (job.residual != NULL)
    cdef Py_ssize_t inner = job.inner
    cdef TypedCall[Forward, T] maps
    job.planes = job.batch * job.channels
    job.channels, job.inner = job.planes // job.group, inner * job.group
    job.batch = 1
    if not plan(job, &p, 1, arrays, arrays):
        return NO_MEMORY
    if p.resident:
        parallel(<unit_fn> forward_parts_unit[Forward, T], job, job.units, job.threads, False, job.bytes, job.host)
        return LEFT if job.any_left else DONE
    run_sums(<TypedCall[Stats, T]*> job)
    if not fold_parts(job, 0, job.channels):
        return LEFT
    maps = to_planes(job, job.planes, inner)
    t = task(&maps, 0, arrays, arrays)
    make_plan(&p, &t)
    p.map.reverse = True
    run_map(&maps, &p)
    return DONE


cdef void merge_groups(Work* job) noexcept nogil:
    """From the merged statistics of an image's channels to those of its groups."""
    cdef Py_ssize_t g, c, k = job.group
    cdef double offset, base, m2, e
    for g in range(job.channels // k):
        base = job.batch_mean[g * k] if isfinite(job.batch_mean[g * k]) else 0
        offset = m2 = 0
        for c in range(g * k, g * k + k):
            offset += (job.batch_mean[c] - base) + job.batch_mean_lo[c]
        offset /= k
        for c in range(g * k, g * k + k):
            e = ((job.batch_mean[c] - base) + job.batch_mean_lo[c]) - offset
            m2 += job.batch_m2[c] + job.count * (e * e)
        job.batch_mean[g] = base + offset
        e = offset - (job.batch_mean[g] - base)
        job.batch_mean_lo[g] = e if isfinite(e) else 0
        job.batch_m2[g] = m2
    job.channels //= k
    job.count *= k


cdef Status forward_image(TypedCall[Forward, T]* job) noexcept nogil:
    """A forward of one image of columns."""
    cdef Plan p
    cdef int arrays = 2 + (job.residual != NULL)
    cdef Py_ssize_t channels = job.channels
    cdef TypedCall[Forward, T] maps
    job.planes, job.apart = channels, True
    if not plan(job, &p, 1, arrays, arrays):
        return NO_MEMORY
    run_sums(<TypedCall[Stats, T]*> job)
    if job.group > 1:
        merge_groups(job)
    if not fold_parts(job, 0, job.channels):
        return LEFT
    maps = to_planes(job, channels, job.inner)
    run_map(&maps, &p)
    return DONE


cdef inline void* further(const void* p, Py_ssize_t bytes) noexcept nogil:
    """What lies some bytes behind; NULL stays NULL."""
    if p == NULL:
        return NULL
    return <char*> p + bytes


cdef TypedCall[Op, T] image(TypedCall[Op, T]* job, Py_ssize_t b) noexcept nogil:
    """The call on one image."""
    cdef TypedCall[Op, T] one = job[0]
    cdef Py_ssize_t size = b * job.outer * job.channels * job.inner * sizeof(T), item = Block[T].item()
    cdef Py_ssize_t parts = b * (job.channels // job.group) * item, channels = b * job.channels * sizeof(double)
    one.x, one.dy, one.residual = further(job.x, size), further(job.dy, size), further(job.residual, size)
    one.out, one.dresidual, one.dz = further(job.out, size), further(job.dresidual, size), further(job.dz, size)
    one.mean, one.mean_lo = further(job.mean, parts), further(job.mean_lo, parts)
    one.invstd = further(job.invstd, parts)
    one.sum_dy, one.sum_dy_xmu = <double*> further(job.sum_dy, channels), <double*> further(job.sum_dy_xmu, channels)
    return one


cdef Status call_image(TypedCall[Map, T]* job, Py_ssize_t b, int threads) noexcept nogil:
    cdef TypedCall[Map, T] one = image(job, b)
    one.threads = threads
    if Map in Forward:
        return forward_image(&one)
    else:
        return backward_image(&one)


cdef void image_unit(TypedCall[Map, T]* job, Py_ssize_t unit) noexcept nogil:
    """One image, by one thread."""
    cdef Status status = call_image(job, unit, 1)
    if status == LEFT:
        job.any_left = True
    elif status == NO_MEMORY:
        job.no_memory = True
    end_scratch()


cdef Status each_image(TypedCall[Map, T]* job, Py_ssize_t arrays) noexcept nogil:
    """Images of columns: each by one thread where there are many, else one after the other by all threads."""
    cdef Py_ssize_t b, bytes = job.batch * job.outer * job.channels * job.inner * arrays * sizeof(T)
    cdef Status status
    if job.threads > 1 and job.batch >= 2 * job.threads:
        parallel(<unit_fn> image_unit[Map, T], job, job.batch, job.threads, False, bytes, job.host)
    else:
        for b in range(job.batch):
            status = call_image(job, b, job.threads)
            job.any_left = job.any_left or status == LEFT
            job.no_memory = job.no_memory or status == NO_MEMORY
    return NO_MEMORY if job.no_memory else LEFT if job.any_left else DONE


cdef Status forward_parts(TypedCall[Forward, T]* job) noexcept nogil:
    """Normalize each part with its own statistics."""
    job.period = job.channels
    if job.outer > 1:
        return each_image(job, 2 + (job.residual != NULL))
    if job.inner > 1:
        return forward_planes(job)
    return forward_rows(job)


cdef void unfold_parts(TypedCall[Backward, T]* job, Py_ssize_t parts) noexcept nogil:
    """The parameters of planes, as the forward had them."""
    cdef Py_ssize_t c, at = 0
    for c in range(parts):
        set_planes(
            job, c, at, Block[T].value(job.mean, c), Block[T].value(job.mean_lo, c), Block[T].value(job.invstd, c), <T*> NULL
        )
        at = next_weight(job, at)
    job.mean, job.scale, job.shift = job.plane_mean, job.plane_scale, job.plane_shift


cdef void fold_parts_gradient(TypedCall[Backward, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """From the merged sums of whole parts' planes to the parameters of the map."""
    cdef Py_ssize_t plane, c, k = job.group, start = first % job.period, at
    cdef double low, invstd, g0, g1, weight, count = job.count * k
    for c in range(first // k, last // k):
        at = start
        low, invstd = Block[T].value(job.mean_lo, c), Block[T].value(job.invstd, c)
        g0 = g1 = 0
        for plane in range(c * k, c * k + k):
            weight = Block[T].value(job.weight, at) if k > 1 and job.weight != NULL else 1
            at += 1
            job.sum_dy_xmu[plane] -= lost(low, job.sum_dy[plane])
            g0 += weight * job.sum_dy[plane]
            g1 += weight * job.sum_dy_xmu[plane]
        g1 = invstd * (invstd * g1 / count)
        g0 = g0 / count - lost(low, g1)
        at = start
        for plane in range(c * k, c * k + k):
            weight = Block[T].value(job.weight, at) if k > 1 and job.weight != NULL else 1
            at += 1
            Block[T].set_value(job.grad_offset, plane, g0 / weight)
            Block[T].set_value(job.grad_slope, plane, -g1 / weight)
        start = at if at < job.period else 0


cdef void backward_parts_unit(TypedCall[Backward, T]* job, Py_ssize_t unit) noexcept nogil:
    """Several parts: sums, then, while they are in the cache, the map."""
    cdef Py_ssize_t first = unit * job.channels_per_unit, last = min(first + job.channels_per_unit, job.channels), end
    cdef TypedCall[GradInput, T] after
    if job.dz != NULL:
        after = to_grad_input(job)
    while first < last:
        end = min(first + job.channels_per_pass, last)
        expect_outputs(job, first, end)
        sum_gradient(job, first, end)
        merge_sums(job, first, end)
        fold_parts_gradient(job, first, end)
        if job.dz != NULL:
            map_group(&after, first, end)
        else:
            map_group(job, first, end)
        first = end
    if job.nontemporal:
        fence()


cdef void sum_and_map_gradient(TypedCall[Backward, T]* job, const Plan* p) noexcept nogil:
    """A gradient whose map waits for all sums."""
    run_gradient_sums(job)
    fold_parts_gradient(job, 0, job.channels)
    if job.out != NULL:
        run_backward_map(job, p)


cdef inline int arrays_of(const Work* job) noexcept nogil:
    """What the map of a gradient reads and writes."""
    return 0 if job.out == NULL else 3 if job.dz != NULL else reads_of(job) + 1 + (job.dresidual != NULL)


cdef Status backward_planes(TypedCall[Backward, T]* job) noexcept nogil:
    """A gradient where each part is one run of memory."""
    cdef Plan p, q
    cdef Task t
    cdef int reads = reads_of(job), touched = reads + 1 + (job.dresidual != NULL), arrays = arrays_of(job)
    cdef Py_ssize_t k = job.group, inner = job.inner
    job.planes = job.batch * job.channels
    job.batch = 1
    job.channels, job.inner = job.planes // k, inner * k
    t = task(job, reads, arrays, touched)
    make_plan(&q, &t)
    job.channels, job.inner, job.apart = job.planes, inner, not q.resident
    t = task(job, reads, arrays, touched)
    make_plan(&p, &t)
    if p.resident != q.resident:
        p.resident = False  # parts may be resident where planes are not, but never the other way round
        job.apart = True
        t = task(job, reads, arrays, touched)
        make_plan(&p, &t)
    if p.resident:
        p.sums.channels_per_unit, p.sums.channels_per_pass = q.sums.channels_per_unit * k, q.sums.channels_per_pass * k
        p.sums.units = q.sums.units
    job.follow(p.tiles, p.sums)
    if not allocate(job, True):
        return NO_MEMORY
    unfold_parts(job, job.planes // k)
    if p.resident:
        set_parameters(job, True)
        parallel(<unit_fn> backward_parts_unit[Backward, T], job, job.units, job.threads, False, job.bytes, job.host)
    else:
        sum_and_map_gradient(job, &p)
    return DONE


cdef Status backward_image(TypedCall[Backward, T]* job) noexcept nogil:
    """A gradient of one image of columns."""
    cdef Plan p
    cdef int reads = reads_of(job)
    job.planes, job.apart = job.channels, True
    if not plan(job, &p, reads, arrays_of(job), reads + 1 + (job.dresidual != NULL)):
        return NO_MEMORY
    unfold_parts(job, job.channels // job.group)
    sum_and_map_gradient(job, &p)
    return DONE


cdef bint may_divide(TypedCall[Backward, T]* job) noexcept nogil:
    """Whether a map can do with one sweep."""
    cdef Py_ssize_t c
    cdef bint fine = True
    if job.group > 1 and job.weight != NULL:
        for c in range(job.channels):
            fine &= not fabs(Block[T].value(job.weight, c)) <= LEAST_WEIGHT
    return fine


cdef Status backward_parts(TypedCall[Backward, T]* job) noexcept nogil:
    """Gradients through the statistics of parts."""
    cdef Py_ssize_t b, c, g, batch = job.batch, channels = job.channels, k = job.group, parts = job.channels // job.group
    cdef double dweight, dbias
    cdef TypedCall[Backward, T] own = job[0]
    cdef Status status
    own.period = channels
    own.channels = batch * parts
    if is_far(&own):
        return LEFT
    own.channels = channels
    if job.outer == 1 and job.inner == 1:
        return backward_rows(&own) if parts == 1 else LEFT
    if not may_divide(job):
        return LEFT
    if Backward is FusedGradInput and job.out != NULL:
        own.dz = choose_workspace(&own, sizeof(T))
    if job.outer > 1:
        status = each_image(&own, reads_of(job) + 1)
    else:
        status = backward_planes(&own)
    if status != DONE:
        return status
    for g in range(parts):
        for c in range(g * k, g * k + k):
            dweight = dbias = 0
            for b in range(batch):
                dbias += job.sum_dy[b * channels + c]
                dweight += job.sum_dy_xmu[b * channels + c] * Block[T].value(job.invstd, b * parts + g)
            if job.dweight != NULL:
                Block[T].set_value(job.dweight, c, dweight)
            if job.dbias != NULL:
                Block[T].set_value(job.dbias, c, dbias)
    return DONE
