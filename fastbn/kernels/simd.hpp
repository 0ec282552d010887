// Vector primitives for every ISA: load, store, stream, convert, fma, partial blocks. No loops over data.
//
// The unit of all kernels is the Block: 128 bytes of arithmetic, 32 lanes of float or 16 of double, held in as many
// native registers as the ISA needs (2 on AVX-512, 4 on AVX2, 8 on SSE and NEON). So a sum is split over the same
// lanes, and gives the same bits, on every ISA with a fused multiply-add; and a block of accumulators hides the
// latency of the additions. GCC compiles vector types of the native width well and wider ones badly, hence the array
// of registers.
//
// The storage type T is float, double, bf16 or f16; arithmetic on the 16-bit types is float. Vectors of per-channel
// parameters are untyped here (void*), because Block<T> knows their type: that of the arithmetic.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Everything is internal to the module: code compiled for a wide ISA must not be merged with another module's.
namespace {

using std::ptrdiff_t;

#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
constexpr int LINE = 64;  // bytes of a cache line
constexpr int BLOCK = 128;

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

// ---- One register ----

inline f32r multiply_add(f32r a, f32r b, f32r c) {
#if defined(__AVX512F__)
    return (f32r)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (f32r)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (f32r)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline f64r multiply_add(f64r a, f64r b, f64r c) {
#if defined(__AVX512F__)
    return (f64r)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    return (f64r)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    return (f64r)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

// A comparison is all ones where it holds; choose takes `a` there and `b` elsewhere.
template <class R, class M> inline R choose(M mask, R a, R b) { return mask ? a : b; }

// a where it is smaller, or larger, and else b: b where one of them is NaN, or both are zeros. x86 has just that.
#if defined(__AVX512F__)
inline f32r smaller(f32r a, f32r b) { return (f32r)_mm512_min_ps((__m512)a, (__m512)b); }
inline f32r larger(f32r a, f32r b) { return (f32r)_mm512_max_ps((__m512)a, (__m512)b); }
inline f64r smaller(f64r a, f64r b) { return (f64r)_mm512_min_pd((__m512d)a, (__m512d)b); }
inline f64r larger(f64r a, f64r b) { return (f64r)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
inline f32r smaller(f32r a, f32r b) { return (f32r)_mm256_min_ps((__m256)a, (__m256)b); }
inline f32r larger(f32r a, f32r b) { return (f32r)_mm256_max_ps((__m256)a, (__m256)b); }
inline f64r smaller(f64r a, f64r b) { return (f64r)_mm256_min_pd((__m256d)a, (__m256d)b); }
inline f64r larger(f64r a, f64r b) { return (f64r)_mm256_max_pd((__m256d)a, (__m256d)b); }
#else
template <class R> inline R smaller(R a, R b) { return choose(a < b, a, b); }
template <class R> inline R larger(R a, R b) { return choose(a > b, a, b); }
#endif

// Whether a comparison holds in any lane.
template <class M> inline bool any(M mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__x86_64__)
    return !_mm_testz_si128((__m128i)mask, (__m128i)mask);
#else
    return vmaxvq_u32((uint32x4_t)mask) != 0;
#endif
}

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

// -- float and double are stored as they are computed with

inline f32r widen(const float* p) { return read<f32r>(p); }
inline f64r widen(const double* p) { return read<f64r>(p); }
inline void narrow(float* p, f32r r) { write(p, r); }
inline void narrow(double* p, f64r r) { write(p, r); }

// Past the caches, where the ISA can; `p` is aligned to the register.
template <class R> inline void write_stream(void* p, R r) {
#if defined(__AVX512F__)
    _mm512_stream_ps(static_cast<float*>(p), (__m512)r);
#elif defined(__AVX2__)
    _mm256_stream_ps(static_cast<float*>(p), (__m256)r);
#elif defined(__x86_64__)
    _mm_stream_ps(static_cast<float*>(p), (__m128)r);
#else
    write(p, r);
#endif
}

// A whole line, as it is.
inline void stream_line(void* to, const void* from) {
    for (int i = 0; i < LINE; i += REGISTER) write_stream(static_cast<char*>(to) + i, read<f32r>(static_cast<const char*>(from) + i));
}

// -- bf16: the upper half of a float, rounded to nearest even; a NaN keeps its sign and stays a NaN

#if defined(__AVX512F__)
typedef __m256i half_register;
#elif defined(__AVX2__) || defined(__x86_64__)
typedef __m128i half_register;  // SSE uses its lower 64 bits
#elif defined(__aarch64__)
typedef uint16x4_t half_register;
#endif

inline half_register read_half(const void* p) {
#if defined(__x86_64__) && !defined(__AVX2__)
    return _mm_loadl_epi64(static_cast<const __m128i*>(p));
#else
    return read<half_register>(p);
#endif
}

inline void write_half(void* p, half_register h) {
#if defined(__x86_64__) && !defined(__AVX2__)
    _mm_storel_epi64(static_cast<__m128i*>(p), h);
#else
    write(p, h);
#endif
}

inline u32r zero_extend(half_register h) {
#if defined(__AVX512F__)
    return (u32r)_mm512_cvtepu16_epi32(h);
#elif defined(__AVX2__)
    return (u32r)_mm256_cvtepu16_epi32(h);
#elif defined(__x86_64__)
    return (u32r)_mm_cvtepu16_epi32(h);
#else
    return (u32r)vmovl_u16(h);
#endif
}

// Lanes below 2^16.
inline half_register truncate(u32r r) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_epi16((__m512i)r);
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)r, (__m256i)r);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#elif defined(__x86_64__)
    return _mm_packus_epi32((__m128i)r, (__m128i)r);
#else
    return vmovn_u32((uint32x4_t)r);
#endif
}

