// The CPU kernels of aten::native_batch_norm and aten::native_batch_norm_backward.
//
// - From a stack of handles to the kernels' Call, and nothing else: no Python, no lock, no loop over elements. A call may
//   come from any thread.
// - As torch's own kernel seen from outside: the same shapes, dtypes, strides, undefined tensors. An input in one of
//   torch's two orders of memory is used where it lies; one in any other is copied to the first, as torch's output is.
// - What is not taken is passed on. _native_batch_norm_legit and batch_norm_backward are torch's own kernels under other
//   names, which nobody overrides: torch computes, or says what is wrong, as it always does.
// - Nothing is modified before everything that can fail has succeeded, so a call can be passed on at any point. The
//   functions that try a call own what they make; the arguments are the stack's until one is sure.
// - fastbn's own operators are the same with an epilogue, and an error in place of torch's kernel.
// - Units run on torch's own team of threads. Its members spin for milliseconds after each of torch's operations; other
//   threads would find the processors taken.
#include "door.hpp"

#include <pthread.h>

#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "saved.hpp"
#include "stable.hpp"

namespace fastbn::torch {

namespace {

constexpr std::int64_t MOST_DIMENSIONS = 16;
// Bytes of x from which torch's threads are worth calling.
constexpr std::int64_t WORTH_THREADS[OPERATIONS] = {192 << 10, 256 << 10, 96 << 10, 96 << 10};

std::atomic<const Kernels*> kernels;  // another kernel may be pinned when fastbn is enabled again
void (*end_scratch)();
std::int32_t cpu, strided, numbers[DTYPES];  // torch's own
Opaque* library;                             // the registration, or null
std::atomic<bool> on{false};
std::atomic<bool> in_child{false};  // of a fork: torch's team stayed behind
std::atomic<std::uint64_t> taken[OPERATIONS][DTYPES][2], declined[OPERATIONS][ANSWERS];

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

// A tensor that is deleted unless somebody takes it.
class Owned {
public:
    Owned() = default;
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() {
        if (tensor != nullptr) torch.aoti_torch_delete_tensor_object(tensor);
    }
    Tensor release() noexcept {
        Tensor mine = tensor;
        tensor = nullptr;
        return mine;
    }
    Tensor tensor = nullptr;
};

// Memory of a call beside its tensors: a few vectors of channels.
class Room {
public:
    Room() = default;
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    ~Room() {
        while (more_ != nullptr) delete[] std::exchange(more_, *reinterpret_cast<char**>(more_));
    }

    // Null if there is none.
    void* take(std::size_t bytes) noexcept {
        bytes = (bytes + 15) / 16 * 16;
        if (bytes <= sizeof near_ - used_) return near_ + std::exchange(used_, used_ + bytes);
        char* made = new (std::nothrow) char[16 + bytes];
        if (made == nullptr) return nullptr;
        *reinterpret_cast<char**>(made) = std::exchange(more_, made);
        return made + 16;
    }

private:
    alignas(16) char near_[8192];
    std::size_t used_ = 0;
    char* more_ = nullptr;
};

Tensor tensor_in(Slot slot) noexcept { return reinterpret_cast<Tensor>(slot); }
Slot* box_in(Slot slot) noexcept { return reinterpret_cast<Slot*>(slot); }
bool bool_in(Slot slot) noexcept { return (slot & 0xff) != 0; }
double double_in(Slot slot) noexcept {
    double value;
    std::memcpy(&value, &slot, sizeof value);
    return value;
}

// Of an argument `Tensor?`: null where there is none. It may also be a tensor that is none.
Tensor optional_in(Slot slot) noexcept {
    if (slot == 0) return nullptr;
    const Tensor tensor = tensor_in(*box_in(slot));
    bool defined = false;
    return torch.aoti_torch_is_defined(tensor, &defined) == 0 && defined ? tensor : nullptr;
}

void delete_box(Slot slot) noexcept {
    if (torch.torch_delete_stable_ivalue != nullptr) {
        (void)torch.torch_delete_stable_ivalue(box_in(slot));
    } else {
        ::operator delete(box_in(slot));  // as torch made it
    }
}

void delete_tensor(Slot slot) noexcept { (void)torch.aoti_torch_delete_tensor_object(tensor_in(slot)); }

void delete_optional(Slot slot) noexcept {
    if (slot == 0) return;
    delete_tensor(*box_in(slot));
    delete_box(slot);
}

// An argument `Tensor?` as a `Tensor`: one that is none where there is none.
Slot unboxed(Slot slot) {
    if (slot != 0) {
        const Slot tensor = *box_in(slot);
        delete_box(slot);
        return tensor;
    }
    Tensor none = nullptr;
    if (torch.aoti_torch_new_uninitialized_tensor(&none) != 0) throw std::bad_alloc();
    return reinterpret_cast<Slot>(none);
}

struct View {
    std::int32_t number;  // of the dtype
    std::int64_t dim;
    const std::int64_t *sizes, *strides;

