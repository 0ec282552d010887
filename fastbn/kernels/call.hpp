// The C entry of the kernels: one Call, whoever brings the memory, and a table of the functions that run it.
//
// NumPy's doors (_calls.pyx) and those of frameworks differ in how they read shapes and strides, and in nothing else.
// Nothing here needs Python: a call may come from any thread, with or without Python's lock.
#pragma once

#include "plan.hpp"
#include "pool.hpp"

namespace fastbn {

enum Dtype : int { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, DTYPES };

enum Kind : int { IDENTITY, RELU, RELU6, LEAKY_RELU, HARDSWISH, SIGMOID, SILU, TANH, GELU, GELU_TANH, KINDS };

// A function of the normalized value; the parameter is the slope of leaky_relu.
struct Activation {
    int kind;
    double parameter;

    bool is_smooth() const { return kind >= SIGMOID; }
};

// Running statistics that a training forward moves, in double or in the type of the arithmetic; or NULL.
struct Running {
    void* data;
    bool is_double;
};

enum Status : int {
    DONE,
    NO_MEMORY,  // for the partial sums; nothing was written
    // The call has channels at the ends of the range, which must be computed in units of their own (extremes.py).
    // A backward has written nothing. A forward has computed all others; `left` marks these, and no running statistics
    // were moved. What the call left in the scratch memory is there until `end_scratch`, which is then the caller's.
    LEFT,
};

// What a caller brings. All zero bytes are an empty one. x is dense memory of (outer, channels, inner) elements, not
// empty, aligned to its elements, and so are all arrays like x. Vectors have one element for each channel, in the type
// of the arithmetic: double for FLOAT64, else float. What may be NULL says so. Outputs may be one of the inputs like x,
// but must not overlap anything else.
struct Call {
    Dtype dtype;
    std::ptrdiff_t outer, channels, inner;
    const void *x, *dy;
    void* out;             // y or dx; of a backward it may be NULL: no dx then
    const void* residual;  // added before the activation; of a backward, where the activation's derivative needs it; or NULL
    void* dresidual;       // of a backward with an activation and an out; or NULL
    Activation activation;
    bool from_output;  // x of a backward is the output of the forward: what the activation made of it is undone
    bool frozen;       // the statistics of a backward are constants
    int threads;
    const Host* host;  // whose threads run the units; NULL is the pool

    const void *weight, *bias;     // or NULL
    void *mean, *mean_lo;          // mean_lo is what the mean rounds away; of an inference or backward, or NULL
    void *invstd;                  // one over the deviation; of an inference, an output or NULL where `var` is given
    const void* var;               // of an inference, or NULL
    void *scale, *shift;           // of the forward: (x - mean) * scale + shift; an output of it, or NULL; an input of a backward
    const void *g0, *g1;           // of `grad_input`: scale * (dy - g0 - (x - mean) * g1)
    double eps, momentum;
    double correction;             // what is taken from the count under the running variance
    Running running_mean, running_var;

    void *dweight, *dbias;         // of a backward; or NULL
    double *batch_mean, *batch_m2, *batch_mean_lo;  // of all elements of a channel, in double: what sums of x are merged to; or NULL
    double *sum_dy, *sum_dy_xmu;   // of dy and of dy (x - mean), likewise; or NULL
    char* left;                    // set by a forward, for each channel

    // Of calls over parts: memory is (batch, outer, channels, inner), of which outer or inner is 1, and `group` channels of
    // an image share statistics. mean, mean_lo and invstd, which are needed, have one element for each of these parts, weight
    // and bias one for each channel; sum_dy and sum_dy_xmu, which a backward needs, one for each channel of each image.
    std::ptrdiff_t batch, group;
    bool uncentered;  // the mean is taken to be 0
};

constexpr std::ptrdiff_t LONGEST_ROW = MOST_TILES * TILE;  // elements

// Whether the kernels take calls over parts of such memory: planes, columns, or rows of several elements and not too many.
inline bool are_parts(std::ptrdiff_t outer, std::ptrdiff_t inner, std::ptrdiff_t group) {
    return outer == 1 && inner == 1 ? group > 1 && group <= LONGEST_ROW : outer == 1 || inner == 1;
}

// Each runs a call in the default floating-point mode. The first four are single operations, of which `core` makes the
// calls that are not here: `normalize` maps with mean, scale and shift, `grad_input` with mean, scale, g0 and g1; `stats`
// leaves the three of the batch, `grad_sums` the two sums.
using call_fn = Status (*)(Call*);

struct Kernels {
    call_fn stats;
    call_fn normalize;
    call_fn grad_sums;
    call_fn grad_input;
    call_fn inference;
    // mean, mean_lo, invstd, scale, shift are outputs, or NULL.
    call_fn forward;
    // Needs mean and invstd, and scale or (with a NULL scale) weight; with an activation also shift, or bias.
    call_fn backward;
    // What a forward does last; where it had LEFT channels, the caller, when it has computed them.
    void (*move_running)(Call*);
    // Over parts. A forward has LEFT the parts whose invstd is -1; all others are done. A backward that is LEFT has written
    // nothing; it must be made of operations.
    call_fn parts_forward, parts_backward;
};

}  // namespace fastbn
