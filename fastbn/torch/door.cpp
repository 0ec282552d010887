// The CPU kernels of aten::native_batch_norm, native_layer_norm, native_group_norm and their backwards.
//
// - What is not taken is passed on: torch computes, or says what is wrong, as it always does. _native_batch_norm_legit and
//   batch_norm_backward are torch's own kernels under other names, which nobody overrides; stock.hpp has the others.
// - fastbn's own operators are the same with an epilogue, and an error in place of torch's kernel.
#include "door.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "attempt.hpp"

namespace fastbn::torch {

std::atomic<const Kernels*> kernels;
void (*end_scratch)();
std::int32_t cpu, strided, numbers[DTYPES];
std::atomic<bool> in_child{false};

namespace {

Opaque* library;  // the registration, or null
std::atomic<bool> on{false};
std::atomic<std::uint64_t> taken[OPERATIONS][DTYPES][2], declined[OPERATIONS][ANSWERS];

void count(const Attempt& attempt, Answer answer) noexcept {
    if (answer == OFF) return;  // whether such calls come here at all depends on other threads
    auto& counter = answer == TAKEN ? taken[attempt.operation][attempt.dtype][attempt.last] : declined[attempt.operation][answer];
    counter.fetch_add(1, std::memory_order_relaxed);
}

// Let torch's own kernel do it. The arguments are its, whatever happens.
void pass_on(const char* name, const char* overload, Slot* arguments, Slot* stack) {
    if (torch.torch_call_dispatcher(name, overload, arguments, VERSION) != 0) {
        const char* why = torch.torch_exception_get_what_without_backtrace == nullptr
                              ? "PyTorch's own batch norm failed, and has written why to the standard error"
                              : torch.torch_exception_get_what_without_backtrace();
        throw std::runtime_error(why);
    }
    for (int i = 0; i < 3; ++i) stack[i] = arguments[i];
}

void native_batch_norm(Slot* stack, std::uint64_t, std::uint64_t) {
    Attempt attempt{};
    attempt.operation = bool_in(stack[5]) ? FORWARD : INFERENCE;
    const Answer answer = on.load(std::memory_order_relaxed) ? try_forward(stack, attempt) : OFF;
    count(attempt, answer);
    if (answer == TAKEN) {
        delete_tensor(stack[0]);
        for (int i = 1; i < 5; ++i) delete_optional(stack[i]);
        for (int i = 0; i < 3; ++i) stack[i] = reinterpret_cast<Slot>(attempt.results[i]);
    } else if (optional_in(stack[3]) == nullptr && optional_in(stack[4]) == nullptr) {
        Slot arguments[] = {stack[0], stack[1], stack[2], stack[5], stack[6], stack[7]};
        delete_optional(stack[3]), delete_optional(stack[4]);
        pass_on("aten::_native_batch_norm_legit", "no_stats", arguments, stack);
    } else {
        Slot arguments[] = {stack[0], stack[1], stack[2], unboxed(stack[3]), unboxed(stack[4]), stack[5], stack[6], stack[7]};
        pass_on("aten::_native_batch_norm_legit", "", arguments, stack);
    }
}

void native_batch_norm_backward(Slot* stack, std::uint64_t, std::uint64_t) {
    Attempt attempt{};
    attempt.operation = bool_in(stack[7]) ? BACKWARD : FROZEN_BACKWARD;
    const Answer answer = on.load(std::memory_order_relaxed) ? try_backward(stack, attempt) : OFF;
    count(attempt, answer);
    if (answer == TAKEN) {
        delete_tensor(stack[0]), delete_tensor(stack[1]);
        for (int i = 2; i < 7; ++i) delete_optional(stack[i]);
        (void)torch.torch_delete_list(reinterpret_cast<Opaque*>(stack[9]));
        delete_tensor(reinterpret_cast<Slot>(attempt.results[3]));  // none
        for (int i = 0; i < 3; ++i) stack[i] = reinterpret_cast<Slot>(attempt.results[i]);
    } else {
        Slot arguments[] = {stack[0], stack[1], unboxed(stack[2]), stack[3], stack[4], stack[5], stack[6], stack[7], stack[8], stack[9], unboxed(0)};
        pass_on("aten::batch_norm_backward", "", arguments, stack);
    }
}

// Torch's tensor as a handle: what a new one held, which is none, is nobody's.
Slot handed(const Held& result) {
    Tensor made = nullptr;
    if (torch.aoti_torch_new_uninitialized_tensor(&made) != 0) throw std::bad_alloc();
    reinterpret_cast<Held*>(made)->tensor = result.tensor;
    return reinterpret_cast<Slot>(made);
}

Mask mask_in(Slot slot) {
    Mask wanted{};
    if (!read_mask(slot, wanted)) throw std::runtime_error("output_mask must have 3 elements");
    return wanted;
}

// The operators of parts: their arguments (a tensor, one that may be absent, a list, a number), and both ways to compute.
struct LayerNorm {
    static constexpr Operation OPERATION = LAYER_FORWARD;
    static constexpr char ARGUMENTS[] = "tloo-";
    static constexpr auto attempt = try_layer_norm;
    static Three left(const Slot* s) {
        const List shape(s[1]);
        return stock.layer_norm(held(s[0]), shape, maybe(s[2]), maybe(s[3]), double_in(s[4]));
    }
};

struct LayerNormBackward {
    static constexpr Operation OPERATION = LAYER_BACKWARD;
    static constexpr char ARGUMENTS[] = "ttlttool";
    static constexpr auto attempt = try_layer_norm_backward;
    static Three left(const Slot* s) {
        const List shape(s[2]);
        return stock.layer_norm_backward(held(s[0]), held(s[1]), shape, held(s[3]), held(s[4]), maybe(s[5]), maybe(s[6]), mask_in(s[7]));
    }
};

struct GroupNorm {
    static constexpr Operation OPERATION = GROUP_FORWARD;
    static constexpr char ARGUMENTS[] = "too-----";
    static constexpr auto attempt = try_group_norm;
    static Three left(const Slot* s) {
        return stock.group_norm(held(s[0]), maybe(s[1]), maybe(s[2]), long_in(s[3]), long_in(s[4]), long_in(s[5]), long_in(s[6]), double_in(s[7]));
    }
};

struct GroupNormBackward {
    static constexpr Operation OPERATION = GROUP_BACKWARD;
    static constexpr char ARGUMENTS[] = "tttto----l";
    static constexpr auto attempt = try_group_norm_backward;
    static Three left(const Slot* s) {
        return stock.group_norm_backward(
            held(s[0]), held(s[1]), held(s[2]), held(s[3]), maybe(s[4]), long_in(s[5]), long_in(s[6]), long_in(s[7]), long_in(s[8]), mask_in(s[9])
        );
    }
};

// A call's arguments, which end with it, whatever happens.
template <class Operator>
struct Arguments {
    static constexpr int COUNT = sizeof Operator::ARGUMENTS - 1;
    Slot slots[COUNT];

