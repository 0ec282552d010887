"""The doors for plain arrays, each a whole call: checks in Python take as long as the work on a small array.

They return None where anything is unusual; the checked way takes it then, or says what is wrong. What is plain is said by
each door's first lines.
"""

cdef struct Given:
    # What a public function was given, by the names of its parameters; None for those that it lacks. The order is that of PARAMETERS.
    PyObject* self
    PyObject* x
    PyObject* dy
    PyObject* saved
    PyObject* mean
    PyObject* invstd
    PyObject* running_mean
    PyObject* running_var
    PyObject* weight
    PyObject* bias
    PyObject* num_groups
    PyObject* normalized_shape
    PyObject* training
    PyObject* use_input_stats
    PyObject* momentum
    PyObject* eps
    PyObject* layout
    PyObject* axis
    PyObject* activation
    PyObject* residual
    PyObject* mask
    PyObject* correction
    PyObject* stats
    PyObject* wrt
    PyObject* from_output
    PyObject* threads
    PyObject* out

cdef enum:
    GIVEN = 27

cdef tuple PARAMETERS = (
    "self", "x", "dy", "saved", "mean", "invstd", "running_mean", "running_var", "weight", "bias", "num_groups", "normalized_shape",
    "training", "use_input_stats", "momentum", "eps", "layout", "axis", "activation", "residual", "mask", "correction", "stats", "wrt",
    "from_output", "threads", "out",
)
assert len(PARAMETERS) == GIVEN and sizeof(Given) == GIVEN * sizeof(PyObject*)


cdef bint is_plain(a, int number) noexcept:
    """Whether something is an aligned C-contiguous array of a type, in native order, and of no subclass."""
    return (
        isinstance(a, cnp.ndarray) and cnp.PyArray_CheckExact(a) and cnp.PyArray_TYPE(a) == number
        and cnp.PyArray_ISBEHAVED_RO(a) and cnp.PyArray_IS_C_CONTIGUOUS(a)
    )


cdef bint lay_out(Call* call, cnp.ndarray x, int axis) noexcept:
    """Enter the dimensions of an array by the order of its memory; whether that is dense."""
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x), step = cnp.PyArray_ITEMSIZE(x), found = 1, inner = 1
    cdef int ndim = cnp.PyArray_NDIM(x), i
    call.channels = cnp.PyArray_DIM(x, axis)
    if not cnp.PyArray_IS_C_CONTIGUOUS(x):
        while found < size:  # the axis that goes on where the last one has ended
            for i in range(ndim):
                if cnp.PyArray_DIM(x, i) != 1 and cnp.PyArray_STRIDE(x, i) == step:
                    break
            else:
                return False
            if i == axis:
                inner = found
            found *= cnp.PyArray_DIM(x, i)
            step *= cnp.PyArray_DIM(x, i)
    else:
        for i in range(axis + 1, ndim):
            inner *= cnp.PyArray_DIM(x, i)
    if call.channels == 1:
        call.outer, call.inner = 1, size  # one channel is one long run
    else:
        call.outer, call.inner = size // (call.channels * inner), inner
    return True


cdef bint is_twin(a, cnp.ndarray x) noexcept:
    """Whether something is a plain array that is like a dense one in type, shape and memory order."""
    cdef int i
    if not (
        isinstance(a, cnp.ndarray) and cnp.PyArray_CheckExact(a) and cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_ISBEHAVED_RO(a) and cnp.PyArray_SAMESHAPE(a, x)
    ):
        return False
    if cnp.PyArray_IS_C_CONTIGUOUS(x) and cnp.PyArray_IS_C_CONTIGUOUS(a):
        return True
    for i in range(cnp.PyArray_NDIM(x)):
        if cnp.PyArray_DIM(x, i) != 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(x, i):
            return False
    return True


