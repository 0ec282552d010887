"""The C++ types of block.hpp and types.hpp, as Cython sees them, and the sets of types that a kernel is compiled for."""

cdef extern from "simd/block.hpp" nogil:
    ctypedef struct bf16:
        pass
    ctypedef struct f16:
        pass

    cdef cppclass Block[T]:
        Block[T] operator+(Block[T])
        Block[T] operator-(Block[T])
        Block[T] operator*(Block[T])
        double total()
        void store(T*)
        void stream(T*)
        void store_part(T*, Py_ssize_t)
        void put(void*, Py_ssize_t)
        @staticmethod
        Py_ssize_t width()
        @staticmethod
        Py_ssize_t worth_joining()
        @staticmethod
        Py_ssize_t item()
        @staticmethod
        Block[T] fma(Block[T], Block[T], Block[T])
        @staticmethod
        Block[T] pivot(Block[T], Block[T], Block[T], double)
        @staticmethod
        Block[T] minimum(Block[T], Block[T])
        @staticmethod
        Block[T] constant(double)
        @staticmethod
        Block[T] load(const T*)
        @staticmethod
        void prefetch(const T*, Py_ssize_t)
        @staticmethod
        void prefetch_near(const T*, Py_ssize_t)
        @staticmethod
        void prefetch_written(T*, Py_ssize_t)
        @staticmethod
        Block[T] load_part(const T*, Py_ssize_t, Block[T])
        @staticmethod
        Block[T] behind(Py_ssize_t)
        @staticmethod
        Block[T] joined(Block[T], Block[T], Block[T])
        @staticmethod
        Block[T] load_end(const T*, Block[T], Block[T])
        @staticmethod
        double element(const T*)
        @staticmethod
        double rounded(double)
        @staticmethod
        double largest()
        @staticmethod
        double pivot_at(const T*, const Py_ssize_t*)
        @staticmethod
        bint in_range(double, double, double)
        @staticmethod
        bint in_range(Block[T], Block[T], Block[T])
        @staticmethod
        bint is_near(Block[T], Block[T], double)
        void put_double(double*, Py_ssize_t)
        @staticmethod
        Py_ssize_t to_line(const T*, Py_ssize_t)
        @staticmethod
        Block[T] splat(const void*, Py_ssize_t)
        @staticmethod
        Block[T] get(const void*, Py_ssize_t)
        @staticmethod
        Block[T] get_first(const void*, Py_ssize_t, Py_ssize_t)
        @staticmethod
        double value(const void*, Py_ssize_t)
        @staticmethod
        void set_value(void*, Py_ssize_t, double)
        double first()
        @staticmethod
        Block[T] activation_forward(Block[T], const Activation&)
        @staticmethod
        Block[T] activation_backward(Block[T], Block[T], const Activation&)
        @staticmethod
        Block[T] activation_inverse(Block[T], const Activation&)
        @staticmethod
        void smooth(Block[T]*, Py_ssize_t, const Activation&, bint)

    void fence()

cdef extern from "simd/types.hpp" nogil:
    ctypedef struct Stats:
        pass
    ctypedef struct GradSums:
        pass
    ctypedef struct FusedGradSums:
        pass
    ctypedef struct Normalize:
        pass
    ctypedef struct FusedNormalize:
        pass
    ctypedef struct GradInput:
        pass
    ctypedef struct FusedGradInput:
        pass

    cdef cppclass Work(Call, Tiles, Units):
        void *dz
        double *pivots
        double *sums
        double *dots
        void *grad_offset
        void *grad_slope
        double *expanded
        Py_ssize_t planes, period
        void *plane_mean
        void *plane_scale
        void *plane_shift
        bint apart, any_left, no_memory, folds
        void *kept_mean
        void *kept_var
        const void *at_mean
        const void *at_scale
        const void *at_shift
        const void *at_slope
        const void *at_bias
        void follow(const Tiles&, const Units&)

    cdef cppclass Columns:
        pass

    cdef cppclass Accumulators[T]:
        Block[T] *sum
        Block[T] *dot

    cdef cppclass Arrays[T]:
        const T *x
        const T *dy
        const T *residual
        T *out
        T *dresidual
        T *dz

    cdef cppclass Operands[T]:
        Block[T] x, dy, residual

    cdef cppclass Outputs[T]:
        Block[T] out, dresidual

    cdef cppclass Parameters[T]:
        Block[T] mean, scale, shift, slope, bias

    cdef cppclass TypedCall[Op, T](Work):
        Arrays[T] arrays()

ctypedef fused T:
    float
    double
    bf16
    f16

ctypedef fused C:
    float
    double

ctypedef fused Sum:
    Stats
    GradSums
    FusedGradSums

ctypedef fused Forward:
    Normalize
    FusedNormalize

ctypedef fused Backward:
    GradInput
    FusedGradInput

ctypedef fused Map:
    Normalize
    FusedNormalize
    GradInput
    FusedGradInput

ctypedef fused Fused:
    FusedGradSums
    FusedNormalize
    FusedGradInput

ctypedef fused Gradient:  # operations that read dy
    GradSums
    FusedGradSums
    GradInput
    FusedGradInput

ctypedef fused Op:
    Stats
    GradSums
    FusedGradSums
    Normalize
    FusedNormalize
    GradInput
    FusedGradInput
