// How data of each storage type is loaded and stored: float, double, bf16 or f16. And the one choice of an ISA's register.
#pragma once

#if defined(__AVX512F__)
#include "register_avx512.hpp"
#elif defined(__AVX2__)
#include "register_avx2.hpp"
#elif defined(__x86_64__)
#include "register_sse.hpp"
#else
#include "register_neon.hpp"
#endif

namespace {

// -- float and double are stored as they are computed with

inline f32r widen(const float* p) { return read<f32r>(p); }
inline f64r widen(const double* p) { return read<f64r>(p); }
inline void narrow(float* p, f32r r) { write(p, r); }
inline void narrow(double* p, f64r r) { write(p, r); }

// -- halves, of either kind

inline f32r widen(const bf16* p) { return widen_half(read_half(p), bf16()); }
inline f32r widen(const f16* p) { return widen_half(read_half(p), f16()); }
inline void narrow(bf16* p, f32r r) { write_half(p, narrow_half(r, bf16())); }
inline void narrow(f16* p, f32r r) { write_half(p, narrow_half(r, f16())); }

// Where two of them are not better joined by another instruction.
template <class R> inline R select_equal(R mask, R a, R b) { return select_bits(mask, a, b); }
inline f64r blend_first(f64r a, f64r b, ptrdiff_t n) { return (f64r)blend_first((f32r)a, (f32r)b, 2 * n); }

// -- the first n lanes of a register, 0 < n < lanes; the others are read as anything and not written;
// where the ISA has nothing better

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

inline int widen_lanes(const f64r (&r)[BLOCK / REGISTER], f64r* t) {
    std::memcpy(t, r, sizeof r);
    return BLOCK / REGISTER;
}

}  // namespace
