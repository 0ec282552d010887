// The types of a call: what a kernel is given, how it is cut, and what loops keep in registers. types.pxi is the same for Cython.
#pragma once

#include "block.hpp"
#include "call.hpp"
#include "plan.hpp"

namespace {

using fastbn::COLUMNS;
using fastbn::PLANES;

struct Stats {};
struct GradSums {};
struct FusedGradSums {};
struct Normalize {};
struct FusedNormalize {};
struct GradInput {};
struct FusedGradInput {};

// One call, under way: what the caller brought, how it is cut, and what it has found. Vectors of channels are in the type
// of the arithmetic.
struct Work : fastbn::Call, fastbn::Tiles, fastbn::Units {
    void* dz;  // where the sums of a fused gradient leave dy before the activation, for the map to read; or NULL
    double *pivots, *sums, *dots;  // the partial sums, of each tile
    void *grad_offset, *grad_slope;   // of the map of a backward: the gradients through the mean and the deviation
    double* expanded;                 // room for a vector for each column
    std::ptrdiff_t planes, period;    // of calls over parts: channels of all images, and of one
    void *plane_mean, *plane_scale, *plane_shift;  // one for each of these planes
    bool apart;                       // the map waits for all sums
    bool any_left, no_memory;         // set by units
    bool folds;                       // units make the parameters of the map from given statistics
    void *kept_mean, *kept_var;       // running statistics as they were
    const void *at_mean, *at_scale, *at_shift, *at_slope, *at_bias;  // of the map; for columns one for each column

    void follow(const fastbn::Tiles& tiles, const fastbn::Units& units) {
        static_cast<fastbn::Tiles&>(*this) = tiles;
        static_cast<fastbn::Units&>(*this) = units;
    }
};

// The accumulators of one unit's columns.
struct alignas(LINE) Columns {
    char bytes[COLUMNS + BLOCK];
};

// The sums of a few channels while their planes are read.
template <class T> struct Accumulators {
    Block<T> sum[PLANES], dot[PLANES];
};

template <class T> struct Arrays {
    const T *x, *dy, *residual;
    T *out, *dresidual, *dz;
};

// A block of each input, and of each output.
template <class T> struct Operands {
    Block<T> x, dy, residual;
};
template <class T> struct Outputs {
    Block<T> out, dresidual;
};

// A block of each vector of channels.
template <class T> struct Parameters {
    Block<T> mean, scale, shift, slope, bias;
};

// The same call, as seen by the kernels of one operation and one storage type.
template <class Op, class T> struct TypedCall : Work {
    Arrays<T> arrays() const {
        return {static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<const T*>(residual), static_cast<T*>(out),
                static_cast<T*>(dresidual), static_cast<T*>(dz)};
    }
};

}
