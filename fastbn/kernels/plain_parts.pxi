"""The doors for plain arrays whose parts have statistics of their own; as in plain.pxi, None is for the checked way."""

cdef int first_of_rows(cnp.ndarray x, shape) except -2:
    """The first axis of rows of a plain normalized_shape; -1 where it is not that, or not the end of the shape of x."""
    cdef int ndim = cnp.PyArray_NDIM(x), n, i
    if type(shape) is int:
        return ndim - 1 if shape == cnp.PyArray_DIM(x, ndim - 1) else -1
    if type(shape) is not tuple and type(shape) is not list:
        return -1
    n = len(shape)
    if n == 0 or n > ndim:
        return -1
    for i in range(n):
        if type(shape[i]) is not int or shape[i] != cnp.PyArray_DIM(x, ndim - n + i):
            return -1
    return ndim - n


cdef bint bind_rows(Call* call, cnp.ndarray x, int at) noexcept:
    """Enter the rows that begin with an axis; whether the kernels take them."""
    cdef Py_ssize_t k = 1
    cdef int i
    for i in range(at, cnp.PyArray_NDIM(x)):
        k *= cnp.PyArray_DIM(x, i)
    call.batch, call.outer, call.channels, call.inner, call.group = cnp.PyArray_SIZE(x) // k, 1, k, 1, k
    return cnp.PyArray_IS_C_CONTIGUOUS(x) and are_parts(1, 1, k)