    // False where it has no ordinary memory.
    bool of(Tensor tensor) noexcept {
        std::int32_t device, layout;
        std::int64_t *its_sizes, *its_strides;
        if (torch.aoti_torch_get_device_type(tensor, &device) != 0 || device != cpu) return false;
        if (torch.aoti_torch_get_layout(tensor, &layout) != 0 || layout != strided) return false;
        if (torch.aoti_torch_get_dtype(tensor, &number) != 0 || torch.aoti_torch_get_dim(tensor, &dim) != 0) return false;
        if (torch.aoti_torch_get_sizes(tensor, &its_sizes) != 0 || torch.aoti_torch_get_strides(tensor, &its_strides) != 0) return false;
        sizes = its_sizes, strides = its_strides;
        return true;
    }
};

const void* memory_of(Tensor tensor) noexcept {
    const void* data = nullptr;
    return torch.torch_get_const_data_ptr(tensor, &data) == 0 ? data : nullptr;
}

void* writable_memory_of(Tensor tensor) noexcept {
    void* data = nullptr;
    return torch.torch_get_mutable_data_ptr(tensor, &data) == 0 ? data : nullptr;
}

Dtype dtype_of(std::int32_t number) noexcept {
    int i = 0;
    while (i < DTYPES && numbers[i] != number) ++i;
    return static_cast<Dtype>(i);
}

bool make(Owned& made, std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides, Dtype dtype) noexcept {
    return torch.aoti_torch_empty_strided(dim, sizes, strides, numbers[dtype], cpu, -1, &made.tensor) == 0;
}

bool make_vector(Owned& made, std::int64_t size, Dtype dtype) noexcept {
    const std::int64_t one = 1;
    return make(made, 1, &size, &one, dtype);
}

bool make_none(Owned& made) noexcept { return torch.aoti_torch_new_uninitialized_tensor(&made.tensor) == 0; }

bool is_aligned(const void* data, Dtype dtype) noexcept { return reinterpret_cast<std::uintptr_t>(data) % SIZES[dtype] == 0; }

// x of a call, and what lies in memory as its output does.
struct Input {
    Tensor tensor;
    View view;
    Dtype dtype;
    bool last;  // channels
    bool direct;  // its memory can be used as it is
    std::ptrdiff_t outer, channels, inner;
    std::int64_t strides[MOST_DIMENSIONS];  // of the output

    Answer of(Tensor x) noexcept {
        tensor = x;
        if (!view.of(x)) return DEVICE;
        dtype = dtype_of(view.number);
        if (dtype == DTYPES) return DTYPE;
        if (view.dim < 2 || view.dim > MOST_DIMENSIONS) return SHAPE;
        std::int64_t rest = 1;
        for (std::int64_t d = 2; d < view.dim; ++d) rest *= view.sizes[d];
        const std::int64_t images = view.sizes[0];
        channels = view.sizes[1];
        if (images * channels * rest == 0) return EMPTY;
        const Order order = order_of(view.dim, view.sizes, view.strides);
        last = order == CHANNELS_LAST, direct = order != OTHER;
        outer = last ? images * rest : images, inner = last ? 1 : rest;
        std::int64_t step = last ? channels : 1;
        for (std::int64_t d = view.dim - 1; d > 1; --d) strides[d] = step, step *= view.sizes[d];
        strides[1] = last ? 1 : step;
        strides[0] = last ? step : step * channels;
        return TAKEN;
    }

    std::int64_t bytes() const noexcept { return outer * channels * inner * SIZES[dtype]; }

