"""The C entry, as Cython sees it; call.hpp says what everything means."""

from fastbn.kernels._pool cimport Host

cdef extern from "call.hpp" namespace "fastbn" nogil:
    cdef enum Dtype:
        FLOAT32, FLOAT64, BFLOAT16, FLOAT16, DTYPES

    cdef enum Status:
        DONE, NO_MEMORY, LEFT

    cdef cppclass Activation:
        int kind
        double parameter
        bint is_smooth()

    cdef cppclass Running:
        void *data
        bint is_double

    bint are_parts(Py_ssize_t outer, Py_ssize_t inner, Py_ssize_t group)

    cdef cppclass Call:
        Dtype dtype
        Py_ssize_t outer, channels, inner
        const void *x
        const void *dy
        void *out
        const void *residual
        void *dresidual
        Activation activation
        bint from_output, frozen
        int threads
        const Host *host
        const void *weight
        const void *bias
        void *mean
        void *mean_lo
        void *invstd
        const void *var
        void *scale
        void *shift
        const void *g0
        const void *g1
        double eps, momentum, correction
        Running running_mean, running_var
        void *dweight
        void *dbias
        double *batch_mean
        double *batch_m2
        double *batch_mean_lo
        double *sum_dy
        double *sum_dy_xmu
        char *left
        Py_ssize_t batch, group
        bint uncentered

    ctypedef Status (*call_fn)(Call*) noexcept nogil

    cdef cppclass Kernels:
        call_fn stats, normalize, grad_sums, grad_input, inference, forward, backward
        void (*move_running)(Call*) noexcept
        call_fn parts_forward, parts_backward
