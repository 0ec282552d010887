"""The doors for checked arrays: what a call is given is entered into a Call, and the Call is run."""


def set_caches(Py_ssize_t l1, Py_ssize_t l2, Py_ssize_t l3):
    """Set the sizes of the caches, in bytes, that the units of work are cut for."""
    global L1, L2, L3
    L1, L2, L3 = l1, l2, l3


cdef int dtype_index(cnp.ndarray a) except -1:
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return 0
    if number == cnp.NPY_DOUBLE:
        return 1
    if number == NPY_HALF:
        return 3
    if a.dtype.name == "bfloat16":
        return 2
    raise TypeError(f"no SIMD kernel for dtype {a.dtype}")


cdef inline int arithmetic_number(int dtype) noexcept:
    return cnp.NPY_DOUBLE if dtype == 1 else cnp.NPY_FLOAT


cdef int thread_count(threads) except -1:
    """A number of threads that C can count with; what is more than there can be makes no difference."""
    return max(1, min(threads, MOST_THREADS))


cdef inline bint is_dense(cnp.ndarray a) noexcept:
    """Whether C may take the memory of an array as it is: C-contiguous, aligned, in native byte order."""
    return cnp.PyArray_IS_C_CONTIGUOUS(a) and cnp.PyArray_ISBEHAVED_RO(a)


cdef int bind(Call* call, cnp.ndarray x, threads) except -1:
    """Enter the input; return the index of its dtype."""
    if cnp.PyArray_NDIM(x) != 3 or not is_dense(x) or cnp.PyArray_SIZE(x) == 0:
        raise ValueError(
            "a kernel needs a C-contiguous and aligned (outer, channels, inner) array, not empty, "
            f"got shape {(<object> x).shape}, strides {(<object> x).strides}"
        )
    memset(call, 0, sizeof(Call))
    call.x = cnp.PyArray_DATA(x)
    call.outer, call.channels, call.inner = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2)
    call.threads = thread_count(threads)
    return dtype_index(x)


cdef void* like(cnp.ndarray x, cnp.ndarray a) except NULL:
    """Memory of an array that is laid out as the input."""
    if (
        cnp.PyArray_NDIM(a) != 3 or not is_dense(a) or dtype_index(a) != dtype_index(x)
        or cnp.PyArray_DIM(a, 0) != cnp.PyArray_DIM(x, 0) or cnp.PyArray_DIM(a, 1) != cnp.PyArray_DIM(x, 1)
        or cnp.PyArray_DIM(a, 2) != cnp.PyArray_DIM(x, 2)
    ):
        raise ValueError("the arrays of a kernel call must have one shape and dtype and be C-contiguous and aligned")
    return cnp.PyArray_DATA(a)


cdef void* target(cnp.ndarray x, cnp.ndarray a) except NULL:
    """Memory of an output that is laid out as the input."""
    if not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError("the outputs of a kernel call must be writable")
    return like(x, a)


cdef void* vector(Call* call, str name, int number, object v) except NULL:
    """Memory of a vector of channels."""
    if not isinstance(v, cnp.ndarray):
        raise TypeError(f"{name} must be an array of {call.channels} channels, got {type(v).__name__}")
    if cnp.PyArray_NDIM(v) != 1 or cnp.PyArray_DIM(v, 0) != call.channels or not is_dense(v) or cnp.PyArray_TYPE(v) != number:
        raise ValueError(
            f"{name} must be a vector of {call.channels} channels, contiguous, aligned and of the type of the arithmetic, "
            f"got {v.dtype} of shape {v.shape} and strides {v.strides}"
        )
    return cnp.PyArray_DATA(v)


cdef void* optional(Call* call, str name, int number, object v) except? NULL:
    """Memory of a vector of channels; NULL for None."""
    return NULL if v is None else vector(call, name, number, v)


cdef Running running(Call* call, str name, int dtype, object v) except *:
    """Enter running statistics that the call updates, or None."""
    cdef Running r = Running(NULL, False)
    if v is not None:
        r.is_double = arithmetic_number(dtype) == cnp.NPY_DOUBLE or (isinstance(v, cnp.ndarray) and cnp.PyArray_TYPE(v) == cnp.NPY_DOUBLE)
        r.data = vector(call, name, cnp.NPY_DOUBLE if r.is_double else cnp.NPY_FLOAT, v)
        if not cnp.PyArray_ISWRITEABLE(v):
            raise ValueError(f"{name} is updated in place but is read-only")
    return r


cdef cnp.ndarray new_vector(Call* call, int number):
    cdef cnp.npy_intp size = call.channels
    return cnp.PyArray_EMPTY(1, &size, number, 0)


