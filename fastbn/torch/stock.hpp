// Torch's own kernels of layer and group norm, to which calls are left that fastbn does not take.
//
// They have no second name in torch's dispatcher, as those of batch norm have, so they are called as what they are:
// functions of C++, found at run time by their full names. A name holds the types of all arguments: in a torch where one
// of these has changed it is not found, and layer and group norm stay torch's. A tensor is one pointer there; the types
// here have the size of torch's, and are passed as these are.
#pragma once

#include <array>
#include <iterator>
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.hpp"

namespace fastbn::torch {

// What lies where a handle points. It is never deleted here: arguments are the stack's, results go there.
struct Held {
    void* tensor = nullptr;
    Held() = default;
    Held(const Held& other) noexcept : tensor(other.tensor) {}
    Held& operator=(const Held&) = default;
    ~Held() {}  // not trivial, so that results are returned in memory, as torch's are
};
static_assert(sizeof(Held) == sizeof(void*) && sizeof(std::optional<Held>) == 2 * sizeof(void*));

struct Integers {
    const std::int64_t* data;
    std::size_t size;
};

// An argument that is a list of integers, one for each of some axes, of which torch sets no limit.
struct List {
    std::int64_t near[16];
    std::vector<std::int64_t> far;  // all of them, where they are more
    std::int64_t* data = near;
    std::size_t size = 0;

    explicit List(Slot slot) {
        Opaque* list = reinterpret_cast<Opaque*>(slot);
        std::size_t found = 0;
        if (torch.torch_list_size(list, &found) != 0) return;
        if (found > std::size(near)) {
            far.resize(found);
            data = far.data();
        }
        for (Slot item; size < found; ++size) {
            if (torch.torch_list_get_item(list, size, &item) != 0) return;
            data[size] = long_in(item);
        }
    }
    List(const List&) = delete;
    List& operator=(const List&) = delete;
    operator Integers() const noexcept { return {data, size}; }
};

using Three = std::tuple<Held, Held, Held>;
using Maybe = std::optional<Held>;
using Mask = std::array<bool, 3>;

// name, name in C++, arguments
#define FASTBN_TORCH_STOCK(FUNCTION)                                                                                        \
    FUNCTION(layer_norm, "_ZN2at3cpu17native_layer_normERKNS_6TensorEN3c108ArrayRefIlEERKSt8optionalIS1_ESA_d",             \
             (const Held&, Integers, const Maybe&, const Maybe&, double))                                                   \
    FUNCTION(layer_norm_backward,                                                                                           \
             "_ZN2at3cpu26native_layer_norm_backwardERKNS_6TensorES3_N3c108ArrayRefIlEES3_S3_RKSt8optionalIS1_ESA_"         \
             "St5arrayIbLm3EE",                                                                                             \
             (const Held&, const Held&, Integers, const Held&, const Held&, const Maybe&, const Maybe&, Mask))              \
    FUNCTION(group_norm, "_ZN2at3cpu17native_group_normERKNS_6TensorERKSt8optionalIS1_ES7_lllld",                           \
             (const Held&, const Maybe&, const Maybe&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, double))     \
    FUNCTION(group_norm_backward,                                                                                           \
             "_ZN2at3cpu26native_group_norm_backwardERKNS_6TensorES3_S3_S3_RKSt8optionalIS1_EllllSt5arrayIbLm3EE",          \
             (const Held&, const Held&, const Held&, const Held&, const Maybe&, std::int64_t, std::int64_t, std::int64_t,   \
              std::int64_t, Mask))

struct Stock {
#define FASTBN_MEMBER(name, full, arguments) Three(*name) arguments;
    FASTBN_TORCH_STOCK(FASTBN_MEMBER)
#undef FASTBN_MEMBER
};

extern Stock stock;  // all null where one of them was not found

inline const Held& held(Slot slot) noexcept { return *reinterpret_cast<const Held*>(slot); }

inline Maybe maybe(Slot slot) noexcept {
    const Tensor tensor = optional_in(slot);
    return tensor == nullptr ? Maybe() : Maybe(*reinterpret_cast<const Held*>(tensor));
}

}  // namespace fastbn::torch
