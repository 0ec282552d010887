"""From the sums of tiles to the parameters of a map: merging, folding, and the running statistics.

The one place of the kernels that knows eps and momentum. Channels are folded a few at a time, in vectors that are known to be
apart: so that roots and quotients of several are computed at once, which on few rows take as long as all that is read.
"""

cdef void merge_stats(Work* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Mean, M2 and the rest of the mean of channels first ... last, from the sums of their tiles."""
    cdef double* mean = job.batch_mean
    cdef double* m2 = job.batch_m2
    cdef double* offset = job.batch_mean_lo  # of the mean from the first pivot; two near numbers have an exact difference
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
        job.sum_dy[c] = 0
        job.sum_dy_xmu[c] = 0
    for tile in range(job.tiles):
        for repeat in range(job.repeats):
            at = tile * job.width + repeat * job.channels
            for c in range(first, tile_last(job, tile, repeat, last)):
                job.sum_dy[c] += job.sums[at + c]
                job.sum_dy_xmu[c] += job.dots[at + c]


cdef inline double lost(double low, double factor) noexcept nogil:
    """What the mean rounded away, times something; nothing where that is infinite: only its sign would be known."""
    return low * factor if isfinite(factor) else 0


cdef inline void get_vector(double* to, const void* vector, Py_ssize_t first, Py_ssize_t n, double otherwise, T* tag) noexcept nogil:
    """Some elements of a vector of channels, in double; or a number where there is no vector."""
    cdef Py_ssize_t i
    if vector == NULL:
        for i in range(n):
            to[i] = otherwise
    else:
        for i in range(n):
            to[i] = Block[T].value(vector, first + i)


cdef inline void put_vector(void* vector, Py_ssize_t first, Py_ssize_t n, const double* values, T* tag) noexcept nogil:
    """Round a few numbers to elements of a vector of channels."""
    cdef Py_ssize_t i
    for i in range(n):
        Block[T].set_value(vector, first + i, values[i])


cdef inline double narrow(double scale, double most) noexcept nogil:
    """A scale that is finite stays so in the type of the arithmetic: where x is the mean, 0 times it must be 0."""
    return min(max(scale, -most), most) if isfinite(scale) else scale


cdef void fold_few(
    Work* job, Py_ssize_t first, Py_ssize_t n, const double* low, const double* invstd, double* scale, T* tag
) noexcept nogil:
    """Scale and shift of a few channels; `composed.fold` is the same in NumPy. What is left in `scale` is not rounded."""
    cdef double shift[FOLDED]
    cdef double kept[FOLDED]
    cdef double most = Block[T].largest()
    cdef Py_ssize_t i
    get_vector(scale, job.weight, first, n, 1, tag)
    get_vector(shift, job.bias, first, n, 0, tag)
    for i in range(n):
        scale[i] = invstd[i] * scale[i]
        kept[i] = narrow(scale[i], most)
        shift[i] -= lost(low[i], scale[i])
    put_vector(job.scale, first, n, kept, tag)
    put_vector(job.shift, first, n, shift, tag)


cdef inline bint is_unusual(double m2, double invstd, double scale, T* tag) noexcept nogil:
    """Whether squares, differences or factors leave the range of a number; `extremes.are_usual` is the same in NumPy."""
    if T is double:  # what is not finite in any other type was so in x
        return (not m2 < LARGE_M2) | (invstd >= LARGE_INVSTD) | (fabs(scale) > Block[T].largest())
    else:
        return (m2 >= Block[T].largest() / 4 * (Block[T].largest() / 4)) | (fabs(scale) > Block[T].largest())


cdef void fold_given(Work* job, Py_ssize_t first, Py_ssize_t last, T* tag) noexcept nogil:
    """Scales and shifts of channels first ... last by given means, with what these round away, and variances, or what was made of these."""
    cdef double low[FOLDED]
    cdef double invstd[FOLDED]
    cdef double scale[FOLDED]
    cdef double eps = job.eps
    cdef Py_ssize_t n, i
    while first < last:
        n = min(<Py_ssize_t> FOLDED, last - first)
        get_vector(low, job.mean_lo, first, n, 0, tag)
        if job.var == NULL:
            get_vector(invstd, job.invstd, first, n, 0, tag)
        else:
            get_vector(invstd, job.var, first, n, 0, tag)
            for i in range(n):
                invstd[i] = 1 / sqrt(invstd[i] + eps)
            put_vector(job.invstd, first, n, invstd, tag)
        fold_few(job, first, n, low, invstd, scale, tag)
        first += n


cdef bint fold_batch(Work* job, Py_ssize_t first, Py_ssize_t last, T* tag) noexcept nogil:
    """From the merged statistics to the parameters of the map; whether the channels may be mapped."""
    cdef double low[FOLDED]
    cdef double invstd[FOLDED]
    cdef double scale[FOLDED]
    cdef double count = job.count, eps = job.eps, high
    cdef const double* mean
    cdef const double* m2
    cdef Py_ssize_t at = first, n, i
    cdef bint unusual = False
    while at < last:
        n = min(<Py_ssize_t> FOLDED, last - at)
        mean, m2 = job.batch_mean + at, job.batch_m2 + at
        put_vector(job.mean, at, n, mean, tag)
        for i in range(n):
            invstd[i] = 1 / sqrt(m2[i] / count + eps)
            high = Block[T].rounded(mean[i])
            low[i] = (mean[i] - high if isfinite(high) else 0) + job.batch_mean_lo[at + i]
        fold_few(job, at, n, low, invstd, scale, tag)
        for i in range(n):
            unusual |= is_unusual(m2[i], invstd[i], scale[i], tag)
        put_vector(job.mean_lo, at, n, low, tag)
        put_vector(job.invstd, at, n, invstd, tag)
        at += n
    memset(job.left + first, unusual, last - first)
    return not unusual


cdef void fold_gradient(TypedCall[GradSums, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """From the merged sums to the parameters of the map; `composed.input_gradient` is the same in NumPy."""
    cdef double low[FOLDED]
    cdef double invstd[FOLDED]
    cdef double g0[FOLDED]
    cdef double g1[FOLDED]
    cdef double count = job.count
    cdef double* sums
    cdef double* dots
    cdef Py_ssize_t n, i
    while first < last:
        n = min(<Py_ssize_t> FOLDED, last - first)
        sums, dots = job.sum_dy + first, job.sum_dy_xmu + first
        get_vector(low, job.mean_lo, first, n, 0, <T*> NULL)
        get_vector(invstd, job.invstd, first, n, 0, <T*> NULL)
        if job.mean_lo != NULL:
            for i in range(n):
                dots[i] -= lost(low[i], sums[i])
        if job.out != NULL and not job.frozen:
            for i in range(n):
                g1[i] = -(invstd[i] * (invstd[i] * dots[i] / count))  # the square alone may leave the range
                g0[i] = sums[i] / count + lost(low[i], g1[i])
            put_vector(job.grad_offset, first, n, g0, <T*> NULL)
            put_vector(job.grad_slope, first, n, g1, <T*> NULL)
        if job.dweight != NULL:
            for i in range(n):
                g1[i] = dots[i] * invstd[i]
            put_vector(job.dweight, first, n, g1, <T*> NULL)
        if job.dbias != NULL:
            put_vector(job.dbias, first, n, sums, <T*> NULL)
        first += n


cdef void move_towards(C* running, const double* batch, double divisor, Py_ssize_t channels, double momentum) noexcept nogil:
    """Move running statistics towards the batch's, of which a divisor is left to apply."""
    cdef Py_ssize_t c
    for c in range(channels):
        running[c] = <C> ((1 - momentum) * running[c] + momentum * (batch[c] / divisor))


cdef void move(Running r, const double* batch, double divisor, Py_ssize_t first, Py_ssize_t last, double momentum) noexcept nogil:
    if r.data != NULL and r.is_double:
        move_towards(<double*> r.data + first, batch + first, divisor, last - first, momentum)
    elif r.data != NULL:
        move_towards(<float*> r.data + first, batch + first, divisor, last - first, momentum)


cdef void move_channels(Call* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Move the running statistics of channels first ... last towards those that a forward has found."""
    move(job.running_mean, job.batch_mean, 1, first, last, job.momentum)
    move(job.running_var, job.batch_m2, <double> job.outer * job.inner - job.correction, first, last, job.momentum)


cdef void move_running(Call* job) noexcept nogil:
    """Move running statistics towards those that a forward has found; nothing that can fail comes after it."""
    move_channels(job, 0, job.channels)


cdef inline void copy_running(Running r, void* kept, Py_ssize_t first, Py_ssize_t last, bint back) noexcept nogil:
    """Keep what running statistics are, or take them back to it."""
    cdef Py_ssize_t size = sizeof(double) if r.is_double else sizeof(float)
    cdef char* data = <char*> r.data + first * size
    if r.data != NULL:
        memcpy(data if back else <char*> kept + first * size, <char*> kept + first * size if back else data, (last - first) * size)


cdef void move_early(Work* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Move some channels' on the thread that has found them; what they were is kept until it is known that none was left."""
    copy_running(job.running_mean, job.kept_mean, first, last, False)
    copy_running(job.running_var, job.kept_var, first, last, False)
    move_channels(job, first, last)


cdef void take_back(Work* job) noexcept nogil:
    copy_running(job.running_mean, job.kept_mean, 0, job.channels, True)
    copy_running(job.running_var, job.kept_var, 0, job.channels, True)


cdef inline bint any_outside(const C* values, Py_ssize_t n, double limit) noexcept nogil:
    """Whether any of several numbers is not between a limit and its reciprocal; 0 is one over infinity, which nothing helps."""
    cdef C high = <C> limit, low = <C> (0.5 / limit)
    cdef Py_ssize_t c
    cdef bint outside = False
    for c in range(n):
        outside |= (values[c] >= high) | ((values[c] < low) & (values[c] != 0))
    return outside


cdef inline bint is_far(TypedCall[Op, T]* job) noexcept nogil:
    """Whether a standard deviation is so far from 1 that a backward must be made of operations (`extremes.far_from_one`)."""
    if T is double:
        return any_outside(<const double*> job.invstd, job.channels, FAR_DOUBLE)
    else:
        return any_outside(<const float*> job.invstd, job.channels, FAR_FLOAT)
