// The arguments of a call, checked: x and what is like it, vectors of channels, what is saved and returned.
//
// - As torch's own kernel seen from outside: the same shapes, dtypes, strides, undefined tensors. An input in one of
//   torch's two orders of memory is used where it lies; one in any other is copied to the first, as torch's output is.
// - A reason is returned for what is not taken; nothing that the caller owns has been modified then.
#pragma once

#include <cstring>
#include <new>
#include <utility>

#include "door.hpp"
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
inline const void* rest_of(const Vector& v, const Parameters& p) noexcept {
    std::int64_t offset = 0, bytes = 0;
    if (v.stride != 1 || torch.aoti_torch_get_storage_offset(v.tensor, &offset) != 0 || offset != 0) return nullptr;
    if (torch.aoti_torch_get_storage_size(v.tensor, &bytes) != 0) return nullptr;
    if (bytes < bytes_of_saved(p.x.channels, p.dtype, p.arithmetic)) return nullptr;
    const char* data = static_cast<const char*>(memory_of(v.tensor));
    return is_sealed(data, p.x.channels, p.dtype) ? data + rest_of_saved(p.x.channels, p.dtype) : nullptr;
}

// Read a vector that a forward saved.
inline bool read_saved(const Vector& v, const Parameters& p, void*& found, void** low) noexcept {
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
