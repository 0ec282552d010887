"""The SIMD kernels: one source for every ISA level and every dtype.

Each `_simd_*.pyx` includes this file and is compiled with the flags of its ISA. The design:

a) Two patterns. *Planes* (ncsp): each channel of each image is a run of `inner` elements. *Columns* (nspc): rows of
   channels, each channel a column. Rows whose number of channels does not fill whole blocks are gathered, several to
   one long row (`repeats`), so that only the last row of the array has a tail.

b) Four operations, two kinds. `Stats` and `GradSums` reduce to two sums per channel; `Normalize` and `InputGradient`
   map to an output. So there are four loops over elements: `sum_planes`, `sum_columns`, `map_planes`, `map_columns`.
   What is summed or mapped stands in `accumulate` and `mapped`. An operation with an activation or a residual is an
   `Active` one. Which activation it is, is decided block by block, which costs next to nothing.

c) Sums run over fixed tiles that depend on the shape alone, in the lanes of one block (simd.hpp), and are merged in
   double in a fixed order: the same bits for any number of threads. Statistics are sums of x - k and (x - k)^2, where
   the shift k is the mean of a sample of the tile. M2 = sum (x - k)^2 - (sum (x - k))^2 / n loses digits where k is far
   from the mean: a tile where it turns out to be more than a deviation away is summed again, around the mean that was
   found; so is one channel in 10,000 for exponential data. The mean of the sample is added in pairs, so that constant
   data give exactly zero; it is rounded to an element of the sample plus a number of few bits, so that data in a few
   low bits give exact sums, and a value that is frequent, like the zeros behind a ReLU, adds a number of few bits, or
   all its roundings would go in one direction. Chan, Golub and LeVeque, The American Statistician 37 (1983).

d) A tile whose sums leave the range of its arithmetic (values near 1e30, or 1e-30) is summed again in double. Channels
   that leave the range of double as well, or whose map would leave that of its arithmetic, are left by a forward: it
   does not map their group, and `forward_left` computes them from the operations, in units of their own (extremes.py).
   What a backward is given says beforehand whether it has such channels.

e) Units of work are whole numbers of tiles, sized for the caches, claimed by the threads of the pool. Where one
   channel's planes stay in the cache, sums and map run on them one after the other: within L2 for several images, whose
   planes lie far apart, within L1 for one; so they do on columns of a few rows. Arrays of more than a part of L3, but not
   of more than L3, take two sweeps all the same: they are read from L3 in long runs as fast as from L2 in short ones. A
   second sweep runs backwards: what was read last is still in the cache. Where the arrays do not stay in L3, rows are read
   in one stream of memory, not in one for each row.

f) Large outputs are written with streaming stores, which do not read the line first; whole aligned lines only. Planes
   of a few lines are mapped to a buffer, and the lines that they make together are streamed from there.
"""

cimport numpy as cnp
from libc.math cimport fabs, isfinite, sqrt
from libc.stdint cimport uint32_t
from libc.string cimport memchr, memcpy, memset

from fastbn.kernels._pool cimport end_scratch, enter_default_mode, leave_default_mode, parallel, scratch, unit_fn

import sys

import numpy as np

cnp.import_array()

cdef extern from "numpy/ndarraytypes.h":
    const int NPY_HALF

cdef extern from "simd.hpp" nogil:
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
        bint in_range(double, double)
        @staticmethod
        bint in_range(Block[T], Block[T])
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

    cdef cppclass Activation:
        int kind
        double parameter
        bint is_smooth()

    void fence()
    void stream_line(void*, const void*)

cdef extern from * nogil:
    """
    namespace {

    struct Stats {};
    struct GradSums {};
    struct ActiveSums {};
    struct Normalize {};
    struct ActiveNormalize {};
    struct InputGradient {};
    struct ActiveGradient {};

    // One call: its arrays, and how they are cut. Vectors of channels are in the type of the arithmetic.
    struct Call {
        const void *x, *dy, *residual;  // residual, dresidual: of active operations, or NULL
        void *out, *dresidual;
        void *kept;  // where the sums of an active gradient leave dy before the activation, for the map to read; or NULL
        Activation activation;
        bool restores;  // x is the output of the forward: what the activation made of it is undone
        ptrdiff_t outer, channels, inner;
        double count;  // values per channel
        int threads;

        const void *weight, *bias;  // of the forward; for active gradients, the bias is the shift of the forward
        void *mean, *mean_lo, *invstd;
        const void *at_mean, *at_scale, *at_shift, *at_slope, *at_bias;  // of the map; for columns one for each column
        void *scale, *shift, *slope;
        double eps;

        bool by_columns;                         // not by planes
        ptrdiff_t tiles, width;                  // numeric tiles; partial sums in each
        ptrdiff_t images, pieces, piece;         // planes: a tile is several images, or a piece of one
        ptrdiff_t columns, rows, rest;           // columns: rows of `columns`, and one of `rest`
        ptrdiff_t repeats, run;                  // in a row: channels repeat, and each has a run of columns
        double *shifts, *sums, *squares;         // the partial sums, of each tile
        double *first, *second, *low;                    // of each channel: the merged sums
        char *left;  // of a forward, of each channel: 1 where it was not mapped, because it leaves the range of a number
        void *dweight, *dbias;  // of a backward, or NULL

        double *spread;  // room for a vector for each column

        ptrdiff_t unit, group;  // what one unit of work takes
        ptrdiff_t turn;         // channels whose sums are followed by their map, before the next ones of the unit
        ptrdiff_t skip;         // elements before the first line of the output: rows are mapped from there
        bool inverted, backwards, streams;
        bool far;  // the arrays do not stay in the caches: memory should be read in one stream, not in one for each row
        ptrdiff_t units;
    };

    struct alignas(64) Columns {
        char bytes[4096 + 128];  // one row of accumulators, and a block more
    };

    // Lines before they are streamed, in one page of memory: a store across two would wait for all streaming stores before.
    struct alignas(2048) Stage {
        char bytes[2048];
    };

    // The sums of a few channels while their planes are read.
    constexpr int PLANES = 32;
    template <class T> struct Accumulators {
        Block<T> sum[PLANES], square[PLANES];
    };

    template <class T> struct Arrays {
        const T *x, *dy, *residual;
        T *out, *dresidual, *kept;
    };

    // A block of each input, and of each output.
    template <class T> struct Elements {
        Block<T> x, dy, residual;
    };
    template <class T> struct Results {
        Block<T> out, dresidual;
    };

    // A block of each vector of channels.
    template <class T> struct Parameters {
        Block<T> mean, scale, shift, slope, bias;
    };

    // The same call, as seen by the kernels of one operation and one storage type.
    template <class Op, class T> struct Job : Call {
        Arrays<T> arrays() const {
            return {static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<const T*>(residual), static_cast<T*>(out),
                    static_cast<T*>(dresidual), static_cast<T*>(kept)};
        }
    };

    }
    """
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

    cdef cppclass Call:
        const void *x
        const void *dy
        const void *residual
        void *out
        void *dresidual
        void *kept
        Activation activation
        bint restores
        Py_ssize_t outer, channels, inner
        double count
        int threads
        const void *weight
        const void *bias
        void *mean
        void *mean_lo
        void *invstd
        const void *at_mean
        const void *at_scale
        const void *at_shift
        const void *at_slope
        const void *at_bias
        void *scale
        void *shift
        void *slope
        double eps
        bint by_columns
        Py_ssize_t tiles, width, images, pieces, piece, columns, rows, rest, repeats, run
        double *shifts
        double *sums
        double *squares
        double *first
        double *second
        double *low
        char *left
        void *dweight
        void *dbias
        double *spread
        Py_ssize_t unit, group, turn
        Py_ssize_t skip
        bint inverted, backwards, streams, far
        Py_ssize_t units

    cdef cppclass Columns:
        pass

    cdef cppclass Stage:
        char *bytes

    const Py_ssize_t PLANES

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

    cdef cppclass Job[Op, T](Call):
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


# Numeric tiles: fixed by the shape, never by the machine.
cdef enum:
    TILE = 16384         # elements of a tile of planes
    CHAIN = 64           # additions to one accumulator, before it is added to another: long chains lose digits
    TILE_ROWS = 256      # rows of a tile of columns
    MANY_ROWS = 32       # images from which small planes are summed and mapped as columns
    SMALL_PLANE = 16     # blocks of a plane below which several images are summed together
    REACH = 4096         # bytes of a plane up to which a gradient's sums ask for the next image's early
    TOGETHER = 4         # images summed together
    BATCH = 8            # rows summed before they are added to the accumulators
    FAR = 3              # arrays of more than this part of L3, which others use too, do not stay in it
    FEW_ROWS = 128       # rows up to which groups of columns are summed and mapped at once
    LONG_ROW = 2048      # gather rows up to this many columns
    COLUMNS = 4096       # bytes of the accumulators of one unit's columns, as in the struct Columns
    MAP_PIECE = 2048     # elements of a long plane mapped before those that lie before them
    MAP_ROWS = 4         # rows mapped with one load of the parameters
    FEW = 4              # blocks that a smooth activation takes at once
    LINE = 64            # bytes of a cache line
    FEW_VALUES = 64      # values of a channel in a tile up to which its sums round so seldom that the shift may be farther away
    MOST_THREADS = 4096  # of one call; the pool has fewer
    BLOCK = 128          # bytes of a block

# The ends of the range, as in extremes.py.
cdef double LARGE_M2 = 2.0 ** 1000, LARGE_INVSTD = 2.0 ** 450, FAR_DOUBLE = 2.0 ** 400, FAR_FLOAT = 2.0 ** 100

cdef Py_ssize_t L1 = 32 << 10, L2 = 512 << 10, L3 = 8 << 20


# ---- What is summed, what is mapped ----

cdef inline Block[T] take(const T* p, Py_ssize_t n, Block[T] fill) noexcept nogil:
    """Load n elements, at most a block; the other lanes are those of `fill`."""
    return Block[T].load(p) if n == Block[T].width() else Block[T].load_part(p, n, fill)


