// One register of NEON on aarch64. Each register_*.hpp has the same names; where one lacks some, storage.hpp has them for all.
#pragma once

#include <arm_neon.h>

namespace {
constexpr int REGISTER = 16;
}

#include "lanes.hpp"

namespace {

inline f32r multiply_add(f32r a, f32r b, f32r c) {
    return (f32r)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

inline f64r multiply_add(f64r a, f64r b, f64r c) {
    return (f64r)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}

// a where it is smaller, or larger, and else b: b where one of them is NaN, or both are zeros. x86 has just that.
template <class R> inline R min(R a, R b) { return select(a < b, a, b); }
template <class R> inline R max(R a, R b) { return select(a > b, a, b); }

// Whether a comparison holds in any lane.
template <class M> inline bool any(M mask) {
    return vmaxvq_u32((uint32x4_t)mask) != 0;
}

// Past the caches, where the ISA can; `p` is aligned to the register.
template <class R> inline void write_stream(void* p, R r) {
    write(p, r);
}

// Order streaming stores before whatever tells other threads that the data is there.
inline void fence() {}

// -- as many halves as a register has floats

typedef uint16x4_t half_register;

inline half_register read_half(const void* p) {
    return read<half_register>(p);
}

inline void write_half(void* p, half_register h) {
    write(p, h);
}

inline u32r zero_extend(half_register h) {
    return (u32r)vmovl_u16(h);
}

// Lanes below 2^16.
inline half_register truncate(u32r r) {
    return vmovn_u32((uint32x4_t)r);
}

// bf16: the upper half of a float, rounded to nearest even; a NaN keeps its sign and stays a NaN
inline f32r widen_half(half_register h, bf16) { return (f32r)(zero_extend(h) << 16); }
inline half_register narrow_half(f32r r, bf16) { return truncate(rounded_upper(r) >> 16); }

// f16
inline f32r widen_half(half_register h, f16) { return (f32r)vcvt_f32_f16(vreinterpret_f16_u16(h)); }
inline half_register narrow_half(f32r r, f16) { return vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)r)); }

// -- two registers of floats as one of halves

template <class T> inline f32r narrow_two(f32r a, f32r b, T) { return (f32r)vcombine_u16(narrow_half(a, T()), narrow_half(b, T())); }

// -- the first n lanes of a, then those of b

inline f32r blend_first(f32r a, f32r b, ptrdiff_t n) {
    return select(read<i32r>(ALL_THEN_NONE + 16 - n), a, b);
}

// The lanes of a where those of the mask are all ones, those of b where they are zeros.
template <class R> inline R select_bits(R mask, R a, R b) {
    return (R)(((u32r)a & (u32r)mask) | ((u32r)b & ~(u32r)mask));
}

// -- the lanes of a block's registers as doubles; the result is the number of registers of double

inline int widen_lanes(const f32r (&r)[BLOCK / REGISTER], f64r* t) {
    for (int i = 0; i < BLOCK / REGISTER; ++i) {
        t[2 * i] = f64r{r[i][0], r[i][1]};
        t[2 * i + 1] = f64r{r[i][2], r[i][3]};
    }
    return 2 * BLOCK / REGISTER;
}

// -- the sum of the lanes, over halves

inline double add_lanes(f64r r) {
    return r[0] + r[1];
}

}  // namespace