cdef inline bint is_apart(a, b) noexcept:
    """Whether two dense arrays, of which each may be None, share no memory."""
    cdef char* p
    cdef char* q
    if a is None or b is None:
        return True
    p, q = cnp.PyArray_BYTES(<cnp.ndarray> a), cnp.PyArray_BYTES(<cnp.ndarray> b)
    return p >= q + cnp.PyArray_NBYTES(<cnp.ndarray> b) or q >= p + cnp.PyArray_NBYTES(<cnp.ndarray> a)


cdef inline bint is_apart_or_all(a, b) noexcept:
    """Whether two dense arrays of one size share no memory, or all."""
    return a is None or b is None or cnp.PyArray_BYTES(<cnp.ndarray> a) == cnp.PyArray_BYTES(<cnp.ndarray> b) or is_apart(a, b)


cdef inline bint are_apart(out, a, b, c, d) noexcept:
    """Whether an output that was given shares no memory with the vectors of a call."""
    return out is None or (is_apart(out, a) and is_apart(out, b) and is_apart(out, c) and is_apart(out, d))


cdef bint bind_vector(const Call* call, object v, void** p) noexcept:
    """Enter a plain vector of channels; whether it was one."""
    if not is_plain(v, arithmetic(call.dtype)) or cnp.PyArray_NDIM(v) != 1 or cnp.PyArray_DIM(v, 0) != call.channels:
        return False
    p[0] = cnp.PyArray_DATA(v)
    return True


cdef inline bint bind_optional(const Call* call, object v, const void** p) noexcept:
    """The same, where None is as good."""
    return v is None or bind_vector(call, v, <void**> p)


cdef bint bind_running(const Call* call, object v, Running* r) noexcept:
    """Enter plain running statistics, of the type of the arithmetic or double, or None; whether they were that."""
    if v is None:
        return True
    r.is_double = call.dtype == Dtype.FLOAT64 or is_plain(v, cnp.NPY_DOUBLE)
    if not is_plain(v, cnp.NPY_DOUBLE if r.is_double else cnp.NPY_FLOAT) or cnp.PyArray_NDIM(v) != 1:
        return False
    r.data = cnp.PyArray_DATA(v)
    return cnp.PyArray_DIM(v, 0) == call.channels and cnp.PyArray_ISWRITEABLE(v)


cdef inline bint is_eps(eps) noexcept:
    """Whether something is a float that may be added to a variance."""
    return type(eps) is float and 0 <= <double> eps and <double> eps <= 1.7976931348623157e308


cdef inline bint is_bit(a) noexcept:
    """Whether something is the int 0 or 1."""
    return type(a) is int and 0 <= a <= 1


cdef cnp.ndarray new_like(Calls calls, cnp.ndarray x):
    """Memory for an output, in the memory order of a dense array."""
    cdef cnp.ndarray made
    if cnp.PyArray_NBYTES(x) >= calls.small:
        made = calls.memory_for(x)
        if not is_twin(made, x):
            raise ValueError("memory for an output must be an array like the input")
        return made
    if cnp.PyArray_IS_C_CONTIGUOUS(x):
        return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)
    return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)