    bool make_like(Owned& made) const noexcept { return make(made, view.dim, view.sizes, strides, dtype); }

    // Whether a tensor of the same shape lies in memory as the output does.
    bool lies_like(const View& other) const noexcept {
        for (std::int64_t d = 0; d < view.dim; ++d)
            if (view.sizes[d] != 1 && other.strides[d] != strides[d]) return false;
        return true;
    }

    bool is_like(const View& other) const noexcept {
        return other.number == view.number && other.dim == view.dim &&
               std::memcmp(other.sizes, view.sizes, static_cast<std::size_t>(view.dim) * sizeof *view.sizes) == 0;
    }

    // Memory of a tensor that is like x, in the order of the output; if it must be copied, in `made`.
    const void* ordered(Tensor given, bool as_it_is, Owned& made) const noexcept {
        if (as_it_is) {
            const void* data = memory_of(given);
            if (is_aligned(data, dtype)) return data;
        }
        if (made.tensor == nullptr && !make_like(made)) return nullptr;
        return torch.aoti_torch_copy_(made.tensor, given, 0) == 0 ? memory_of(made.tensor) : nullptr;
    }
};

// A vector of channels among the arguments, or none.
struct Vector {
    Tensor tensor = nullptr;
    std::int64_t stride = 1;
};

// All of them: they share one dtype, that of x, or float32 beside 16 bits.
struct Parameters {
    const Input& x;
    Dtype dtype;
    Dtype arithmetic;
    bool any = false;
    Room& room;

    Parameters(const Input& input, Room& memory) noexcept
        : x(input), dtype(input.dtype), arithmetic(input.dtype == FLOAT64 ? FLOAT64 : FLOAT32), room(memory) {}

    Answer of(Tensor tensor, Vector& v) noexcept {
        if (tensor == nullptr) return TAKEN;
        View view;
        if (!view.of(tensor)) return DEVICE;
        const Dtype found = dtype_of(view.number);
        if (found == DTYPES || view.dim != 1 || view.sizes[0] != x.channels) return PARAMETERS;
        if (any ? found != dtype : found != x.dtype && !(found == FLOAT32 && SIZES[x.dtype] == 2)) return PARAMETERS;
        v.tensor = tensor, v.stride = view.strides[0];
        dtype = found, any = true;
        return TAKEN;
    }

    bool is_plain(const Vector& v, const void* data) const noexcept {
        return dtype == arithmetic && (v.stride == 1 || x.channels == 1) && is_aligned(data, dtype);
    }

    void* take() const noexcept { return room.take(static_cast<std::size_t>(x.channels * SIZES[arithmetic])); }

    // A vector in the type of the arithmetic, where it lies or in the room; false if there is no memory.
    template <class P>
    bool read(const Vector& v, P*& found) const noexcept {
        if (v.tensor == nullptr) return true;
        const void* data = memory_of(v.tensor);
        if (is_plain(v, data)) {
            found = const_cast<void*>(data);
            return true;
        }
        void* copy = take();
        if (data == nullptr || copy == nullptr) return false;
        convert(data, dtype, v.stride, copy, arithmetic, 1, x.channels);
        found = copy;
        return true;
    }

    // The same for one that will be written.
    bool read(const Vector& v, Running& found) const noexcept {
        found.is_double = arithmetic == FLOAT64;
        if (v.tensor == nullptr) return true;
        void* data = writable_memory_of(v.tensor);
        if (is_plain(v, data)) {
            found.data = data;
            return true;
        }
        return data != nullptr && read(v, found.data);
    }

    void write_back(const Vector& v, const Running& moved) const noexcept {
        if (v.tensor == nullptr) return;
        void* data = writable_memory_of(v.tensor);
        if (data != moved.data) convert(moved.data, arithmetic, 1, data, dtype, v.stride, x.channels);
    }

