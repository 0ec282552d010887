// The functions of PyTorch that the door calls: those of its stable C interface, found at run time.
//
// No header of torch is needed, nothing is linked with it: one binary is for every torch from 2.10 on. A torch without
// one of the functions is refused when it is enabled, so a call finds all of them.
#pragma once

#include <cstdint>
#include <string>

namespace fastbn::torch {

struct Opaque;
using Tensor = Opaque*;  // a handle, owned by whoever holds it
using Slot = std::uint64_t;  // an argument or a result of a kernel: a handle, a number, or a pointer
using Error = std::int32_t;  // 0: none

using kernel_fn = void (*)(Slot* stack, std::uint64_t arguments, std::uint64_t results);
using range_fn = void (*)(std::int64_t begin, std::int64_t end, void* data);

// The interface of torch 2.10, in torch's own encoding.
constexpr std::uint64_t VERSION = std::uint64_t{2} << 56 | std::uint64_t{10} << 48;

// name, result, arguments
#define FASTBN_TORCH_FUNCTIONS(FUNCTION)                                                                                    \
    FUNCTION(aoti_torch_device_type_cpu, std::int32_t, ())                                                                  \
    FUNCTION(aoti_torch_layout_strided, std::int32_t, ())                                                                   \
    FUNCTION(aoti_torch_dtype_float32, std::int32_t, ())                                                                    \
    FUNCTION(aoti_torch_dtype_float64, std::int32_t, ())                                                                    \
    FUNCTION(aoti_torch_dtype_bfloat16, std::int32_t, ())                                                                   \
    FUNCTION(aoti_torch_dtype_float16, std::int32_t, ())                                                                    \
    FUNCTION(aoti_torch_is_defined, Error, (Tensor, bool*))                                                                 \
    FUNCTION(aoti_torch_get_device_type, Error, (Tensor, std::int32_t*))                                                    \
    FUNCTION(aoti_torch_get_layout, Error, (Tensor, std::int32_t*))                                                         \
    FUNCTION(aoti_torch_get_dtype, Error, (Tensor, std::int32_t*))                                                          \
    FUNCTION(aoti_torch_get_dim, Error, (Tensor, std::int64_t*))                                                            \
    FUNCTION(aoti_torch_get_sizes, Error, (Tensor, std::int64_t**))                                                         \
    FUNCTION(aoti_torch_get_strides, Error, (Tensor, std::int64_t**))                                                       \
    FUNCTION(aoti_torch_get_storage_offset, Error, (Tensor, std::int64_t*))                                                 \
    FUNCTION(aoti_torch_get_storage_size, Error, (Tensor, std::int64_t*))                                                   \
    FUNCTION(torch_get_const_data_ptr, Error, (Tensor, const void**))                                                       \
    FUNCTION(torch_get_mutable_data_ptr, Error, (Tensor, void**))                                                           \
    FUNCTION(aoti_torch_empty_strided, Error,                                                                               \
             (std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t, std::int32_t, std::int32_t, Tensor*))   \
    FUNCTION(aoti_torch__reinterpret_tensor, Error,                                                                         \
             (Tensor, std::int64_t, const std::int64_t*, const std::int64_t*, std::int64_t, Tensor*))                       \
    FUNCTION(aoti_torch_new_uninitialized_tensor, Error, (Tensor*))                                                         \
    FUNCTION(aoti_torch_copy_, Error, (Tensor, Tensor, std::int32_t))                                                       \
    FUNCTION(aoti_torch_delete_tensor_object, Error, (Tensor))                                                              \
    FUNCTION(torch_list_get_item, Error, (Opaque*, std::size_t, Slot*))                                                     \
    FUNCTION(torch_list_size, Error, (Opaque*, std::size_t*))                                                               \
    FUNCTION(torch_delete_list, Error, (Opaque*))                                                                           \
    FUNCTION(torch_get_num_threads, Error, (std::uint32_t*))                                                                \
    FUNCTION(torch_parallel_for, Error, (std::int64_t, std::int64_t, std::int64_t, range_fn, void*))                        \
    FUNCTION(torch_call_dispatcher, Error, (const char*, const char*, Slot*, std::uint64_t))                                \
    FUNCTION(torch_library_impl, Error, (Opaque*, const char*, kernel_fn, std::uint64_t))                                   \
    FUNCTION(aoti_torch_library_init_def, Error, (const char*, const char*, std::uint32_t, Opaque**))                       \
    FUNCTION(aoti_torch_library_def, Error, (Opaque*, const char*))                                                         \
    FUNCTION(aoti_torch_library_init_impl, Error, (const char*, const char*, const char*, std::uint32_t, Opaque**))         \
    FUNCTION(aoti_torch_delete_library_object, Error, (Opaque*))

// Newer ones, which are null in an older torch.
#define FASTBN_TORCH_NEWER_FUNCTIONS(FUNCTION)                                   \
    FUNCTION(torch_delete_stable_ivalue, Error, (Slot*))                         \
    FUNCTION(torch_exception_get_what_without_backtrace, const char*, ())

struct Functions {
#define FASTBN_MEMBER(name, result, arguments) result(*name) arguments;
    FASTBN_TORCH_FUNCTIONS(FASTBN_MEMBER)
    FASTBN_TORCH_NEWER_FUNCTIONS(FASTBN_MEMBER)
#undef FASTBN_MEMBER
};

extern Functions torch;

// Find all of them in the torch that this process has loaded; an empty text, or what is missing.
std::string find_torch();

}  // namespace fastbn::torch