cdef bint bind_plain(Calls calls, Call* call, str op, const Given* g, int* at, activation, residual) except -1:
    """Enter the array of a plain call and what follows the normalization; whether they are plain.

    The axis of the channels is `at` or, where that is negative, what layout and axis say; it is entered there.
    """
    x, layout, axis = <object> g.x, <object> g.layout, <object> g.axis
    memset(call, 0, sizeof(Call))
    if (
        not isinstance(x, cnp.ndarray) or cnp.PyArray_NDIM(x) < 2 or cnp.PyArray_SIZE(x) == 0
        or not cnp.PyArray_ISBEHAVED_RO(x) or not cnp.PyArray_CheckExact(x)
    ):
        return False
    # First what may run lines of the user's, in which an array may become another.
    if at[0] < 0:
        at[0] = 1 if layout is None and axis is None else calls.axis_of(layout, cnp.PyArray_NDIM(x), axis)
    if activation is not None:
        code = None
        if isinstance(activation, tuple):  # one of the kernels' own
            code = activation.code
        elif calls.customs is not None and (op != "backward" or activation.derivative is not None):
            code = calls.customs.get(activation)
        if code is None:
            return False
        call.activation.kind, call.activation.parameter = code, activation.parameter
    if not 0 <= at[0] < cnp.PyArray_NDIM(x) or cnp.PyArray_SIZE(x) == 0 or not lay_out(call, x, at[0]):
        return False
    call.dtype = <Dtype> dtype_of(x)
    if residual is not None:
        if not is_twin(residual, x):
            return False
        call.residual = cnp.PyArray_DATA(residual)
    call.x = cnp.PyArray_DATA(x)
    call.threads = 1
    threads = <object> g.threads
    if threads is not None:
        if type(threads) is not int or thread_count(threads) != threads:
            return False
        call.threads = threads
    elif cnp.PyArray_SIZE(x) * max(cnp.PyArray_ITEMSIZE(x), 4) >= calls.small:
        call.threads = thread_count(calls.threads_of(op, x))
    return True


cdef bint bind_output(cnp.ndarray x, other, residual, out) noexcept:
    """Whether an output that was given, or None, is one that a plain call may write."""
    return out is None or (
        is_twin(out, x) and cnp.PyArray_ISWRITEABLE(out) and is_apart_or_all(out, x) and is_apart_or_all(out, other)
        and is_apart_or_all(out, residual)
    )


cdef inline bint has_shape(cnp.ndarray x, tuple shape) except -1:
    cdef int i
    if len(shape) != cnp.PyArray_NDIM(x):
        return False
    for i in range(cnp.PyArray_NDIM(x)):
        if <Py_ssize_t> shape[i] != cnp.PyArray_DIM(x, i):
            return False
    return True


cdef int named(wrt, bint has_residual) except -1:
    """Which of x, weight, bias and residual a tuple names, as bits of 1, 2, 4 and 8; 0 where it is none, or names another."""
    cdef int found = 0
    if type(wrt) is not tuple:
        return 0
    for name in <tuple> wrt:
        if type(name) is not str:
            return 0
        if name == "x":
            found |= 1
        elif name == "weight":
            found |= 2
        elif name == "bias":
            found |= 4
        elif name == "residual" and has_residual:
            found |= 8
        else:
            return 0
    return found


cdef enum:
    MADE = 9  # what `made_of` has
    MADE_ACTIVATION = 6  # and where


cdef inline tuple made_of(const Call* call, cnp.ndarray vectors, bint training, x, int axis, activation, kept, residual):
    """What a backward needs: vectors, count, training, shape, dtype, axis, activation, residual, and whether there was one."""
    return vectors, call.outer * call.inner, training, x.shape, x.dtype, axis, activation, kept, residual is not None


cdef object plain_stats(Calls calls, const Given* g):
    """The number of values per channel, with mean, variance and what these round away, one below the other."""
    cdef Call call
    cdef cnp.ndarray wide, found
    cdef Py_ssize_t count
    cdef int at = -1
    cdef uint32_t mode
    cdef bint known
    if not bind_plain(calls, &call, "stats", g, &at, None, None):
        return None
    wide, found = new_vectors(&call, 3, cnp.NPY_DOUBLE), new_vectors(&call, 4, arithmetic(call.dtype))
    call.batch_mean, call.batch_m2, call.batch_mean_lo = <double*> row(wide, 0), <double*> row(wide, 1), <double*> row(wide, 2)
    run(calls.table.stats, &call)
    count = call.outer * call.inner
    mode = enter_default_mode()
    if call.dtype == Dtype.FLOAT64:
        known = finish_stats(<double*> cnp.PyArray_DATA(found), &call)
    else:
        known = finish_stats(<float*> cnp.PyArray_DATA(found), &call)
    leave_default_mode(mode)
    return (count, found) if known else None