cdef int bind_activation(Call* call, activation) except -1:
    """Enter an activation, or None."""
    if activation is None:
        return 0
    code = getattr(activation, "code", None)
    if not isinstance(code, int):
        raise TypeError(f"a SIMD kernel takes activations of its own, got {activation!r}")
    call.activation.kind, call.activation.parameter = code, activation.parameter
    return 0


cdef bint bind_epilogue(Call* call, cnp.ndarray x, epilogue) except -1:
    """Enter what comes after the normalization; return whether there is anything."""
    if epilogue is None:
        return False
    activation, residual, _, _, dresidual, call.restores = epilogue
    bind_activation(call, activation)
    if residual is not None:
        call.residual = like(x, residual)
    if dresidual is not None:
        call.dresidual = target(x, dresidual)
    return True


cdef bint bind_gradient(Call* call, cnp.ndarray x, int dtype, epilogue) except -1:
    """As `bind_epilogue`, of a gradient: it finds again what the activation was applied to."""
    cdef bint active = bind_epilogue(call, x, epilogue)
    if active:
        call.scale = vector(call, "scale", arithmetic_number(dtype), epilogue.scale)
        call.bias = vector(call, "shift", arithmetic_number(dtype), epilogue.shift)
    return active


cdef int run(call_fn function, Call* call) except -1:
    """Run a call, in the default floating-point mode, that leaves nothing in its scratch memory."""
    cdef bint done
    cdef uint32_t mode
    with nogil:
        mode = enter_default_mode()
        done = function(call)
        end_scratch()
        leave_default_mode(mode)
    if not done:
        raise MemoryError("no memory for the partial sums")
    return 0


def plan(str op, dims, Py_ssize_t itemsize, threads):
    """How a call would be cut: tiles, units of work, streaming, and its traffic; for `dispatch.explain`."""
    cdef Call call
    cdef Py_ssize_t W = BLOCK // max(itemsize, <Py_ssize_t> 4), size, units = 0
    cdef bint resident = False
    memset(&call, 0, sizeof(Call))
    call.outer, call.channels, call.inner = dims
    call.threads = thread_count(threads)
    call.out = &call  # an output of its own
    call.dy = &call + 1 if op == "backward" else NULL  # an array of its own, too
    size = call.outer * call.channels * call.inner * itemsize
    cut(&call, W)
    if call.by_columns:
        cutting = f"{call.tiles} tiles of {min(call.rows, <Py_ssize_t> TILE_ROWS)} rows of {call.columns} columns"
    elif call.pieces > 1:
        cutting = f"{call.tiles} tiles of {call.piece} elements for each channel"
    else:
        cutting = f"{call.tiles} tiles of {min(call.images, call.outer)} images for each channel"
    arrays = 2 if op == "backward" else 1
    if op != "normalize":
        units = sum_units(&call, W, itemsize)
        resident = op != "stats" and grouped(&call, W, itemsize)
    if resident:
        fits = arrays * call.group * call.outer * call.inner * itemsize <= L2
        work = f"{call.units} of {call.group} channels, sums and map on resident data"
        reads, writes = arrays * (1 if fits else 2), 1
    elif op == "stats":
        work, reads, writes = f"{units}", 1, 0
    else:
        choose_map(&call, W)
        map_units(&call, W, itemsize, touched(&call))
        work = f"{call.units}" if op == "normalize" else f"{units}, then backwards {call.units}"
        reads, writes = arrays * (1 if op == "normalize" else 2), 1
    return {
        "tiles": cutting,
        "units": work,
        "streaming": "yes" if call.streams else "no",
        "traffic": f"at most {reads} reads and {writes} writes of x, {(reads + writes) * size} bytes",
    }


def stats(cnp.ndarray x not None, threads=1):
    """Mean, what it rounds away, and M2 of each channel; as `reference.stats`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads)
    cdef cnp.ndarray mean = new_vector(&call, cnp.NPY_DOUBLE), low = new_vector(&call, cnp.NPY_DOUBLE)
    cdef cnp.ndarray m2 = new_vector(&call, cnp.NPY_DOUBLE)
    call.first, call.low = <double*> cnp.PyArray_DATA(mean), <double*> cnp.PyArray_DATA(low)
    call.second = <double*> cnp.PyArray_DATA(m2)
    run(STATS[dtype], &call)
    return mean, low, m2


def normalize(cnp.ndarray x not None, cnp.ndarray y not None, mean, scale, shift, threads=1, epilogue=None):
    """Write ``(x - mean) * scale + shift`` and what comes after it to `y`; as `reference.normalize`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_epilogue(&call, x, epilogue)
    call.out = target(x, y)
    call.mean, call.scale = vector(&call, "mean", number, mean), vector(&call, "scale", number, scale)
    call.shift = vector(&call, "shift", number, shift)
    run(NORMALIZE[dtype][active], &call)


