// The arguments of a call, checked: x and what is like it, vectors of channels or of parts, what is saved and returned.
//
// - As torch's own kernel seen from outside: the same shapes, dtypes, strides, undefined tensors. An input in one of
//   torch's two orders of memory is used where it lies; one in any other is copied to the first, as torch's output is.
// - A reason is returned for what is not taken; nothing that the caller owns has been modified then.
#pragma once

#include <cstring>
#include <new>
#include <utility>

#include "door.hpp"
#include "pages.hpp"
#include "tensors.hpp"

namespace fastbn::torch {

constexpr std::int64_t MOST_DIMENSIONS = 16;

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

// The shape of a vector: of one dimension, or of several that lie densely one behind the other.
struct Sizes {
    std::int64_t dim = 0, count = 1, sizes[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];

    void add(std::int64_t size) noexcept {
        for (std::int64_t d = 0; d < dim; ++d) strides[d] *= size;
        sizes[dim] = size, strides[dim++] = 1;
        count *= size;
    }

    bool are_of(const View& view) const noexcept {
        return view.dim == dim && std::memcmp(view.sizes, sizes, static_cast<std::size_t>(dim) * sizeof *sizes) == 0;
    }
};

// x of a call, and what lies in memory as its output does.
struct Input {
    Tensor tensor;
    View view;
    Dtype dtype = DTYPES;
    bool last = false;  // channels
    bool direct = false;  // its memory can be used as it is
    std::ptrdiff_t outer, channels, inner;
    std::int64_t strides[MOST_DIMENSIONS];  // of the output

    // Images with channels.
    Answer of(Tensor x) noexcept {
        if (const Answer no = see(x)) return no;
        if (view.dim < 2) return SHAPE;
        std::int64_t rest = 1;
        for (std::int64_t d = 2; d < view.dim; ++d) rest *= view.sizes[d];
        const std::int64_t images = view.sizes[0];
        channels = view.sizes[1];
        if (images * channels * rest == 0) return EMPTY;
        const Order order = order_of(view.dim, view.sizes, view.strides);
        last = order == CHANNELS_LAST || order == GAPS, direct = order == CONTIGUOUS || order == CHANNELS_LAST;
        outer = last ? images * rest : images, inner = last ? 1 : rest;
        std::int64_t step = last ? channels : 1;
        for (std::int64_t d = view.dim - 1; d > 1; --d) strides[d] = step, step *= view.sizes[d];
        strides[1] = last ? 1 : step;
        strides[0] = last ? step : step * channels;
        return TAKEN;
    }

    // Rows of so many channels, which are the last axes.
    Answer of_rows(Tensor x, std::int64_t axes) noexcept {
        if (const Answer no = see(x)) return no;
        if (axes < 1 || view.dim < axes) return SHAPE;
        outer = channels = inner = 1;
        std::int64_t step = 1;
        for (std::int64_t d = view.dim - 1; d >= 0; --d) {
            strides[d] = step, step *= view.sizes[d];
            (d < view.dim - axes ? outer : channels) *= view.sizes[d];
        }
        last = false, direct = order_of(view.dim, view.sizes, view.strides) == CONTIGUOUS;
        return step == 0 ? EMPTY : TAKEN;
    }

    std::int64_t bytes() const noexcept { return outer * channels * inner * SIZES[dtype]; }

    bool make_like(Owned& made) const noexcept {
        if (!make(made, view.dim, view.sizes, strides, dtype)) return false;
        ask_for_large_pages(writable_memory_of(made.tensor), bytes());
        return true;
    }

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

private:
    Answer see(Tensor x) noexcept {
        tensor = x;
        if (!view.of(x)) return DEVICE;
        dtype = dtype_of(view.number);
        return dtype == DTYPES ? DTYPE : view.dim > MOST_DIMENSIONS ? SHAPE : TAKEN;
    }
};

// A vector among the arguments, or none.
struct Vector {
    Tensor tensor = nullptr;
    std::int64_t stride = 1, count = 0;
};

// All of them: they share one dtype, that of x, or float32 beside 16 bits.
struct Parameters {
    const Input& x;
    Sizes channels;
    Dtype dtype;
    Dtype arithmetic;
    bool any = false;
    Room& room;

    Parameters(const Input& input, Room& memory) noexcept
        : x(input), dtype(input.dtype), arithmetic(input.dtype == FLOAT64 ? FLOAT64 : FLOAT32), room(memory) {
        channels.add(input.channels);
    }

    Answer of(Tensor tensor, Vector& v) noexcept { return of(tensor, v, channels); }
    Answer of(Tensor tensor, Vector& v, const Sizes& sizes) noexcept {
        if (tensor == nullptr) return TAKEN;
        View view;
        if (!view.of(tensor)) return DEVICE;
        const Dtype found = dtype_of(view.number);
        if (found == DTYPES || !sizes.are_of(view)) return PARAMETERS;
        if (any ? found != dtype : found != x.dtype && !(found == FLOAT32 && SIZES[x.dtype] == 2)) return PARAMETERS;
        if (view.dim > 1 && order_of(view.dim, view.sizes, view.strides) != CONTIGUOUS) return PARAMETERS;
        v.tensor = tensor, v.stride = view.dim == 1 ? view.strides[0] : 1, v.count = sizes.count;
        dtype = found, any = true;
        return TAKEN;
    }