inline f32r widen_half(half_register h, bf16) { return (f32r)(zero_extend(h) << 16); }

// In the upper half of each lane; the lower is anything.
inline u32r rounded_upper(f32r r) {
    const u32r bits = (u32r)r;
    return choose(r != r, bits | 0x400000, bits + 0x7fff + ((bits >> 16) & 1));
}

inline half_register narrow_half(f32r r, bf16) { return truncate(rounded_upper(r) >> 16); }

// -- f16: by the processor, except for SSE

#if defined(__AVX512F__)
inline f32r widen_half(half_register h, f16) { return (f32r)_mm512_cvtph_ps(h); }
inline half_register narrow_half(f32r r, f16) { return _mm512_cvtps_ph((__m512)r, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
inline f32r widen_half(half_register h, f16) { return (f32r)_mm256_cvtph_ps(h); }
inline half_register narrow_half(f32r r, f16) { return _mm256_cvtps_ph((__m256)r, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
inline f32r widen_half(half_register h, f16) { return (f32r)vcvt_f32_f16(vreinterpret_f16_u16(h)); }
inline half_register narrow_half(f32r r, f16) { return vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)r)); }
#else
inline f32r constant(float value) { return f32r{} + value; }

inline f32r widen_half(half_register h, f16) {
    const u32r bits = zero_extend(h);
    const u32r magnitude = bits & 0x7fff;
    // The exponent moves from a bias of 15 to 127 by a multiplication, which also normalizes subnormals.
    const f32r finite = (f32r)(magnitude << 13) * constant(0x1p112f);
    const u32r special = (magnitude << 13) | 0x7f800000;
    const u32r wide = choose((u32r)(magnitude >= 0x7c00), special, (u32r)finite);
    return (f32r)(wide | ((bits & 0x8000) << 16));
}

inline half_register narrow_half(f32r r, f16) {
    const u32r bits = (u32r)r;
    const u32r sign = (bits >> 16) & 0x8000;
    const u32r magnitude = bits & 0x7fffffff;
    // Subnormal halves: adding 0.5 leaves the value, rounded to nearest even, in the lowest bits.
    const u32r subnormal = (u32r)((f32r)magnitude + constant(0.5f)) - 0x3f000000;
    const u32r normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    u32r half = choose((u32r)(magnitude < 0x38800000), subnormal, normal);
    half = choose((u32r)(magnitude >= 0x47800000), (u32r{} + 0x7c00), half);
    half = choose((u32r)(magnitude > 0x7f800000), ((magnitude >> 13) & 0x7fff) | 0x7e00, half);
    return truncate(half | sign);
}
#endif

inline f32r widen(const bf16* p) { return widen_half(read_half(p), bf16()); }
inline f32r widen(const f16* p) { return widen_half(read_half(p), f16()); }
inline void narrow(bf16* p, f32r r) { write_half(p, narrow_half(r, bf16())); }
inline void narrow(f16* p, f32r r) { write_half(p, narrow_half(r, f16())); }

// -- two registers of floats as one of halves

#if defined(__AVX512F__)
inline f32r narrow_two(f32r a, f32r b, bf16) {
    alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (f32r)_mm512_permutex2var_epi16((__m512i)rounded_upper(a), read<__m512i>(upper), (__m512i)rounded_upper(b));
}
inline f32r narrow_two(f32r a, f32r b, f16) {
    return (f32r)_mm512_inserti64x4(_mm512_castsi256_si512(narrow_half(a, f16())), narrow_half(b, f16()), 1);
}
#elif defined(__AVX2__)
inline f32r narrow_two(f32r a, f32r b, bf16) {
    const __m256i packed = _mm256_packus_epi32((__m256i)(rounded_upper(a) >> 16), (__m256i)(rounded_upper(b) >> 16));
    return (f32r)_mm256_permute4x64_epi64(packed, 0xd8);
}
inline f32r narrow_two(f32r a, f32r b, f16) { return (f32r)_mm256_set_m128i(narrow_half(b, f16()), narrow_half(a, f16())); }
#else
template <class T> inline f32r narrow_two(f32r a, f32r b, T) {
    T halves[REGISTER / sizeof(T)];
    narrow(halves, a);
    narrow(halves + REGISTER / sizeof(float), b);
    return read<f32r>(halves);
}
#endif

// -- the first n lanes of a, then those of b

alignas(64) constexpr int32_t ALL_THEN_NONE[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

inline f32r join(f32r a, f32r b, ptrdiff_t n) {
#if defined(__AVX512F__)
    return (f32r)_mm512_mask_blend_ps((__mmask16)((1u << n) - 1), (__m512)b, (__m512)a);
#elif defined(__AVX2__)
    return (f32r)_mm256_blendv_ps((__m256)b, (__m256)a, read<__m256>(ALL_THEN_NONE + 16 - n));
#else
    return choose(read<i32r>(ALL_THEN_NONE + 16 - n), a, b);
#endif
}

inline f64r join(f64r a, f64r b, ptrdiff_t n) { return (f64r)join((f32r)a, (f32r)b, 2 * n); }

// The lanes of a where those of the mask are all ones, those of b where they are zeros.
template <class R> inline R select_bits(R mask, R a, R b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (R)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (R)(((u32r)a & (u32r)mask) | ((u32r)b & ~(u32r)mask));
#endif
}

// -- the first n lanes of a register, 0 < n < lanes; the others are read as anything and not written

template <class T> inline auto widen_part(const T* p, ptrdiff_t n) {
    constexpr ptrdiff_t lanes = REGISTER / sizeof(arithmetic<T>);
    T buffer[lanes] = {};
    copy_few<T>(buffer, p, n);
    return widen(buffer);
}

template <class T, class R> inline void narrow_part(T* p, R r, ptrdiff_t n) {
    T buffer[REGISTER / sizeof(arithmetic<T>)];
    narrow(buffer, r);
    copy_few<T>(p, buffer, n);
}

#if defined(__AVX512F__)
template <> inline auto widen_part<float>(const float* p, ptrdiff_t n) {
    return (f32r)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
template <> inline auto widen_part<double>(const double* p, ptrdiff_t n) {
    return (f64r)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
template <> inline void narrow_part<float, f32r>(float* p, f32r r, ptrdiff_t n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)r);
}
template <> inline void narrow_part<double, f64r>(double* p, f64r r, ptrdiff_t n) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)r);
}
template <> inline auto widen_part<bf16>(const bf16* p, ptrdiff_t n) {
    return widen_half(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), bf16());
}
template <> inline auto widen_part<f16>(const f16* p, ptrdiff_t n) {
    return widen_half(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), f16());
}
template <> inline void narrow_part<bf16, f32r>(bf16* p, f32r r, ptrdiff_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), narrow_half(r, bf16()));
}
template <> inline void narrow_part<f16, f32r>(f16* p, f32r r, ptrdiff_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), narrow_half(r, f16()));
}
#elif defined(__AVX2__)
// Masked loads are fast everywhere; masked stores are not on AMD, so those go in pieces.
template <> inline auto widen_part<float>(const float* p, ptrdiff_t n) {
    return (f32r)_mm256_maskload_ps(p, read<__m256i>(ALL_THEN_NONE + 16 - n));
}
template <> inline auto widen_part<double>(const double* p, ptrdiff_t n) {
    return (f64r)_mm256_maskload_pd(p, read<__m256i>(ALL_THEN_NONE + 16 - 2 * n));
}
#endif

