// What is the same for registers of any width: the storage types, the vector types, and what the compiler's own operators do.
//
// Each register_*.hpp sets REGISTER and includes this. GCC compiles vector types of the native width well and wider ones
// badly, so a block is an array of registers (block.hpp).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "plan.hpp"

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Everything is internal to the module: code compiled for a wide ISA must not be merged with another module's.
namespace {

using std::ptrdiff_t;

using fastbn::BLOCK;
using fastbn::LINE;

template <class T> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };
template <class T> using arithmetic = typename Arithmetic<T>::type;

typedef float f32r __attribute__((vector_size(REGISTER)));
typedef double f64r __attribute__((vector_size(REGISTER)));
typedef int32_t i32r __attribute__((vector_size(REGISTER)));
typedef uint32_t u32r __attribute__((vector_size(REGISTER)));
typedef int64_t i64r __attribute__((vector_size(REGISTER)));
template <class C> struct Register { using type = f32r; };
template <> struct Register<double> { using type = f64r; };

// A comparison is all ones where it holds; choose takes `a` there and `b` elsewhere.
template <class R, class M> inline R select(M mask, R a, R b) { return mask ? a : b; }

template <class R> struct Unaligned { typedef R type __attribute__((aligned(1), may_alias)); };

template <class R> inline R read(const void* p) { return *static_cast<const typename Unaligned<R>::type*>(p); }
template <class R> inline void write(void* p, R r) { *static_cast<typename Unaligned<R>::type*>(p) = r; }

// Copy fewer than 16 elements in pieces of constant size.
template <class T> inline void copy_few(void* to, const void* from, ptrdiff_t n) {
    char* t = static_cast<char*>(to);
    const char* f = static_cast<const char*>(from);
    if (n & 8) std::memcpy(t, f, 8 * sizeof(T)), t += 8 * sizeof(T), f += 8 * sizeof(T);
    if (n & 4) std::memcpy(t, f, 4 * sizeof(T)), t += 4 * sizeof(T), f += 4 * sizeof(T);
    if (n & 2) std::memcpy(t, f, 2 * sizeof(T)), t += 2 * sizeof(T), f += 2 * sizeof(T);
    if (n & 1) std::memcpy(t, f, sizeof(T));
}

// A float rounded to bf16, in the upper half of each lane; the lower is anything.
inline u32r rounded_upper(f32r r) {
    const u32r bits = (u32r)r;
    return select(r != r, bits | 0x400000, bits + 0x7fff + ((bits >> 16) & 1));
}

// Lanes of a block by number.
template <class C> struct Counted {
    alignas(LINE) C from_0[BLOCK / sizeof(C)] = {};
    constexpr Counted() {
        for (ptrdiff_t i = 0; i < (ptrdiff_t)(BLOCK / sizeof(C)); ++i) from_0[i] = (C)i;
    }
};

// The first n of 16 lanes are all ones where reading starts at index 16 - n.
alignas(64) constexpr int32_t ALL_THEN_NONE[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

}  // namespace