def grad_sums(cnp.ndarray dy not None, cnp.ndarray x not None, mean, threads=1, epilogue=None):
    """Sums over each channel of `dy` and of ``dy * (x - mean)``; as `reference.grad_sums`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_gradient(&call, x, dtype, epilogue)
    cdef cnp.ndarray sum_dy = new_vector(&call, cnp.NPY_DOUBLE), sum_dy_xmu = new_vector(&call, cnp.NPY_DOUBLE)
    call.dy = like(x, dy)
    call.mean = vector(&call, "mean", number, mean)
    call.first, call.second = <double*> cnp.PyArray_DATA(sum_dy), <double*> cnp.PyArray_DATA(sum_dy_xmu)
    run(GRAD_SUMS[dtype][active], &call)
    return sum_dy, sum_dy_xmu


def grad_input(
    cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray dx not None, mean, scale, g0, g1, threads=1, epilogue=None
):
    """Write ``scale * (dy - g0 - (x - mean) * g1)`` to `dx`; as `reference.grad_input`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_gradient(&call, x, dtype, epilogue)
    call.dy, call.out = like(x, dy), target(x, dx)
    call.mean, call.scale = vector(&call, "mean", number, mean), vector(&call, "scale", number, scale)
    call.shift, call.slope = vector(&call, "g0", number, g0), vector(&call, "g1", number, g1)
    run(GRAD_INPUT[dtype][active], &call)


def inference(
    cnp.ndarray x not None, cnp.ndarray y not None, mean, mean_lo, spread, weight, bias, eps, threads, epilogue=None
):
    """Normalize with given statistics; as `core.Composed.inference`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_epilogue(&call, x, epilogue)
    call.out = target(x, y)
    call.mean, call.mean_lo = vector(&call, "mean", number, mean), optional(&call, "mean_lo", number, mean_lo)
    call.invstd = vector(&call, "spread", number, spread)
    call.weight, call.bias = optional(&call, "weight", number, weight), optional(&call, "bias", number, bias)
    call.inverted = eps is None
    call.eps = 0 if eps is None else eps
    run(INFERENCE[dtype][active], &call)


def forward(
    cnp.ndarray x not None, cnp.ndarray y not None, weight, bias, double eps, running_mean, running_var, double momentum,
    int correction, compute, threads, epilogue=None
):
    """Normalize with the batch's statistics; as `core.Composed.forward`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_epilogue(&call, x, epilogue)
    cdef Running mean = running(&call, "running_mean", dtype, running_mean), var = running(&call, "running_var", dtype, running_var)
    call.out = target(x, y)
    call.weight, call.bias = optional(&call, "weight", number, weight), optional(&call, "bias", number, bias)
    call.eps = eps
    return train(&call, dtype, active, x, y, weight, bias, running_mean, mean, running_var, var, momentum, correction, epilogue)


cdef tuple train(
    Call* call, int dtype, bint active, x, y, weight, bias, running_mean, Running mean_to_move, running_var, Running var_to_move,
    double momentum, int correction, epilogue
):
    """Run a forward whose inputs were entered; return the vectors that it makes.

    The running statistics are updated last, when nothing can fail any more.
    """
    cdef uint32_t mode
    cdef bint done
    cdef object left = None
    cdef int number = arithmetic_number(dtype)
    cdef cnp.ndarray mean = new_vector(call, number), mean_lo = new_vector(call, number), invstd = new_vector(call, number)
    cdef cnp.ndarray scale = new_vector(call, number), shift = new_vector(call, number)
    cdef tuple made = (mean, mean_lo, invstd, scale, shift)
    call.mean, call.mean_lo, call.invstd = cnp.PyArray_DATA(mean), cnp.PyArray_DATA(mean_lo), cnp.PyArray_DATA(invstd)
    call.scale, call.shift = cnp.PyArray_DATA(scale), cnp.PyArray_DATA(shift)
    mode = enter_default_mode()
    try:
        with nogil:
            done = FORWARD[dtype][active](call)
        if not done:
            raise MemoryError("no memory for the partial sums")
        if memchr(call.left, 1, call.channels) != NULL:
            left = forward_left(call, made, x, y, weight, bias, running_mean, running_var, momentum, correction, epilogue)
        update(mean_to_move, call.first, 1, call.channels, momentum)
        update(var_to_move, call.second, call.count - correction, call.channels, momentum)
        if left is not None:
            replace_left(left, running_mean, running_var)
    finally:
        end_scratch()
        leave_default_mode(mode)
    return made


cdef object COMPOSED = None, PART = None


