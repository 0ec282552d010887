// One register of AVX2 with FMA and F16C. Each register_*.hpp has the same names; where one lacks some, storage.hpp has them for all.
#pragma once

#include <immintrin.h>

namespace {
constexpr int REGISTER = 32;
}

#include "lanes.hpp"

namespace {

inline f32r multiply_add(f32r a, f32r b, f32r c) {
    return (f32r)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

inline f64r multiply_add(f64r a, f64r b, f64r c) {
    return (f64r)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

// a where it is smaller, or larger, and else b: b where one of them is NaN, or both are zeros. x86 has just that.
inline f32r min(f32r a, f32r b) { return (f32r)_mm256_min_ps((__m256)a, (__m256)b); }
inline f32r max(f32r a, f32r b) { return (f32r)_mm256_max_ps((__m256)a, (__m256)b); }
inline f64r min(f64r a, f64r b) { return (f64r)_mm256_min_pd((__m256d)a, (__m256d)b); }
inline f64r max(f64r a, f64r b) { return (f64r)_mm256_max_pd((__m256d)a, (__m256d)b); }

// Whether a comparison holds in any lane.
template <class M> inline bool any(M mask) {
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
}

// Past the caches, where the ISA can; `p` is aligned to the register.
template <class R> inline void write_stream(void* p, R r) {
    _mm256_stream_ps(static_cast<float*>(p), (__m256)r);
}

// Order streaming stores before whatever tells other threads that the data is there.
inline void fence() { _mm_sfence(); }

// -- as many halves as a register has floats

typedef __m128i half_register;

inline half_register read_half(const void* p) {
    return read<half_register>(p);
}

inline void write_half(void* p, half_register h) {
    write(p, h);
}

inline u32r zero_extend(half_register h) {
    return (u32r)_mm256_cvtepu16_epi32(h);
}

// Lanes below 2^16.
inline half_register truncate(u32r r) {
    const __m256i packed = _mm256_packus_epi32((__m256i)r, (__m256i)r);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

// bf16: the upper half of a float, rounded to nearest even; a NaN keeps its sign and stays a NaN
inline f32r widen_half(half_register h, bf16) { return (f32r)(zero_extend(h) << 16); }
inline half_register narrow_half(f32r r, bf16) { return truncate(rounded_upper(r) >> 16); }

// f16
inline f32r widen_half(half_register h, f16) { return (f32r)_mm256_cvtph_ps(h); }
inline half_register narrow_half(f32r r, f16) { return _mm256_cvtps_ph((__m256)r, _MM_FROUND_TO_NEAREST_INT); }

// -- two registers of floats as one of halves

inline f32r narrow_two(f32r a, f32r b, bf16) {
    const __m256i packed = _mm256_packus_epi32((__m256i)(rounded_upper(a) >> 16), (__m256i)(rounded_upper(b) >> 16));
    return (f32r)_mm256_permute4x64_epi64(packed, 0xd8);
}
inline f32r narrow_two(f32r a, f32r b, f16) { return (f32r)_mm256_set_m128i(narrow_half(b, f16()), narrow_half(a, f16())); }

// -- the first n lanes of a, then those of b

inline f32r blend_first(f32r a, f32r b, ptrdiff_t n) {
    return (f32r)_mm256_blendv_ps((__m256)b, (__m256)a, read<__m256>(ALL_THEN_NONE + 16 - n));
}

// The lanes of a where those of the mask are all ones, those of b where they are zeros.
template <class R> inline R select_bits(R mask, R a, R b) {
    return (R)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
}

// The same of registers whose lanes are equal: one instruction instead of three, after one for all registers of a block.
inline f32r select_equal(f32r mask, f32r a, f32r b) {
    return (f32r)_mm256_permutevar_ps(_mm256_unpacklo_ps((__m256)b, (__m256)a), (__m256i)mask);
}
inline f64r select_equal(f64r mask, f64r a, f64r b) {
    return (f64r)_mm256_permutevar_pd(_mm256_unpacklo_pd((__m256d)b, (__m256d)a), (__m256i)mask);
}

// -- the first n lanes of a register, 0 < n < lanes; of other types by storage.hpp

// Masked loads are fast everywhere; masked stores are not on AMD, so those go in pieces.
inline f32r widen_part(const float* p, ptrdiff_t n) {
    return (f32r)_mm256_maskload_ps(p, read<__m256i>(ALL_THEN_NONE + 16 - n));
}
inline f64r widen_part(const double* p, ptrdiff_t n) {
    return (f64r)_mm256_maskload_pd(p, read<__m256i>(ALL_THEN_NONE + 16 - 2 * n));
}

// -- the lanes of a block's registers as doubles; the result is the number of registers of double

inline int widen_lanes(const f32r (&r)[BLOCK / REGISTER], f64r* t) {
    for (int i = 0; i < BLOCK / REGISTER; ++i) {
        t[2 * i] = (f64r)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)r[i]));
        t[2 * i + 1] = (f64r)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)r[i], 1));
    }
    return 2 * BLOCK / REGISTER;
}

// -- the sum of the lanes, over halves

inline double add_lanes(f64r r) {
    const __m256d four = (__m256d)r;
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return two[0] + two[1];
}

}  // namespace