    // Whether the memory of a vector that is written overlaps that of another one.
    bool overlaps(const Vector& a, const Vector& b) const noexcept {
        return a.tensor != nullptr && b.tensor != nullptr && overlaps(a, memory_of(b.tensor), extent(b.stride));
    }
    bool overlaps(const Vector& a, const void* other, std::int64_t bytes) const noexcept {
        if (a.tensor == nullptr) return false;
        const char *first = static_cast<const char*>(memory_of(a.tensor)), *second = static_cast<const char*>(other);
        return first < second + bytes && second < first + extent(a.stride);
    }
    std::int64_t extent(std::int64_t stride) const noexcept { return ((x.channels - 1) * stride + 1) * SIZES[dtype]; }
};

// What a forward saves for the backward, a vector of channels; or what a backward returns.
struct Output {
    Owned made;
    void* data = nullptr;  // in the type of the arithmetic
    void* low = nullptr;

    // With what rounding takes away behind it, where that is `wanted`.
    bool make(const Parameters& p, bool wanted) noexcept {
        if (!wanted) {
            if (!make_vector(made, p.x.channels, p.dtype)) return false;
        } else if (!make_longer(p)) {
            return false;
        }
        void* memory = writable_memory_of(made.tensor);
        data = p.dtype == p.arithmetic ? memory : p.take();
        if (wanted) low = static_cast<char*>(memory) + rest_of_saved(p.x.channels, p.dtype);
        return memory != nullptr && data != nullptr;
    }

    // Write what is in the type of the arithmetic to the tensor.
    void finish(const Parameters& p) noexcept {
        void* memory = writable_memory_of(made.tensor);
        if (p.dtype != p.arithmetic) {
            convert(data, p.arithmetic, 1, memory, p.dtype, 1, p.x.channels);
            if (low != nullptr) subtract(static_cast<const float*>(data), memory, p.dtype, static_cast<float*>(low), p.x.channels);
        }
        if (low != nullptr) seal_saved(memory, p.x.channels, p.dtype);
    }

private:
    // A vector whose storage is longer than it is.
    bool make_longer(const Parameters& p) noexcept {
        const std::int64_t bytes = bytes_of_saved(p.x.channels, p.dtype, p.arithmetic), size = p.x.channels, one = 1;
        Owned storage;
        return make_vector(storage, (bytes + SIZES[p.dtype] - 1) / SIZES[p.dtype], p.dtype) &&
               torch.aoti_torch__reinterpret_tensor(storage.tensor, 1, &size, &one, 0, &made.tensor) == 0;
    }
};

// What rounding took away from a saved vector; null where nobody knows, as when a hook has copied the vector.
const void* rest_of(const Vector& v, const Parameters& p) noexcept {
    std::int64_t offset = 0, bytes = 0;
    if (v.stride != 1 || torch.aoti_torch_get_storage_offset(v.tensor, &offset) != 0 || offset != 0) return nullptr;
    if (torch.aoti_torch_get_storage_size(v.tensor, &bytes) != 0) return nullptr;
    if (bytes < bytes_of_saved(p.x.channels, p.dtype, p.arithmetic)) return nullptr;
    const char* data = static_cast<const char*>(memory_of(v.tensor));
    return is_sealed(data, p.x.channels, p.dtype) ? data + rest_of_saved(p.x.channels, p.dtype) : nullptr;
}

// Read a vector that a forward saved.
bool read_saved(const Vector& v, const Parameters& p, void*& found, void** low) noexcept {
    if (!p.read(v, found)) return false;
    const void* rest = rest_of(v, p);
    if (rest == nullptr) return true;
    if (p.dtype != p.arithmetic) {
        add(static_cast<float*>(found), static_cast<const float*>(rest), p.x.channels);
    } else if (low != nullptr) {
        *low = const_cast<void*>(rest);
    }
    return true;
}

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

struct Attempt {
    Operation operation;
    Dtype dtype;
    bool last;
    Tensor results[4];

    void found(const Input& x) noexcept { dtype = x.dtype, last = x.last; }

    void count(Answer answer) const noexcept {
        if (answer == OFF) return;  // whether such calls come here at all depends on other threads
        auto& counter = answer == TAKEN ? taken[operation][dtype][last] : declined[operation][answer];
        counter.fetch_add(1, std::memory_order_relaxed);
    }
};

// What follows a normalization.
struct Epilogue {
    Tensor residual = nullptr;
    Activation activation{};
    View view{};  // of the residual