cdef object plain_inference(Calls calls, const Given* g, mean, spread, activation, kept):
    """Normalize as `inference` does; the output or, with `kept`, a residual or None, also what `plain_backward` needs."""
    cdef Call call
    cdef cnp.ndarray vectors
    cdef int at = -1
    x, weight, bias, eps, residual, out = (
        <object> g.x, <object> g.weight, <object> g.bias, <object> g.eps, <object> g.residual, <object> g.out
    )
    if not (eps is None or is_eps(eps)) or not bind_plain(calls, &call, "normalize", g, &at, activation, residual):
        return None
    if (
        not bind_vector(&call, mean, &call.mean) or not bind_vector(&call, spread, &call.invstd if eps is None else <void**> &call.var)
        or not bind_optional(&call, weight, &call.weight) or not bind_optional(&call, bias, &call.bias)
        or not bind_output(x, None, residual, out) or not are_apart(out, mean, spread, weight, bias)
    ):
        return None
    call.eps = 0 if eps is None else eps
    y = new_like(calls, x) if out is None else out
    call.out = cnp.PyArray_DATA(y)
    if kept is not False:
        vectors = new_vectors(&call, 5, arithmetic(call.dtype))
        memcpy(row(vectors, 0), call.mean, cnp.PyArray_STRIDE(vectors, 0))
        memset(row(vectors, 1), 0, cnp.PyArray_STRIDE(vectors, 0))
        call.invstd, call.scale, call.shift = row(vectors, 2), row(vectors, 3), row(vectors, 4)
    run(calls.table.inference, &call)
    return y if kept is False else (y, made_of(&call, vectors, False, x, at, activation, kept, residual))


cdef object plain_forward(Calls calls, const Given* g, activation, kept):
    """A forward, in training or not; the output or, with `kept`, a residual or None, also what `plain_backward` needs."""
    training = <object> g.training
    if not is_eps(<object> g.eps) or type(<object> g.momentum) is not float or not is_bit(<object> g.correction):
        return None
    if training is False:
        return plain_inference(calls, g, <object> g.running_mean, <object> g.running_var, activation, kept)
    return plain_training(calls, g, activation, kept) if training is True else None


cdef object plain_training(Calls calls, const Given* g, activation, kept):
    cdef Call call
    cdef cnp.ndarray made
    cdef int at = -1
    x, weight, bias, residual, out = <object> g.x, <object> g.weight, <object> g.bias, <object> g.residual, <object> g.out
    running_mean, running_var = <object> g.running_mean, <object> g.running_var
    if not bind_plain(calls, &call, "forward", g, &at, activation, residual):
        return None
    call.momentum, call.correction, call.eps = <object> g.momentum, <object> g.correction, <object> g.eps
    if (
        call.outer * call.inner <= call.correction
        or not bind_optional(&call, weight, &call.weight) or not bind_optional(&call, bias, &call.bias)
        or not bind_running(&call, running_mean, &call.running_mean) or not bind_running(&call, running_var, &call.running_var)
        or not bind_output(x, None, residual, out) or not are_apart(out, weight, bias, running_mean, running_var)
        or not are_apart(running_mean, running_var, weight, bias, None) or not are_apart(running_var, weight, bias, None, None)
        or not are_apart(residual, running_mean, running_var, None, None) or not are_apart(x, running_mean, running_var, None, None)
    ):
        return None
    y = new_like(calls, x) if out is None else out
    call.out = cnp.PyArray_DATA(y)
    made = train(calls, &call, arithmetic(call.dtype), x, y, (weight, bias, running_mean, running_var), None, (activation, residual))
    return y if kept is False else (y, made_of(&call, made, True, x, at, activation, kept, residual))