cdef bint bind_images(Call* call, cnp.ndarray x, int at, Py_ssize_t group) noexcept:
    """Enter images of a dense array that was laid out, one behind the other, and their groups; whether the kernels take them."""
    cdef Py_ssize_t batch = cnp.PyArray_DIM(x, 0)
    if at == 0 or group < 1 or call.channels % group != 0 or (batch > 1 and cnp.PyArray_STRIDE(x, 0) != cnp.PyArray_NBYTES(x) // batch):
        return False
    call.batch, call.group = batch, group
    if call.channels == 1:
        call.inner //= batch
    else:
        call.outer //= batch
    return are_parts(call.outer, call.inner, group)


cdef bint bind_affine(const Call* call, cnp.ndarray x, int at, bint rows, v, const void** p) noexcept:
    """Enter a plain weight or bias, or None; of rows it has their shape. Whether it was that."""
    cdef int i, n = cnp.PyArray_NDIM(x) - at
    if not rows or v is None:
        return bind_optional(call, v, p)
    if not is_plain(v, arithmetic(call.dtype)) or cnp.PyArray_NDIM(v) != n:
        return False
    for i in range(n):
        if cnp.PyArray_DIM(v, i) != cnp.PyArray_DIM(x, at + i):
            return False
    p[0] = cnp.PyArray_DATA(v)
    return True


cdef bint bind_statistic(const Call* call, v, void** p) noexcept:
    """Enter a plain vector of parts; whether it was one."""
    if not is_plain(v, arithmetic(call.dtype)) or cnp.PyArray_SIZE(v) != call.batch * (call.channels // call.group):
        return False
    p[0] = cnp.PyArray_DATA(v)
    return True


cdef tuple plain_parts_forward(Doors doors, str kind, x, divided, out, tuple given, activation, residual):
    """Normalize parts, of rows that have a shape, or of images, divided by the number of groups or None, layout and axis.

    The output, the statistics, axis and group, and whether parts are left to the caller.
    """
    cdef Call call
    cdef cnp.npy_intp[3] shape
    cdef cnp.ndarray made
    cdef Py_ssize_t group = 1
    cdef int at = -1
    cdef bint rows = kind == "layer_norm" or kind == "rms_norm", left
    weight, bias, eps = given
    groups, layout, axis = (None, None, None) if rows else divided
    if not is_eps(eps) or not isinstance(x, cnp.ndarray) or cnp.PyArray_NDIM(x) < 2:
        return None
    if rows:
        at = first_of_rows(x, divided)
        if at < 0:
            return None
    if not bind_plain(doors, &call, "forward", x, layout, axis, &at, activation, residual):
        return None
    if groups is not None:
        if type(groups) is not int or groups < 1 or call.channels % groups != 0 or cnp.PyArray_SIZE(x) == groups:
            return None
        group = call.channels // <Py_ssize_t> groups
    if (
        not (bind_rows(&call, x, at) if rows else bind_images(&call, x, at, group))
        or not bind_affine(&call, x, at, rows, weight, &call.weight) or not bind_affine(&call, x, at, rows, bias, &call.bias)
        or not bind_output(x, None, residual, out) or not are_apart(out, weight, bias, None, None)
    ):
        return None
    call.eps, call.uncentered = eps, kind == "rms_norm"
    y = new_like(doors, x) if out is None else out
    call.out = cnp.PyArray_DATA(y)
    shape[0], shape[1], shape[2] = 3, call.batch, call.channels // call.group
    made = cnp.PyArray_EMPTY(3, shape, arithmetic(call.dtype), 0)
    call.mean, call.mean_lo, call.invstd = row(made, 0), row(made, 1), row(made, 2)
    left = run(doors.table.parts_forward, &call) == LEFT
    if left:
        end_scratch()
    return y, made, at, call.group, left


cdef tuple plain_parts_backward(Doors doors, str kind, x, dy, tuple vectors, tuple how, wrt, out):
    """The gradients of x, weight, bias and residual, those that `wrt` names; None for others.

    The vectors are mean, mean_lo, invstd, weight and bias; how: shape, dtype, axis, group, activation, residual, and whether
    there was one.
    """
    cdef Call call
    cdef cnp.npy_intp[2] planes
    cdef cnp.ndarray sums
    cdef bint rows = kind == "layer_norm" or kind == "rms_norm"
    cdef int at
    mean, mean_lo, invstd, weight, bias = vectors
    shape, dtype, at, group, activation, residual, had_residual = how
    cdef int wanted = named(wrt, had_residual)
    cdef bint of_x = wanted & 1, of_residual = wanted & 8, active
    if (
        wanted == 0 or not isinstance(x, cnp.ndarray) or not has_shape(x, shape) or (x.dtype is not dtype and x.dtype != dtype)
        or not is_twin(dy, x) or not bind_plain(doors, &call, "backward", x, None, None, &at, activation, residual)
        or not (bind_rows(&call, x, at) if rows else bind_images(&call, x, at, group))
        or not bind_statistic(&call, mean, &call.mean) or not bind_statistic(&call, mean_lo, &call.mean_lo)
        or not bind_statistic(&call, invstd, &call.invstd)
        or not bind_optional(&call, weight, &call.weight) or not bind_optional(&call, bias, &call.bias)
        or not bind_output(x, dy, residual, out) or not are_apart(out, mean, mean_lo, invstd, weight) or not is_apart(out, bias)
    ):
        return None
    active = call.activation.kind != 0
    if (out is not None and (not of_x or (of_residual and not active))) or (of_residual and active and not of_x):
        return None
    dx = dresidual = None
    call.dy, call.uncentered = cnp.PyArray_DATA(dy), kind == "rms_norm"
    if of_x:
        dx = new_like(doors, x) if out is None else out
        call.out = cnp.PyArray_DATA(dx)
    if of_residual:
        dresidual = new_like(doors, x) if active else dy  # the gradient of a sum
    if of_residual and active:
        call.dresidual = cnp.PyArray_DATA(dresidual)
    if not active:
        call.residual = NULL
    dweight, dbias = new_affine(&call, x, at, rows), new_affine(&call, x, at, rows)
    call.dweight, call.dbias = cnp.PyArray_DATA(dweight), cnp.PyArray_DATA(dbias)
    planes[0], planes[1] = 2, 0 if rows else call.batch * call.channels
    sums = cnp.PyArray_EMPTY(2, planes, cnp.NPY_DOUBLE, 0)
    call.sum_dy, call.sum_dy_xmu = <double*> row(sums, 0), <double*> row(sums, 1)
    if run(doors.table.parts_backward, &call) == LEFT:
        end_scratch()
        return None
    return dx, dweight if wanted & 2 else None, dbias if wanted & 4 else None, dresidual


cdef inline cnp.ndarray new_affine(const Call* call, cnp.ndarray x, int at, bint rows):
    """Memory for the gradient of a weight or a bias."""
    if rows:
        return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x) - at, cnp.PyArray_DIMS(x) + at, arithmetic(call.dtype), 0)
    return new_vector(call)
