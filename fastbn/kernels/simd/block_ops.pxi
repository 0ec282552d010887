"""What is summed and what is mapped, for one block of each operand; and the sums in double of what left the range."""

cdef inline Block[T] load(const T* p, Py_ssize_t n, Block[T] fill) noexcept nogil:
    """Load n elements, at most a block; the other lanes are those of `fill`."""
    return Block[T].load(p) if n == Block[T].width() else Block[T].load_part(p, n, fill)


cdef inline Operands[T] load_operands(TypedCall[Op, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Parameters[T]* p) noexcept nogil:
    """Load n elements of each input, at most a block; the other lanes add nothing to a sum."""
    cdef Operands[T] e
    cdef Block[T] zero = Block[T].constant(0)
    e.x = load(a.x + at, n, p.mean)
    if Op in Gradient:
        e.dy = load(a.dy + at, n, zero)
    if Op in Fused:
        if job.from_output:
            e.x = Block[T].activation_inverse(e.x, job.activation)
        if job.residual != NULL:
            e.residual = load(a.residual + at, n, zero)
    return e


cdef inline Operands[T] operands_before(
    TypedCall[Op, T]* job, Arrays[T]* a, Py_ssize_t end, Block[T] lanes, Parameters[T]* p
) noexcept nogil:
    """The last lanes of the block that ends at `end`, all of which can be read."""
    cdef Operands[T] e
    cdef Block[T] zero = Block[T].constant(0)
    e.x = Block[T].load_end(a.x + end, lanes, p.mean)
    if Op in Gradient:
        e.dy = Block[T].load_end(a.dy + end, lanes, zero)
    if Op in Fused:
        if job.from_output:
            e.x = Block[T].activation_inverse(e.x, job.activation)
        if job.residual != NULL:
            e.residual = Block[T].load_end(a.residual + end, lanes, zero)
    return e


cdef inline Block[T] pre_activation(TypedCall[Fused, T]* job, Operands[T] e, Parameters[T]* p) noexcept nogil:
    """What the activation of the forward is applied to."""
    cdef Block[T] z
    if job.from_output:
        return e.x
    z = Block[T].fma(e.x - p.mean, p.scale, p.shift if Fused is FusedNormalize else p.bias)
    return z if job.residual == NULL else z + e.residual


cdef inline void activate(
    TypedCall[Fused, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, Parameters[T]* p, Block[T]* z
) noexcept nogil:
    """A smooth activation of a few blocks, `step` apart; of a gradient, its derivative there."""
    cdef Py_ssize_t i
    for i in range(blocks):
        z[i] = pre_activation(job, load_operands(job, a, at + i * step, n, p), p)
    Block[T].smooth(z, blocks, job.activation, Fused in Gradient)


cdef inline void accumulate(TypedCall[Sum, T]* job, Operands[T] e, Parameters[T]* p, Block[T]* sum, Block[T]* dot) noexcept nogil:
    """Add a block, whose dy is that before the activation."""
    cdef Block[T] d = e.x - p.mean
    cdef Block[T] term = d if Sum is Stats else e.dy
    sum[0] = sum[0] + term
    dot[0] = Block[T].fma(term, d, dot[0])


cdef inline void store(T* p, Block[T] a, Py_ssize_t n, bint nontemporal) noexcept nogil:
    if n < Block[T].width():
        a.store_part(p, n)
    elif nontemporal:
        a.stream(p)
    else:
        a.store(p)


cdef inline void store_dz(TypedCall[FusedGradSums, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Block[T] dy) noexcept nogil:
    if job.dz != NULL:
        store(a.dz + at, dy, n, False)


cdef inline void sum_blocks(
    TypedCall[Sum, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, Parameters[T]* p,
    Block[T]* sum, Block[T]* dot
) noexcept nogil:
    """Add several blocks of n elements, `step` apart."""
    cdef Operands[T] e
    cdef Py_ssize_t i, few
    cdef Block[T] slopes[FEW]
    if Sum is FusedGradSums:
        while job.activation.is_smooth() and blocks > 0:
            few = min(<Py_ssize_t> FEW, blocks)
            activate(job, a, at, step, few, n, p, slopes)
            for i in range(few):
                e = load_operands(job, a, at + i * step, n, p)
                e.dy = e.dy * slopes[i]
                store_dz(job, a, at + i * step, n, e.dy)
                accumulate(job, e, p, sum, dot)
            at += few * step
            blocks -= few
    for i in range(blocks):
        e = load_operands(job, a, at + i * step, n, p)
        if Sum is FusedGradSums:
            e.dy = Block[T].activation_backward(e.dy, pre_activation(job, e, p), job.activation)
            store_dz(job, a, at + i * step, n, e.dy)
        accumulate(job, e, p, sum, dot)


cdef inline Outputs[T] mapped(TypedCall[Map, T]* job, Operands[T] e, Parameters[T]* p) noexcept nogil:
    """Map a block, whose dy is that before the activation."""
    cdef Outputs[T] r
    if Map is Normalize:
        r.out = Block[T].fma(e.x - p.mean, p.scale, p.shift)
    elif Map is FusedNormalize:
        r.out = Block[T].activation_forward(pre_activation(job, e, p), job.activation)
    else:
        r.dresidual = e.dy
        r.out = Block[T].fma(e.x - p.mean, p.slope, e.dy - p.shift)
        if Map is FusedGradInput:
            if job.frozen:
                r.out = e.dy  # x may be infinite
        r.out = p.scale * r.out
    return r


cdef inline void store_outputs(
    TypedCall[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, bint nontemporal, Outputs[T] r
) noexcept nogil:
    """Store n elements of each output, at most a block."""
    store(a.out + at, r.out, n, nontemporal)
    if Map is FusedGradInput:
        if job.dresidual != NULL:
            store(a.dresidual + at, r.dresidual, n, nontemporal)


cdef inline Outputs[T] mapped_block(TypedCall[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Parameters[T]* p) noexcept nogil:
    cdef Operands[T] e = load_operands(job, a, at, n, p)
    if Map is FusedGradInput:
        e.dy = Block[T].activation_backward(e.dy, pre_activation(job, e, p), job.activation)
    return mapped(job, e, p)


cdef inline void map_blocks(
    TypedCall[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, bint nontemporal,
    Parameters[T]* p
) noexcept nogil:
    """Map several blocks of n elements, `step` apart."""
    cdef Operands[T] e
    cdef Outputs[T] r
    cdef Py_ssize_t i, few
    cdef Block[T] values[FEW]
    if Map in Fused:
        while job.activation.is_smooth() and blocks > 0:
            few = min(<Py_ssize_t> FEW, blocks)
            activate(job, a, at, step, few, n, p, values)
            for i in range(few):
                if Map is FusedNormalize:
                    r.out = values[i]
                else:
                    e = load_operands(job, a, at + i * step, n, p)
                    e.dy = e.dy * values[i]
                    r = mapped(job, e, p)
                store_outputs(job, a, at + i * step, n, nontemporal, r)
            at += few * step
            blocks -= few
    for i in range(blocks):
        store_outputs(job, a, at + i * step, n, nontemporal, mapped_block(job, a, at + i * step, n, p))


cdef inline void broadcast_parameters(TypedCall[Op, T]* job, Py_ssize_t c, Parameters[T]* p) noexcept nogil:
    """Set the parameters to those of one channel, in all lanes."""
    if Op is not Stats:
        p.mean = Block[T].splat(job.at_mean, c)
    if Op in Map or Op is FusedGradSums:
        p.scale = Block[T].splat(job.at_scale, c)
    if Op in Map:
        p.shift = Block[T].splat(job.at_shift, c)
    if Op in Backward:
        p.slope = Block[T].splat(job.at_slope, c)
    if Op in Fused and Op in Gradient:
        p.bias = Block[T].splat(job.at_bias, c)


cdef inline void load_parameters(TypedCall[Op, T]* job, Py_ssize_t j, Parameters[T]* p) noexcept nogil:
    """Set the parameters to those of the columns from index j on."""
    if Op is not Stats:
        p.mean = Block[T].get(job.at_mean, j)
    if Op in Map or Op is FusedGradSums:
        p.scale = Block[T].get(job.at_scale, j)
    if Op in Map:
        p.shift = Block[T].get(job.at_shift, j)
    if Op in Backward:
        p.slope = Block[T].get(job.at_slope, j)
    if Op in Fused and Op in Gradient:
        p.bias = Block[T].get(job.at_bias, j)


cdef inline void join_parameters(TypedCall[Map, T]* job, Parameters[T]* p, const Parameters[T]* next, Block[T] lanes) noexcept nogil:
    """Set some lanes of the parameters to those of the next plane."""
    p.mean = Block[T].joined(p.mean, next.mean, lanes)
    p.scale = Block[T].joined(p.scale, next.scale, lanes)
    p.shift = Block[T].joined(p.shift, next.shift, lanes)
    if Map in Backward:
        p.slope = Block[T].joined(p.slope, next.slope, lanes)
    if Map is FusedGradInput:
        p.bias = Block[T].joined(p.bias, next.bias, lanes)


cdef inline double allowance(double n) noexcept nogil:
    """What (sum)^2 / dot may be, so that the pivot is within a deviation of the mean, or sqrt(2) for few values.

    Within e deviations, (sum / n)^2 <= e^2 M2 / n, where M2 = dot - sum^2 / n.
    """
    return n / 2 if n > FEW_VALUES else n * 2 / 3


cdef inline bint is_near(double sum, double dot, double n) noexcept nogil:
    """Whether the pivot is near enough to the mean of n values."""
    return sum * sum <= allowance(n) * dot


cdef inline bint move_pivot(TypedCall[Sum, T]* job, Py_ssize_t index, double n) noexcept nogil:
    """Move the pivot at an index to the mean that its sums give, if it is too far away from there."""
    if Sum is Stats:
        if not out_of_range(job, index) and not is_near(job.sums[index], job.dots[index], n):
            job.pivots[index] = Block[T].rounded(job.pivots[index] + job.sums[index] / n)
            return True
    return False


cdef inline bint out_of_range(TypedCall[Sum, T]* job, Py_ssize_t index) noexcept nogil:
    """Whether the sums at an index left the range in which they keep their digits."""
    if Sum is Stats:
        return not Block[T].in_range(job.dots[index], job.sums[index], job.pivots[index])
    else:
        return not Block[T].in_range(job.dots[index], 0, 1)


cdef void sum_in_double(
    TypedCall[Sum, T]* job, Py_ssize_t index, Py_ssize_t offset, Py_ssize_t runs, Py_ssize_t stride, Py_ssize_t n, Parameters[T]* p
) noexcept nogil:
    """Sum `runs` runs of n elements, `stride` apart, in double; store the sums at an index."""
    cdef Arrays[T] a = job.arrays()
    cdef bint constant = Sum is Stats
    cdef Operands[T] e
    cdef double k = 0, g, d, sum = 0, dot = 0
    cdef Py_ssize_t r, i
    if Sum is Stats:
        k = Block[T].element(a.x + offset)
        for r in range(runs):
            for i in range(n):  # to the end: without a way out, several at once
                constant &= Block[T].element(a.x + offset + r * stride + i) == k
            if not constant:
                break
        if constant:
            job.pivots[index], job.sums[index], job.dots[index] = k, 0, 0
            return
        k = 0
        for r in range(runs):
            for i in range(n):
                k += Block[T].element(a.x + offset + r * stride + i)
        k /= runs * n
        k = k if isfinite(k) else 0
        job.pivots[index] = k
    else:
        k = p.mean.first()
    for r in range(runs):
        for i in range(n):
            e = load_operands(job, &a, offset + r * stride + i, 1, p)
            d = e.x.first() - k
            g = d
            if Sum is GradSums:
                g = e.dy.first()
            elif Sum is FusedGradSums:
                g = Block[T].activation_backward(e.dy, pre_activation(job, e, p), job.activation).first()
            sum += g
            dot += g * d
    job.sums[index] = sum
    job.dots[index] = dot
