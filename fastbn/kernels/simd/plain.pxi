"""The doors for plain arrays, each one C function: checks in Python take as long as the work on a small array.

They return None where an array is not plain; the checked doors take it then, or say what is wrong.
"""

cdef bint is_plain(a, int number) noexcept:
    """Whether something is an aligned C-contiguous array of a type, in native order, and of no subclass."""
    return (
        isinstance(a, cnp.ndarray) and cnp.PyArray_CheckExact(a) and cnp.PyArray_TYPE(a) == number
        and cnp.PyArray_ISBEHAVED_RO(a) and cnp.PyArray_IS_C_CONTIGUOUS(a)
    )


cdef bint is_twin(a, cnp.ndarray x) noexcept:
    """Whether something is a plain array of the shape and type of a plain array."""
    return is_plain(a, cnp.PyArray_TYPE(x)) and cnp.PyArray_SAMESHAPE(a, x)


cdef inline bint overlaps(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two contiguous arrays of one size share part of their memory, but not all."""
    cdef char* p = cnp.PyArray_BYTES(a)
    cdef char* q = cnp.PyArray_BYTES(b)
    return p != q and p < q + cnp.PyArray_NBYTES(b) and q < p + cnp.PyArray_NBYTES(a)


cdef cnp.ndarray bind_plain(Call* call, cnp.ndarray x, other, out, int axis, threads):
    """Enter plain arrays whose channels are on axis 1 or the last; return the output, or None where they are not plain.

    The other array is a second input, or None.
    """
    cdef cnp.ndarray y
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x)
    cdef int ndim = cnp.PyArray_NDIM(x)
    if size == 0 or ndim < 2 or not (axis == 1 or axis == ndim - 1) or (other is not None and not is_twin(other, x)):
        return None
    if out is None:
        y = cnp.PyArray_EMPTY(ndim, cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)
    elif is_twin(out, x) and cnp.PyArray_ISWRITEABLE(out):
        y = out
        if overlaps(y, x) or (other is not None and overlaps(y, other)):
            return None
    else:
        return None
    call.x, call.out = cnp.PyArray_DATA(x), cnp.PyArray_DATA(y)
    call.threads = thread_count(threads)
    call.channels = cnp.PyArray_DIM(x, axis)
    if call.channels == 1:
        call.outer, call.inner = 1, size
    elif axis == ndim - 1:
        call.outer, call.inner = size // call.channels, 1
    else:
        call.outer = cnp.PyArray_DIM(x, 0)
        call.inner = size // (call.outer * call.channels)
    return y


cdef bint bind_vector(Call* call, int number, object v, void** p) noexcept:
    """Enter a plain vector of channels; whether it was one."""
    if not is_plain(v, number) or cnp.PyArray_NDIM(v) != 1 or cnp.PyArray_DIM(v, 0) != call.channels:
        return False
    p[0] = cnp.PyArray_DATA(v)
    return True


cdef inline bint bind_optional(Call* call, int number, object v, const void** p) noexcept:
    """The same, where None is as good."""
    return v is None or bind_vector(call, number, v, <void**> p)


cdef bint bind_running(Call* call, int number, object v, Running* r) noexcept:
    """Enter plain running statistics, of the type of the arithmetic or double, or None; whether they were that."""
    r.data = NULL
    if v is None:
        return True
    r.is_double = number == cnp.NPY_DOUBLE or is_plain(v, cnp.NPY_DOUBLE)
    return bind_vector(call, cnp.NPY_DOUBLE if r.is_double else cnp.NPY_FLOAT, v, &r.data) and cnp.PyArray_ISWRITEABLE(v)


cdef inline bint is_eps(eps) noexcept:
    """Whether something is a float that may be added to a variance."""
    return type(eps) is float and 0 <= <double> eps and <double> eps <= 1.7976931348623157e308


cdef inline bint is_apart(a, b) noexcept:
    """Whether two contiguous arrays, of which each may be None, share no memory."""
    cdef char* p
    cdef char* q
    if a is None or b is None:
        return True
    p, q = cnp.PyArray_BYTES(<cnp.ndarray> a), cnp.PyArray_BYTES(<cnp.ndarray> b)
    return p >= q + cnp.PyArray_NBYTES(<cnp.ndarray> b) or q >= p + cnp.PyArray_NBYTES(<cnp.ndarray> a)


cdef inline bint are_apart(out, a, b, c, d) noexcept:
    """Whether an output that was given shares no memory with the vectors of a call."""
    return out is None or (is_apart(out, a) and is_apart(out, b) and is_apart(out, c) and is_apart(out, d))


def plain_normalize(cnp.ndarray x not None, int axis, out, threads, mean, spread, weight, bias, eps):
    """Normalize as `inference`, from arrays as the user gave them; None where they are not plain."""
    cdef Call call
    cdef int dtype = dtype_index(x)
    cdef int number = arithmetic_number(dtype)
    cdef cnp.ndarray y
    if not (eps is None or is_eps(eps)) or not is_plain(x, cnp.PyArray_TYPE(x)):
        return None
    memset(&call, 0, sizeof(Call))
    y = bind_plain(&call, x, None, out, axis, threads)
    if (
        y is None or not bind_vector(&call, number, mean, &call.mean) or not bind_vector(&call, number, spread, &call.invstd)
        or not bind_optional(&call, number, weight, &call.weight) or not bind_optional(&call, number, bias, &call.bias)
        or not are_apart(out, mean, spread, weight, bias)
    ):
        return None
    call.inverted = eps is None
    call.eps = 0 if eps is None else eps
    run(INFERENCE[dtype][False], &call)
    return y


def plain_forward(
    cnp.ndarray x not None, int axis, out, threads, weight, bias, running_mean, running_var, momentum, int correction, eps
):
    """As `forward`, from arrays as the user gave them; with the output, and the count. None where they are not plain."""
    cdef Call call
    cdef int dtype = dtype_index(x), number = arithmetic_number(dtype)
    cdef Running mean, var
    cdef cnp.ndarray y
    if not is_eps(eps) or type(momentum) is not float or not is_plain(x, cnp.PyArray_TYPE(x)):
        return None
    memset(&call, 0, sizeof(Call))
    y = bind_plain(&call, x, None, out, axis, threads)
    if (
        y is None or call.outer * call.inner <= correction
        or not bind_optional(&call, number, weight, &call.weight) or not bind_optional(&call, number, bias, &call.bias)
        or not bind_running(&call, number, running_mean, &mean) or not bind_running(&call, number, running_var, &var)
        or not is_apart(running_mean, running_var) or not are_apart(out, weight, bias, running_mean, running_var)
    ):
        return None
    call.eps = eps
    vectors = train(&call, dtype, False, x, y, weight, bias, running_mean, mean, running_var, var, momentum, correction, None)
    return y, *vectors, call.outer * call.inner


def plain_backward(cnp.ndarray x not None, int axis, out, threads, dy, mean, mean_lo, invstd, scale):
    """As `backward`, from arrays as the user gave them: the gradients of x, weight and bias. None where they are not plain."""
    cdef Call call
    cdef int dtype = dtype_index(x), number = arithmetic_number(dtype)
    cdef cnp.ndarray dx, dweight, dbias
    if dy is None or not is_plain(x, cnp.PyArray_TYPE(x)):
        return None
    memset(&call, 0, sizeof(Call))
    dx = bind_plain(&call, x, dy, out, axis, threads)
    if (
        dx is None or not bind_vector(&call, number, mean, &call.mean)
        or not bind_optional(&call, number, mean_lo, <const void**> &call.mean_lo)
        or not bind_vector(&call, number, invstd, &call.invstd) or not bind_vector(&call, number, scale, &call.scale)
        or not are_apart(out, mean, mean_lo, invstd, scale) or is_far(&call, number)
    ):
        return None
    call.dy = cnp.PyArray_DATA(dy)
    dweight, dbias = new_vector(&call, number), new_vector(&call, number)
    call.dweight, call.dbias = cnp.PyArray_DATA(dweight), cnp.PyArray_DATA(dbias)
    run(BACKWARD[dtype][False], &call)
    return dx, dweight, dbias


cdef class Plain:
    """Normalize plain arrays with fixed parameters, each as one call.

    Parameters
    ----------
    mean, scale, shift : ndarray of shape (C,)
        Contiguous, in the type of the arithmetic.
    activation : object or None
        As in an epilogue.
    sample : ndarray
        Of the dtype and number of axes of the arrays to come.
    axis : int
        Axis of the channels: 1 or the last.
    limit : int
        Arrays of so many bytes and more are only taken where the number of threads is given.
    """

    cdef object vectors
    cdef Call prepared
    cdef Py_ssize_t limit
    cdef int dtype, number, ndim, axis

    def __cinit__(
        self, cnp.ndarray mean not None, scale, shift, activation, cnp.ndarray sample not None, int axis, Py_ssize_t limit
    ):
        cdef Call* call = &self.prepared
        cdef int number
        self.dtype, self.number = dtype_index(sample), cnp.PyArray_TYPE(sample)
        self.ndim, self.axis, self.limit = cnp.PyArray_NDIM(sample), axis, limit
        if self.ndim < 2 or not (axis == 1 or axis == self.ndim - 1):
            raise ValueError(f"axis must be 1 or the last of at least two, got {axis} of {self.ndim}")
        self.vectors = mean, scale, shift
        memset(call, 0, sizeof(Call))
        call.channels = cnp.PyArray_SIZE(mean)
        number = arithmetic_number(self.dtype)
        call.mean, call.scale = vector(call, "mean", number, mean), vector(call, "scale", number, scale)
        call.shift = vector(call, "shift", number, shift)
        bind_activation(call, activation)

    def __call__(self, x, residual, out, threads=0):
        """Return the output, or None where the arrays are not plain."""
        cdef Call call = self.prepared
        cdef cnp.ndarray y
        if (
            not is_plain(x, self.number) or cnp.PyArray_NDIM(x) != self.ndim
            or cnp.PyArray_DIM(x, self.axis) != call.channels or (threads == 0 and cnp.PyArray_NBYTES(x) >= self.limit)
        ):
            return None
        y = bind_plain(&call, x, residual, out, self.axis, max(1, threads))
        if y is None:
            return None
        call.residual = NULL if residual is None else cnp.PyArray_DATA(residual)
        run(NORMALIZE[self.dtype][call.activation.kind != 0 or residual is not None], &call)
        return y
