"""The door for calls over parts of images: (batch, outer, channels, inner) arrays, of which outer or inner is 1."""

cdef int bind_parts(Call* call, cnp.ndarray x, Py_ssize_t group, threads) except -1:
    """Enter the input; return NumPy's number of the type of the arithmetic."""
    if (
        cnp.PyArray_NDIM(x) != 4 or not is_dense(x) or cnp.PyArray_SIZE(x) == 0 or group < 1
        or cnp.PyArray_DIM(x, 2) % group != 0 or (cnp.PyArray_DIM(x, 1) > 1 and cnp.PyArray_DIM(x, 3) > 1)
    ):
        raise ValueError(
            "a call over parts needs a C-contiguous and aligned (batch, outer, channels, inner) array, not empty, of which outer or "
            f"inner is 1, and groups of channels, got shape {(<object> x).shape}, strides {(<object> x).strides}, groups of {group}"
        )
    memset(call, 0, sizeof(Call))
    call.dtype = <Dtype> dtype_of(x)
    call.x = cnp.PyArray_DATA(x)
    call.batch, call.outer, call.channels, call.inner = (<object> x).shape
    call.group, call.threads = group, thread_count(threads)
    return arithmetic(call.dtype)


cdef object forward_of_parts(
    Calls calls, cnp.ndarray x, cnp.ndarray y, affine, double eps, grouping, threads, epilogue
):
    cdef Call call
    cdef Py_ssize_t group
    cdef bint centered
    group, centered = grouping
    cdef int number = bind_parts(&call, x, group, threads)
    cdef cnp.npy_intp[2] shape = [3, call.batch * (call.channels // group)]
    cdef cnp.ndarray made
    cdef bint rows = call.outer == 1 and call.inner == 1
    if not are_parts(call.outer, call.inner, group) or (not rows and not centered):
        return None
    bind_epilogue(&call, x, epilogue)
    call.out = target(x, y)
    enter_affine(&call, number, affine)
    call.eps, call.uncentered = eps, not centered
    made = cnp.PyArray_EMPTY(2, shape, number, 0)
    call.mean, call.mean_lo, call.invstd = row(made, 0), row(made, 1), row(made, 2)
    left = run(calls.table.parts_forward, &call) == LEFT
    if left:
        end_scratch()
    return made, left


cdef object backward_of_parts(Calls calls, tuple arrays, statistics, affine, grouping, threads, epilogue):
    cdef Call call
    cdef cnp.ndarray dy, x
    cdef Py_ssize_t group
    cdef bint centered
    dy, x, dx = arrays
    group, centered = grouping
    mean, mean_lo, invstd = statistics[:3]
    cdef int number = bind_parts(&call, x, group, threads)
    cdef Py_ssize_t parts = call.batch * (call.channels // group)
    cdef bint rows = call.outer == 1 and call.inner == 1
    cdef cnp.npy_intp[2] planes = [2, 0 if rows else call.batch * call.channels]
    cdef cnp.ndarray sums, made
    if not are_parts(call.outer, call.inner, group):
        return None
    bind_epilogue(&call, x, epilogue)
    call.dy = like(x, dy)
    call.out = NULL if dx is None else target(x, dx)
    call.uncentered = not centered
    enter_affine(&call, number, affine)
    for v in (mean, mean_lo, invstd):
        if not is_plain(v, number) or cnp.PyArray_SIZE(v) != parts:
            raise ValueError(f"statistics must be vectors of {parts} parts, in the type of the arithmetic")
    call.mean, call.mean_lo = cnp.PyArray_DATA(<cnp.ndarray> mean), cnp.PyArray_DATA(<cnp.ndarray> mean_lo)
    call.invstd = cnp.PyArray_DATA(<cnp.ndarray> invstd)
    sums, made = cnp.PyArray_EMPTY(2, planes, cnp.NPY_DOUBLE, 0), new_vectors(&call, 2, number)
    call.sum_dy, call.sum_dy_xmu = <double*> row(sums, 0), <double*> row(sums, 1)
    call.dweight, call.dbias = row(made, 0), row(made, 1)
    if run(calls.table.parts_backward, &call) == LEFT:
        end_scratch()
        return None
    return tuple(made)
