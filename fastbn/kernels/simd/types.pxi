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
        Block[T] fma(Block[T], Block[T], Block[T])
        @staticmethod
        Block[T] shift(Block[T], Block[T], Block[T], double)
        @staticmethod
        Block[T] lesser(Block[T], Block[T])
        @staticmethod
        Block[T] constant(double)
        @staticmethod
        Block[T] load(const T*)
        @staticmethod
        void prefetch(const T*, Py_ssize_t)
        @staticmethod
        Block[T] load_part(const T*, Py_ssize_t, Block[T])
        @staticmethod
        Block[T] last_lanes(Py_ssize_t)
        @staticmethod
        Block[T] load_end(const T*, Block[T], Block[T])
        @staticmethod
        double element(const T*)
        @staticmethod
        double rounded(double)
        @staticmethod
        double largest()
        @staticmethod
        double shift_at(const T*, const Py_ssize_t*)
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
        Block[T] activated(Block[T], const Activation&)
        @staticmethod
        Block[T] through(Block[T], Block[T], const Activation&)
        @staticmethod
        Block[T] restored(Block[T], const Activation&)
        @staticmethod
        void smooth(Block[T]*, Py_ssize_t, const Activation&, bint)

    void fence()
    void stream_line(void*, const void*)

cdef extern from "simd/types.hpp" nogil:
    ctypedef struct Stats:
        pass
    ctypedef struct GradSums:
        pass
    ctypedef struct ActiveSums:
        pass
    ctypedef struct Normalize:
        pass
    ctypedef struct ActiveNormalize:
        pass
    ctypedef struct InputGradient:
        pass
    ctypedef struct ActiveGradient:
        pass

    cdef cppclass Work(Call, Tiles, Units):
        void *kept
        double *shifts
        double *sums
        double *squares
        void *grad_offset
        void *grad_slope
        double *invstds
        double *spread
        const void *at_mean
        const void *at_scale
        const void *at_shift
        const void *at_slope
        const void *at_bias
        void follow(const Tiles&, const Units&)

    cdef cppclass Columns:
        pass

    cdef cppclass Stage:
        char *bytes

    cdef cppclass Accumulators[T]:
        Block[T] *sum
        Block[T] *square

    cdef cppclass Arrays[T]:
        const T *x
        const T *dy
        const T *residual
        T *out
        T *dresidual
        T *kept

    cdef cppclass Elements[T]:
        Block[T] x, dy, residual

    cdef cppclass Results[T]:
        Block[T] out, dresidual

    cdef cppclass Parameters[T]:
        Block[T] mean, scale, shift, slope, bias

    cdef cppclass Job[Op, T](Work):
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
    ActiveSums

ctypedef fused Forward:
    Normalize
    ActiveNormalize

ctypedef fused Backward:
    InputGradient
    ActiveGradient

ctypedef fused Map:
    Normalize
    ActiveNormalize
    InputGradient
    ActiveGradient

ctypedef fused Active:
    ActiveSums
    ActiveNormalize
    ActiveGradient

ctypedef fused Gradient:  # operations that read dy
    GradSums
    ActiveSums
    InputGradient
    ActiveGradient

ctypedef fused Op:
    Stats
    GradSums
    ActiveSums
    Normalize
    ActiveNormalize
    InputGradient
    ActiveGradient