    explicit Arguments(const Slot* stack) noexcept { std::copy(stack, stack + COUNT, slots); }
    Arguments(const Arguments&) = delete;
    Arguments& operator=(const Arguments&) = delete;
    ~Arguments() {
        for (int i = 0; i < COUNT; ++i) {
            const char kind = Operator::ARGUMENTS[i];
            if (kind == 't') delete_tensor(slots[i]);
            if (kind == 'o') delete_optional(slots[i]);
            if (kind == 'l') (void)torch.torch_delete_list(reinterpret_cast<Opaque*>(slots[i]));
        }
    }
};

template <class Operator>
void native(Slot* stack, std::uint64_t, std::uint64_t) {
    const Arguments<Operator> arguments(stack);
    Attempt attempt{};
    attempt.operation = Operator::OPERATION;
    const Answer answer = on.load(std::memory_order_relaxed) ? Operator::attempt(stack, attempt) : OFF;
    count(attempt, answer);
    if (answer == TAKEN) {
        for (int i = 0; i < 3; ++i) stack[i] = reinterpret_cast<Slot>(attempt.results[i]);
    } else {
        const Three results = Operator::left(arguments.slots);
        stack[0] = handed(std::get<0>(results)), stack[1] = handed(std::get<1>(results)), stack[2] = handed(std::get<2>(results));
    }
}

Activation activation_in(Slot kind, Slot parameter) noexcept {
    const auto known = static_cast<std::int64_t>(kind) >= IDENTITY && static_cast<std::int64_t>(kind) < KINDS;
    return {known ? static_cast<int>(kind) : IDENTITY, double_in(parameter)};
}

// fastbn::batch_norm_forward: as native_batch_norm, then residual?, activation, parameter
void own_forward(Slot* stack, std::uint64_t, std::uint64_t) {
    Attempt attempt{};
    attempt.operation = bool_in(stack[5]) ? FORWARD : INFERENCE;
    const Answer answer = try_forward(stack, attempt, {optional_in(stack[8]), activation_in(stack[9], stack[10])});
    count(attempt, answer);
    delete_tensor(stack[0]);
    for (int i : {1, 2, 3, 4, 8}) delete_optional(stack[i]);
    if (answer != TAKEN) throw std::runtime_error(std::string("fastbn cannot compute this: ") + REASONS[answer]);
    for (int i = 0; i < 3; ++i) stack[i] = reinterpret_cast<Slot>(attempt.results[i]);
}

// fastbn::batch_norm_backward: as native_batch_norm_backward, then bias?, residual?, activation, parameter, of_residual, from_output
void own_backward(Slot* stack, std::uint64_t, std::uint64_t) {
    Attempt attempt{};
    attempt.operation = bool_in(stack[7]) ? BACKWARD : FROZEN_BACKWARD;
    const Epilogue after{optional_in(stack[11]), activation_in(stack[12], stack[13]), optional_in(stack[10]), bool_in(stack[14]), bool_in(stack[15])};
    const Answer answer = try_backward(stack, attempt, after);
    count(attempt, answer);
    delete_tensor(stack[0]), delete_tensor(stack[1]);
    for (int i : {2, 3, 4, 5, 6, 10, 11}) delete_optional(stack[i]);
    (void)torch.torch_delete_list(reinterpret_cast<Opaque*>(stack[9]));
    if (answer != TAKEN) throw std::runtime_error(std::string("fastbn cannot compute this: ") + REASONS[answer]);
    for (int i = 0; i < 4; ++i) stack[i] = reinterpret_cast<Slot>(attempt.results[i]);
}

constexpr const char* OWN_FORWARD =
    "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, "
    "float momentum, float eps, Tensor? residual, int activation, float parameter) -> (Tensor, Tensor, Tensor)";
constexpr const char* OWN_BACKWARD =
    "batch_norm_backward(Tensor grad_out, Tensor input, Tensor? weight, Tensor? running_mean, Tensor? running_var, Tensor? save_mean, "
    "Tensor? save_invstd, bool training, float eps, bool[3] output_mask, Tensor? bias, Tensor? residual, int activation, "
    "float parameter, bool of_residual, bool from_output) -> (Tensor, Tensor, Tensor, Tensor)";

void leave_team() { in_child.store(true, std::memory_order_relaxed); }

void need_torch() {
    if (torch.torch_library_impl == nullptr) throw std::runtime_error("torch's functions are not known: attach kernels first");
}

void withdraw_library() {
    if (library != nullptr) (void)torch.aoti_torch_delete_library_object(std::exchange(library, nullptr));
}

}  // namespace

const char* const REASONS[ANSWERS] = {
    "",
    "fastbn is disabled",
    "a tensor does not lie in this processor's memory",
    "x has another dtype than float32, float64, bfloat16 and float16",
    "x has too few dimensions or more than 16, or another tensor is unlike x",
    "x is empty",
    "strides of axes of one element, or gaps in channels_last, leave the order of memory open",
    "a parameter has another dtype or shape than torch takes",
    "a tensor that is needed is absent",
    "running statistics share memory with another tensor",
    "eps is not positive",
    "values are at the ends of the range",
    "values are at the ends of the range, a weight is nearly 0, or rows have one element or more than a million",
    "memory ran out",
};

Order order_of(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides) noexcept {
    const auto follows = [&](std::int64_t d, std::int64_t& step) {
        if (sizes[d] == 1) return true;  // its stride is never used
        const bool fits = strides[d] == step;
        step *= sizes[d];
        return fits;
    };
    const bool may_be_last = dim == 4 || dim == 5;
    bool contiguous = true, last = may_be_last;
    std::int64_t step = 1;
    for (std::int64_t d = dim - 1; d >= 0 && contiguous; --d) contiguous = follows(d, step);
    if (contiguous) return CONTIGUOUS;
    step = 1;
    last = last && follows(1, step);
    for (std::int64_t d = dim - 1; d > 1 && last; --d) last = follows(d, step);
    if (last && follows(0, step)) return CHANNELS_LAST;
    std::int64_t least = 0;  // that the stride of the next axis must have, for torch
    const auto fits = [&](std::int64_t d) {
        const bool does = strides[d] >= least;
        least = strides[d] * std::max<std::int64_t>(sizes[d], 1);
        return does;
    };
    bool gaps = may_be_last && strides[1] != 0 && fits(1);
    for (std::int64_t d = dim - 1; d > 1 && gaps; --d) gaps = fits(d);
    return gaps && least != strides[1] && fits(0) ? GAPS : OTHER;
}

Counts counts() noexcept {
    Counts now;
    for (int o = 0; o < OPERATIONS; ++o) {
        for (int d = 0; d < DTYPES; ++d)
            for (int l = 0; l < 2; ++l) now.taken[o][d][l] = taken[o][d][l].load(std::memory_order_relaxed);
        for (int a = 0; a < ANSWERS; ++a) now.declined[o][a] = declined[o][a].load(std::memory_order_relaxed);
    }
    return now;
}

void reset_counts() noexcept {
    for (auto& operation : taken)
        for (auto& dtype : operation)
            for (auto& counter : dtype) counter.store(0, std::memory_order_relaxed);
    for (auto& operation : declined)
        for (auto& counter : operation) counter.store(0, std::memory_order_relaxed);
}

std::string attach(const Kernels* given, void (*end)()) {
    if (given->parts_forward == nullptr || given->parts_backward == nullptr) throw std::invalid_argument("these kernels have no calls over parts");
    kernels = given, end_scratch = end;
    if (torch.torch_library_impl != nullptr) return "";
    std::string missing = find_torch();
    if (!missing.empty()) return missing;
    pthread_atfork(nullptr, nullptr, leave_team);
    cpu = torch.aoti_torch_device_type_cpu(), strided = torch.aoti_torch_layout_strided();
    numbers[FLOAT32] = torch.aoti_torch_dtype_float32(), numbers[BFLOAT16] = torch.aoti_torch_dtype_bfloat16();
    numbers[FLOAT16] = torch.aoti_torch_dtype_float16(), numbers[FLOAT64] = torch.aoti_torch_dtype_float64();
    return "";
}

bool start() {
    need_torch();
    if (library == nullptr) {
        if (torch.aoti_torch_library_init_impl("aten", "CPU", "fastbn", 0, &library) != 0) return false;
        const auto put = [](const char* name, kernel_fn kernel) { return torch.torch_library_impl(library, name, kernel, VERSION) == 0; };
        bool all = put("native_batch_norm", native_batch_norm) && put("native_batch_norm_backward", native_batch_norm_backward);
        if (takes_parts())
            all = all && put("native_layer_norm", native<LayerNorm>) && put("native_layer_norm_backward", native<LayerNormBackward>) &&
                  put("native_group_norm", native<GroupNorm>) && put("native_group_norm_backward", native<GroupNormBackward>);
        if (!all) {
            withdraw_library();
            return false;
        }
    }
    on.store(true, std::memory_order_relaxed);
    return true;
}

void stop(bool withdraw) {
    on.store(false, std::memory_order_relaxed);
    if (withdraw) withdraw_library();
}

bool is_on() noexcept { return on.load(std::memory_order_relaxed); }

bool takes_parts() noexcept { return stock.layer_norm != nullptr; }

bool define_operators() {
    static bool defined = false;
    if (defined) return true;
    need_torch();
    Opaque *schemas = nullptr, *own = nullptr;  // never withdrawn
    if (torch.aoti_torch_library_init_def("fastbn", "fastbn", 0, &schemas) != 0) return false;
    if (torch.aoti_torch_library_def(schemas, OWN_FORWARD) != 0 || torch.aoti_torch_library_def(schemas, OWN_BACKWARD) != 0) return false;
    if (torch.aoti_torch_library_init_impl("fastbn", "CPU", "fastbn", 0, &own) != 0) return false;
    defined = torch.torch_library_impl(own, "batch_norm_forward", own_forward, VERSION) == 0 &&
              torch.torch_library_impl(own, "batch_norm_backward", own_backward, VERSION) == 0;
    return defined;
}

}  // namespace fastbn::torch