    bool is_plain(const Vector& v, const void* data) const noexcept {
        return dtype == arithmetic && (v.stride == 1 || v.count == 1) && is_aligned(data, dtype);
    }

    void* take() const noexcept { return take(channels.count); }
    void* take(std::int64_t count) const noexcept { return room.take(static_cast<std::size_t>(count * SIZES[arithmetic])); }

    // A vector in the type of the arithmetic, where it lies or in the room; false if there is no memory.
    template <class P>
    bool read(const Vector& v, P*& found) const noexcept {
        if (v.tensor == nullptr) return true;
        const void* data = memory_of(v.tensor);
        if (is_plain(v, data)) {
            found = const_cast<void*>(data);
            return true;
        }
        void* copy = take(v.count);
        if (data == nullptr || copy == nullptr) return false;
        convert(data, dtype, v.stride, copy, arithmetic, 1, v.count);
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
        if (data != moved.data) convert(moved.data, arithmetic, 1, data, dtype, v.stride, v.count);
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

// What a forward saves for the backward, a vector; or what a backward returns.
struct Output {
    Owned made;
    void* data = nullptr;  // in the type of the arithmetic
    void* low = nullptr;
    std::int64_t count = 0;

    // With what rounding takes away behind it, where that is `wanted`.
    bool make(const Parameters& p, const Sizes& sizes, bool wanted) noexcept {
        count = sizes.count;
        if (!(wanted ? make_longer(p, sizes) : fastbn::torch::make(made, sizes.dim, sizes.sizes, sizes.strides, p.dtype))) return false;
        void* memory = writable_memory_of(made.tensor);
        data = p.dtype == p.arithmetic ? memory : p.take(count);
        if (wanted) low = static_cast<char*>(memory) + rest_of_saved(count, p.dtype);
        return memory != nullptr && data != nullptr;
    }

    // Write what is in the type of the arithmetic to the tensor.
    void finish(const Parameters& p) noexcept {
        void* memory = writable_memory_of(made.tensor);
        if (p.dtype != p.arithmetic) {
            convert(data, p.arithmetic, 1, memory, p.dtype, 1, count);
            if (low != nullptr) subtract(static_cast<const float*>(data), memory, p.dtype, static_cast<float*>(low), count);
        }
        if (low != nullptr) seal_saved(memory, count, p.dtype);
    }

private:
    // A vector whose storage is longer than it is.
    bool make_longer(const Parameters& p, const Sizes& sizes) noexcept {
        const std::int64_t bytes = bytes_of_saved(sizes.count, p.dtype, p.arithmetic);
        Owned storage;
        return make_vector(storage, (bytes + SIZES[p.dtype] - 1) / SIZES[p.dtype], p.dtype) &&
               torch.aoti_torch__reinterpret_tensor(storage.tensor, sizes.dim, sizes.sizes, sizes.strides, 0, &made.tensor) == 0;
    }
};

// What rounding took away from a saved vector; null where nobody knows, as when a hook has copied the vector.
inline const void* rest_of(const Vector& v, const Parameters& p) noexcept {
    std::int64_t offset = 0, bytes = 0;
    if (v.stride != 1 || torch.aoti_torch_get_storage_offset(v.tensor, &offset) != 0 || offset != 0) return nullptr;
    if (torch.aoti_torch_get_storage_size(v.tensor, &bytes) != 0) return nullptr;
    if (bytes < bytes_of_saved(v.count, p.dtype, p.arithmetic)) return nullptr;
    const char* data = static_cast<const char*>(memory_of(v.tensor));
    return is_sealed(data, v.count, p.dtype) ? data + rest_of_saved(v.count, p.dtype) : nullptr;
}

// Read a vector that a forward saved.
inline bool read_saved(const Vector& v, const Parameters& p, void*& found, void** low) noexcept {
    if (!p.read(v, found)) return false;
    const void* rest = rest_of(v, p);
    if (rest == nullptr) return true;
    if (p.dtype != p.arithmetic) {
        add(static_cast<float*>(found), static_cast<const float*>(rest), v.count);
    } else if (low != nullptr) {
        *low = const_cast<void*>(rest);
    }
    return true;
}

// What follows a normalization.
struct Epilogue {
    Tensor residual = nullptr;
    Activation activation{};
    // A backward's: the normalization's bias; whether the residual's gradient is wanted (without an activation it is dy);
    // whether the input is what the activation made of it.
    Tensor bias = nullptr;
    bool of_residual = false, from_output = false;
    View view{};  // of the residual

    Answer of(const Input& x) noexcept {
        if (residual == nullptr) return TAKEN;
        if (!view.of(residual)) return DEVICE;
        return x.is_like(view) ? TAKEN : SHAPE;
    }
};

}  // namespace fastbn::torch
