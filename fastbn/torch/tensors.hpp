// Torch's tensors as the door needs them: what a stack's slots hold, who deletes it, and where memory is.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "saved.hpp"
#include "stable.hpp"

namespace fastbn::torch {

extern std::int32_t cpu, strided, numbers[DTYPES];  // torch's own

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

inline Tensor tensor_in(Slot slot) noexcept { return reinterpret_cast<Tensor>(slot); }
inline Slot* box_in(Slot slot) noexcept { return reinterpret_cast<Slot*>(slot); }
inline bool bool_in(Slot slot) noexcept { return (slot & 0xff) != 0; }
inline std::int64_t long_in(Slot slot) noexcept { return static_cast<std::int64_t>(slot); }
inline double double_in(Slot slot) noexcept {
    double value;
    std::memcpy(&value, &slot, sizeof value);
    return value;
}

// Of an argument `Tensor?`: null where there is none. It may also be a tensor that is none.
inline Tensor optional_in(Slot slot) noexcept {
    if (slot == 0) return nullptr;
    const Tensor tensor = tensor_in(*box_in(slot));
    bool defined = false;
    return torch.aoti_torch_is_defined(tensor, &defined) == 0 && defined ? tensor : nullptr;
}

inline void delete_box(Slot slot) noexcept {
    if (torch.torch_delete_stable_ivalue != nullptr) {
        (void)torch.torch_delete_stable_ivalue(box_in(slot));
    } else {
        ::operator delete(box_in(slot));  // as torch made it
    }
}

inline void delete_tensor(Slot slot) noexcept { (void)torch.aoti_torch_delete_tensor_object(tensor_in(slot)); }

inline void delete_optional(Slot slot) noexcept {
    if (slot == 0) return;
    delete_tensor(*box_in(slot));
    delete_box(slot);
}

// An argument `Tensor?` as a `Tensor`: one that is none where there is none.
inline Slot unboxed(Slot slot) {
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

inline const void* memory_of(Tensor tensor) noexcept {
    const void* data = nullptr;
    return torch.torch_get_const_data_ptr(tensor, &data) == 0 ? data : nullptr;
}

inline void* writable_memory_of(Tensor tensor) noexcept {
    void* data = nullptr;
    return torch.torch_get_mutable_data_ptr(tensor, &data) == 0 ? data : nullptr;
}

inline Dtype dtype_of(std::int32_t number) noexcept {
    int i = 0;
    while (i < DTYPES && numbers[i] != number) ++i;
    return static_cast<Dtype>(i);
}

inline bool make(Owned& made, std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides, Dtype dtype) noexcept {
    return torch.aoti_torch_empty_strided(dim, sizes, strides, numbers[dtype], cpu, -1, &made.tensor) == 0;
}

inline bool make_vector(Owned& made, std::int64_t size, Dtype dtype) noexcept {
    const std::int64_t one = 1;
    return make(made, 1, &size, &one, dtype);
}

inline bool make_none(Owned& made) noexcept { return torch.aoti_torch_new_uninitialized_tensor(&made.tensor) == 0; }

inline bool is_aligned(const void* data, Dtype dtype) noexcept { return reinterpret_cast<std::uintptr_t>(data) % SIZES[dtype] == 0; }

}  // namespace fastbn::torch
