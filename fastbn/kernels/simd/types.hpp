// The types of a call: what a kernel is given, how it is cut, and what loops keep in registers. types.pxi is the same for Cython.
#pragma once

#include "block.hpp"
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

constexpr int COLUMNS = 4096;  // bytes of the accumulators of one unit's columns
struct alignas(LINE) Columns {
    char bytes[COLUMNS + BLOCK];
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
