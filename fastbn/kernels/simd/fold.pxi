"""From the sums of tiles to the parameters of a map: merging, folding, and the running statistics.

The one place of the kernels that knows eps and momentum.
"""

cdef void merge_stats(Work* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Mean, M2 and the rest of the mean of channels first ... last, from the sums of their tiles."""
    cdef double* mean = job.first
    cdef double* m2 = job.second
    cdef double* offset = job.low  # of the mean from the first pivot; two near numbers have an exact difference
    cdef double n, e, hi, rest
    cdef Py_ssize_t tile, repeat, c, at
    for c in range(first, last):
        offset[c] = 0
        m2[c] = 0
    for tile in range(job.tiles):
        n = tile_count(job, tile)
        for repeat in range(job.repeats):
            at = tile * job.width + repeat * job.channels
            for c in range(first, tile_last(job, tile, repeat, last)):
                offset[c] += job.sums[at + c] + n * (job.pivots[at + c] - job.pivots[c])
    for c in range(first, last):
        offset[c] /= job.count
    for tile in range(job.tiles):
        n = tile_count(job, tile)
        for repeat in range(job.repeats):
            at = tile * job.width + repeat * job.channels
            for c in range(first, tile_last(job, tile, repeat, last)):
                e = offset[c] - (job.pivots[at + c] - job.pivots[c])
                m2[c] += job.dots[at + c] + e * (n * e - 2 * job.sums[at + c])
    for c in range(first, last):
        m2[c] = 0 if m2[c] < 0 else m2[c]
        mean[c] = job.pivots[c] + offset[c]
        hi = mean[c] - job.pivots[c]
        rest = (job.pivots[c] - (mean[c] - hi)) + (offset[c] - hi)
        offset[c] = rest if isfinite(rest) else 0


cdef void merge_sums(Work* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Both sums of channels first ... last."""
    cdef Py_ssize_t tile, repeat, c, at
    for c in range(first, last):
        job.first[c] = 0
        job.second[c] = 0
    for tile in range(job.tiles):
        for repeat in range(job.repeats):
            at = tile * job.width + repeat * job.channels
            for c in range(first, tile_last(job, tile, repeat, last)):
                job.first[c] += job.sums[at + c]
                job.second[c] += job.dots[at + c]


cdef inline double fold_channel(TypedCall[Map, T]* job, Py_ssize_t c, double low, double invstd) noexcept nogil:
    """Scale and shift of one channel; `composed.fold` is the same in NumPy. The result is the scale before it is rounded."""
    cdef double scale = invstd if job.weight == NULL else invstd * Block[T].value(job.weight, c)
    cdef double shift = 0 if job.bias == NULL else Block[T].value(job.bias, c)
    cdef double most = Block[T].largest()
    # Where x is the mean, 0 times the scale must be 0: a finite one is none too large for the type.
    Block[T].set_value(job.scale, c, min(max(scale, -most), most) if isfinite(scale) else scale)
    Block[T].set_value(job.shift, c, shift if low == 0 else shift - low * scale)  # the scale may be infinite
    return scale


cdef inline bint is_unusual(TypedCall[Forward, T]* job, double m2, double invstd, double scale) noexcept nogil:
    """Whether squares, differences or factors leave the range of a number; `extremes.are_usual` is the same in NumPy."""
    if T is double:  # what is not finite in any other type was so in x
        return not m2 < LARGE_M2 or invstd >= LARGE_INVSTD or fabs(scale) > Block[T].largest()
    else:
        return m2 >= Block[T].largest() / 4 * (Block[T].largest() / 4) or fabs(scale) > Block[T].largest()


cdef bint fold_batch(TypedCall[Forward, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """From the merged statistics to the parameters of the map; whether the channels may be mapped."""
    cdef double high, low, scale, count = job.count, eps = job.eps
    cdef double* m2 = job.second
    cdef double* invstd = job.invstds
    cdef Py_ssize_t c
    cdef bint unusual = False
    for c in range(first, last):  # a loop of its own: roots and quotients of several channels at once
        invstd[c] = 1 / sqrt(m2[c] / count + eps)
    for c in range(first, last):
        Block[T].set_value(job.mean, c, job.first[c])
        high = Block[T].value(job.mean, c)
        low = (job.first[c] - high if isfinite(high) else 0) + job.low[c]
        scale = fold_channel(job, c, low, invstd[c])
        unusual = unusual or is_unusual(job, m2[c], invstd[c], scale)
        Block[T].set_value(job.mean_lo, c, low)
        Block[T].set_value(job.invstd, c, invstd[c])
    memset(job.left + first, unusual, last - first)
    return not unusual


cdef void fold_gradient(TypedCall[GradSums, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """From the merged sums to the parameters of the map; `composed.input_gradient` is the same in NumPy."""
    cdef double low, invstd, g0, g1
    cdef Py_ssize_t c
    for c in range(first, last):
        low = 0
        if job.mean_lo != NULL:
            low = Block[T].value(job.mean_lo, c)
            job.second[c] -= low * job.first[c]
        if job.out != NULL and not job.frozen:
            invstd = Block[T].value(job.invstd, c)
            g1 = invstd * (invstd * job.second[c] / job.count)  # the square alone may leave the range
            g0 = job.first[c] / job.count - low * g1
            Block[T].set_value(job.grad_offset, c, g0)
            Block[T].set_value(job.grad_slope, c, -g1)
        if job.dweight != NULL:
            Block[T].set_value(job.dweight, c, job.second[c] * Block[T].value(job.invstd, c))
        if job.dbias != NULL:
            Block[T].set_value(job.dbias, c, job.first[c])


cdef void move_towards(C* running, const double* batch, double divisor, Py_ssize_t channels, double momentum) noexcept nogil:
    """Move running statistics towards the batch's, of which a divisor is left to apply."""
    cdef Py_ssize_t c
    for c in range(channels):
        running[c] = <C> ((1 - momentum) * running[c] + momentum * (batch[c] / divisor))


cdef void move(Running r, const double* batch, double divisor, Py_ssize_t channels, double momentum) noexcept nogil:
    if r.data != NULL and r.is_double:
        move_towards(<double*> r.data, batch, divisor, channels, momentum)
    elif r.data != NULL:
        move_towards(<float*> r.data, batch, divisor, channels, momentum)


cdef void move_running(Call* job) noexcept nogil:
    """Move running statistics towards those that a forward has found; nothing that can fail comes after it."""
    move(job.running_mean, job.first, 1, job.channels, job.momentum)
    move(job.running_var, job.second, <double> job.outer * job.inner - job.correction, job.channels, job.momentum)


cdef inline bint any_outside(const C* values, Py_ssize_t n, double limit) noexcept nogil:
    """Whether any of several numbers is not between a limit and its reciprocal."""
    cdef C high = <C> limit, low = <C> (0.5 / limit)
    cdef Py_ssize_t c
    cdef bint outside = False
    for c in range(n):
        outside |= (values[c] >= high) | (values[c] < low)
    return outside


cdef inline bint is_far(TypedCall[Op, T]* job) noexcept nogil:
    """Whether a standard deviation is so far from 1 that a backward must be made of operations (`extremes.far_from_one`)."""
    if T is double:
        return any_outside(<const double*> job.invstd, job.channels, FAR_DOUBLE)
    else:
        return any_outside(<const float*> job.invstd, job.channels, FAR_FLOAT)
