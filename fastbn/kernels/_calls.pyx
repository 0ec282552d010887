# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, freethreading_compatible=True
"""NumPy's doors to the kernels: from arrays to a Call, which the table of an ISA's functions runs.

`Calls` takes what was checked: (outer, channels, inner) arrays, and vectors in the type of the arithmetic. The doors of
plain.pxi take what users give and do all of a call, as long as nothing about that is unusual; direct.pxi goes to them from
the arguments of a public function.
"""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_Occurred
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF
from libc.math cimport isfinite
from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset

from fastbn.kernels._call cimport DONE, LEFT, Call, Dtype, Kernels, Running, Status, are_parts, call_fn
from fastbn.kernels._plan cimport thread_count
from fastbn.kernels._pool cimport end_scratch, enter_default_mode, leave_default_mode

from types import MethodType

import numpy as np

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    const int NPY_HALF
    object PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, void*, int)

STORAGES = ("float32", "float64", "bfloat16", "float16")  # as call.hpp numbers them
assert len(STORAGES) == <int> Dtype.DTYPES

include "binding.pxi"


cdef class Calls:
    """The kernels of one ISA.

    Parameters
    ----------
    kernels : capsule
        The table that an ISA's module exports as KERNELS.
    customs : dict, optional
        Codes of functions of the user's, as the table's functions know them.
    """

    cdef const Kernels* table
    cdef readonly object kernels, customs, composed, part, epilogue, finish_parts, axis_of, threads_of, memory_for
    cdef Py_ssize_t small

    def __cinit__(self, kernels not None, dict customs=None):
        self.kernels, self.customs = kernels, customs
        self.table = <const Kernels*> PyCapsule_GetPointer(kernels, "fastbn.kernels.Kernels")

    def connect(self, *, composed, part, epilogue, finish_parts, axis_of, threads_of, memory_for, small):
        """Bring what the doors need of the library: kernels know nothing of it.

        Parameters
        ----------
        composed, part, epilogue
            What computes channels at the ends of the range: whole calls made of this object's operations, and the classes
            that stand for parts of channels and for what follows a normalization.
        finish_parts : callable
            What computes the parts that a kernel has left.
        axis_of, threads_of, memory_for : callable
            Axis of the channels, number of threads, and memory for an output, of plain calls.
        small : int
            Bytes below which one thread does, of x in the type of the arithmetic, and fresh memory.
        """
        self.composed, self.part, self.epilogue, self.finish_parts = composed, part, epilogue, finish_parts
        self.axis_of, self.threads_of, self.memory_for, self.small = axis_of, threads_of, memory_for, small

    def stats(self, cnp.ndarray x not None, threads=1):
        """Mean, what it rounds away, and M2 of each channel; as `reference.stats`."""
        cdef Call call
        bind(&call, x, threads)
        cdef cnp.ndarray found = new_vectors(&call, 3, cnp.NPY_DOUBLE)
        call.batch_mean, call.batch_mean_lo = <double*> row(found, 0), <double*> row(found, 1)
        call.batch_m2 = <double*> row(found, 2)
        run(self.table.stats, &call)
        return tuple(found)

    def normalize(self, cnp.ndarray x not None, cnp.ndarray y not None, mean, scale, shift, threads=1, epilogue=None):
        """Write ``(x - mean) * scale + shift`` and what comes after it to `y`; as `reference.normalize`."""
        cdef Call call
        cdef int number = bind(&call, x, threads)
        bind_epilogue(&call, x, epilogue)
        call.out = target(x, y)
        call.mean, call.scale = vector(&call, "mean", number, mean), vector(&call, "scale", number, scale)
        call.shift = vector(&call, "shift", number, shift)
        run(self.table.normalize, &call)

    def grad_sums(self, cnp.ndarray dy not None, cnp.ndarray x not None, mean, threads=1, epilogue=None):
        """Sums over each channel of `dy` and of ``dy * (x - mean)``; as `reference.grad_sums`."""
        cdef Call call
        cdef int number = bind(&call, x, threads)
        cdef cnp.ndarray sums = new_vectors(&call, 2, cnp.NPY_DOUBLE)
        bind_gradient(&call, x, number, epilogue)
        call.dy = like(x, dy)
        call.mean = vector(&call, "mean", number, mean)
        call.sum_dy, call.sum_dy_xmu = <double*> row(sums, 0), <double*> row(sums, 1)
        run(self.table.grad_sums, &call)
        return tuple(sums)

    def grad_input(
        self, cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray dx not None, mean, scale, line, threads=1,
        epilogue=None
    ):
        """Write ``scale * (dy - g0 - (x - mean) * g1)`` to `dx`; as `reference.grad_input`."""
        cdef Call call
        cdef int number = bind(&call, x, threads)
        bind_gradient(&call, x, number, epilogue)
        g0, g1 = line
        call.dy, call.out = like(x, dy), target(x, dx)
        call.mean, call.scale = vector(&call, "mean", number, mean), vector(&call, "scale", number, scale)
        call.g0, call.g1 = vector(&call, "g0", number, g0), vector(&call, "g1", number, g1)
        run(self.table.grad_input, &call)

    def inference(self, cnp.ndarray x not None, cnp.ndarray y not None, given, affine, threads, epilogue=None):
        """Normalize with given statistics; as `composed.ComposedKernel.inference`."""
        cdef Call call
        cdef int number = bind(&call, x, threads)
        bind_epilogue(&call, x, epilogue)
        call.out = target(x, y)
        enter_statistics(&call, number, given)
        enter_affine(&call, number, affine)
        run(self.table.inference, &call)

    def forward(
        self, cnp.ndarray x not None, cnp.ndarray y not None, affine, double eps, running, compute, threads,
        epilogue=None
    ):
        """Normalize with the batch's statistics; as `composed.ComposedKernel.forward`."""
        cdef Call call
        cdef int number = bind(&call, x, threads)
        bind_epilogue(&call, x, epilogue)
        call.out = target(x, y)
        enter_affine(&call, number, affine)
        mean, var, call.momentum, call.correction = running
        call.running_mean = moved(&call, "running_mean", number, mean)
        call.running_var = moved(&call, "running_var", number, var)
        call.eps = eps
        return tuple(train(self, &call, number, x, y, (*affine, mean, var), epilogue, None))

    def prepared(self, mean, scale, shift, activation, sample, axis):
        """Calls of `normalize` with fixed parameters, for arrays like a sample."""
        return Prepared(self, mean, scale, shift, activation, sample, axis)

    def backward(self, cnp.ndarray dy not None, cnp.ndarray x not None, dx, kept, scale, threads, epilogue=None):
        """Sums of dy and of dy (x - mean), and dx unless it is None; as `composed.ComposedKernel.backward`."""
        cdef Call call
        cdef int number = bind(&call, x, threads)
        cdef cnp.ndarray sums = new_vectors(&call, 2, cnp.NPY_DOUBLE)
        bind_gradient(&call, x, number, epilogue)
        call.dy = like(x, dy)
        enter_statistics(&call, number, kept)
        if call.invstd == NULL:
            raise ValueError("a backward needs the deviations themselves: no variance, and no eps")
        call.sum_dy, call.sum_dy_xmu = <double*> row(sums, 0), <double*> row(sums, 1)
        if dx is not None:
            call.out = target(x, dx)
            call.scale = vector(&call, "scale", number, scale)
        if run(self.table.backward, &call) == LEFT:
            return rescue(self).backward(dy, x, dx, kept, scale, call.threads, epilogue)
        return tuple(sums)

    def parts_forward(
        self, cnp.ndarray x not None, cnp.ndarray y not None, affine, double eps, grouping, threads,
        epilogue=None
    ):
        """Normalize parts with their own statistics, of (batch, outer, channels, inner) arrays; as `parts.forward`.

        Mean, what it rounds away, and invstd of each part, one below the other; invstd is -1 where the caller must do it.
        None where this takes no such shape.
        """
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
        left = run(self.table.parts_forward, &call) == LEFT
        if left:
            end_scratch()
        return made, left

    def parts_backward(
        self, cnp.ndarray dy not None, cnp.ndarray x not None, dx, kept, affine, grouping,
        threads, epilogue=None
    ):
        """Gradients through the statistics of parts; as `parts_gradient.backward`: those of weight and bias, or None where this cannot."""
        cdef Call call
        cdef Py_ssize_t group
        cdef bint centered
        group, centered = grouping
        mean, mean_lo, invstd = kept[:3]
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
        if run(self.table.parts_backward, &call) == LEFT:
            end_scratch()
            return None
        return tuple(made)


