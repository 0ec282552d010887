// A call to the kernels with torch's arguments: it is taken, or there is a reason why not.
#pragma once

#include <atomic>

#include "arguments.hpp"
#include "stock.hpp"

namespace fastbn::torch {

extern std::atomic<const Kernels*> kernels;  // another kernel may be pinned when fastbn is enabled again
extern void (*end_scratch)();
extern std::atomic<bool> in_child;  // of a fork: torch's team stayed behind

struct Attempt {
    Operation operation;
    Dtype dtype;
    bool last;
    Tensor results[4];

    void found(const Input& x) noexcept { dtype = x.dtype, last = x.last; }
};

// input, weight?, bias?, running_mean?, running_var?, training, momentum, eps
Answer try_forward(const Slot* stack, Attempt& attempt, Epilogue after = {}) noexcept;

// grad_out, input, weight?, running_mean?, running_var?, save_mean?, save_invstd?, train, eps, output_mask
Answer try_backward(const Slot* stack, Attempt& attempt, Epilogue after = {}) noexcept;

// input, normalized_shape, weight?, bias?, eps
Answer try_layer_norm(const Slot* stack, Attempt& attempt) noexcept;

// grad_out, input, normalized_shape, mean, rstd, weight?, bias?, output_mask
Answer try_layer_norm_backward(const Slot* stack, Attempt& attempt) noexcept;

// input, weight?, bias?, N, C, HxW, group, eps
Answer try_group_norm(const Slot* stack, Attempt& attempt) noexcept;

// grad_out, input, mean, rstd, weight?, N, C, HxW, group, output_mask
Answer try_group_norm_backward(const Slot* stack, Attempt& attempt) noexcept;

// A call on x, on torch's team where that is worth while.
Call begin(const Input& x, Operation operation) noexcept;

// What became of a call.
Answer run(Status (*function)(Call*), Call& call) noexcept;

// x and dy of a backward, in the order of memory that dx has; dx is made if it is wanted. False if there is no memory.
struct Gradient {
    Owned dx, copy_of_x, copy_of_dy;

    bool enter(const Input& x, Tensor given, const View& dy, bool wanted, Call& call) noexcept {
        if (wanted && !x.make_like(dx)) return false;
        if (wanted) call.out = writable_memory_of(dx.tensor);
        call.x = x.ordered(x.tensor, x.direct, copy_of_x);
        call.dy = x.ordered(given, x.lies_like(dy), wanted ? dx : copy_of_dy);  // in place where it must be copied
        return call.x != nullptr && call.dy != nullptr;
    }
};

// Which gradients are wanted.
bool read_mask(Slot slot, Mask& wanted) noexcept;

}  // namespace fastbn::torch
