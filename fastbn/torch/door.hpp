// PyTorch's door to the kernels: what ATen's operators of normalization run on the CPU while fastbn is enabled. See door.cpp.
#pragma once

#include <cstdint>
#include <string>

#include "call.hpp"

namespace fastbn::torch {

enum Operation : int {
    FORWARD,
    INFERENCE,
    BACKWARD,
    FROZEN_BACKWARD,
    LAYER_FORWARD,
    LAYER_BACKWARD,
    GROUP_FORWARD,
    GROUP_BACKWARD,
    OPERATIONS
};

// What becomes of a call: it is taken, or left to torch's own kernel for a reason.
enum Answer : int {
    TAKEN,
    OFF,         // fastbn is disabled, and other threads may be on their way to its kernels
    DEVICE,      // something does not lie in ordinary memory
    DTYPE,       // of x
    SHAPE,       // too few dimensions, too many, or dy unlike x
    EMPTY,
    ODD,         // strides of x, of which torch's versions make different ones
    PARAMETERS,  // a dtype or a shape
    ABSENT,      // something that the call needs
    OVERLAP,     // running statistics that share memory with something else
    EPS,         // not positive
    RANGE,       // channels at the ends of the range
    PARTS,       // parts that the kernels leave
    MEMORY,      // there is none, or torch refused a request
    ANSWERS
};

enum Order : int { CONTIGUOUS, CHANNELS_LAST, GAPS, OTHER };

extern const char* const REASONS[ANSWERS];

// How torch sees an order of memory. Channels last with gaps between elements is copied to that, any other to the first.
Order order_of(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides) noexcept;

struct Counts {
    std::uint64_t taken[OPERATIONS][DTYPES][2];  // the last index: whether channels are last
    std::uint64_t declined[OPERATIONS][ANSWERS];
};
Counts counts() noexcept;
void reset_counts() noexcept;

// Bring the kernels, once; an empty text, or the functions that torch lacks.
std::string attach(const Kernels* kernels, void (*end_scratch)());

// From here on ATen's operators come here; false if torch refused. May be repeated.
bool start();

// From here on they do what they did before. The registration is withdrawn where the caller knows that no other thread
// can be on its way to the kernels: torch would call what is no more. Else calls are passed on.
void stop(bool withdraw);

bool is_on() noexcept;

// Whether layer and group norm are among them: torch's own kernels were found, to which a call can be left.
bool takes_parts() noexcept;

// Define fastbn's own operators, once: batch norm with what may follow it, a residual and an activation. They are not
// switched, and what they do not take is an error. False if torch refused.
bool define_operators();

}  // namespace fastbn::torch