cdef Status run(call_fn function, Call* call) except *:
    """Run a call; DONE or LEFT."""
    cdef Status status
    if function == NULL:
        raise NotImplementedError("these kernels have no such call")
    with nogil:
        status = function(call)
    if status != DONE and status != LEFT and PyErr_Occurred() == NULL:  # what compiles its functions may have raised
        raise MemoryError("no memory for the partial sums")
    return status


cdef object rescue(Calls calls):
    """The same calls, made of single operations: they know what to do at the ends of the range."""
    if calls.composed is None:
        raise RuntimeError("values at the ends of the range need `connect` before")
    return calls.composed


cdef cnp.ndarray train(Calls calls, Call* call, int number, x, y, tuple vectors, epilogue, tuple after):
    """Run a forward whose inputs were entered; return mean, mean_lo, invstd, scale and shift, one below the other.

    What follows the normalization is given as an epilogue or, `after`, as a user gives it: activation and residual.
    """
    cdef cnp.ndarray made = new_vectors(call, 5, number)
    call.mean, call.mean_lo, call.invstd = row(made, 0), row(made, 1), row(made, 2)
    call.scale, call.shift = row(made, 3), row(made, 4)
    if run(calls.table.forward, call) == LEFT:
        finish(calls, call, made, x, y, vectors, epilogue, after)
    return made


