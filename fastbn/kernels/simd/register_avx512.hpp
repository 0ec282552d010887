// One register of AVX-512 (F, BW, DQ, VL). Each register_*.hpp has the same names; where one lacks some, storage.hpp has them for all.
#pragma once

#include <immintrin.h>

namespace {
constexpr int REGISTER = 64;
}

#include "lanes.hpp"

namespace {

inline f32r multiply_add(f32r a, f32r b, f32r c) {
    return (f32r)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

inline f64r multiply_add(f64r a, f64r b, f64r c) {
    return (f64r)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

// a where it is smaller, or larger, and else b: b where one of them is NaN, or both are zeros. x86 has just that.
inline f32r min(f32r a, f32r b) { return (f32r)_mm512_min_ps((__m512)a, (__m512)b); }
inline f32r max(f32r a, f32r b) { return (f32r)_mm512_max_ps((__m512)a, (__m512)b); }
inline f64r min(f64r a, f64r b) { return (f64r)_mm512_min_pd((__m512d)a, (__m512d)b); }
inline f64r max(f64r a, f64r b) { return (f64r)_mm512_max_pd((__m512d)a, (__m512d)b); }

// Whether a comparison holds in any lane.
template <class M> inline bool any(M mask) {
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}

// Past the caches, where the ISA can; `p` is aligned to the register.
template <class R> inline void write_stream(void* p, R r) {
    _mm512_stream_ps(static_cast<float*>(p), (__m512)r);
}

// Order streaming stores before whatever tells other threads that the data is there.
inline void fence() { _mm_sfence(); }

// -- as many halves as a register has floats

typedef __m256i half_register;

inline half_register read_half(const void* p) {
    return read<half_register>(p);
}

inline void write_half(void* p, half_register h) {
    write(p, h);
}

inline u32r zero_extend(half_register h) {
    return (u32r)_mm512_cvtepu16_epi32(h);
}

// Lanes below 2^16.
inline half_register truncate(u32r r) {
    return _mm512_cvtepi32_epi16((__m512i)r);
}

// bf16: the upper half of a float, rounded to nearest even; a NaN keeps its sign and stays a NaN
inline f32r widen_half(half_register h, bf16) {
    alignas(64) static constexpr uint16_t upper[32] = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7,
                                                       0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    return (f32r)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, read<__m512i>(upper), _mm512_castsi256_si512(h));
}
// As `rounded_upper`, in fewer instructions.
inline u32r rounded(f32r r) {
    const __m512i bits = (__m512i)r;
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i nearest = _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)r, (__m512)r, _CMP_UNORD_Q);
    return (u32r)_mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
}
inline half_register narrow_half(f32r r, bf16) { return truncate(rounded(r) >> 16); }

// f16
inline f32r widen_half(half_register h, f16) { return (f32r)_mm512_cvtph_ps(h); }
inline half_register narrow_half(f32r r, f16) { return _mm512_cvtps_ph((__m512)r, _MM_FROUND_TO_NEAREST_INT); }

// -- two registers of floats as one of halves

inline f32r narrow_two(f32r a, f32r b, bf16) {
    alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (f32r)_mm512_permutex2var_epi16((__m512i)rounded(a), read<__m512i>(upper), (__m512i)rounded(b));
}
inline f32r narrow_two(f32r a, f32r b, f16) {
    return (f32r)_mm512_inserti64x4(_mm512_castsi256_si512(narrow_half(a, f16())), narrow_half(b, f16()), 1);
}

// -- the first n lanes of a, then those of b

inline f32r blend_first(f32r a, f32r b, ptrdiff_t n) {
    return (f32r)_mm512_mask_blend_ps((__mmask16)((1u << n) - 1), (__m512)b, (__m512)a);
}

// The lanes of a where those of the mask are all ones, those of b where they are zeros.
template <class R> inline R select_bits(R mask, R a, R b) {
    return (R)(((u32r)a & (u32r)mask) | ((u32r)b & ~(u32r)mask));
}

// -- the first n lanes of a register, 0 < n < lanes; of other types by storage.hpp

inline f32r widen_part(const float* p, ptrdiff_t n) {
    return (f32r)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
inline f64r widen_part(const double* p, ptrdiff_t n) {
    return (f64r)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
inline void narrow_part(float* p, f32r r, ptrdiff_t n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)r);
}
inline void narrow_part(double* p, f64r r, ptrdiff_t n) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)r);
}
inline f32r widen_part(const bf16* p, ptrdiff_t n) {
    return widen_half(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), bf16());
}
inline f32r widen_part(const f16* p, ptrdiff_t n) {
    return widen_half(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), f16());
}
inline void narrow_part(bf16* p, f32r r, ptrdiff_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), narrow_half(r, bf16()));
}
inline void narrow_part(f16* p, f32r r, ptrdiff_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), narrow_half(r, f16()));
}

// -- the lanes of a block's registers as doubles; the result is the number of registers of double

inline int widen_lanes(const f32r (&r)[BLOCK / REGISTER], f64r* t) {
    for (int i = 0; i < BLOCK / REGISTER; ++i) {
        t[2 * i] = (f64r)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)r[i]));
        t[2 * i + 1] = (f64r)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)r[i], 1));
    }
    return 2 * BLOCK / REGISTER;
}

// -- the sum of the lanes, over halves

inline double add_lanes(f64r r) {
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)r), _mm512_extractf64x4_pd((__m512d)r, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return two[0] + two[1];
}

}  // namespace
