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
    """Enter plain numbers of parts, of each image below those of the one before; whether they were that."""
    if (
        not is_plain(v, arithmetic(call.dtype)) or cnp.PyArray_NDIM(v) != 2
        or cnp.PyArray_DIM(v, 0) != call.batch or cnp.PyArray_DIM(v, 1) != call.channels // call.group
    ):
        return False
    p[0] = cnp.PyArray_DATA(v)
    return True


cdef object plain_parts_forward(Calls calls, const Given* g, str kind, activation, eps):
    """Normalize parts, of rows or of images; the output, the statistics, axis and group."""
    cdef Call call
    cdef cnp.npy_intp[3] shape
    cdef cnp.ndarray made
    cdef Py_ssize_t group = 1
    cdef int at = -1
    cdef bint rows = kind == "layer_norm" or kind == "rms_norm"
    x, weight, bias, residual, out = <object> g.x, <object> g.weight, <object> g.bias, <object> g.residual, <object> g.out
    groups = <object> g.num_groups
    if calls.table.parts_forward == NULL or not is_eps(eps) or not isinstance(x, cnp.ndarray) or cnp.PyArray_NDIM(x) < 2:
        return None
    if rows:
        at = first_of_rows(x, <object> g.normalized_shape)
        if at < 0:
            return None
    if not bind_plain(calls, &call, "forward", g, &at, activation, residual):
        return None
    if kind == "group_norm":
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
    y = new_like(calls, x) if out is None else out
    call.out = cnp.PyArray_DATA(y)
    shape[0], shape[1], shape[2] = 3, call.batch, call.channels // call.group
    made = cnp.PyArray_EMPTY(3, shape, arithmetic(call.dtype), 0)
    call.mean, call.mean_lo, call.invstd = row(made, 0), row(made, 1), row(made, 2)
    if run(calls.table.parts_forward, &call) == LEFT:
        end_scratch()
        dims = call.batch, call.outer, call.channels, call.inner
        arrays = in_memory(x, dims), in_memory(y, dims), None if residual is None else in_memory(residual, dims)
        calls.finish_parts(calls, arrays, call.group, (weight, bias), eps, not call.uncentered, activation, made)
    return y, made, at, call.group


cdef object plain_parts_backward(Calls calls, const Given* g, str kind, dict saved):
    """The gradients of x, weight, bias and residual, those that `wrt` names; None for others."""
    cdef Call call
    cdef cnp.npy_intp[2] planes
    cdef cnp.ndarray sums
    cdef bint rows = kind == "layer_norm" or kind == "rms_norm"
    cdef int at = saved["axis"], wanted = named(<object> g.wrt, saved["has_residual"])
    cdef bint of_x = wanted & 1, of_residual = wanted & 8, active
    x, dy, out = <object> g.x, <object> g.dy, <object> g.out
    weight, bias, residual, dtype = saved["weight"], saved["bias"], saved["residual"], saved["dtype"]
    mean, mean_lo, invstd = saved["mean"], saved["mean_lo"], saved["invstd"]
    if (
        wanted == 0 or (wanted & 4 and kind == "rms_norm") or calls.table.parts_backward == NULL
        or (residual is None and saved["has_residual"] and saved["activation"] is not None)
        or not isinstance(x, cnp.ndarray) or not has_shape(x, saved["shape"]) or (x.dtype is not dtype and x.dtype != dtype)
        or not bind_plain(calls, &call, "backward", g, &at, saved["activation"], residual) or not is_twin(dy, x)
        or not (bind_rows(&call, x, at) if rows else bind_images(&call, x, at, saved["group"]))
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
        dx = new_like(calls, x) if out is None else out
        call.out = cnp.PyArray_DATA(dx)
    if of_residual:
        dresidual = new_like(calls, x) if active else dy  # the gradient of a sum
    if of_residual and active:
        call.dresidual = cnp.PyArray_DATA(dresidual)
    if not active:
        call.residual = NULL
    dweight, dbias = new_affine(&call, x, at, rows), new_affine(&call, x, at, rows)
    call.dweight, call.dbias = cnp.PyArray_DATA(dweight), cnp.PyArray_DATA(dbias)
    planes[0], planes[1] = 2, 0 if rows else call.batch * call.channels
    sums = cnp.PyArray_EMPTY(2, planes, cnp.NPY_DOUBLE, 0)
    call.sum_dy, call.sum_dy_xmu = <double*> row(sums, 0), <double*> row(sums, 1)
    if run(calls.table.parts_backward, &call) == LEFT:
        end_scratch()
        return None
    return dx, dweight if wanted & 2 else None, dbias if wanted & 4 else None, dresidual


cdef inline cnp.ndarray new_affine(const Call* call, cnp.ndarray x, int at, bint rows):
    """Memory for the gradient of a weight or a bias."""
    if rows:
        return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x) - at, cnp.PyArray_DIMS(x) + at, arithmetic(call.dtype), 0)
    return new_vector(call)