cdef object plain_backward(Calls calls, const Given* g, tuple made):
    """The gradients of x, weight, bias and residual, those that `wrt` names; None for others."""
    cdef Call call
    cdef cnp.ndarray vectors
    x, dy, wrt, out = <object> g.x, <object> g.dy, <object> g.wrt, <object> g.out
    cdef int axis, wanted = named(wrt, made[8])
    cdef bint of_x = wanted & 1, of_weight = wanted & 2, of_bias = wanted & 4, of_residual = wanted & 8
    if wanted == 0:
        return None
    dx = dweight = dbias = dresidual = None
    found, count, training, shape, dtype, axis, activation, residual, _ = made
    if (
        not isinstance(found, cnp.ndarray) or not isinstance(x, cnp.ndarray) or not has_shape(x, shape)
        or (x.dtype is not dtype and x.dtype != dtype)
        or not bind_plain(calls, &call, "backward", g, &axis, activation, residual) or not is_twin(dy, x)
    ):
        return None
    vectors = found
    if (
        not is_plain(vectors, arithmetic(call.dtype)) or cnp.PyArray_NDIM(vectors) != 2 or cnp.PyArray_DIM(vectors, 0) != 5
        or cnp.PyArray_DIM(vectors, 1) != call.channels or count != call.outer * call.inner
        or not bind_output(x, dy, residual, out) or not is_apart(out, vectors)
    ):
        return None
    if of_residual and call.activation.kind == 0:
        dresidual = dy  # the gradient of a sum
    if (of_residual and not of_x and call.activation.kind != 0) or (dresidual is not None and out is not None):
        return None
    call.dy, call.frozen = cnp.PyArray_DATA(dy), not training
    call.mean, call.mean_lo, call.invstd = row(vectors, 0), row(vectors, 1), row(vectors, 2)
    call.scale, call.shift = row(vectors, 3), row(vectors, 4)
    if of_x:
        dx = new_like(calls, x) if out is None else out
        call.out = cnp.PyArray_DATA(dx)
    elif out is not None:
        return None
    if of_residual and call.activation.kind != 0:
        dresidual = new_like(calls, x)
        call.dresidual = cnp.PyArray_DATA(dresidual)
    if of_weight:
        dweight = new_vector(&call)
        call.dweight = cnp.PyArray_DATA(dweight)
    if of_bias:
        dbias = new_vector(&call)
        call.dbias = cnp.PyArray_DATA(dbias)
    if call.activation.kind == 0:
        call.residual = NULL  # whose sum has the gradient of either
    if (of_x or of_weight or of_bias) and run(calls.table.backward, &call) == LEFT:
        return None
    return dx, dweight, dbias, dresidual


cdef double LARGE_M2 = 2.0 ** 1000  # as in extremes.py

ctypedef fused C:
    float
    double


cdef bint finish_stats(C* found, const Call* call) noexcept nogil:
    """From means and sums of squares to means and variances, rounded; what that rounds away goes below, as far as it is a number.

    False where a sum is so large that the range decides.
    """
    cdef Py_ssize_t c, channels = call.channels
    cdef double rest
    for c in range(channels):
        if not call.batch_m2[c] < LARGE_M2:
            return False
        call.batch_m2[c] /= call.outer * call.inner
    for c in range(channels):
        found[c], found[channels + c] = <C> call.batch_mean[c], <C> call.batch_m2[c]
        rest = call.batch_mean[c] - found[c] + call.batch_mean_lo[c]
        found[2 * channels + c] = <C> (rest if isfinite(rest) else 0)
        rest = call.batch_m2[c] - found[channels + c]
        found[3 * channels + c] = <C> (rest if isfinite(rest) else 0)
    return True


cdef inline cnp.ndarray new_vector(const Call* call):
    cdef cnp.npy_intp size = call.channels
    return cnp.PyArray_EMPTY(1, &size, arithmetic(call.dtype), 0)