// -- the lanes of a block's registers as doubles; the result is the number of registers of double

inline int widen_lanes(const f32r (&r)[BLOCK / REGISTER], f64r* t) {
    for (int i = 0; i < BLOCK / REGISTER; ++i) {
#if defined(__AVX512F__)
        t[2 * i] = (f64r)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)r[i]));
        t[2 * i + 1] = (f64r)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)r[i], 1));
#elif defined(__AVX2__)
        t[2 * i] = (f64r)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)r[i]));
        t[2 * i + 1] = (f64r)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)r[i], 1));
#else
        t[2 * i] = f64r{r[i][0], r[i][1]};
        t[2 * i + 1] = f64r{r[i][2], r[i][3]};
#endif
    }
    return 2 * BLOCK / REGISTER;
}

inline int widen_lanes(const f64r (&r)[BLOCK / REGISTER], f64r* t) {
    std::memcpy(t, r, sizeof r);
    return BLOCK / REGISTER;
}

// -- the sum of the lanes, over halves

inline double add_lanes(f64r r) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)r), _mm512_extractf64x4_pd((__m512d)r, 1));
#else
    const __m256d four = (__m256d)r;
#endif
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return two[0] + two[1];
#else
    return r[0] + r[1];
#endif
}

}  // namespace

#include "activation.hpp"