cdef int finish(Calls calls, Call* call, cnp.ndarray made, x, y, tuple given, epilogue, tuple after) except -1:
    """Compute the channels that a forward has left, then move the running statistics, which cannot fail any more.

    The tiles of so many channels alone are those of all: planes are cut without regard to the number of channels, and
    where the units of work are whole channels of columns, they are so many as make whole blocks.
    """
    cdef cnp.ndarray mask = np.empty(call.channels, np.bool_), found = new_vectors(call, 2, cnp.NPY_DOUBLE)
    memcpy(cnp.PyArray_DATA(mask), call.left, call.channels)
    # Before any line of Python runs: a handler of signals may call, too, and other calls use the scratch memory.
    memcpy(row(found, 0), call.batch_mean, call.channels * sizeof(double))
    memcpy(row(found, 1), call.batch_m2, call.channels * sizeof(double))
    call.batch_mean, call.batch_m2 = <double*> row(found, 0), <double*> row(found, 1)
    end_scratch()
    weight, bias, mean, var = given
    dims = dims_of(call)
    if after is not None:
        activation, residual = after
        epilogue = calls.epilogue(activation, None if residual is None else in_memory(residual, dims))
    channels = np.flatnonzero(mask)
    part = calls.part(channels, np.zeros_like(channels))
    rows, own_mean, own_var = part.of(in_memory(x, dims)), part.of(mean), part.of(var)
    running = own_mean, own_var, call.momentum, int(call.correction)
    vectors = rescue(calls).forward(
        rows, rows, (part.of(weight), part.of(bias)), call.eps, running, made.dtype, call.threads, part.epilogue(epilogue)
    )
    in_memory(y, dims)[:, channels] = rows
    made[:, channels] = vectors
    cdef uint32_t mode = enter_default_mode()
    calls.table.move_running(call)
    leave_default_mode(mode)
    if mean is not None:
        mean[channels] = own_mean
    if var is not None:
        var[channels] = own_var
    return 0


cdef inline tuple dims_of(const Call* call):
    return call.outer, call.channels, call.inner


cdef object in_memory(cnp.ndarray a, tuple dims):
    """A dense array as (outer, channels, inner), in the order of its memory."""
    order = sorted(range(a.ndim), key=lambda i: -a.strides[i] if a.shape[i] != 1 else 1)
    return a.transpose(order).reshape(dims)


include "plain.pxi"
include "plain_parts.pxi"
include "prepared.pxi"
include "direct.pxi"
