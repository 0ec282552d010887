"""What is summed and what is mapped, for one block of each operand; and the sums in double of what left the range."""

cdef inline Block[T] take(const T* p, Py_ssize_t n, Block[T] fill) noexcept nogil:
    """Load n elements, at most a block; the other lanes are those of `fill`."""
    return Block[T].load(p) if n == Block[T].width() else Block[T].load_part(p, n, fill)


cdef inline Elements[T] elements(Job[Op, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Parameters[T]* p) noexcept nogil:
    """Load n elements of each input, at most a block; the other lanes add nothing to a sum."""
    cdef Elements[T] e
    cdef Block[T] zero = Block[T].constant(0)
    e.x = take(a.x + at, n, p.mean)
    if Op in Gradient:
        e.dy = take(a.dy + at, n, zero)
    if Op in Active:
        if job.from_output:
            e.x = Block[T].restored(e.x, job.activation)
        if job.residual != NULL:
            e.residual = take(a.residual + at, n, zero)
    return e


cdef inline Elements[T] elements_before(
    Job[Op, T]* job, Arrays[T]* a, Py_ssize_t end, Block[T] lanes, Parameters[T]* p
) noexcept nogil:
    """The last lanes of the block that ends at `end`, all of which can be read."""
    cdef Elements[T] e
    cdef Block[T] zero = Block[T].constant(0)
    e.x = Block[T].load_end(a.x + end, lanes, p.mean)
    if Op in Gradient:
        e.dy = Block[T].load_end(a.dy + end, lanes, zero)
    if Op in Active:
        if job.from_output:
            e.x = Block[T].restored(e.x, job.activation)
        if job.residual != NULL:
            e.residual = Block[T].load_end(a.residual + end, lanes, zero)
    return e


cdef inline Block[T] before_activation(Job[Active, T]* job, Elements[T] e, Parameters[T]* p) noexcept nogil:
    """What the activation of the forward is applied to."""
    cdef Block[T] z
    if job.from_output:
        return e.x
    z = Block[T].fma(e.x - p.mean, p.scale, p.shift if Active is ActiveNormalize else p.bias)
    return z if job.residual == NULL else z + e.residual


cdef inline void activate(
    Job[Active, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, Parameters[T]* p, Block[T]* z
) noexcept nogil:
    """A smooth activation of a few blocks, `step` apart; of a gradient, its derivative there."""
    cdef Py_ssize_t i
    for i in range(blocks):
        z[i] = before_activation(job, elements(job, a, at + i * step, n, p), p)
    Block[T].smooth(z, blocks, job.activation, Active in Gradient)


cdef inline void accumulate(Job[Sum, T]* job, Elements[T] e, Parameters[T]* p, Block[T]* sum, Block[T]* square) noexcept nogil:
    """Add a block, whose dy is that before the activation."""
    cdef Block[T] d = e.x - p.mean
    cdef Block[T] term = d if Sum is Stats else e.dy
    sum[0] = sum[0] + term
    square[0] = Block[T].fma(term, d, square[0])


cdef inline void give(T* p, Block[T] a, Py_ssize_t n, bint streams) noexcept nogil:
    if n < Block[T].width():
        a.store_part(p, n)
    elif streams:
        a.stream(p)
    else:
        a.store(p)


cdef inline void keep(Job[ActiveSums, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Block[T] dy) noexcept nogil:
    if job.kept != NULL:
        give(a.kept + at, dy, n, False)


cdef inline void sum_blocks(
    Job[Sum, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, Parameters[T]* p,
    Block[T]* sum, Block[T]* square
) noexcept nogil:
    """Add several blocks of n elements, `step` apart."""
    cdef Elements[T] e
    cdef Py_ssize_t i, few
    cdef Block[T] slopes[FEW]
    if Sum is ActiveSums:
        while job.activation.is_smooth() and blocks > 0:
            few = min(<Py_ssize_t> FEW, blocks)
            activate(job, a, at, step, few, n, p, slopes)
            for i in range(few):
                e = elements(job, a, at + i * step, n, p)
                e.dy = e.dy * slopes[i]
                keep(job, a, at + i * step, n, e.dy)
                accumulate(job, e, p, sum, square)
            at += few * step
            blocks -= few
    for i in range(blocks):
        e = elements(job, a, at + i * step, n, p)
        if Sum is ActiveSums:
            e.dy = Block[T].through(e.dy, before_activation(job, e, p), job.activation)
            keep(job, a, at + i * step, n, e.dy)
        accumulate(job, e, p, sum, square)


cdef inline Results[T] mapped(Job[Map, T]* job, Elements[T] e, Parameters[T]* p) noexcept nogil:
    """Map a block, whose dy is that before the activation."""
    cdef Results[T] r
    if Map is Normalize:
        r.out = Block[T].fma(e.x - p.mean, p.scale, p.shift)
    elif Map is ActiveNormalize:
        r.out = Block[T].activated(before_activation(job, e, p), job.activation)
    else:
        r.dresidual = e.dy
        r.out = Block[T].fma(e.x - p.mean, p.slope, e.dy - p.shift)
        if Map is ActiveGradient:
            if job.frozen:
                r.out = e.dy  # x may be infinite
        r.out = p.scale * r.out
    return r


cdef inline void deliver(Job[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, bint streams, Results[T] r) noexcept nogil:
    """Store n elements of each output, at most a block."""
    give(a.out + at, r.out, n, streams)
    if Map is ActiveGradient:
        if job.dresidual != NULL:
            give(a.dresidual + at, r.dresidual, n, streams)


cdef inline Results[T] mapped_block(Job[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Parameters[T]* p) noexcept nogil:
    cdef Elements[T] e = elements(job, a, at, n, p)
    if Map is ActiveGradient:
        e.dy = Block[T].through(e.dy, before_activation(job, e, p), job.activation)
    return mapped(job, e, p)


cdef inline void map_blocks(
    Job[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, bint streams, Parameters[T]* p
) noexcept nogil:
    """Map several blocks of n elements, `step` apart."""
    cdef Elements[T] e
    cdef Results[T] r
    cdef Py_ssize_t i, few
    cdef Block[T] values[FEW]
    if Map in Active:
        while job.activation.is_smooth() and blocks > 0:
            few = min(<Py_ssize_t> FEW, blocks)
            activate(job, a, at, step, few, n, p, values)
            for i in range(few):
                if Map is ActiveNormalize:
                    r.out = values[i]
                else:
                    e = elements(job, a, at + i * step, n, p)
                    e.dy = e.dy * values[i]
                    r = mapped(job, e, p)
                deliver(job, a, at + i * step, n, streams, r)
            at += few * step
            blocks -= few
    for i in range(blocks):
        deliver(job, a, at + i * step, n, streams, mapped_block(job, a, at + i * step, n, p))


cdef inline void of_channel(Job[Op, T]* job, Py_ssize_t c, Parameters[T]* p) noexcept nogil:
    """Set the parameters to those of one channel, in all lanes."""
    if Op is not Stats:
        p.mean = Block[T].splat(job.at_mean, c)
    if Op in Map or Op is ActiveSums:
        p.scale = Block[T].splat(job.at_scale, c)
    if Op in Map:
        p.shift = Block[T].splat(job.at_shift, c)
    if Op in Backward:
        p.slope = Block[T].splat(job.at_slope, c)
    if Op in Active and Op in Gradient:
        p.bias = Block[T].splat(job.at_bias, c)


cdef inline void of_columns(Job[Op, T]* job, Py_ssize_t j, Parameters[T]* p) noexcept nogil:
    """Set the parameters to those of the columns from index j on."""
    if Op is not Stats:
        p.mean = Block[T].get(job.at_mean, j)
    if Op in Map or Op is ActiveSums:
        p.scale = Block[T].get(job.at_scale, j)
    if Op in Map:
        p.shift = Block[T].get(job.at_shift, j)
    if Op in Backward:
        p.slope = Block[T].get(job.at_slope, j)
    if Op in Active and Op in Gradient:
        p.bias = Block[T].get(job.at_bias, j)


cdef inline double allowance(double n) noexcept nogil:
    """What (sum)^2 / square may be, so that the shift is within a deviation of the mean, or sqrt(2) for few values.

    Within e deviations, (sum / n)^2 <= e^2 M2 / n, where M2 = square - sum^2 / n.
    """
    return n / 2 if n > FEW_VALUES else n * 2 / 3


cdef inline bint is_near(double sum, double square, double n) noexcept nogil:
    """Whether the shift is near enough to the mean of n values."""
    return sum * sum <= allowance(n) * square


cdef inline bint find_nearer_shift(Job[Sum, T]* job, Py_ssize_t index, double n) noexcept nogil:
    """Move the shift at an index to the mean that its sums give, if it is too far away from there."""
    if Sum is Stats:
        if not is_lost(job, index) and not is_near(job.sums[index], job.squares[index], n):
            job.shifts[index] = Block[T].rounded(job.shifts[index] + job.sums[index] / n)
            return True
    return False


cdef inline bint is_lost(Job[Sum, T]* job, Py_ssize_t index) noexcept nogil:
    """Whether the sums at an index left the range in which they keep their digits."""
    return not Block[T].in_range(job.squares[index], job.sums[index] if Sum is Stats else 0)


cdef void sum_exactly(
    Job[Sum, T]* job, Py_ssize_t index, Py_ssize_t offset, Py_ssize_t runs, Py_ssize_t stride, Py_ssize_t n, Parameters[T]* p
) noexcept nogil:
    """Sum `runs` runs of n elements, `stride` apart, in double; store the sums at an index."""
    cdef Arrays[T] a = job.arrays()
    cdef Elements[T] e
    cdef double k = 0, g, d, sum = 0, square = 0
    cdef Py_ssize_t r, i
    if Sum is Stats:
        for r in range(runs):
            for i in range(n):
                k += Block[T].element(a.x + offset + r * stride + i)
        k /= runs * n
        k = k if isfinite(k) else 0
        job.shifts[index] = k
    else:
        k = p.mean.first()
    for r in range(runs):
        for i in range(n):
            e = elements(job, &a, offset + r * stride + i, 1, p)
            d = e.x.first() - k
            g = d
            if Sum is GradSums:
                g = e.dy.first()
            elif Sum is ActiveSums:
                g = Block[T].through(e.dy, before_activation(job, e, p), job.activation).first()
            sum += g
            square += g * d
    job.sums[index] = sum
    job.squares[index] = square
