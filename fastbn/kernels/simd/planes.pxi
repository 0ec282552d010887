"""Planes (ncsp): the loops over runs of `inner` elements that belong to one channel."""

cdef inline void sum_run(
    TypedCall[Sum, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Block[T]* rest, Parameters[T]* p, Block[T]* sum, Block[T]* dot
) noexcept nogil:
    """Add n elements that lie one behind the other; `rest` has as many last lanes as the last block elements."""
    cdef Py_ssize_t W = Block[T].width(), end = at + n
    cdef Operands[T] e, whole
    sum_blocks(job, a, at, W, n // W, W, p, sum, dot)
    at += n // W * W
    if at == end:
        return
    if n < W:
        sum_blocks(job, a, at, 0, 1, n, p, sum, dot)
        return
    e = operands_before(job, a, end, rest[0], p)
    if Sum is FusedGradSums:
        e.dy = Block[T].activation_backward(e.dy, pre_activation(job, e, p), job.activation)
        if job.dz != NULL:
            whole = load_operands(job, a, end - W, W, p)
            store_dz(job, a, end - W, W, Block[T].activation_backward(whole.dy, pre_activation(job, whole, p), job.activation))
    accumulate(job, e, p, sum, dot)


cdef void find_pivots(TypedCall[Stats, T]* job, Py_ssize_t first, Py_ssize_t last, Py_ssize_t tile) noexcept nogil:
    """The pivots of channels first ... last in one tile of planes: of many before their sums, which would wait for memory."""
    cdef Py_ssize_t stride = job.channels * job.inner, c, i, at
    cdef Py_ssize_t n0 = tile // job.pieces * job.images, start = tile % job.pieces * job.piece
    cdef Py_ssize_t length = min(job.piece, job.inner - start), e = min(job.images, job.outer - n0) * length
    cdef Py_ssize_t places[8]
    cdef const T* plane = job.arrays().x + n0 * stride + first * job.inner + start
    for i in range(8):
        at = (2 * i + 1) * e // 16
        places[i] = at if e == length else at // length * stride + at % length  # of one run without divisions
    for c in range(first, last):
        job.pivots[tile * job.channels + c] = Block[T].pivot_at(plane, places)
        plane += job.inner


cdef void add_planes(TypedCall[Sum, T]* job, Py_ssize_t first, Py_ssize_t last, Py_ssize_t tile) noexcept nogil:
    """The sums of one tile of channels first ... last, at most PLANES, around their pivots."""
    cdef Py_ssize_t W = Block[T].width(), stride = job.channels * job.inner
    cdef Py_ssize_t n0 = tile // job.pieces * job.images, runs = min(job.images, job.outer - n0)
    cdef Py_ssize_t start = tile % job.pieces * job.piece, length = min(job.piece, job.inner - start)
    cdef Py_ssize_t at = n0 * stride + first * job.inner + start, index = tile * job.channels + first
    cdef Py_ssize_t i, n, c, together, parts, step, chain, images = runs, channels = last - first
    # Two arrays of long planes the processor foresees by itself, and better.
    cdef bint early = job.exceeds_l3 and (Sum is Stats or length * <Py_ssize_t> sizeof(T) <= REACH)
    cdef Arrays[T] a = job.arrays()
    cdef Accumulators[T] acc
    cdef Parameters[T] p
    cdef Block[T] sum, dot, zero = Block[T].constant(0), rest = Block[T].behind(W - length % W)
    # Image by image, so that memory is read in long runs; small planes of a few images together, so that the
    # accumulators are loaded and stored less often.
    while images > 0:
        if length < SMALL_PLANE * W:
            together = parts = min(images, <Py_ssize_t> TOGETHER)
            step, chain = stride, 0
        else:
            together, parts = 1, div_up(length, CHAIN * W)
            step = chain = CHAIN * W
        for c in range(channels):
            if together < images and early:  # the same channel of the next images is too far away to be foreseen
                for n in range(together):
                    Block[T].prefetch(a.x + at + (n + together) * stride, length)
                    if Sum in Gradient:
                        Block[T].prefetch(a.dy + at + (n + together) * stride, length)
            broadcast_parameters(job, first + c, &p)
            if Sum is Stats:
                p.mean = Block[T].constant(job.pivots[index + c])
            sum = dot = zero
            for i in range(parts):
                if chain > 0:
                    sum = dot = zero
                sum_run(job, &a, at + i * step, min(CHAIN * W, length - i * chain), &rest, &p, &sum, &dot)
                if chain > 0 or i + 1 == parts:
                    if images < runs or i * chain > 0:
                        sum = acc.sum[c] + sum
                        dot = acc.dot[c] + dot
                    if together < images or i + 1 < parts:
                        acc.sum[c] = sum
                        acc.dot[c] = dot
            if together == images:
                job.sums[index + c] = sum.total()
                job.dots[index + c] = dot.total()
            at += job.inner
        at += together * stride - channels * job.inner
        images -= together


cdef void sum_planes(TypedCall[Sum, T]* job, Py_ssize_t first, Py_ssize_t last, Py_ssize_t tile) noexcept nogil:
    """The sums of one tile of channels first ... last, at most PLANES."""
    cdef Py_ssize_t stride = job.channels * job.inner, n0 = tile // job.pieces * job.images, runs = min(job.images, job.outer - n0)
    cdef Py_ssize_t start = tile % job.pieces * job.piece, length = min(job.piece, job.inner - start), c
    cdef Parameters[T] p
    add_planes(job, first, last, tile)
    for c in range(first, last):
        if move_pivot(job, tile * job.channels + c, runs * length):
            add_planes(job, c, c + 1, tile)
        if out_of_range(job, tile * job.channels + c):
            broadcast_parameters(job, c, &p)
            sum_in_double(job, tile * job.channels + c, n0 * stride + c * job.inner + start, runs, stride, length, &p)


cdef inline void next_plane(TypedCall[Map, T]* job, Py_ssize_t* channel, Parameters[T]* p) noexcept nogil:
    channel[0] = channel[0] + 1 if channel[0] + 1 < job.channels else 0
    broadcast_parameters(job, channel[0], p)


cdef inline void map_alone(TypedCall[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t length, Parameters[T]* p) noexcept nogil:
    """Map a plane by itself: of fused operations, whose code is long, only one below a block."""
    cdef Py_ssize_t W = Block[T].width()
    cdef Outputs[T] tail
    if length < W:
        map_blocks(job, a, at, 0, 1, length, False, p)
    elif Map is Normalize or Map is GradInput:
        # The tail overlaps what is before it. It is computed first, because the output may be the input.
        tail = mapped_block(job, a, at + length - W, W, p)
        map_blocks(job, a, at, W, length // W, W, False, p)
        if length % W != 0:
            store_outputs(job, a, at + length - W, W, False, tail)


cdef void map_planes(
    TypedCall[Map, T]* job, Py_ssize_t plane, Py_ssize_t planes, Py_ssize_t start, Py_ssize_t length
) noexcept nogil:
    """Map elements start ... start + length of several planes that lie one behind the other.

    They are one run of blocks, of which those where planes meet have the parameters of each in its lanes: so but for both ends of
    the run whole cache lines are written, and none twice. In short planes that costs more than to take each by itself.
    """
    cdef Py_ssize_t W = Block[T].width(), at = plane * job.inner + start, channel = plane % job.channels
    cdef Py_ssize_t meeting = at + length, end = meeting + (planes - 1) * job.inner, short = W, blocks, n = 0
    cdef Arrays[T] a = job.arrays()
    cdef Parameters[T] p, joined
    if Map is Normalize:
        short = Block[T].worth_joining()
    elif Map is GradInput:  # which has more parameters to join, and fewer stores for each load
        short = LINED * W
    broadcast_parameters(job, channel, &p)
    if job.inner < (W if job.nontemporal else short):  # of those below a block, more than two could meet in one
        while True:
            map_alone(job, &a, at, length, &p)
            at += length
            if at == end:
                return
            next_plane(job, &channel, &p)
    if job.nontemporal or end - at >= LINED * W:
        n = Block[T].to_line(a.out + at, end - at)
    while at < end:
        if at == meeting:
            next_plane(job, &channel, &p)
            meeting += job.inner
        blocks = (meeting - at) // W if n == 0 else 0
        if blocks > 0:
            map_blocks(job, &a, at, W, blocks, W, job.nontemporal, &p)
            at += blocks * W
            continue
        if n == 0:
            n = min(W, end - at)
        joined = p
        if meeting < at + n:
            next_plane(job, &channel, &p)
            join_parameters(job, &joined, &p, Block[T].behind(meeting - at))
            meeting += job.inner
        map_blocks(job, &a, at, 0, 1, n, job.nontemporal, &joined)
        at += n
        n = 0
