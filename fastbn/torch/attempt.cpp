// - From a stack of handles to the kernels' Call, and nothing else: no Python, no lock, no loop over elements. A call may
//   come from any thread.
// - Nothing is modified before everything that can fail has succeeded, so a call can be passed on at any point. The
//   functions here own what they make; the arguments are the stack's until one is sure.
// - Units run on torch's own team of threads. Its members spin for milliseconds after each of torch's operations; other
//   threads would find the processors taken.
#include "attempt.hpp"

namespace fastbn::torch {

namespace {

// Bytes of x from which torch's threads are worth calling.
constexpr std::int64_t WORTH_THREADS[OPERATIONS] = {192 << 10, 256 << 10, 96 << 10, 96 << 10, 192 << 10, 96 << 10, 192 << 10, 96 << 10};

void run_on_team(void*, int threads, member_fn member, void* data) {
    struct Members {
        member_fn run;
        void* data;
    } members{member, data};
    // One call may get several numbers. What is left out if torch fails is done by the caller.
    (void)torch.torch_parallel_for(
        0, threads, 1,
        [](std::int64_t begin, std::int64_t end, void* given) {
            const Members& all = *static_cast<Members*>(given);
            for (std::int64_t i = begin; i < end; ++i) all.run(all.data, static_cast<int>(i));
        },
        &members);
}
const Host team{run_on_team, nullptr};

}  // namespace

Call begin(const Input& x, Operation operation) noexcept {
    Call call{};
    call.dtype = x.dtype;
    call.outer = x.outer, call.channels = x.channels, call.inner = x.inner;
    call.threads = 1;
    std::uint32_t threads = 1;
    if (x.bytes() >= WORTH_THREADS[operation] && torch.torch_get_num_threads(&threads) == 0 && threads > 1) {
        call.threads = static_cast<int>(threads < 1 << 20 ? threads : 1 << 20);
        call.host = in_child.load(std::memory_order_relaxed) ? nullptr : &team;
    }
    return call;
}

Answer run(Status (*function)(Call*), Call& call) noexcept {
    const Status status = function(&call);
    if (status == LEFT) end_scratch();
    return status == DONE ? TAKEN : status == LEFT ? RANGE : MEMORY;
}

bool read_mask(Slot slot, Mask& wanted) noexcept {
    Opaque* list = reinterpret_cast<Opaque*>(slot);
    std::size_t size = 0;
    if (torch.torch_list_size(list, &size) != 0 || size != 3) return false;
    for (std::size_t i = 0; i < 3; ++i) {
        Slot item;
        if (torch.torch_list_get_item(list, i, &item) != 0) return false;
        wanted[i] = bool_in(item);
    }
    return true;
}

namespace {

// What an activation's gradient needs; false if there is no memory.
bool read_pre_activation(const Input& x, const Parameters& p, const Epilogue& after, const Vector& bias, Call& call, Owned& copy,
                         Owned& dresidual) noexcept {
    if (after.activation.kind == IDENTITY) return true;
    call.activation = after.activation, call.from_output = after.from_output;
    if (!p.read(bias, call.bias)) return false;
    if (after.residual != nullptr) call.residual = x.ordered(after.residual, x.lies_like(after.view), copy);
    if (after.of_residual && x.make_like(dresidual)) call.dresidual = writable_memory_of(dresidual.tensor);
    return (after.residual == nullptr || call.residual != nullptr) && (!after.of_residual || call.dresidual != nullptr);
}

}  // namespace

Answer try_forward(const Slot* stack, Attempt& attempt, Epilogue after) noexcept {
    const FloatMode mode;
    Input x;
    if (const Answer no = x.of(tensor_in(stack[0]))) return no;
    attempt.found(x);
    if (const Answer no = after.of(x)) return no;
    Room room;
    Parameters p(x, room);
    Vector weight, bias, running_mean, running_var;
    if (const Answer no = p.of(optional_in(stack[1]), weight)) return no;
    if (const Answer no = p.of(optional_in(stack[2]), bias)) return no;
    if (const Answer no = p.of(optional_in(stack[3]), running_mean)) return no;
    if (const Answer no = p.of(optional_in(stack[4]), running_var)) return no;
    const bool training = attempt.operation == FORWARD;
    if ((running_mean.tensor == nullptr) != (running_var.tensor == nullptr)) return ABSENT;
    if (!training && running_mean.tensor == nullptr) return ABSENT;
    Call call = begin(x, attempt.operation);
    call.eps = double_in(stack[7]);
    if (!(call.eps > 0)) return EPS;

    Owned y, copy_of_residual;
    if (!x.make_like(y)) return MEMORY;
    call.activation = after.activation;
    if (after.residual != nullptr) {
        call.residual = x.ordered(after.residual, x.lies_like(after.view), copy_of_residual);
        if (call.residual == nullptr) return MEMORY;
    }
    call.out = writable_memory_of(y.tensor);
    call.x = x.ordered(x.tensor, x.direct, y);  // in place where it must be copied
    if (call.x == nullptr || !p.read(weight, call.weight) || !p.read(bias, call.bias)) return MEMORY;
    if (!training) {
        Owned nothing[2];
        if (!p.read(running_mean, call.mean) || !p.read(running_var, call.var)) return MEMORY;
        if (!make_vector(nothing[0], 0, p.dtype) || !make_vector(nothing[1], 0, p.dtype)) return MEMORY;
        if (const Answer no = run(kernels.load()->inference, call)) return no;
        attempt.results[0] = y.release(), attempt.results[1] = nothing[0].release(), attempt.results[2] = nothing[1].release();
        return TAKEN;
    }

    const void* memory = memory_of(x.tensor);
    for (const Vector* moved : {&running_mean, &running_var})
        if (p.overlaps(*moved, weight) || p.overlaps(*moved, bias) || (x.direct && p.overlaps(*moved, memory, x.bytes())) ||
            (call.residual != nullptr && p.overlaps(*moved, call.residual, x.bytes())))
            return OVERLAP;
    if (p.overlaps(running_mean, running_var) || (x.channels > 1 && running_mean.stride * running_var.stride == 0)) return OVERLAP;
    call.momentum = double_in(stack[6]), call.correction = 1;
    Output mean, invstd;
    if (!mean.make(p, p.channels, true) || !invstd.make(p, p.channels, p.dtype != p.arithmetic)) return MEMORY;
    call.mean = mean.data, call.invstd = invstd.data;
    call.mean_lo = p.dtype == p.arithmetic ? mean.low : nullptr;  // 16 bits have fewer digits than the arithmetic
    if (!p.read(running_mean, call.running_mean) || !p.read(running_var, call.running_var)) return MEMORY;
    if (const Answer no = run(kernels.load()->forward, call)) return no;
    p.write_back(running_mean, call.running_mean);
    p.write_back(running_var, call.running_var);
    mean.finish(p);
    invstd.finish(p);
    attempt.results[0] = y.release(), attempt.results[1] = mean.made.release(), attempt.results[2] = invstd.made.release();
    return TAKEN;
}

Answer try_backward(const Slot* stack, Attempt& attempt, Epilogue after) noexcept {
    const FloatMode mode;
    Input x;
    View dy;
    Mask wanted;
    if (const Answer no = x.of(tensor_in(stack[1]))) return no;
    attempt.found(x);
    if (!dy.of(tensor_in(stack[0]))) return DEVICE;
    if (!x.is_like(dy)) return SHAPE;
    if (const Answer no = after.of(x)) return no;
    if (!read_mask(stack[9], wanted)) return MEMORY;
    Room room;
    Parameters p(x, room);
    const bool frozen = attempt.operation == FROZEN_BACKWARD;
    Vector weight, bias;
    if (const Answer no = p.of(optional_in(stack[2]), weight)) return no;
    if (const Answer no = p.of(after.bias, bias)) return no;
    // Of the other statistics nothing is asked: they are empty, or of no use.
    Vector center, spread;
    if (const Answer no = p.of(optional_in(stack[frozen ? 3 : 5]), center)) return no;
    if (const Answer no = p.of(optional_in(stack[frozen ? 4 : 6]), spread)) return no;
    if (center.tensor == nullptr || spread.tensor == nullptr || (wanted[1] && weight.tensor == nullptr)) return ABSENT;
    const double eps = double_in(stack[8]);
    if (!(eps > 0)) return EPS;

    Call call = begin(x, attempt.operation);
    call.frozen = frozen;
    Gradient of_x;
    Owned dresidual, copy_of_residual, no_dx;
    Output dweight, dbias;
    const bool maps = wanted[0] || (after.of_residual && after.activation.kind != IDENTITY);  // the kernels write both in one loop
    if (!of_x.enter(x, tensor_in(stack[0]), dy, maps, call) || !p.read(weight, call.weight)) return MEMORY;
    if (frozen) {
        void* var = nullptr;
        call.invstd = p.take();
        if (call.invstd == nullptr || !p.read(center, call.mean) || !p.read(spread, var)) return MEMORY;
        invert(var, eps, call.invstd, p.arithmetic, x.channels);
    } else if (!read_saved(center, p, call.mean, &call.mean_lo) || !read_saved(spread, p, call.invstd, nullptr)) {
        return MEMORY;
    }
    if (wanted[1] && !dweight.make(p, p.channels, false)) return MEMORY;
    if (wanted[2] && !dbias.make(p, p.channels, false)) return MEMORY;
    call.dweight = dweight.data, call.dbias = dbias.data;
    if (!read_pre_activation(x, p, after, bias, call, copy_of_residual, dresidual)) return MEMORY;
    Owned* results[] = {wanted[0] ? &of_x.dx : &no_dx, &dweight.made, &dbias.made, &dresidual};
    for (int i = 0; i < 4; ++i)
        if (results[i]->tensor == nullptr && !make_none(*results[i])) return MEMORY;
    if (wanted[0] || wanted[1] || wanted[2] || after.of_residual)
        if (const Answer no = run(kernels.load()->backward, call)) return no;
    if (wanted[1]) dweight.finish(p);
    if (wanted[2]) dbias.finish(p);
    for (int i = 0; i < 4; ++i) attempt.results[i] = results[i]->release();
    return TAKEN;
}

}  // namespace fastbn::torch