def set_rescue(composed, part):
    """Set what computes channels at the ends of the range: whole calls made of this module's operations, and parts of channels.

    Whoever selects a kernel brings them, because a kernel knows nothing of eps and momentum beyond its own calls.
    """
    global COMPOSED, PART
    COMPOSED, PART = composed, part


cdef object composed():
    """The same calls, made of the operations of this module: they know what to do at the ends of the range."""
    if COMPOSED is None:
        raise RuntimeError("values at the ends of the range need set_rescue before")
    return COMPOSED


cdef tuple forward_left(
    Call* call, tuple made, x, y, weight, bias, running_mean, running_var, double momentum, int correction, epilogue
):
    """Compute the channels that a forward has left; return their indices and running statistics, and the merged sums of all.

    The tiles of so many channels alone are those of all: planes are cut without regard to the number of channels, and
    where the units of work are whole channels of columns, they are so many as make whole blocks.
    """
    rescue = composed()
    cdef cnp.ndarray mask = np.empty(call.channels, np.bool_)
    cdef cnp.ndarray first = new_vector(call, cnp.NPY_DOUBLE), second = new_vector(call, cnp.NPY_DOUBLE)
    memcpy(cnp.PyArray_DATA(mask), call.left, call.channels)
    memcpy(cnp.PyArray_DATA(first), call.first, call.channels * sizeof(double))  # other calls use the scratch memory
    memcpy(cnp.PyArray_DATA(second), call.second, call.channels * sizeof(double))
    call.first, call.second = <double*> cnp.PyArray_DATA(first), <double*> cnp.PyArray_DATA(second)
    channels = np.flatnonzero(mask)
    part = PART(channels, np.zeros_like(channels))
    dims = call.outer, call.channels, call.inner
    rows, own_mean, own_var = part.of(x.reshape(dims)), part.of(running_mean), part.of(running_var)
    found = rescue.forward(
        rows, rows, part.of(weight), part.of(bias), call.eps, own_mean, own_var, momentum, correction, made[0].dtype, call.threads,
        part.epilogue(epilogue),
    )
    y.reshape(dims)[:, channels] = rows
    for vector, values in zip(made, found):
        vector[channels] = values
    return channels, own_mean, own_var, first, second


cdef int replace_left(tuple left, running_mean, running_var) except -1:
    """Set the running statistics of the channels that a forward has left."""
    channels, own_mean, own_var, _, _ = left
    if running_mean is not None:
        running_mean[channels] = own_mean
    if running_var is not None:
        running_var[channels] = own_var
    return 0


cdef inline bint any_outside(const C* values, Py_ssize_t n, double limit) noexcept nogil:
    """Whether any of several numbers is not between a limit and its reciprocal."""
    cdef C high = <C> limit, low = <C> (0.5 / limit)
    cdef Py_ssize_t c
    cdef bint outside = False
    for c in range(n):
        outside |= (values[c] >= high) | (values[c] < low)
    return outside


cdef bint is_far(Call* call, int number) noexcept nogil:
    """Whether a standard deviation is so far from 1 that a backward must be made of operations (`extremes.far_from_one`)."""
    if number == cnp.NPY_DOUBLE:
        return any_outside(<const double*> call.invstd, call.channels, FAR_DOUBLE)
    return any_outside(<const float*> call.invstd, call.channels, FAR_FLOAT)


def backward(cnp.ndarray dy not None, cnp.ndarray x not None, dx, mean, mean_lo, invstd, scale, threads, epilogue=None):
    """Sums of dy and of dy (x - mean), and dx unless it is None; as `core.Composed.backward`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_gradient(&call, x, dtype, epilogue)
    cdef cnp.ndarray sum_dy = new_vector(&call, cnp.NPY_DOUBLE), sum_dy_xmu = new_vector(&call, cnp.NPY_DOUBLE)
    call.dy = like(x, dy)
    call.mean, call.mean_lo = vector(&call, "mean", number, mean), optional(&call, "mean_lo", number, mean_lo)
    call.first, call.second = <double*> cnp.PyArray_DATA(sum_dy), <double*> cnp.PyArray_DATA(sum_dy_xmu)
    if dx is not None:
        call.out = target(x, dx)
        call.invstd, call.scale = vector(&call, "invstd", number, invstd), vector(&call, "scale", number, scale)
    elif invstd is not None:
        call.invstd = vector(&call, "invstd", number, invstd)
    if call.invstd != NULL and is_far(&call, number):
        return composed().backward(dy, x, dx, mean, mean_lo, invstd, scale, call.threads, epilogue)
    run(REDUCE[dtype][active] if dx is None else BACKWARD[dtype][active], &call)
    return sum_dy, sum_dy_xmu
