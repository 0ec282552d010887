"""From arrays to the fields of a Call."""

cdef int bfloat16 = -1  # NumPy's number of it, once it was seen

cdef int dtype_or_none(cnp.ndarray a) except -2:
    """The Dtype of an array; -1 where the kernels have none."""
    global bfloat16
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return Dtype.FLOAT32
    if number == cnp.NPY_DOUBLE:
        return Dtype.FLOAT64
    if number == NPY_HALF:
        return Dtype.FLOAT16
    if number != bfloat16 and a.dtype.name != "bfloat16":
        return -1
    bfloat16 = number
    return Dtype.BFLOAT16


cdef int dtype_of(cnp.ndarray a) except -1:
    """The Dtype of an array."""
    cdef int found = dtype_or_none(a)
    if found < 0:
        raise TypeError(f"no SIMD kernel for dtype {a.dtype}")
    return found


cdef inline int arithmetic(Dtype dtype) noexcept:
    """NumPy's number of the type of the arithmetic."""
    return cnp.NPY_DOUBLE if dtype == Dtype.FLOAT64 else cnp.NPY_FLOAT


cdef inline bint is_dense(cnp.ndarray a) noexcept:
    """Whether C may take the memory of an array as it is: C-contiguous, aligned, in native byte order."""
    return cnp.PyArray_IS_C_CONTIGUOUS(a) and cnp.PyArray_ISBEHAVED_RO(a)


cdef int bind(Call* call, cnp.ndarray x, threads) except -1:
    """Enter the input; return NumPy's number of the type of the arithmetic."""
    if cnp.PyArray_NDIM(x) != 3 or not is_dense(x) or cnp.PyArray_SIZE(x) == 0:
        raise ValueError(
            "a kernel needs a C-contiguous and aligned (outer, channels, inner) array, not empty, "
            f"got shape {(<object> x).shape}, strides {(<object> x).strides}"
        )
    memset(call, 0, sizeof(Call))
    call.dtype = <Dtype> dtype_of(x)
    call.x = cnp.PyArray_DATA(x)
    call.outer, call.channels, call.inner = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2)
    call.threads = thread_count(threads)
    return arithmetic(call.dtype)


cdef int bind_parts(Call* call, cnp.ndarray x, Py_ssize_t group, threads) except -1:
    """The same for a call over parts; return NumPy's number of the type of the arithmetic."""
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


cdef void* like(cnp.ndarray x, cnp.ndarray a) except NULL:
    """Memory of an array that is laid out as the input."""
    if not cnp.PyArray_SAMESHAPE(a, x) or not is_dense(a) or dtype_of(a) != dtype_of(x):
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


cdef Running moved(Call* call, str name, int number, object v) except *:
    """Running statistics that the call updates, in the type of the arithmetic or in double, or None."""
    cdef Running r
    memset(&r, 0, sizeof(Running))
    if v is not None:
        r.is_double = number == cnp.NPY_DOUBLE or (isinstance(v, cnp.ndarray) and cnp.PyArray_TYPE(v) == cnp.NPY_DOUBLE)
        r.data = vector(call, name, cnp.NPY_DOUBLE if r.is_double else cnp.NPY_FLOAT, v)
        if not cnp.PyArray_ISWRITEABLE(v):
            raise ValueError(f"{name} is updated in place but is read-only")
    return r


cdef int enter_affine(Call* call, int number, affine) except -1:
    weight, bias = affine
    call.weight, call.bias = optional(call, "weight", number, weight), optional(call, "bias", number, bias)
    return 0


cdef int enter_statistics(Call* call, int number, statistics) except -1:
    mean, mean_lo, spread, eps = statistics
    call.mean, call.mean_lo = vector(call, "mean", number, mean), optional(call, "mean_lo", number, mean_lo)
    if eps is None:
        call.invstd = vector(call, "spread", number, spread)
    else:
        call.var, call.eps = vector(call, "spread", number, spread), eps
    return 0


cdef cnp.ndarray new_vectors(const Call* call, Py_ssize_t number_of_vectors, int number):
    """Vectors of channels, one below the other."""
    cdef cnp.npy_intp[2] shape = [number_of_vectors, call.channels]
    return cnp.PyArray_EMPTY(2, shape, number, 0)


cdef inline void* row(cnp.ndarray vectors, Py_ssize_t index) noexcept:
    return cnp.PyArray_BYTES(vectors) + index * cnp.PyArray_STRIDE(vectors, 0)


cdef int bind_activation(Call* call, activation) except -1:
    """Enter an activation, or None."""
    if activation is None:
        return 0
    code = getattr(activation, "code", None)
    if not isinstance(code, int):
        raise TypeError(f"a SIMD kernel takes activations of its own, got {activation!r}")
    call.activation.kind, call.activation.parameter = code, activation.parameter
    return 0


cdef int bind_epilogue(Call* call, cnp.ndarray x, epilogue) except -1:
    """Enter what comes after the normalization."""
    if epilogue is None:
        return 0
    activation, residual, _, _, dresidual, call.from_output = epilogue
    bind_activation(call, activation)
    if residual is not None:
        call.residual = like(x, residual)
    if dresidual is not None:
        call.dresidual = target(x, dresidual)
    return 0


cdef int bind_gradient(Call* call, cnp.ndarray x, int number, epilogue) except -1:
    """As `bind_epilogue`, of a gradient: it finds again what the activation was applied to."""
    bind_epilogue(call, x, epilogue)
    if epilogue is not None:
        call.scale = vector(call, "scale", number, epilogue.scale)
        call.shift = vector(call, "shift", number, epilogue.shift)
    return 0