namespace {

// ---- Blocks ----

// What is not inlined passes blocks through memory, in pieces that are slow to read again as a whole.
#define INLINE __attribute__((always_inline))

#define FOR_REGISTERS _Pragma("GCC unroll 8") for (int i = 0; i < registers; ++i)

template <class T> struct Block {
    using C = arithmetic<T>;
    using R = typename Register<C>::type;
    static constexpr int registers = BLOCK / REGISTER;
    static constexpr ptrdiff_t lanes = REGISTER / sizeof(C);  // of one register

    R r[registers];

    static constexpr ptrdiff_t width() { return BLOCK / sizeof(C); }

    Block operator+(Block b) const {
        FOR_REGISTERS b.r[i] = r[i] + b.r[i];
        return b;
    }

    Block operator-(Block b) const {
        FOR_REGISTERS b.r[i] = r[i] - b.r[i];
        return b;
    }

    Block operator*(Block b) const {
        FOR_REGISTERS b.r[i] = r[i] * b.r[i];
        return b;
    }

    // a * b + c, with one rounding where the ISA can
    static Block fma(Block a, Block b, Block c) {
        FOR_REGISTERS c.r[i] = multiply_add(a.r[i], b.r[i], c.r[i]);
        return c;
    }

    // A smooth activation of several blocks, or its derivative.
    static void smooth(Block* z, ptrdiff_t n, const Activation& f, bool derivative) {
        derivative ? apply_smooth<true>(z->r, n * registers, f.kind) : apply_smooth<false>(z->r, n * registers, f.kind);
    }

    // Registers of its own, or those of the loop would have to be in memory, even where this is never called.
    INLINE static Block smooth(Block z, const Activation& f, bool derivative) {
        Block own;
        FOR_REGISTERS own.r[i] = z.r[i];
        smooth(&own, 1, f, derivative);
        return own;
    }

    INLINE static Block activated(Block z, const Activation& f) {
        switch (f.kind) {
            case IDENTITY: break;
            case RELU: FOR_REGISTERS z.r[i] = larger(R{}, z.r[i]); break;
            case RELU6: FOR_REGISTERS z.r[i] = larger(R{}, smaller(all<R>(6), z.r[i])); break;
            case LEAKY_RELU: FOR_REGISTERS z.r[i] = choose(z.r[i] > 0, z.r[i], z.r[i] * (C)f.parameter); break;
            case HARDSWISH: FOR_REGISTERS z.r[i] = z.r[i] * (ramp(z.r[i]) * all<R>(1.0 / 6)); break;
            default: z = smooth(z, f, false);
        }
        return z;
    }

    // dy times the derivative of the activation at z.
    INLINE static Block through(Block dy, Block z, const Activation& f) {
        switch (f.kind) {
            case IDENTITY: break;
            case RELU: FOR_REGISTERS dy.r[i] = choose(z.r[i] <= 0, R{}, dy.r[i]); break;
            case RELU6: FOR_REGISTERS dy.r[i] = choose((z.r[i] <= 0) | (z.r[i] >= 6), R{}, dy.r[i]); break;
            case LEAKY_RELU: FOR_REGISTERS dy.r[i] = choose(z.r[i] > 0, dy.r[i], dy.r[i] * (C)f.parameter); break;
            case HARDSWISH:
                FOR_REGISTERS {
                    const R inside = dy.r[i] * multiply_add(z.r[i], all<R>(1.0 / 3), all<R>(0.5));
                    dy.r[i] = choose(z.r[i] <= -3, R{}, choose(z.r[i] >= 3, dy.r[i], inside));
                }
                break;
            default: dy = dy * smooth(z, f, true);
        }
        return dy;
    }

    // What leaky_relu made y of; identity stays as it is.
    INLINE static Block restored(Block y, const Activation& f) {
        if (f.kind == LEAKY_RELU) FOR_REGISTERS y.r[i] = choose(y.r[i] > 0, y.r[i], y.r[i] / (C)f.parameter);
        return y;
    }

    static R ramp(R z) { return larger(R{}, smaller(all<R>(6), z + 3)); }

    // The sum of all lanes, in double, over halves, quarters, ...: the same tree on every ISA.
    double total() const {
        f64r t[2 * registers];
        int parts = widen_lanes(r, t);
        while (parts > 1) {
            parts /= 2;
            for (int i = 0; i < parts; ++i) t[i] = t[i] + t[i + parts];
        }
        return add_lanes(t[0]);
    }

    static Block constant(double value) {
        Block a;
        FOR_REGISTERS a.r[i] = (C)value - R{};  // in all lanes
        return a;
    }

    // -- Data, in storage type

    static Block load(const T* p) {
        Block a;
        FOR_REGISTERS a.r[i] = widen(p + i * lanes);
        return a;
    }

    void store(T* p) const {
        if constexpr (sizeof(T) < sizeof(C))
            for (int i = 0; i < registers; i += 2) write(p + i * lanes, narrow_two(r[i], r[i + 1], T()));
        else
            FOR_REGISTERS narrow(p + i * lanes, r[i]);
    }

    // `p` starts a cache line.
    void stream(T* p) const {
        if constexpr (sizeof(T) < sizeof(C))
            for (int i = 0; i < registers; i += 2) write_stream(p + i * lanes, narrow_two(r[i], r[i + 1], T()));
        else
            FOR_REGISTERS write_stream(p + i * lanes, r[i]);
    }

    // Ask for the lines of n elements that will be loaded soon, into the second-level cache.
    static void prefetch(const T* p, ptrdiff_t n) {
        for (ptrdiff_t i = 0; i < n; i += LINE / (ptrdiff_t)sizeof(T)) __builtin_prefetch(p + i, 0, 2);
    }

    // The first n < width lanes from memory, the others from `fill`.
    static Block load_part(const T* p, ptrdiff_t n, Block fill) {
        FOR_REGISTERS {
            const ptrdiff_t left = n - i * lanes;
            if (left >= lanes) fill.r[i] = widen(p + i * lanes);
            else if (left > 0) fill.r[i] = join(widen_part<T>(p + i * lanes, left), fill.r[i], left);
        }
        return fill;
    }

    // All ones in the last n < width lanes, zeros in the others.
    static Block last_lanes(ptrdiff_t n) {
        const R none = R{}, ones = (R)~(u32r)none;
        Block a;
        FOR_REGISTERS {
            const ptrdiff_t others = width() - n - i * lanes;
            a.r[i] = join(none, ones, others < 0 ? 0 : others < lanes ? others : lanes);
        }
        return a;
    }

    // Some lanes of the block that ends at `end` from memory, though all of them can be read; the others from `fill`.
    static Block load_end(const T* end, Block lanes_of_memory, Block fill) {
        FOR_REGISTERS fill.r[i] = select_bits(lanes_of_memory.r[i], widen(end - width() + i * lanes), fill.r[i]);
        return fill;
    }

    void store_part(T* p, ptrdiff_t n) const {
        FOR_REGISTERS {
            const ptrdiff_t left = n - i * lanes;
            if (left >= lanes) narrow(p + i * lanes, r[i]);
            else if (left > 0) narrow_part<T>(p + i * lanes, r[i], left);
        }
    }

    double first() const { return r[0][0]; }

    // One element, in double.
    static double element(const T* p) { return widen_part<T>(p, 1)[0]; }

    static double rounded(double value) { return (C)value; }
    static constexpr double largest() { return std::numeric_limits<C>::max(); }

    // The shift of a tile, from the sums of two halves of a sample: their mean, of equal elements exactly that; rounded to
    // an element and about a hundredth of the deviation, by adding a number whose last bit is that, and taking it away.
    static constexpr C coarse = sizeof(C) == 8 ? 0x1p45 : 0x1p16;
    template <class V> static V shift(V early, V late, V element, C share) {
        const V large = (early - late) * coarse;
        return element + (((early + late) * share - element + large) - large);
    }
    static Block shift(Block early, Block late, Block element, double share) {
        FOR_REGISTERS early.r[i] = shift<R>(early.r[i], late.r[i], element.r[i], (C)share);
        return early;
    }
    static Block lesser(Block a, Block b) {
        FOR_REGISTERS a.r[i] = smaller(a.r[i], b.r[i]);
        return a;
    }
    // Of a sample of eight.
    static double shift_at(const T* p, const ptrdiff_t* at) {
        C e[8];
        for (int i = 0; i < 8; ++i) e[i] = widen_part<T>(p + at[i], 1)[0];
        const auto lesser = [](C a, C b) { return a < b ? a : b; };
        return shift<C>((e[0] + e[1]) + (e[2] + e[3]), (e[4] + e[5]) + (e[6] + e[7]), lesser(lesser(e[0], e[2]), lesser(e[4], e[6])), 0.125);
    }

    // Whether a sum of products kept its digits: it is finite, and far from where products underflow, or it is exactly zero,
    // and so is another sum.
    static constexpr double tiny = sizeof(C) == 8 ? 1e-250 : 1e-25;
    static bool in_range(double square, double other) {
        return std::isfinite(square) && (std::fabs(square) >= tiny || (square == 0 && other == 0));
    }
    // In all lanes.
    static bool in_range(Block square, Block other) {
        auto kept = square.r[0] == square.r[0];
        FOR_REGISTERS {
            const R size = larger(-square.r[i], square.r[i]);
            kept &= (size <= std::numeric_limits<C>::max()) & ((size >= (C)tiny) | ((size == 0) & (other.r[i] == 0)));
        }
        return !any(~kept);
    }

    // Whether sum^2 is within an allowance of the squares, in all lanes.
    static bool is_near(Block sum, Block square, double allowance) {
        auto near = square.r[0] == square.r[0];
        FOR_REGISTERS near &= sum.r[i] * sum.r[i] <= square.r[i] * (C)allowance;
        return !any(~near);
    }

    // The first n <= width lanes, in double.
    void put_double(double* p, ptrdiff_t n) const {
        f64r t[2 * registers];
        widen_lanes(r, t);
        if (n == width()) std::memcpy(p, t, sizeof(double) * width());  // of constant size: stores, not a call
        else std::memcpy(p, t, sizeof(double) * n);
    }

    // Elements up to the next cache line, at most n.
    static ptrdiff_t to_line(const T* p, ptrdiff_t n) {
        const ptrdiff_t bytes = (ptrdiff_t)(-reinterpret_cast<uintptr_t>(p) & (LINE - 1));
        const ptrdiff_t elements = bytes / (ptrdiff_t)sizeof(T);
        return elements < n ? elements : n;
    }

    // -- Vectors of parameters, in the type of the arithmetic

    static Block splat(const void* p, ptrdiff_t j) {
        const C c = static_cast<const C*>(p)[j];
        Block a;
        FOR_REGISTERS a.r[i] = c - R{};  // in all lanes
        return a;
    }

    static Block get(const void* p, ptrdiff_t j) {
        const C* q = static_cast<const C*>(p) + j;
        Block a;
        FOR_REGISTERS a.r[i] = widen(q + i * lanes);
        return a;
    }

    // The first n <= width lanes, and zeros.
    static Block get_first(const void* p, ptrdiff_t j, ptrdiff_t n) {
        Block a = get(p, j);
        FOR_REGISTERS {
            const ptrdiff_t left = n - i * lanes;
            a.r[i] = join(a.r[i], R{}, left < 0 ? 0 : left < lanes ? left : lanes);
        }
        return a;
    }

    void put(void* p, ptrdiff_t j) const {
        C* q = static_cast<C*>(p) + j;
        FOR_REGISTERS narrow(q + i * lanes, r[i]);
    }

    static double value(const void* p, ptrdiff_t j) { return static_cast<const C*>(p)[j]; }
    static void set_value(void* p, ptrdiff_t j, double v) { static_cast<C*>(p)[j] = (C)v; }
};

// Order streaming stores before whatever tells other threads that the data is there.
inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace
