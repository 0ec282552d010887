"""Plain calls with fixed parameters: what a FrozenBatchNorm repeats."""

cdef class Prepared:
    """Normalize plain arrays with fixed parameters, each as one call.

    Parameters
    ----------
    calls : Calls
    mean, scale, shift : ndarray of shape (C,)
        Contiguous, in the type of the arithmetic.
    activation : Builtin or None
    sample : ndarray
        Of the dtype and number of axes of the arrays to come.
    axis : int
        Axis of the channels.
    """

    cdef Calls calls
    cdef object vectors, activation
    cdef Call call
    cdef int number, ndim, axis

    def __cinit__(self, Calls calls not None, mean, scale, shift, activation, cnp.ndarray sample not None, int axis):
        cdef Call* call = &self.call
        cdef int number
        memset(call, 0, sizeof(Call))
        call.dtype = <Dtype> dtype_of(sample)
        self.number, self.ndim, self.axis = cnp.PyArray_TYPE(sample), cnp.PyArray_NDIM(sample), axis
        if self.ndim < 2 or not 0 <= axis < self.ndim:
            raise ValueError(f"axis must be one of at least two, got {axis} of {self.ndim}")
        self.calls, self.vectors, self.activation = calls, (mean, scale, shift), activation
        call.channels = len(mean)
        number = arithmetic(call.dtype)
        call.mean, call.scale = vector(call, "mean", number, mean), vector(call, "scale", number, scale)
        call.shift = vector(call, "shift", number, shift)
        bind_activation(call, activation)

    cdef object normalize(self, const Given* g):
        """The output, or None where the arrays are not plain."""
        cdef Call call
        cdef int at = self.axis
        x, residual, out = <object> g.x, <object> g.residual, <object> g.out
        if (
            not isinstance(x, cnp.ndarray) or cnp.PyArray_TYPE(x) != self.number or cnp.PyArray_NDIM(x) != self.ndim
            or cnp.PyArray_DIM(x, self.axis) != self.call.channels
            or not bind_plain(self.calls, &call, "normalize", g, &at, self.activation, residual)
            or not bind_output(x, None, residual, out)
        ):
            return None
        call.mean, call.scale, call.shift = self.call.mean, self.call.scale, self.call.shift
        y = new_like(self.calls, x) if out is None else out
        call.out = cnp.PyArray_DATA(y)
        run(self.calls.table.normalize, &call)
        return y
