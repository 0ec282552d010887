// One register of SSE 4.2: no fused multiply-add, and f16 by integers. Each register_*.hpp has the same names; where one lacks some, storage.hpp has them for all.
#pragma once

#include <immintrin.h>

namespace {
constexpr int REGISTER = 16;
}

#include "lanes.hpp"

namespace {

inline f32r multiply_add(f32r a, f32r b, f32r c) {
    return a * b + c;
}

inline f64r multiply_add(f64r a, f64r b, f64r c) {
    return a * b + c;
}

// a where it is smaller, or larger, and else b: b where one of them is NaN, or both are zeros. x86 has just that.
template <class R> inline R min(R a, R b) { return select(a < b, a, b); }
template <class R> inline R max(R a, R b) { return select(a > b, a, b); }

// Whether a comparison holds in any lane.
template <class M> inline bool any(M mask) {
    return !_mm_testz_si128((__m128i)mask, (__m128i)mask);
}

// Past the caches, where the ISA can; `p` is aligned to the register.
template <class R> inline void write_stream(void* p, R r) {
    _mm_stream_ps(static_cast<float*>(p), (__m128)r);
}

// Order streaming stores before whatever tells other threads that the data is there.
inline void fence() { _mm_sfence(); }

// -- as many halves as a register has floats

typedef __m128i half_register;  // SSE uses its lower 64 bits

inline half_register read_half(const void* p) {
    return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}

inline void write_half(void* p, half_register h) {
    _mm_storel_epi64(static_cast<__m128i*>(p), h);
}

inline u32r zero_extend(half_register h) {
    return (u32r)_mm_cvtepu16_epi32(h);
}

// Lanes below 2^16.
inline half_register truncate(u32r r) {
    return _mm_packus_epi32((__m128i)r, (__m128i)r);
}

// bf16: the upper half of a float, rounded to nearest even; a NaN keeps its sign and stays a NaN
inline f32r widen_half(half_register h, bf16) { return (f32r)(zero_extend(h) << 16); }
inline half_register narrow_half(f32r r, bf16) { return truncate(rounded_upper(r) >> 16); }

// f16, which has no instructions of its own
inline f32r constant(float value) { return f32r{} + value; }

inline f32r widen_half(half_register h, f16) {
    const u32r bits = zero_extend(h);
    const u32r magnitude = bits & 0x7fff;
    // The exponent moves from a bias of 15 to 127 by a multiplication, which also normalizes subnormals.
    const f32r finite = (f32r)(magnitude << 13) * constant(0x1p112f);
    const u32r special = (magnitude << 13) | 0x7f800000;
    const u32r wide = select((u32r)(magnitude >= 0x7c00), special, (u32r)finite);
    return (f32r)(wide | ((bits & 0x8000) << 16));
}

inline u32r rounded_half(f32r r) {
    const u32r bits = (u32r)r;
    const u32r sign = (bits >> 16) & 0x8000;
    const u32r magnitude = bits & 0x7fffffff;
    // Subnormal halves: adding 0.5 leaves the value, rounded to nearest even, in the lowest bits.
    const u32r subnormal = (u32r)((f32r)magnitude + constant(0.5f)) - 0x3f000000;
    const u32r normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    u32r half = select((u32r)(magnitude < 0x38800000), subnormal, normal);
    half = select((u32r)(magnitude >= 0x47800000), (u32r{} + 0x7c00), half);
    half = select((u32r)(magnitude > 0x7f800000), ((magnitude >> 13) & 0x7fff) | 0x7e00, half);
    return half | sign;
}

inline half_register narrow_half(f32r r, f16) { return truncate(rounded_half(r)); }

// -- two registers of floats as one of halves

inline f32r narrow_two(f32r a, f32r b, bf16) {
    return (f32r)_mm_packus_epi32((__m128i)(rounded_upper(a) >> 16), (__m128i)(rounded_upper(b) >> 16));
}
inline f32r narrow_two(f32r a, f32r b, f16) { return (f32r)_mm_packus_epi32((__m128i)rounded_half(a), (__m128i)rounded_half(b)); }

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