    Answer of(const Input& x) noexcept {
        if (residual == nullptr) return TAKEN;
        if (!view.of(residual)) return DEVICE;
        return x.is_like(view) ? TAKEN : SHAPE;
    }
};

// input, weight?, bias?, running_mean?, running_var?, training, momentum, eps
Answer try_forward(const Slot* stack, Attempt& attempt, Epilogue after = {}) noexcept {
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
    if (!mean.make(p, true) || !invstd.make(p, p.dtype != p.arithmetic)) return MEMORY;
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

// Which gradients are wanted.
bool read_mask(Slot slot, bool (&wanted)[3]) noexcept {
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

// grad_out, input, weight?, running_mean?, running_var?, save_mean?, save_invstd?, train, eps, output_mask
// `of_residual` is whether the gradient of the residual is wanted; without an activation it is dy. `from_output` is whether
// the input is what the activation made of it.
Answer try_backward(const Slot* stack, Attempt& attempt, Epilogue after = {}, Tensor its_bias = nullptr, bool of_residual = false,
                    bool from_output = false) noexcept {
    const FloatMode mode;
    Input x;
    View dy;
    bool wanted[3];
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
    if (const Answer no = p.of(its_bias, bias)) return no;
    // Of the other statistics nothing is asked: they are empty, or of no use.
    Vector center, spread;
    if (const Answer no = p.of(optional_in(stack[frozen ? 3 : 5]), center)) return no;
    if (const Answer no = p.of(optional_in(stack[frozen ? 4 : 6]), spread)) return no;
    if (center.tensor == nullptr || spread.tensor == nullptr || (wanted[1] && weight.tensor == nullptr)) return ABSENT;
    const double eps = double_in(stack[8]);
    if (!(eps > 0)) return EPS;

    Call call = begin(x, attempt.operation);
    call.frozen = frozen;
    Owned dx, dresidual, copy_of_x, copy_of_dy, copy_of_residual;
    Output dweight, dbias;
    if (wanted[0]) {
        if (!x.make_like(dx)) return MEMORY;
        call.out = writable_memory_of(dx.tensor);
    }
    call.x = x.ordered(x.tensor, x.direct, copy_of_x);
    call.dy = x.ordered(tensor_in(stack[0]), x.lies_like(dy), wanted[0] ? dx : copy_of_dy);  // in place where it must be copied
    if (call.x == nullptr || call.dy == nullptr || !p.read(weight, call.weight)) return MEMORY;
    if (frozen) {
        void* var = nullptr;
        call.invstd = p.take();
        if (call.invstd == nullptr || !p.read(center, call.mean) || !p.read(spread, var)) return MEMORY;
        invert(var, eps, call.invstd, p.arithmetic, x.channels);
    } else if (!read_saved(center, p, call.mean, &call.mean_lo) || !read_saved(spread, p, call.invstd, nullptr)) {
        return MEMORY;
    }
    if (wanted[1] && !dweight.make(p, false)) return MEMORY;
    if (wanted[2] && !dbias.make(p, false)) return MEMORY;
    call.dweight = dweight.data, call.dbias = dbias.data;
    if (after.activation.kind != IDENTITY) {
        call.activation = after.activation, call.from_output = from_output;
        if (!p.read(bias, call.bias)) return MEMORY;
        if (after.residual != nullptr) call.residual = x.ordered(after.residual, x.lies_like(after.view), copy_of_residual);
        if (of_residual && x.make_like(dresidual)) call.dresidual = writable_memory_of(dresidual.tensor);
        if ((after.residual != nullptr && call.residual == nullptr) || (of_residual && call.dresidual == nullptr)) return MEMORY;
    }
    Owned* results[] = {&dx, &dweight.made, &dbias.made, &dresidual};
    for (int i = 0; i < 4; ++i)
        if (results[i]->tensor == nullptr && !make_none(*results[i])) return MEMORY;
    if (wanted[0] || wanted[1] || wanted[2] || of_residual)
        if (const Answer no = run(kernels.load()->backward, call)) return no;
    if (wanted[1]) dweight.finish(p);
    if (wanted[2]) dbias.finish(p);
    for (int i = 0; i < 4; ++i) attempt.results[i] = results[i]->release();
    return TAKEN;
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
    attempt.count(answer);
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
    attempt.count(answer);
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

Activation activation_in(Slot kind, Slot parameter) noexcept {
    const auto known = static_cast<std::int64_t>(kind) >= IDENTITY && static_cast<std::int64_t>(kind) <= GELU_TANH;
    return {known ? static_cast<int>(kind) : IDENTITY, double_in(parameter)};
}

// fastbn::batch_norm_forward: as native_batch_norm, then residual?, activation, parameter
void own_forward(Slot* stack, std::uint64_t, std::uint64_t) {
    Attempt attempt{};
    attempt.operation = bool_in(stack[5]) ? FORWARD : INFERENCE;
    const Answer answer = try_forward(stack, attempt, {optional_in(stack[8]), activation_in(stack[9], stack[10])});
    attempt.count(answer);
    delete_tensor(stack[0]);
    for (int i : {1, 2, 3, 4, 8}) delete_optional(stack[i]);
    if (answer != TAKEN) throw std::runtime_error(std::string("fastbn cannot compute this: ") + REASONS[answer]);
    for (int i = 0; i < 3; ++i) stack[i] = reinterpret_cast<Slot>(attempt.results[i]);
}

// fastbn::batch_norm_backward: as native_batch_norm_backward, then bias?, residual?, activation, parameter, of_residual, from_output
void own_backward(Slot* stack, std::uint64_t, std::uint64_t) {
    Attempt attempt{};
    attempt.operation = bool_in(stack[7]) ? BACKWARD : FROZEN_BACKWARD;
    const Epilogue after{optional_in(stack[11]), activation_in(stack[12], stack[13])};
    const Answer answer = try_backward(stack, attempt, after, optional_in(stack[10]), bool_in(stack[14]), bool_in(stack[15]));
    attempt.count(answer);
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

void withdraw_library() {
    if (library != nullptr) (void)torch.aoti_torch_delete_library_object(std::exchange(library, nullptr));
}

}  // namespace

const char* const REASONS[ANSWERS] = {
    "",
    "fastbn is disabled",
    "a tensor does not lie in this processor's memory",
    "x has another dtype than float32, float64, bfloat16 and float16",
    "x has fewer than 2 dimensions or more than 16, or another tensor is unlike x",
    "x is empty",
    "a parameter has another dtype or shape than torch takes",
    "a tensor that is needed is absent",
    "running statistics share memory with another tensor",
    "eps is not positive",
    "values are at the ends of the range",
    "memory ran out",
};

Order order_of(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides) noexcept {
    const auto follows = [&](std::int64_t d, std::int64_t& step) {
        if (sizes[d] == 1) return true;  // its stride is never used
        const bool fits = strides[d] == step;
        step *= sizes[d];
        return fits;
    };
    bool contiguous = true, last = dim == 4 || dim == 5;
    std::int64_t step = 1;
    for (std::int64_t d = dim - 1; d >= 0 && contiguous; --d) contiguous = follows(d, step);
    if (contiguous) return CONTIGUOUS;
    step = 1;
    last = last && follows(1, step);
    for (std::int64_t d = dim - 1; d > 1 && last; --d) last = follows(d, step);
    return last && follows(0, step) ? CHANNELS_LAST : OTHER;
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
    if (library == nullptr) {
        if (torch.aoti_torch_library_init_impl("aten", "CPU", "fastbn", 0, &library) != 0) return false;
        const bool both = torch.torch_library_impl(library, "native_batch_norm", native_batch_norm, VERSION) == 0 &&
                          torch.torch_library_impl(library, "native_batch_norm_backward", native_batch_norm_backward, VERSION) == 0;
        if (!both) {
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

bool define_operators() {
    static bool defined = false;
    if (defined) return true;
    Opaque *schemas = nullptr, *own = nullptr;  // never withdrawn
    if (torch.aoti_torch_library_init_def("fastbn", "fastbn", 0, &schemas) != 0) return false;
    if (torch.aoti_torch_library_def(schemas, OWN_FORWARD) != 0 || torch.aoti_torch_library_def(schemas, OWN_BACKWARD) != 0) return false;
    if (torch.aoti_torch_library_init_impl("fastbn", "CPU", "fastbn", 0, &own) != 0) return false;
    defined = torch.torch_library_impl(own, "batch_norm_forward", own_forward, VERSION) == 0 &&
              torch.torch_library_impl(own, "batch_norm_backward", own_backward, VERSION) == 0;
    return defined;
}

}  // namespace fastbn::torch
