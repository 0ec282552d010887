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
    cdef Block[T] sum, dot, zero = Block[T].constant(0), rest = Block[T].tail_mask(length % W)
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


cdef void map_planes(
    TypedCall[Map, T]* job, Py_ssize_t plane, Py_ssize_t planes, Py_ssize_t start, Py_ssize_t length
) noexcept nogil:
    """Map elements start ... start + length of several planes that lie one behind the other."""
    cdef Py_ssize_t W = Block[T].width(), channel = plane % job.channels, at = plane * job.inner + start, n, i
    cdef Arrays[T] a = job.arrays()
    cdef Parameters[T] p
    cdef Outputs[T] tail
    for n in range(planes):
        broadcast_parameters(job, channel, &p)
        if length < W:
            map_blocks(job, &a, at, 0, 1, length, False, &p)
        elif length % W == 0 and length < LINED * W and not job.nontemporal and not ON_SSE:  # where it would be long, for what it saves
            map_blocks(job, &a, at, W, length // W, W, False, &p)
        else:
            # The tail overlaps what is before it. It is computed first, because the output may be the input.
            tail = mapped_block(job, &a, at + length - W, W, &p)
            i = Block[T].to_line(a.out + at, length) if job.nontemporal or length >= LINED * W else 0
            if i > 0:
                store_outputs(job, &a, at, i, False, mapped_block(job, &a, at, W, &p))
            if job.nontemporal:
                map_blocks(job, &a, at + i, W, (length - i) // W, W, True, &p)
                i += (length - i) // W * W
                if i < length:  # never write a streamed line again
                    store_outputs(job, &a, at + i, length - i, False, mapped_block(job, &a, at + i, length - i, &p))
            else:
                map_blocks(job, &a, at + i, W, (length - i) // W, W, False, &p)
                if i + (length - i) // W * W < length:
                    store_outputs(job, &a, at + length - W, W, False, tail)
        at += job.inner
        channel = channel + 1 if channel + 1 < job.channels else 0


cdef void stream_planes(TypedCall[Map, T]* job, Py_ssize_t plane, Py_ssize_t planes) noexcept nogil:
    """Map several planes to lines in the cache, which are streamed when they are full."""
    cdef Py_ssize_t item = sizeof(T), line = LINE // item, at = plane * job.inner, end = at + planes * job.inner
    cdef Py_ssize_t given = at, full, first, few  # elements before `given` are in the output
    cdef T* out = job.arrays().out
    cdef Stage stage
    cdef char* lines = stage.bytes
    cdef TypedCall[Map, T] staged = job[0]
    staged.nontemporal = False
    first = at - (line - Block[T].to_line(out + at, line)) % line
    while at < end:
        few = min(planes, (<Py_ssize_t> sizeof(Stage) // item - (at - first)) // job.inner)
        staged.out = lines - first * item  # of the element at index 0
        map_planes(&staged, plane, few, 0, job.inner)
        plane += few
        planes -= few
        at += few * job.inner
        full = at - (at - first) % line
        if first < given and first < full:  # what is before is another's, and may be written at this time
            memcpy(out + given, lines + (given - first) * item, (first + line - given) * item)
            given = first + line
        while given < full:
            stream_line(out + given, lines + (given - first) * item)
            given += line
        memcpy(lines, lines + (full - first) * item, (at - full) * item)
        first = full
    memcpy(out + given, lines + (given - first) * item, (end - given) * item)


cdef inline void map_whole(TypedCall[Map, T]* job, Py_ssize_t plane, Py_ssize_t planes) noexcept nogil:
    """Map several planes that lie one behind the other."""
    if job.nontemporal and is_staged(job.inner, sizeof(T)):
        stream_planes(job, plane, planes)
    else:
        map_planes(job, plane, planes, 0, job.inner)