cdef inline Elements[T] elements(Job[Op, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Parameters[T]* p) noexcept nogil:
    """Load n elements of each input, at most a block; the other lanes add nothing to a sum."""
    cdef Elements[T] e
    cdef Block[T] zero = Block[T].constant(0)
    e.x = take(a.x + at, n, p.mean)
    if Op in Gradient:
        e.dy = take(a.dy + at, n, zero)
    if Op in Active:
        if job.restores:
            e.x = Block[T].restored(e.x, job.activation)
        if job.residual != NULL:
            e.residual = take(a.residual + at, n, zero)
    return e


cdef inline Elements[T] elements_before(
    Job[Op, T]* job, Arrays[T]* a, Py_ssize_t end, Block[T] lanes, Parameters[T]* p
) noexcept nogil:
    """The last lanes of the block that ends at `end`, all of which can be read."""
    cdef Elements[T] e
    cdef Block[T] zero = Block[T].constant(0)
    e.x = Block[T].load_end(a.x + end, lanes, p.mean)
    if Op in Gradient:
        e.dy = Block[T].load_end(a.dy + end, lanes, zero)
    if Op in Active:
        if job.restores:
            e.x = Block[T].restored(e.x, job.activation)
        if job.residual != NULL:
            e.residual = Block[T].load_end(a.residual + end, lanes, zero)
    return e


cdef inline Block[T] before_activation(Job[Active, T]* job, Elements[T] e, Parameters[T]* p) noexcept nogil:
    """What the activation of the forward is applied to."""
    cdef Block[T] z
    if job.restores:
        return e.x
    z = Block[T].fma(e.x - p.mean, p.scale, p.shift if Active is ActiveNormalize else p.bias)
    return z if job.residual == NULL else z + e.residual


cdef inline void activate(
    Job[Active, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, Parameters[T]* p, Block[T]* z
) noexcept nogil:
    """A smooth activation of a few blocks, `step` apart; of a gradient, its derivative there."""
    cdef Py_ssize_t i
    for i in range(blocks):
        z[i] = before_activation(job, elements(job, a, at + i * step, n, p), p)
    Block[T].smooth(z, blocks, job.activation, Active in Gradient)


cdef inline void accumulate(Job[Sum, T]* job, Elements[T] e, Parameters[T]* p, Block[T]* sum, Block[T]* square) noexcept nogil:
    """Add a block, whose dy is that before the activation."""
    cdef Block[T] d = e.x - p.mean
    cdef Block[T] term = d if Sum is Stats else e.dy
    sum[0] = sum[0] + term
    square[0] = Block[T].fma(term, d, square[0])


cdef inline void give(T* p, Block[T] a, Py_ssize_t n, bint streams) noexcept nogil:
    if n < Block[T].width():
        a.store_part(p, n)
    elif streams:
        a.stream(p)
    else:
        a.store(p)


cdef inline void keep(Job[ActiveSums, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Block[T] dy) noexcept nogil:
    if job.kept != NULL:
        give(a.kept + at, dy, n, False)


cdef inline void sum_blocks(
    Job[Sum, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, Parameters[T]* p,
    Block[T]* sum, Block[T]* square
) noexcept nogil:
    """Add several blocks of n elements, `step` apart."""
    cdef Elements[T] e
    cdef Py_ssize_t i, few
    cdef Block[T] slopes[FEW]
    if Sum is ActiveSums:
        while job.activation.is_smooth() and blocks > 0:
            few = min(<Py_ssize_t> FEW, blocks)
            activate(job, a, at, step, few, n, p, slopes)
            for i in range(few):
                e = elements(job, a, at + i * step, n, p)
                e.dy = e.dy * slopes[i]
                keep(job, a, at + i * step, n, e.dy)
                accumulate(job, e, p, sum, square)
            at += few * step
            blocks -= few
    for i in range(blocks):
        e = elements(job, a, at + i * step, n, p)
        if Sum is ActiveSums:
            e.dy = Block[T].through(e.dy, before_activation(job, e, p), job.activation)
            keep(job, a, at + i * step, n, e.dy)
        accumulate(job, e, p, sum, square)


cdef inline Results[T] mapped(Job[Map, T]* job, Elements[T] e, Parameters[T]* p) noexcept nogil:
    """Map a block, whose dy is that before the activation."""
    cdef Results[T] r
    if Map is Normalize:
        r.out = Block[T].fma(e.x - p.mean, p.scale, p.shift)
    elif Map is ActiveNormalize:
        r.out = Block[T].activated(before_activation(job, e, p), job.activation)
    else:
        r.dresidual = e.dy
        r.out = p.scale * Block[T].fma(e.x - p.mean, p.slope, e.dy - p.shift)
    return r


cdef inline void deliver(Job[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, bint streams, Results[T] r) noexcept nogil:
    """Store n elements of each output, at most a block."""
    give(a.out + at, r.out, n, streams)
    if Map is ActiveGradient:
        if job.dresidual != NULL:
            give(a.dresidual + at, r.dresidual, n, streams)


cdef inline Results[T] mapped_block(Job[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Parameters[T]* p) noexcept nogil:
    cdef Elements[T] e = elements(job, a, at, n, p)
    if Map is ActiveGradient:
        e.dy = Block[T].through(e.dy, before_activation(job, e, p), job.activation)
    return mapped(job, e, p)


cdef inline void map_blocks(
    Job[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t step, Py_ssize_t blocks, Py_ssize_t n, bint streams, Parameters[T]* p
) noexcept nogil:
    """Map several blocks of n elements, `step` apart."""
    cdef Elements[T] e
    cdef Results[T] r
    cdef Py_ssize_t i, few
    cdef Block[T] values[FEW]
    if Map in Active:
        while job.activation.is_smooth() and blocks > 0:
            few = min(<Py_ssize_t> FEW, blocks)
            activate(job, a, at, step, few, n, p, values)
            for i in range(few):
                if Map is ActiveNormalize:
                    r.out = values[i]
                else:
                    e = elements(job, a, at + i * step, n, p)
                    e.dy = e.dy * values[i]
                    r = mapped(job, e, p)
                deliver(job, a, at + i * step, n, streams, r)
            at += few * step
            blocks -= few
    for i in range(blocks):
        deliver(job, a, at + i * step, n, streams, mapped_block(job, a, at + i * step, n, p))


cdef inline void of_channel(Job[Op, T]* job, Py_ssize_t c, Parameters[T]* p) noexcept nogil:
    """Set the parameters to those of one channel, in all lanes."""
    if Op is not Stats:
        p.mean = Block[T].splat(job.at_mean, c)
    if Op in Map or Op is ActiveSums:
        p.scale = Block[T].splat(job.at_scale, c)
    if Op in Map:
        p.shift = Block[T].splat(job.at_shift, c)
    if Op in Backward:
        p.slope = Block[T].splat(job.at_slope, c)
    if Op in Active and Op in Gradient:
        p.bias = Block[T].splat(job.at_bias, c)


cdef inline void of_columns(Job[Op, T]* job, Py_ssize_t j, Parameters[T]* p) noexcept nogil:
    """Set the parameters to those of the columns from index j on."""
    if Op is not Stats:
        p.mean = Block[T].get(job.at_mean, j)
    if Op in Map or Op is ActiveSums:
        p.scale = Block[T].get(job.at_scale, j)
    if Op in Map:
        p.shift = Block[T].get(job.at_shift, j)
    if Op in Backward:
        p.slope = Block[T].get(job.at_slope, j)
    if Op in Active and Op in Gradient:
        p.bias = Block[T].get(job.at_bias, j)


# ---- Sums that lost digits ----

cdef inline double allowance(double n) noexcept nogil:
    """What (sum)^2 / square may be, so that the shift is within a deviation of the mean, or sqrt(2) for few values.

    Within e deviations, (sum / n)^2 <= e^2 M2 / n, where M2 = square - sum^2 / n.
    """
    return n / 2 if n > FEW_VALUES else n * 2 / 3


cdef inline bint is_near(double sum, double square, double n) noexcept nogil:
    """Whether the shift is near enough to the mean of n values."""
    return sum * sum <= allowance(n) * square


cdef inline bint find_nearer_shift(Job[Sum, T]* job, Py_ssize_t index, double n) noexcept nogil:
    """Move the shift at an index to the mean that its sums give, if it is too far away from there."""
    if Sum is Stats:
        if not is_lost(job, index) and not is_near(job.sums[index], job.squares[index], n):
            job.shifts[index] = Block[T].rounded(job.shifts[index] + job.sums[index] / n)
            return True
    return False


cdef inline bint is_lost(Job[Sum, T]* job, Py_ssize_t index) noexcept nogil:
    """Whether the sums at an index left the range in which they keep their digits."""
    return not Block[T].in_range(job.squares[index], job.sums[index] if Sum is Stats else 0)


cdef void sum_exactly(
    Job[Sum, T]* job, Py_ssize_t index, Py_ssize_t offset, Py_ssize_t runs, Py_ssize_t stride, Py_ssize_t n, Parameters[T]* p
) noexcept nogil:
    """Sum `runs` runs of n elements, `stride` apart, in double; store the sums at an index."""
    cdef Arrays[T] a = job.arrays()
    cdef Elements[T] e
    cdef double k = 0, g, d, sum = 0, square = 0
    cdef Py_ssize_t r, i
    if Sum is Stats:
        for r in range(runs):
            for i in range(n):
                k += Block[T].element(a.x + offset + r * stride + i)
        k /= runs * n
        k = k if isfinite(k) else 0
        job.shifts[index] = k
    else:
        k = p.mean.first()
    for r in range(runs):
        for i in range(n):
            e = elements(job, &a, offset + r * stride + i, 1, p)
            d = e.x.first() - k
            g = d
            if Sum is GradSums:
                g = e.dy.first()
            elif Sum is ActiveSums:
                g = Block[T].through(e.dy, before_activation(job, e, p), job.activation).first()
            sum += g
            square += g * d
    job.sums[index] = sum
    job.squares[index] = square


# ---- Planes ----

cdef inline void sum_run(
    Job[Sum, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t n, Block[T]* rest, Parameters[T]* p, Block[T]* sum, Block[T]* square
) noexcept nogil:
    """Add n elements that lie one behind the other; `rest` has as many last lanes as the last block elements."""
    cdef Py_ssize_t W = Block[T].width(), end = at + n
    cdef Elements[T] e, whole
    sum_blocks(job, a, at, W, n // W, W, p, sum, square)
    at += n // W * W
    if at == end:
        return
    if n < W:
        sum_blocks(job, a, at, 0, 1, n, p, sum, square)
        return
    e = elements_before(job, a, end, rest[0], p)
    if Sum is ActiveSums:
        e.dy = Block[T].through(e.dy, before_activation(job, e, p), job.activation)
        if job.kept != NULL:
            whole = elements(job, a, end - W, W, p)
            keep(job, a, end - W, W, Block[T].through(whole.dy, before_activation(job, whole, p), job.activation))
    accumulate(job, e, p, sum, square)


cdef void find_shifts(Job[Stats, T]* job, Py_ssize_t first, Py_ssize_t last, Py_ssize_t tile) noexcept nogil:
    """The shifts of channels first ... last in one tile of planes: of many before their sums, which would wait for memory."""
    cdef Py_ssize_t stride = job.channels * job.inner, c, i, at
    cdef Py_ssize_t n0 = tile // job.pieces * job.images, start = tile % job.pieces * job.piece
    cdef Py_ssize_t length = min(job.piece, job.inner - start), e = min(job.images, job.outer - n0) * length
    cdef Py_ssize_t places[8]
    cdef const T* plane = job.arrays().x + n0 * stride + first * job.inner + start
    for i in range(8):
        at = (2 * i + 1) * e // 16
        places[i] = at // length * stride + at % length
    for c in range(first, last):
        job.shifts[tile * job.channels + c] = Block[T].shift_at(plane, places)
        plane += job.inner


cdef void add_planes(Job[Sum, T]* job, Py_ssize_t first, Py_ssize_t last, Py_ssize_t tile) noexcept nogil:
    """The sums of one tile of channels first ... last, at most PLANES, around their shifts."""
    cdef Py_ssize_t W = Block[T].width(), stride = job.channels * job.inner
    cdef Py_ssize_t n0 = tile // job.pieces * job.images, runs = min(job.images, job.outer - n0)
    cdef Py_ssize_t start = tile % job.pieces * job.piece, length = min(job.piece, job.inner - start)
    cdef Py_ssize_t at = n0 * stride + first * job.inner + start, index = tile * job.channels + first
    cdef Py_ssize_t i, n, c, together, parts, step, chain, images = runs, channels = last - first
    # Two arrays of long planes the processor foresees by itself, and better.
    cdef bint early = job.far and (Sum is Stats or length * <Py_ssize_t> sizeof(T) <= REACH)
    cdef Arrays[T] a = job.arrays()
    cdef Accumulators[T] acc
    cdef Parameters[T] p
    cdef Block[T] sum, square, zero = Block[T].constant(0), rest = Block[T].last_lanes(length % W)
    # Image by image, so that memory is read in long runs; small planes of a few images together, so that the
    # accumulators are loaded and stored less often.
    while images > 0:
        if length < SMALL_PLANE * W:
            together = parts = min(images, <Py_ssize_t> TOGETHER)
            step, chain = stride, 0
        else:
            together, parts = 1, up(length, CHAIN * W)
            step = chain = CHAIN * W
        for c in range(channels):
            if together < images and early:  # the same channel of the next images is too far away to be foreseen
                for n in range(together):
                    Block[T].prefetch(a.x + at + (n + together) * stride, length)
                    if Sum in Gradient:
                        Block[T].prefetch(a.dy + at + (n + together) * stride, length)
            of_channel(job, first + c, &p)
            if Sum is Stats:
                p.mean = Block[T].constant(job.shifts[index + c])
            sum = square = zero
            for i in range(parts):
                if chain > 0:
                    sum = square = zero
                sum_run(job, &a, at + i * step, min(CHAIN * W, length - i * chain), &rest, &p, &sum, &square)
                if chain > 0 or i + 1 == parts:
                    if images < runs or i * chain > 0:
                        sum = acc.sum[c] + sum
                        square = acc.square[c] + square
                    if together < images or i + 1 < parts:
                        acc.sum[c] = sum
                        acc.square[c] = square
            if together == images:
                job.sums[index + c] = sum.total()
                job.squares[index + c] = square.total()
            at += job.inner
        at += together * stride - channels * job.inner
        images -= together


cdef void sum_planes(Job[Sum, T]* job, Py_ssize_t first, Py_ssize_t last, Py_ssize_t tile) noexcept nogil:
    """The sums of one tile of channels first ... last, at most PLANES."""
    cdef Py_ssize_t stride = job.channels * job.inner, n0 = tile // job.pieces * job.images, runs = min(job.images, job.outer - n0)
    cdef Py_ssize_t start = tile % job.pieces * job.piece, length = min(job.piece, job.inner - start), c
    cdef Parameters[T] p
    add_planes(job, first, last, tile)
    for c in range(first, last):
        if find_nearer_shift(job, tile * job.channels + c, runs * length):
            add_planes(job, c, c + 1, tile)
        if is_lost(job, tile * job.channels + c):
            of_channel(job, c, &p)
            sum_exactly(job, tile * job.channels + c, n0 * stride + c * job.inner + start, runs, stride, length, &p)


cdef void map_planes(
    Job[Map, T]* job, Py_ssize_t plane, Py_ssize_t planes, Py_ssize_t start, Py_ssize_t length
) noexcept nogil:
    """Map elements start ... start + length of several planes that lie one behind the other."""
    cdef Py_ssize_t W = Block[T].width(), channel = plane % job.channels, at = plane * job.inner + start, n, i
    cdef Arrays[T] a = job.arrays()
    cdef Parameters[T] p
    cdef Results[T] tail
    for n in range(planes):
        of_channel(job, channel, &p)
        if length < W:
            map_blocks(job, &a, at, 0, 1, length, False, &p)
        else:
            # The tail overlaps what is before it. It is computed first, because the output may be the input.
            tail = mapped_block(job, &a, at + length - W, W, &p)
            i = Block[T].to_line(a.out + at, length) if job.streams or length >= 16 * W else 0
            if i > 0:
                deliver(job, &a, at, i, False, mapped_block(job, &a, at, W, &p))
            if job.streams:
                map_blocks(job, &a, at + i, W, (length - i) // W, W, True, &p)
                i += (length - i) // W * W
                if i < length:  # never write a streamed line again
                    deliver(job, &a, at + i, length - i, False, mapped_block(job, &a, at + i, length - i, &p))
            else:
                map_blocks(job, &a, at + i, W, (length - i) // W, W, False, &p)
                if i + (length - i) // W * W < length:
                    deliver(job, &a, at + length - W, W, False, tail)
        at += job.inner
        channel = channel + 1 if channel + 1 < job.channels else 0


cdef inline bint is_staged(Call* job, Py_ssize_t item) noexcept nogil:
    """Whether planes that are streamed are too short to be so one by one: their first and last lines would not be."""
    return job.inner * item <= <Py_ssize_t> sizeof(Stage) - LINE


cdef void stream_planes(Job[Map, T]* job, Py_ssize_t plane, Py_ssize_t planes) noexcept nogil:
    """Map several planes to lines in the cache, which are streamed when they are full."""
    cdef Py_ssize_t item = sizeof(T), line = LINE // item, at = plane * job.inner, end = at + planes * job.inner
    cdef Py_ssize_t given = at, full, first, few  # elements before `given` are in the output
    cdef T* out = job.arrays().out
    cdef Stage stage
    cdef char* lines = stage.bytes
    cdef Job[Map, T] staged = job[0]
    staged.streams = False
    first = at - (line - Block[T].to_line(out + at, line)) % line
    while at < end:
        few = min(planes, (<Py_ssize_t> sizeof(Stage) // item - (at - first)) // job.inner)
        staged.out = lines - first * item  # of the element at index 0
        map_planes(&staged, plane, few, 0, job.inner)
        plane += few
        planes -= few
        at += few * job.inner
        full = at - (at - first) % line
        if first < given and first < full:  # what is before is another's, and may be written at this time
            memcpy(out + given, lines + (given - first) * item, (first + line - given) * item)
            given = first + line
        while given < full:
            stream_line(out + given, lines + (given - first) * item)
            given += line
        memcpy(lines, lines + (full - first) * item, (at - full) * item)
        first = full
    memcpy(out + given, lines + (given - first) * item, (end - given) * item)


cdef inline void map_whole(Job[Map, T]* job, Py_ssize_t plane, Py_ssize_t planes) noexcept nogil:
    """Map several planes that lie one behind the other."""
    if job.streams and is_staged(job, sizeof(T)):
        stream_planes(job, plane, planes)
    else:
        map_planes(job, plane, planes, 0, job.inner)


# ---- Columns ----

cdef inline Py_ssize_t tile_rows(Call* job, Py_ssize_t tile) noexcept nogil:
    """Rows of a tile; the last tile is the short row, where there is one."""
    cdef Py_ssize_t row = tile * TILE_ROWS
    return min(<Py_ssize_t> TILE_ROWS, job.rows - row) if row < job.rows else 1


cdef inline Py_ssize_t tile_offset(Call* job, Py_ssize_t tile) noexcept nogil:
    return min(tile * TILE_ROWS, job.rows) * job.columns


cdef inline Py_ssize_t tile_columns(Call* job, Py_ssize_t tile) noexcept nogil:
    return job.columns if tile * TILE_ROWS < job.rows else job.rest


cdef inline void sum_rows(
    Job[Sum, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t n, void* k, void* sums, void* squares,
    Py_ssize_t first, Py_ssize_t j
) noexcept nogil:
    """Add a few rows of n columns, at most a block, from column first + j on to the accumulators from index j on."""
    cdef Block[T] sum = Block[T].constant(0), square = Block[T].constant(0)
    cdef Parameters[T] p
    of_columns(job, first + j, &p)
    if Sum is Stats:
        p.mean = Block[T].get(k, j)
    sum_blocks(job, a, at + j, job.columns, rows, n, &p, &sum, &square)
    (Block[T].get(sums, j) + sum).put(sums, j)
    (Block[T].get(squares, j) + square).put(squares, j)


cdef inline void put_run(void* vector, Py_ssize_t first, Py_ssize_t run, Block[T] same) noexcept nogil:
    """Fill a run of columns, and what the next run overwrites."""
    cdef Py_ssize_t i = 0
    while i < run:
        same.put(vector, first + i)
        i += Block[T].width()


cdef inline double run_total(Job[Sum, T]* job, void* sums, Py_ssize_t first) noexcept nogil:
    """The sum of the columns of one channel."""
    cdef Py_ssize_t W = Block[T].width(), i = 0
    cdef Block[T] total = Block[T].constant(0)
    while i < job.run:
        total = total + Block[T].get_first(sums, first + i, min(W, job.run - i))
        i += W
    return total.total()


cdef inline Block[T] sample_sum(const T* x, const Py_ssize_t* places, Py_ssize_t n) noexcept nogil:
    """The sum of n columns in four rows."""
    cdef Block[T] zero = Block[T].constant(0)
    return (take(x + places[0], n, zero) + take(x + places[1], n, zero)) + (take(x + places[2], n, zero) + take(x + places[3], n, zero))


cdef inline Block[T] sample_shift(const T* x, const Py_ssize_t* places, Py_ssize_t sample, Py_ssize_t n) noexcept nogil:
    """The shifts of n columns, from a sample of 8 or 16 rows."""
    cdef Block[T] zero = Block[T].constant(0), early = sample_sum(x, places, n), late = sample_sum(x, places + sample // 2, n)
    if sample == 16:
        early = early + sample_sum(x, places + 4, n)
        late = late + sample_sum(x, places + 12, n)
    return Block[T].shift(
        early, late,
        Block[T].lesser(
            Block[T].lesser(take(x + places[0], n, zero), take(x + places[sample // 4], n, zero)),
            Block[T].lesser(take(x + places[sample // 2], n, zero), take(x + places[sample * 3 // 4], n, zero)),
        ),
        1.0 / sample,
    )


cdef inline void choose_shifts(
    Job[Sum, T]* job, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t columns, void* k, T* tag
) noexcept nogil:
    """The shifts of the columns of a tile from an offset on: of each channel, from a sample."""
    cdef Py_ssize_t W = Block[T].width(), run = job.run, sample = 16 if rows > FEW_VALUES and run == 1 else 8, j = 0, i
    cdef const T* x = job.arrays().x + at
    cdef Py_ssize_t places[16]
    for i in range(sample):
        places[i] = (2 * i + 1) * rows // (2 * sample) * job.columns + (2 * i + 1) * run // (2 * sample)
    while run == 1 and j < columns:
        if j + W <= columns:
            sample_shift(x + j, places, sample, W).put(k, j)
        else:
            sample_shift(x + j, places, sample, columns - j).put(k, j)
        j += W
    while j < columns:
        put_run[T](k, j, run, Block[T].constant(Block[T].shift_at(x + j, places)))
        j += run


cdef inline void add_columns(
    Job[Sum, T]* job, Py_ssize_t tile, Py_ssize_t first, Py_ssize_t start, Py_ssize_t columns, void* k, void* sums, void* squares
) noexcept nogil:
    """The sums of the columns of a tile from first + start to first + columns, around their shifts; by index from `first` on."""
    cdef Py_ssize_t W = Block[T].width(), K = job.columns, rows = tile_rows(job, tile), at = tile_offset(job, tile) + first
    cdef Py_ssize_t r = 0, j = start, n, ahead
    cdef Arrays[T] a = job.arrays()
    cdef Block[T] zero = Block[T].constant(0)
    while j < columns:
        zero.put(sums, j)
        zero.put(squares, j)
        j += W
    while r < rows:
        n = min(<Py_ssize_t> BATCH, rows - r)
        j = start
        if n == BATCH:
            while j + W <= columns:
                if job.far:  # the next rows, one behind the other
                    ahead = at + (r + BATCH + j * BATCH // columns) * K + j * BATCH % columns
                    Block[T].prefetch(a.x + ahead, W * BATCH)
                    if Sum in Gradient:
                        Block[T].prefetch(a.dy + ahead, W * BATCH)
                sum_rows(job, &a, at + r * K, BATCH, W, k, sums, squares, first, j)
                j += W
        while j < columns:
            sum_rows(job, &a, at + r * K, n, min(W, columns - j), k, sums, squares, first, j)
            j += W
        r += BATCH


cdef inline bint store_totals(
    Job[Sum, T]* job, Py_ssize_t index, double count, Py_ssize_t j, Py_ssize_t columns, void* k, void* sums, void* squares, T* tag
) noexcept nogil:
    """Store the sums of the columns from index j on by channels, from an index on; whether all may have kept their digits.

    The count is that of the values in a channel's sum.
    """
    cdef Py_ssize_t W = Block[T].width(), run = job.run, n
    cdef Block[T] sum, square
    cdef bint kept = True
    while run == 1 and j < columns:
        n = min(W, columns - j)
        sum = Block[T].get(sums, j)
        square = Block[T].get(squares, j)
        sum.put_double(job.sums + index, n)
        square.put_double(job.squares + index, n)
        if Sum is Stats:
            Block[T].get(k, j).put_double(job.shifts + index, n)
            kept = kept and Block[T].is_near(sum, square, allowance(count))
        kept = kept and Block[T].in_range(square, sum if Sum is Stats else Block[T].constant(0))
        index += n
        j += W
    while j < columns:
        job.sums[index] = run_total(job, sums, j)
        job.squares[index] = run_total(job, squares, j)
        if Sum is Stats:
            job.shifts[index] = Block[T].value(k, j)
            kept = kept and is_near(job.sums[index], job.squares[index], count)
        kept = kept and not is_lost(job, index)
        index += 1
        j += run
    return kept


cdef void sum_columns(Job[Sum, T]* job, Py_ssize_t tile, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """The sums of columns first ... last of one tile."""
    cdef Py_ssize_t run = job.run, step = Block[T].width() if run == 1 else run
    cdef Py_ssize_t rows = tile_rows(job, tile), at = tile_offset(job, tile) + first, index = tile * job.width + first // run
    cdef Py_ssize_t columns = min(last, tile_columns(job, tile)) - first, start = 0, end, j
    cdef Columns k, sums, squares
    cdef Parameters[T] p
    cdef bint moved
    if Sum is Stats:
        choose_shifts(job, at, rows, columns, &k, <T*> NULL)
    add_columns(job, tile, first, 0, columns, &k, &sums, &squares)
    if store_totals(job, index, rows * run, 0, columns, &k, &sums, &squares, <T*> NULL):
        return
    while start < columns:
        end = min(start + step, columns)
        moved = False
        for j in range(start, end):
            # All columns of a run share a shift; the sums in `sums` may be those of the run before.
            if find_nearer_shift(job, index + j // run, rows * run) if j % run == 0 else moved:
                moved = True
            if moved:
                Block[T].set_value(&k, j, job.shifts[index + j // run])
        if moved:
            add_columns(job, tile, first, start, end, &k, &sums, &squares)
            store_totals(job, index + start // run, rows * run, start, end, &k, &sums, &squares, <T*> NULL)
        start = end
    for j in range(columns // run):
        if is_lost(job, index + j):
            of_columns(job, first + j * run, &p)
            sum_exactly(job, index + j, at + j * run, rows, job.columns, run, &p)


cdef inline void map_rows(
    Job[Map, T]* job, Arrays[T]* a, Py_ssize_t at, Py_ssize_t rows, Py_ssize_t j, Py_ssize_t n, bint streams
) noexcept nogil:
    """Map n columns from j on, at most a block, of a few rows."""
    cdef Parameters[T] p
    of_columns(job, j, &p)
    map_blocks(job, a, at + j, job.columns, rows, n, streams, &p)


cdef void map_columns(Job[Map, T]* job, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Map columns first ... last of several rows."""
    cdef Py_ssize_t W = Block[T].width(), at = job.skip + row * job.columns, batch, j
    cdef Arrays[T] a = job.arrays()
    while rows > 0:
        batch = min(<Py_ssize_t> MAP_ROWS, rows)
        if job.far and last - first <= COLUMNS // BLOCK * W and not job.activation.is_smooth():
            batch = 1  # whose parameters stay in L1
        j = first
        if batch < MAP_ROWS:
            while j + W <= last:
                map_rows(job, &a, at, batch, j, W, job.streams)
                j += W
        else:
            while j + W <= last:
                map_rows(job, &a, at, MAP_ROWS, j, W, job.streams)
                j += W
        if j < last:
            map_rows(job, &a, at, batch, j, last - j, False)
        at += batch * job.columns
        rows -= batch


# ---- Merging tiles, and what the sums become ----

cdef inline double tile_count(Call* job, Py_ssize_t tile) noexcept nogil:
    """Values of one channel or column in a tile."""
    if job.by_columns:
        return tile_rows(job, tile) * job.run
    cdef Py_ssize_t images = min(job.images, job.outer - tile // job.pieces * job.images)
    return images * min(job.piece, job.inner - tile % job.pieces * job.piece)


cdef inline Py_ssize_t tile_last(Call* job, Py_ssize_t tile, Py_ssize_t repeat, Py_ssize_t last) noexcept nogil:
    """Channels before `last` that a tile has in one of the repeats of a gathered row."""
    return min(last, tile_columns(job, tile) - repeat * job.channels) if job.repeats > 1 else last


cdef void merge_stats(Call* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Mean, M2 and the rest of the mean of channels first ... last, from the sums of their tiles."""
    cdef double* mean = job.first
    cdef double* m2 = job.second
    cdef double* offset = job.low  # of the mean from the first shift; two near numbers have an exact difference
    cdef double n, e, hi, rest
    cdef Py_ssize_t tile, repeat, c, at
    for c in range(first, last):
        offset[c] = 0
        m2[c] = 0
    for tile in range(job.tiles):
        n = tile_count(job, tile)
        for repeat in range(job.repeats):
            at = tile * job.width + repeat * job.channels
            for c in range(first, tile_last(job, tile, repeat, last)):
                offset[c] += job.sums[at + c] + n * (job.shifts[at + c] - job.shifts[c])
    for c in range(first, last):
        offset[c] /= job.count
    for tile in range(job.tiles):
        n = tile_count(job, tile)
        for repeat in range(job.repeats):
            at = tile * job.width + repeat * job.channels
            for c in range(first, tile_last(job, tile, repeat, last)):
                e = offset[c] - (job.shifts[at + c] - job.shifts[c])
                m2[c] += job.squares[at + c] + e * (n * e - 2 * job.sums[at + c])
    for c in range(first, last):
        m2[c] = 0 if m2[c] < 0 else m2[c]
        mean[c] = job.shifts[c] + offset[c]
        hi = mean[c] - job.shifts[c]
        rest = (job.shifts[c] - (mean[c] - hi)) + (offset[c] - hi)
        offset[c] = rest if isfinite(rest) else 0


cdef void merge_sums(Call* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """Both sums of channels first ... last."""
    cdef Py_ssize_t tile, repeat, c, at
    for c in range(first, last):
        job.first[c] = 0
        job.second[c] = 0
    for tile in range(job.tiles):
        for repeat in range(job.repeats):
            at = tile * job.width + repeat * job.channels
            for c in range(first, tile_last(job, tile, repeat, last)):
                job.first[c] += job.sums[at + c]
                job.second[c] += job.squares[at + c]


cdef inline double fold_channel(Job[Forward, T]* job, Py_ssize_t c, double low, double invstd) noexcept nogil:
    """Scale and shift of one channel; `core.fold` is the same in NumPy. The result is the scale before it is rounded."""
    cdef double scale = invstd if job.weight == NULL else invstd * Block[T].value(job.weight, c)
    cdef double shift = 0 if job.bias == NULL else Block[T].value(job.bias, c)
    cdef double most = Block[T].largest()
    # Where x is the mean, 0 times the scale must be 0: a finite one is none too large for the type.
    Block[T].set_value(job.scale, c, min(max(scale, -most), most) if isfinite(scale) else scale)
    Block[T].set_value(job.shift, c, shift if low == 0 else shift - low * scale)  # the scale may be infinite
    return scale


cdef inline bint is_unusual(Job[Forward, T]* job, double m2, double invstd, double scale) noexcept nogil:
    """Whether squares, differences or factors leave the range of a number; `extremes.are_usual` is the same in NumPy."""
    if T is double:  # what is not finite in any other type was so in x
        return not m2 < LARGE_M2 or invstd >= LARGE_INVSTD or fabs(scale) > Block[T].largest()
    else:
        return m2 >= Block[T].largest() / 4 * (Block[T].largest() / 4) or fabs(scale) > Block[T].largest()


cdef bint fold_batch(Job[Forward, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """From the merged statistics to the parameters of the map; whether the channels may be mapped."""
    cdef double high, low, scale, count = job.count, eps = job.eps
    cdef double* m2 = job.second
    cdef double* invstd = <double*> job.slope  # room that a forward has no other use for
    cdef Py_ssize_t c
    cdef bint unusual = False
    for c in range(first, last):  # a loop of its own: roots and quotients of several channels at once
        invstd[c] = 1 / sqrt(m2[c] / count + eps)
    for c in range(first, last):
        Block[T].set_value(job.mean, c, job.first[c])
        high = Block[T].value(job.mean, c)
        low = (job.first[c] - high if isfinite(high) else 0) + job.low[c]
        scale = fold_channel(job, c, low, invstd[c])
        unusual = unusual or is_unusual(job, m2[c], invstd[c], scale)
        Block[T].set_value(job.mean_lo, c, low)
        Block[T].set_value(job.invstd, c, invstd[c])
    memset(job.left + first, unusual, last - first)
    return not unusual


cdef void fold_gradient(Job[Backward, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """From the merged sums to the parameters of the map; `core.input_gradient` is the same in NumPy."""
    cdef double low, invstd, g0, g1
    cdef Py_ssize_t c
    for c in range(first, last):
        low = 0 if job.mean_lo == NULL else Block[T].value(job.mean_lo, c)
        invstd = Block[T].value(job.invstd, c)
        job.second[c] -= low * job.first[c]
        g1 = invstd * (invstd * job.second[c] / job.count)  # the square alone may leave the range
        g0 = job.first[c] / job.count - low * g1
        Block[T].set_value(job.shift, c, g0)
        Block[T].set_value(job.slope, c, -g1)


# ---- Units of work ----

cdef void sum_unit(Job[Sum, T]* job, Py_ssize_t unit) noexcept nogil:
    """One tile of a group of channels or columns."""
    cdef Py_ssize_t tile = unit % job.tiles, first = unit // job.tiles * job.group, last
    if job.by_columns:
        sum_columns(job, tile, first, min(first + job.group, job.columns))
    else:
        last = min(first + job.group, job.channels)
        if Sum is Stats:
            find_shifts(job, first, last, tile)
        sum_planes(job, first, last, tile)


cdef void map_unit(Job[Map, T]* job, Py_ssize_t unit) noexcept nogil:
    """Several rows, several planes, or a piece of one plane."""
    cdef Py_ssize_t pieces, first, groups
    cdef Arrays[T] a = job.arrays()
    if job.by_columns:
        groups = (job.columns + job.group - 1) // job.group
        first = unit % groups * job.group
        if unit == 0 and job.skip > 0:
            map_rows(job, &a, job.skip, 1, -job.skip, job.skip, False)
        unit = unit // groups * job.unit
        if unit < job.rows:
            map_columns(job, unit, min(job.unit, job.rows - unit), first, min(first + job.group, job.columns))
        elif first < job.rest:
            map_columns(job, job.rows, 1, first, min(first + job.group, job.rest))
    elif job.unit >= job.inner:
        first = unit * (job.unit // job.inner)
        map_whole(job, first, min(job.unit // job.inner, job.outer * job.channels - first))
    else:
        pieces = (job.inner + job.unit - 1) // job.unit
        first = unit % pieces * job.unit
        map_planes(job, unit // pieces, 1, first, min(job.unit, job.inner - first))
    if job.streams:
        fence()


cdef void sum_channels(Job[Sum, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """All tiles of channels first ... last; columns have but one."""
    cdef Py_ssize_t tile
    if job.by_columns:
        sum_columns(job, 0, first, last)
        return
    while first < last:
        for tile in range(job.tiles):
            sum_planes(job, first, min(first + PLANES, last), tile)
        first += PLANES


cdef void map_group(Job[Map, T]* job, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """All planes of channels first ... last, those read last before the others."""
    cdef Py_ssize_t n, piece = MAP_PIECE
    if job.by_columns:
        map_columns(job, 0, job.rows, first, last)
        return
    if job.outer == 1 and job.turn == 1 and not job.far:
        for n in range(up(job.inner, piece) - 1, -1, -1):
            map_planes(job, first, 1, n * piece, min(piece, job.inner - n * piece))
        return
    for n in range(job.outer - 1, -1, -1):
        map_whole(job, n * job.channels + first, last - first)


cdef Job[InputGradient, T] of_kept(Job[Backward, T]* job) noexcept nogil:
    """What is left to do where the sums kept dy before the activation."""
    cdef Job[InputGradient, T] after = (<Job[InputGradient, T]*> job)[0]
    after.dy = job.kept
    after.residual = after.dresidual = NULL
    return after


cdef void forward_unit(Job[Forward, T]* job, Py_ssize_t unit) noexcept nogil:
    """All planes of a group of channels: statistics, then, while they are in the cache, the map."""
    cdef Py_ssize_t first = unit * job.group, last = min(first + job.group, job.channels), tile, end
    if not job.by_columns:
        for tile in range(job.tiles):
            find_shifts(<Job[Stats, T]*> job, first, last, tile)
    while first < last:
        end = min(first + job.turn, last)
        sum_channels(<Job[Stats, T]*> job, first, end)
        merge_stats(job, first, end)
        if fold_batch(job, first, end):
            map_group(job, first, end)
        first = end
    if job.streams:
        fence()


cdef void backward_unit(Job[Backward, T]* job, Py_ssize_t unit) noexcept nogil:
    """All planes of a group of channels: sums, then, while they are in the cache, the map."""
    cdef Py_ssize_t first = unit * job.group, last = min(first + job.group, job.channels), end
    cdef Job[InputGradient, T] after
    if job.kept != NULL:
        after = of_kept(job)
    while first < last:
        end = min(first + job.turn, last)
        if Backward is InputGradient:
            sum_channels(<Job[GradSums, T]*> job, first, end)
        else:
            sum_channels(<Job[ActiveSums, T]*> job, first, end)
        merge_sums(job, first, end)
        fold_gradient(job, first, end)
        if job.kept != NULL:
            map_group(&after, first, end)
        else:
            map_group(job, first, end)
        first = end
    if job.streams:
        fence()


# ---- Whole calls ----

cdef inline Py_ssize_t up(Py_ssize_t n, Py_ssize_t step) noexcept nogil:
    """Number of steps that cover n."""
    return (n + step - 1) // step


cdef inline Py_ssize_t even_part(Py_ssize_t n, Py_ssize_t most, Py_ssize_t step) noexcept nogil:
    """The size of equal parts of n, of at most `most` each, in whole steps."""
    return up(up(n, up(n, most)), step) * step


cdef Py_ssize_t common_divisor(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a


cdef void cut(Call* job, Py_ssize_t W) noexcept nogil:
    """Fix the numeric tiles, from the shape and the lanes of a block."""
    cdef Py_ssize_t C = job.channels, R = job.outer
    job.count = <double> job.outer * job.inner
    job.images = job.pieces = job.repeats = job.run = 1
    job.piece = job.inner
    job.columns = job.width = C
    job.rows = job.rest = 0
    # Planes of less than two blocks, of many images, are rows of short runs: without tails, and without tiny loops.
    job.by_columns = job.inner == 1 or (job.inner < 2 * W and job.inner % W != 0 and job.outer >= MANY_ROWS)
    if not job.by_columns:
        if job.inner > TILE:
            job.piece = even_part(job.inner, TILE, W)
            job.pieces = up(job.inner, job.piece)
            job.tiles = job.outer * job.pieces
        else:
            job.images = max(<Py_ssize_t> 1, min(<Py_ssize_t> CHAIN, TILE // job.inner))
            job.tiles = up(job.outer, job.images)
        return
    job.run = job.inner
    job.repeats = W // common_divisor(C, W)
    if job.run > 1 or job.repeats * C > LONG_ROW or R < 4 * job.repeats:
        job.repeats = 1
    job.width = job.repeats * C
    job.columns = job.width * job.run
    job.rows = R // job.repeats
    job.rest = R % job.repeats * C
    job.tiles = up(job.rows, TILE_ROWS) + (job.rest > 0)


cdef inline bint exceeds(Py_ssize_t cache, Call* job, Py_ssize_t item, Py_ssize_t arrays) noexcept nogil:
    """Whether so many arrays are more than a cache."""
    return job.outer * job.channels * job.inner * item * arrays > cache


cdef Py_ssize_t sum_units(Call* job, Py_ssize_t W, Py_ssize_t item) noexcept nogil:
    """Cut the sums into units of work; return their number."""
    cdef Py_ssize_t room, enough = up(4 * job.threads, job.tiles)  # groups that keep every thread busy
    if job.by_columns:
        job.far = exceeds(L3 // FAR, job, item, 1 + (job.dy != NULL) + (job.residual != NULL))
        room = COLUMNS // BLOCK * W
        if job.run > 1:
            job.group = min(room // job.run, up(job.channels, enough)) * job.run
        else:
            job.group = even_part(job.columns, min(room, up(job.columns, enough)), W)
        return job.tiles * up(job.columns, job.group)
    job.far = False  # long runs need no help
    job.group = max(<Py_ssize_t> 1, min(PLANES, job.channels // enough))
    return job.tiles * up(job.channels, job.group)


cdef void choose_map(Call* job, Py_ssize_t W) noexcept nogil:
    """Map long runs by planes, though they were summed by columns: no parameters are needed for each column."""
    if 2 * job.inner >= 3 * W:
        job.by_columns = False


cdef Py_ssize_t map_units(Call* job, Py_ssize_t W, Py_ssize_t item, Py_ssize_t arrays) noexcept nogil:
    """Cut the map into units of work; return their number."""
    cdef Py_ssize_t size = job.outer * job.channels * job.inner
    cdef Py_ssize_t elements = max(W, min(L2 // 2 // (arrays * item), up(size, 4 * job.threads)))
    job.streams = is_streamed(job, item, arrays)
    job.far = exceeds(L3 // FAR, job, item, arrays)
    if job.by_columns:
        job.group = even_part(job.columns, elements, W)
        job.unit = up(max(<Py_ssize_t> 1, elements // job.columns), MAP_ROWS) * MAP_ROWS
        job.units = (up(job.rows, job.unit) + (job.rest > 0)) * up(job.columns, job.group)
    elif elements >= job.inner:
        job.unit = elements // job.inner * job.inner
        job.units = up(job.outer * job.channels, elements // job.inner)
    else:
        job.unit = even_part(job.inner, elements, W)
        job.units = job.outer * job.channels * up(job.inner, job.unit)
    return job.units


cdef bint is_streamed(Call* job, Py_ssize_t item, Py_ssize_t arrays) noexcept nogil:
    """Whether the output is written past the caches: when it is far too large for them, in long aligned runs."""
    cdef Py_ssize_t run = job.columns if job.by_columns else job.inner
    if job.out == job.x or job.out == job.dy or job.out == job.residual:
        return False
    if job.dresidual != NULL and (<char*> job.dresidual - <char*> job.out) % LINE:
        return False
    if not exceeds(L3, job, item, arrays):
        return False
    return run * item % LINE == 0 if job.by_columns else not is_staged(job, item) or job.dresidual == NULL


cdef bint allocate(Call* job, Py_ssize_t W, Py_ssize_t tiles) noexcept nogil:
    """Give a call its scratch memory; False where there is none."""
    cdef Py_ssize_t C = job.channels, size = tiles * job.width
    cdef double* p = <double*> scratch((3 * size + 6 * C + 5 * (job.columns + 2 * W)) * sizeof(double) + C)
    if p == NULL:
        return False
    job.shifts, job.sums, job.squares = p, p + size, p + 2 * size
    p += 3 * size
    # What the caller did not bring.
    if job.first == NULL:
        job.first, job.second = p, p + C
    if job.low == NULL:
        job.low = p + 2 * C
    if job.scale == NULL:
        job.scale = p + 3 * C
    if job.shift == NULL:
        job.shift = p + 4 * C
    job.slope = p + 5 * C
    job.spread = p + 6 * C
    job.left = <char*> (job.spread + 5 * (job.columns + 2 * W))
    return True


cdef inline bint is_spread(Call* job, Py_ssize_t W) noexcept nogil:
    """Whether a vector of channels is one of columns as it is."""
    return job.columns == job.channels and job.channels % W == 0


cdef const void* spread(Job[Op, T]* job, const void* vector, Py_ssize_t index) noexcept nogil:
    """A vector of channels as one of columns, from `skip` on, with room behind it; planes take it as it is."""
    if not job.by_columns:
        return vector
    # What a training forward has found is copied even so: lines that other cores read are slow to write in the next call.
    if is_spread(job, Block[T].width()) and job.skip == 0 and not (Op in Forward and job.backwards):
        return vector
    cdef Py_ssize_t W = Block[T].width(), size = BLOCK // W, repeat, c
    cdef char* p = <char*> (job.spread + index * (job.columns + 2 * W))
    if job.run == 1:
        for repeat in range(job.repeats):
            memcpy(p + repeat * job.channels * size, vector, job.channels * size)
    else:
        for c in range(job.channels):
            put_run[T](p, c * job.run, job.run, Block[T].splat(vector, c))
    memcpy(p + job.columns * size, p, job.skip * size)
    memset(p + (job.columns + job.skip) * size, 0, BLOCK)
    return p + job.skip * size


cdef void run_sums(Job[Sum, T]* job) noexcept nogil:
    cdef Py_ssize_t units = sum_units(job, Block[T].width(), sizeof(T))
    if Sum is not Stats:
        job.at_mean = spread(job, job.mean, 0)
    if Sum is ActiveSums:
        job.at_scale = spread(job, job.scale, 1)
        job.at_bias = spread(job, job.bias, 2)
    parallel(<unit_fn> sum_unit[Sum, T], job, units, job.threads, False)
    if Sum is Stats:
        merge_stats(job, 0, job.channels)
    else:
        merge_sums(job, 0, job.channels)


cdef void run_map(Job[Map, T]* job) noexcept nogil:
    cdef Py_ssize_t W = Block[T].width(), size = job.outer * job.channels * job.inner
    choose_map(job, W)
    if job.by_columns and job.columns * <Py_ssize_t> sizeof(T) % LINE == 0:
        # Let rows start on cache lines, wherever the array starts: columns are the same from there, only rotated.
        job.skip = Block[T].to_line(job.arrays().out, size)
        job.rows = (size - job.skip) // job.columns
        job.rest = (size - job.skip) % job.columns
    job.at_mean = spread(job, job.mean, 0)
    job.at_scale = spread(job, job.scale, 1)
    job.at_shift = spread(job, job.shift, 2)
    if Map in Backward:
        job.at_slope = spread(job, job.slope, 3)
    if Map is ActiveGradient:
        job.at_bias = spread(job, job.bias, 4)
    map_units(job, W, sizeof(T), touched(job))
    parallel(<unit_fn> map_unit[Map, T], job, job.units, job.threads, job.backwards)


cdef Py_ssize_t touched(Call* job) noexcept nogil:
    """How many arrays the map of a call reads and writes."""
    return 2 + (job.dy != NULL) + (job.residual != NULL) + (job.dresidual != NULL)


cdef bint grouped(Call* job, Py_ssize_t W, Py_ssize_t item) noexcept nogil:
    """Whether whole channels are the units of work, and if so how many make one unit."""
    cdef Py_ssize_t read = 1 + (job.dy != NULL) + (job.dy != NULL and job.residual != NULL)  # by the sums
    cdef Py_ssize_t channel = read * job.outer * job.inner * item
    job.far = exceeds(L3 // FAR, job, item, touched(job))
    if job.by_columns:
        # Of a few rows: the threads need not wait for each other, nor fetch what the others found.
        if job.rows > FEW_ROWS or not is_spread(job, W) or job.channels < 2 * job.threads * W:
            return False
        job.group = job.turn = min(COLUMNS // BLOCK * W, up(up(job.channels, 4 * job.threads), W) * W)
    elif job.threads > 1 and job.channels < 4 * job.threads:
        return False
    elif job.outer > 1 and job.far and not exceeds(L3, job, item, touched(job)):
        return False  # long runs from L3 take less time than short ones
    else:
        job.group = max(<Py_ssize_t> 1, min(L2 // 2 // channel, job.channels // (4 * job.threads)))
        # Several images would be read in short runs, if only a few channels took their turn.
        job.turn = max(L1 // 2 // channel, <Py_ssize_t> 1) if job.outer == 1 else job.group
        job.streams = job.kept != job.out and is_streamed(job, item, touched(job))
    job.units = up(job.channels, job.group)
    job.at_mean, job.at_scale, job.at_shift, job.at_slope = job.mean, job.scale, job.shift, job.slope
    job.at_bias = job.bias
    return True


cdef bint sum_call(Job[Sum, T]* job) noexcept nogil:
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), job.tiles):
        return False
    run_sums(job)
    return True


cdef bint map_call(Job[Map, T]* job) noexcept nogil:
    cdef const void* slope = job.slope
    cdef Py_ssize_t c
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), 0):
        return False
    if Map in Backward:
        for c in range(job.channels):
            Block[T].set_value(job.slope, c, -Block[T].value(slope, c))
    run_map(job)
    return True


cdef bint inference_call(Job[Forward, T]* job) noexcept nogil:
    """`invstd` holds the variances or, where they are `inverted`, one over the deviations."""
    cdef double invstd
    cdef Py_ssize_t c
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), 0):
        return False
    for c in range(job.channels):
        invstd = Block[T].value(job.invstd, c)
        if not job.inverted:
            invstd = 1 / sqrt(invstd + job.eps)
        fold_channel(job, c, 0 if job.mean_lo == NULL else Block[T].value(job.mean_lo, c), invstd)
    run_map(job)
    return True


cdef bint forward_call(Job[Forward, T]* job) noexcept nogil:
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), job.tiles):
        return False
    if grouped(job, Block[T].width(), sizeof(T)):
        parallel(<unit_fn> forward_unit[Forward, T], job, job.units, job.threads, False)
    else:
        run_sums(<Job[Stats, T]*> job)
        job.backwards = True
        if fold_batch(job, 0, job.channels):
            run_map(job)
    return True


cdef void* place_to_keep(Call* job, Py_ssize_t item) noexcept nogil:
    """Where to keep dy before the activation, if it pays, and nothing is lost by it: the residual's gradient, or dx."""
    if item < 4:
        return NULL  # the map would read it rounded
    if job.dresidual != NULL:
        return job.dresidual
    if not job.activation.is_smooth() or job.out == job.x or job.out == job.dy or job.out == job.residual:
        return NULL
    return job.out


cdef bint backward_call(Job[Backward, T]* job) noexcept nogil:
    cdef Job[InputGradient, T] after
    if Backward is ActiveGradient:
        job.kept = place_to_keep(job, sizeof(T))
    cut(job, Block[T].width())
    if not allocate(job, Block[T].width(), job.tiles):
        return False
    if grouped(job, Block[T].width(), sizeof(T)):
        parallel(<unit_fn> backward_unit[Backward, T], job, job.units, job.threads, False)
    else:
        if Backward is InputGradient:
            run_sums(<Job[GradSums, T]*> job)
        else:
            run_sums(<Job[ActiveSums, T]*> job)
        fold_gradient(job, 0, job.channels)
        job.backwards = True
        if job.kept != NULL:
            after = of_kept(job)
            run_map(&after)
        else:
            run_map(job)
    if job.dweight != NULL:
        gradients(<Job[GradSums, T]*> job)
    return True


cdef bint reduce_call(Job[Sum, T]* job) noexcept nogil:
    """The sums of the backward alone, corrected by the low part of the mean."""
    cdef Py_ssize_t c
    if not sum_call(job):
        return False
    if job.mean_lo != NULL:
        for c in range(job.channels):
            job.second[c] -= Block[T].value(job.mean_lo, c) * job.first[c]
    return True


cdef void gradients(Job[GradSums, T]* job) noexcept nogil:
    """The gradients of weight and bias, from the sums of a backward."""
    cdef Py_ssize_t c
    for c in range(job.channels):
        Block[T].set_value(job.dweight, c, job.second[c] * Block[T].value(job.invstd, c))
        Block[T].set_value(job.dbias, c, job.first[c])


cdef void move_running(C* running, const double* batch, double divisor, Py_ssize_t channels, double momentum) noexcept nogil:
    """Move running statistics towards the batch's, of which a divisor is left to apply."""
    cdef Py_ssize_t c
    for c in range(channels):
        running[c] = <C> ((1 - momentum) * running[c] + momentum * (batch[c] / divisor))


# ---- From Python ----

ctypedef bint (*call_fn)(void* job) noexcept nogil

# Of each dtype, plain and active.
cdef call_fn[4][2] GRAD_SUMS, NORMALIZE, GRAD_INPUT, INFERENCE, FORWARD, BACKWARD, REDUCE
cdef call_fn[4] STATS


cdef void register(T* tag, int dtype) noexcept:
    STATS[dtype] = <call_fn> sum_call[Stats, T]
    GRAD_SUMS[dtype][:] = [<call_fn> sum_call[GradSums, T], <call_fn> sum_call[ActiveSums, T]]
    REDUCE[dtype][:] = [<call_fn> reduce_call[GradSums, T], <call_fn> reduce_call[ActiveSums, T]]
    NORMALIZE[dtype][:] = [<call_fn> map_call[Normalize, T], <call_fn> map_call[ActiveNormalize, T]]
    GRAD_INPUT[dtype][:] = [<call_fn> map_call[InputGradient, T], <call_fn> map_call[ActiveGradient, T]]
    INFERENCE[dtype][:] = [<call_fn> inference_call[Normalize, T], <call_fn> inference_call[ActiveNormalize, T]]
    FORWARD[dtype][:] = [<call_fn> forward_call[Normalize, T], <call_fn> forward_call[ActiveNormalize, T]]
    BACKWARD[dtype][:] = [<call_fn> backward_call[InputGradient, T], <call_fn> backward_call[ActiveGradient, T]]

register[float](NULL, 0)
register[double](NULL, 1)
register[bf16](NULL, 2)
register[f16](NULL, 3)


cdef int dtype_index(cnp.ndarray a) except -1:
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return 0
    if number == cnp.NPY_DOUBLE:
        return 1
    if number == NPY_HALF:
        return 3
    if a.dtype.name == "bfloat16":
        return 2
    raise TypeError(f"no SIMD kernel for dtype {a.dtype}")


cdef inline int arithmetic_number(int dtype) noexcept:
    return cnp.NPY_DOUBLE if dtype == 1 else cnp.NPY_FLOAT


cdef int thread_count(threads) except -1:
    """A number of threads that C can count with; what is more than there can be makes no difference."""
    return max(1, min(threads, MOST_THREADS))


cdef inline bint is_dense(cnp.ndarray a) noexcept:
    """Whether C may take the memory of an array as it is: C-contiguous, aligned, in native byte order."""
    return cnp.PyArray_IS_C_CONTIGUOUS(a) and cnp.PyArray_ISBEHAVED_RO(a)


cdef int bind(Call* call, cnp.ndarray x, threads) except -1:
    """Enter the input; return the index of its dtype."""
    if cnp.PyArray_NDIM(x) != 3 or not is_dense(x) or cnp.PyArray_SIZE(x) == 0:
        raise ValueError(
            "a kernel needs a C-contiguous and aligned (outer, channels, inner) array, not empty, "
            f"got shape {(<object> x).shape}, strides {(<object> x).strides}"
        )
    memset(call, 0, sizeof(Call))
    call.x = cnp.PyArray_DATA(x)
    call.outer, call.channels, call.inner = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2)
    call.threads = thread_count(threads)
    return dtype_index(x)


cdef void* like(cnp.ndarray x, cnp.ndarray a) except NULL:
    """Memory of an array that is laid out as the input."""
    if (
        cnp.PyArray_NDIM(a) != 3 or not is_dense(a) or dtype_index(a) != dtype_index(x)
        or cnp.PyArray_DIM(a, 0) != cnp.PyArray_DIM(x, 0) or cnp.PyArray_DIM(a, 1) != cnp.PyArray_DIM(x, 1)
        or cnp.PyArray_DIM(a, 2) != cnp.PyArray_DIM(x, 2)
    ):
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


cdef struct Running:
    # A vector of running statistics, of the type of the arithmetic or double.
    void* data
    bint is_double


cdef Running running(Call* call, str name, int dtype, object v) except *:
    """Enter running statistics that the call updates, or None."""
    cdef Running r = Running(NULL, False)
    if v is not None:
        r.is_double = arithmetic_number(dtype) == cnp.NPY_DOUBLE or (isinstance(v, cnp.ndarray) and cnp.PyArray_TYPE(v) == cnp.NPY_DOUBLE)
        r.data = vector(call, name, cnp.NPY_DOUBLE if r.is_double else cnp.NPY_FLOAT, v)
        if not cnp.PyArray_ISWRITEABLE(v):
            raise ValueError(f"{name} is updated in place but is read-only")
    return r


cdef void update(Running r, const double* batch, double divisor, Py_ssize_t channels, double momentum) noexcept nogil:
    if r.data != NULL and r.is_double:
        move_running(<double*> r.data, batch, divisor, channels, momentum)
    elif r.data != NULL:
        move_running(<float*> r.data, batch, divisor, channels, momentum)


cdef cnp.ndarray new_vector(Call* call, int number):
    cdef cnp.npy_intp size = call.channels
    return cnp.PyArray_EMPTY(1, &size, number, 0)


cdef int bind_activation(Call* call, activation) except -1:
    """Enter an activation, or None."""
    if activation is None:
        return 0
    code = getattr(activation, "code", None)
    if not isinstance(code, int):
        raise TypeError(f"a SIMD kernel takes activations of its own, got {activation!r}")
    call.activation.kind, call.activation.parameter = code, activation.parameter
    return 0


cdef bint bind_epilogue(Call* call, cnp.ndarray x, epilogue) except -1:
    """Enter what comes after the normalization; return whether there is anything."""
    if epilogue is None:
        return False
    activation, residual, _, _, dresidual, call.restores = epilogue
    bind_activation(call, activation)
    if residual is not None:
        call.residual = like(x, residual)
    if dresidual is not None:
        call.dresidual = target(x, dresidual)
    return True


cdef bint bind_gradient(Call* call, cnp.ndarray x, int dtype, epilogue) except -1:
    """As `bind_epilogue`, of a gradient: it finds again what the activation was applied to."""
    cdef bint active = bind_epilogue(call, x, epilogue)
    if active:
        call.scale = vector(call, "scale", arithmetic_number(dtype), epilogue.scale)
        call.bias = vector(call, "shift", arithmetic_number(dtype), epilogue.shift)
    return active


cdef int run(call_fn function, Call* call) except -1:
    """Run a call, in the default floating-point mode, that leaves nothing in its scratch memory."""
    cdef bint done
    cdef uint32_t mode
    with nogil:
        mode = enter_default_mode()
        done = function(call)
        end_scratch()
        leave_default_mode(mode)
    if not done:
        raise MemoryError("no memory for the partial sums")
    return 0


def set_caches(Py_ssize_t l1, Py_ssize_t l2, Py_ssize_t l3):
    """Set the sizes of the caches, in bytes, that the units of work are cut for."""
    global L1, L2, L3
    L1, L2, L3 = l1, l2, l3


def plan(str op, dims, Py_ssize_t itemsize, threads):
    """How a call would be cut: tiles, units of work, streaming, and its traffic; for `dispatch.explain`."""
    cdef Call call
    cdef Py_ssize_t W = BLOCK // max(itemsize, <Py_ssize_t> 4), size, units = 0
    cdef bint resident = False
    memset(&call, 0, sizeof(Call))
    call.outer, call.channels, call.inner = dims
    call.threads = thread_count(threads)
    call.out = &call  # an output of its own
    call.dy = &call + 1 if op == "backward" else NULL  # an array of its own, too
    size = call.outer * call.channels * call.inner * itemsize
    cut(&call, W)
    if call.by_columns:
        cutting = f"{call.tiles} tiles of {min(call.rows, <Py_ssize_t> TILE_ROWS)} rows of {call.columns} columns"
    elif call.pieces > 1:
        cutting = f"{call.tiles} tiles of {call.piece} elements for each channel"
    else:
        cutting = f"{call.tiles} tiles of {min(call.images, call.outer)} images for each channel"
    arrays = 2 if op == "backward" else 1
    if op != "normalize":
        units = sum_units(&call, W, itemsize)
        resident = op != "stats" and grouped(&call, W, itemsize)
    if resident:
        fits = arrays * call.group * call.outer * call.inner * itemsize <= L2
        work = f"{call.units} of {call.group} channels, sums and map on resident data"
        reads, writes = arrays * (1 if fits else 2), 1
    elif op == "stats":
        work, reads, writes = f"{units}", 1, 0
    else:
        choose_map(&call, W)
        map_units(&call, W, itemsize, touched(&call))
        work = f"{call.units}" if op == "normalize" else f"{units}, then backwards {call.units}"
        reads, writes = arrays * (1 if op == "normalize" else 2), 1
    return {
        "tiles": cutting,
        "units": work,
        "streaming": "yes" if call.streams else "no",
        "traffic": f"at most {reads} reads and {writes} writes of x, {(reads + writes) * size} bytes",
    }


def stats(cnp.ndarray x not None, threads=1):
    """Mean, what it rounds away, and M2 of each channel; as `reference.stats`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads)
    cdef cnp.ndarray mean = new_vector(&call, cnp.NPY_DOUBLE), low = new_vector(&call, cnp.NPY_DOUBLE)
    cdef cnp.ndarray m2 = new_vector(&call, cnp.NPY_DOUBLE)
    call.first, call.low = <double*> cnp.PyArray_DATA(mean), <double*> cnp.PyArray_DATA(low)
    call.second = <double*> cnp.PyArray_DATA(m2)
    run(STATS[dtype], &call)
    return mean, low, m2


def normalize(cnp.ndarray x not None, cnp.ndarray y not None, mean, scale, shift, threads=1, epilogue=None):
    """Write ``(x - mean) * scale + shift`` and what comes after it to `y`; as `reference.normalize`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_epilogue(&call, x, epilogue)
    call.out = target(x, y)
    call.mean, call.scale = vector(&call, "mean", number, mean), vector(&call, "scale", number, scale)
    call.shift = vector(&call, "shift", number, shift)
    run(NORMALIZE[dtype][active], &call)


def grad_sums(cnp.ndarray dy not None, cnp.ndarray x not None, mean, threads=1, epilogue=None):
    """Sums over each channel of `dy` and of ``dy * (x - mean)``; as `reference.grad_sums`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_gradient(&call, x, dtype, epilogue)
    cdef cnp.ndarray sum_dy = new_vector(&call, cnp.NPY_DOUBLE), sum_dy_xmu = new_vector(&call, cnp.NPY_DOUBLE)
    call.dy = like(x, dy)
    call.mean = vector(&call, "mean", number, mean)
    call.first, call.second = <double*> cnp.PyArray_DATA(sum_dy), <double*> cnp.PyArray_DATA(sum_dy_xmu)
    run(GRAD_SUMS[dtype][active], &call)
    return sum_dy, sum_dy_xmu


def grad_input(
    cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray dx not None, mean, scale, g0, g1, threads=1, epilogue=None
):
    """Write ``scale * (dy - g0 - (x - mean) * g1)`` to `dx`; as `reference.grad_input`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_gradient(&call, x, dtype, epilogue)
    call.dy, call.out = like(x, dy), target(x, dx)
    call.mean, call.scale = vector(&call, "mean", number, mean), vector(&call, "scale", number, scale)
    call.shift, call.slope = vector(&call, "g0", number, g0), vector(&call, "g1", number, g1)
    run(GRAD_INPUT[dtype][active], &call)


def inference(
    cnp.ndarray x not None, cnp.ndarray y not None, mean, mean_lo, spread, weight, bias, eps, threads, epilogue=None
):
    """Normalize with given statistics; as `core.Composed.inference`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_epilogue(&call, x, epilogue)
    call.out = target(x, y)
    call.mean, call.mean_lo = vector(&call, "mean", number, mean), optional(&call, "mean_lo", number, mean_lo)
    call.invstd = vector(&call, "spread", number, spread)
    call.weight, call.bias = optional(&call, "weight", number, weight), optional(&call, "bias", number, bias)
    call.inverted = eps is None
    call.eps = 0 if eps is None else eps
    run(INFERENCE[dtype][active], &call)


def forward(
    cnp.ndarray x not None, cnp.ndarray y not None, weight, bias, double eps, running_mean, running_var, double momentum,
    int correction, compute, threads, epilogue=None
):
    """Normalize with the batch's statistics; as `core.Composed.forward`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_epilogue(&call, x, epilogue)
    cdef Running mean = running(&call, "running_mean", dtype, running_mean), var = running(&call, "running_var", dtype, running_var)
    call.out = target(x, y)
    call.weight, call.bias = optional(&call, "weight", number, weight), optional(&call, "bias", number, bias)
    call.eps = eps
    return train(&call, dtype, active, x, y, weight, bias, running_mean, mean, running_var, var, momentum, correction, epilogue)


cdef tuple train(
    Call* call, int dtype, bint active, x, y, weight, bias, running_mean, Running mean_to_move, running_var, Running var_to_move,
    double momentum, int correction, epilogue
):
    """Run a forward whose inputs were entered; return the vectors that it makes.

    The running statistics are updated last, when nothing can fail any more.
    """
    cdef uint32_t mode
    cdef bint done
    cdef object left = None
    cdef int number = arithmetic_number(dtype)
    cdef cnp.ndarray mean = new_vector(call, number), mean_lo = new_vector(call, number), invstd = new_vector(call, number)
    cdef cnp.ndarray scale = new_vector(call, number), shift = new_vector(call, number)
    cdef tuple made = (mean, mean_lo, invstd, scale, shift)
    call.mean, call.mean_lo, call.invstd = cnp.PyArray_DATA(mean), cnp.PyArray_DATA(mean_lo), cnp.PyArray_DATA(invstd)
    call.scale, call.shift = cnp.PyArray_DATA(scale), cnp.PyArray_DATA(shift)
    mode = enter_default_mode()
    try:
        with nogil:
            done = FORWARD[dtype][active](call)
        if not done:
            raise MemoryError("no memory for the partial sums")
        if memchr(call.left, 1, call.channels) != NULL:
            left = forward_left(call, made, x, y, weight, bias, running_mean, running_var, momentum, correction, epilogue)
        update(mean_to_move, call.first, 1, call.channels, momentum)
        update(var_to_move, call.second, call.count - correction, call.channels, momentum)
        if left is not None:
            replace_left(left, running_mean, running_var)
    finally:
        end_scratch()
        leave_default_mode(mode)
    return made


cdef object composed():
    """The same calls, made of the operations of this module: they know what to do at the ends of the range."""
    from fastbn import core
    return core.Composed(sys.modules[__name__])


cdef tuple forward_left(
    Call* call, tuple made, x, y, weight, bias, running_mean, running_var, double momentum, int correction, epilogue
):
    """Compute the channels that a forward has left; return their indices and running statistics, and the merged sums of all.

    The tiles of so many channels alone are those of all: planes are cut without regard to the number of channels, and
    where the units of work are whole channels of columns, they are so many as make whole blocks.
    """
    from fastbn import extremes
    cdef cnp.ndarray mask = np.empty(call.channels, np.bool_)
    cdef cnp.ndarray first = new_vector(call, cnp.NPY_DOUBLE), second = new_vector(call, cnp.NPY_DOUBLE)
    memcpy(cnp.PyArray_DATA(mask), call.left, call.channels)
    memcpy(cnp.PyArray_DATA(first), call.first, call.channels * sizeof(double))  # other calls use the scratch memory
    memcpy(cnp.PyArray_DATA(second), call.second, call.channels * sizeof(double))
    call.first, call.second = <double*> cnp.PyArray_DATA(first), <double*> cnp.PyArray_DATA(second)
    channels = np.flatnonzero(mask)
    part = extremes.Part(channels, np.zeros_like(channels))
    dims = call.outer, call.channels, call.inner
    rows, own_mean, own_var = part.of(x.reshape(dims)), part.of(running_mean), part.of(running_var)
    found = composed().forward(
        rows, rows, part.of(weight), part.of(bias), call.eps, own_mean, own_var, momentum, correction, made[0].dtype, call.threads,
        part.epilogue(epilogue),
    )
    y.reshape(dims)[:, channels] = rows
    for vector, values in zip(made, found):
        vector[channels] = values
    return channels, own_mean, own_var, first, second


cdef int replace_left(tuple left, running_mean, running_var) except -1:
    """Set the running statistics of the channels that a forward has left."""
    channels, own_mean, own_var, _, _ = left
    if running_mean is not None:
        running_mean[channels] = own_mean
    if running_var is not None:
        running_var[channels] = own_var
    return 0


cdef inline bint any_outside(const C* values, Py_ssize_t n, double limit) noexcept nogil:
    """Whether any of several numbers is not between a limit and its reciprocal."""
    cdef C high = <C> limit, low = <C> (0.5 / limit)
    cdef Py_ssize_t c
    cdef bint outside = False
    for c in range(n):
        outside |= (values[c] >= high) | (values[c] < low)
    return outside


cdef bint is_far(Call* call, int number) noexcept nogil:
    """Whether a standard deviation is so far from 1 that a backward must be made of operations (`extremes.far_from_one`)."""
    if number == cnp.NPY_DOUBLE:
        return any_outside(<const double*> call.invstd, call.channels, FAR_DOUBLE)
    return any_outside(<const float*> call.invstd, call.channels, FAR_FLOAT)


def backward(cnp.ndarray dy not None, cnp.ndarray x not None, dx, mean, mean_lo, invstd, scale, threads, epilogue=None):
    """Sums of dy and of dy (x - mean), and dx unless it is None; as `core.Composed.backward`."""
    cdef Call call
    cdef int dtype = bind(&call, x, threads), number = arithmetic_number(dtype)
    cdef bint active = bind_gradient(&call, x, dtype, epilogue)
    cdef cnp.ndarray sum_dy = new_vector(&call, cnp.NPY_DOUBLE), sum_dy_xmu = new_vector(&call, cnp.NPY_DOUBLE)
    call.dy = like(x, dy)
    call.mean, call.mean_lo = vector(&call, "mean", number, mean), optional(&call, "mean_lo", number, mean_lo)
    call.first, call.second = <double*> cnp.PyArray_DATA(sum_dy), <double*> cnp.PyArray_DATA(sum_dy_xmu)
    if dx is not None:
        call.out = target(x, dx)
        call.invstd, call.scale = vector(&call, "invstd", number, invstd), vector(&call, "scale", number, scale)
    elif invstd is not None:
        call.invstd = vector(&call, "invstd", number, invstd)
    if call.invstd != NULL and is_far(&call, number):
        return composed().backward(dy, x, dx, mean, mean_lo, invstd, scale, call.threads, epilogue)
    run(REDUCE[dtype][active] if dx is None else BACKWARD[dtype][active], &call)
    return sum_dy, sum_dy_xmu


# ---- Plain arrays: each call is one C function, because the checks in Python take as long as the work on a small one ----

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
