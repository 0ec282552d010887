// Vectors of channels in torch's dtypes: conversions, and what a forward saves beside them for its backward.
//
// ATen's batch norm has two vectors to save, with torch's dtype; the kernels know more digits. So the storage of such a
// vector is longer than the vector, and what rounding took away lies behind it:
//
//     the vector | a seal, at the next multiple of 8 bytes | the rest, in the type of the arithmetic
//
// The seal is a sum over the vector. A vector that somebody has copied or changed has none, and then no rest.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "call.hpp"

namespace fastbn::torch {

constexpr std::int64_t SIZES[DTYPES] = {4, 8, 2, 2};

inline std::uint32_t bits_of(float value) noexcept {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float of_bits(std::uint32_t bits) noexcept {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bfloat16(std::uint16_t value) noexcept { return of_bits(std::uint32_t{value} << 16); }

inline std::uint16_t to_bfloat16(float value) noexcept {
    const std::uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);  // NaN stays one
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(std::uint16_t value) noexcept {
    const std::uint32_t sign = (value & 0x8000u) << 16, exponent = value >> 10 & 31, fraction = value & 0x3ff;
    if (exponent == 31) return of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent != 0) return of_bits(sign | (exponent + 112) << 23 | fraction << 13);
    return of_bits(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
}

inline std::uint16_t to_float16(float value) noexcept {
    const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    std::uint32_t half;
    if (size > 0x7f800000) {
        half = 0x7e00;  // NaN
    } else if (size >= 0x477ff000) {
        half = 0x7c00;  // what rounds to more than the largest number
    } else if (size < 0x38800000) {
        half = bits_of(of_bits(size) + 0.5f) - bits_of(0.5f);  // a subnormal one: the last digit of 1/2 is its unit
    } else {
        half = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
    }
    return static_cast<std::uint16_t>(sign | half);
}

inline double load(const void* data, Dtype dtype, std::int64_t i) noexcept {
    switch (dtype) {
        case FLOAT32: return static_cast<const float*>(data)[i];
        case FLOAT64: return static_cast<const double*>(data)[i];
        case BFLOAT16: return from_bfloat16(static_cast<const std::uint16_t*>(data)[i]);
        default: return from_float16(static_cast<const std::uint16_t*>(data)[i]);
    }
}

inline void store(void* data, Dtype dtype, std::int64_t i, double value) noexcept {
    switch (dtype) {
        case FLOAT32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
        case FLOAT64: static_cast<double*>(data)[i] = value; break;
        case BFLOAT16: static_cast<std::uint16_t*>(data)[i] = to_bfloat16(static_cast<float>(value)); break;
        default: static_cast<std::uint16_t*>(data)[i] = to_float16(static_cast<float>(value));
    }
}

inline void convert(const void* from, Dtype its, std::int64_t step, void* to, Dtype dtype, std::int64_t stride, std::int64_t n) noexcept {
    for (std::int64_t i = 0; i < n; ++i) store(to, dtype, i * stride, load(from, its, i * step));
}

// One over the deviation.
inline void invert(const void* var, double eps, void* invstd, Dtype dtype, std::int64_t n) noexcept {
    for (std::int64_t i = 0; i < n; ++i) store(invstd, dtype, i, 1 / std::sqrt(load(var, dtype, i) + eps));
}

// What rounding a vector took away; 0 where the rounded number is infinite.
inline void subtract(const float* exact, const void* rounded, Dtype dtype, float* rest, std::int64_t n) noexcept {
    for (std::int64_t i = 0; i < n; ++i) {
        const float lost = exact[i] - static_cast<float>(load(rounded, dtype, i));
        rest[i] = std::isfinite(lost) ? lost : 0;
    }
}

inline void add(float* rounded, const float* rest, std::int64_t n) noexcept {
    for (std::int64_t i = 0; i < n; ++i) rounded[i] += rest[i];
}

inline std::int64_t seal_of_saved(std::int64_t n, Dtype dtype) noexcept { return (n * SIZES[dtype] + 7) / 8 * 8; }

inline std::int64_t rest_of_saved(std::int64_t n, Dtype dtype) noexcept { return seal_of_saved(n, dtype) + 8; }

inline std::int64_t bytes_of_saved(std::int64_t n, Dtype dtype, Dtype arithmetic) noexcept {
    return rest_of_saved(n, dtype) + n * SIZES[arithmetic];
}

inline std::uint64_t sum_of_saved(const void* data, std::int64_t n, Dtype dtype) noexcept {
    const std::int64_t bytes = n * SIZES[dtype];
    std::uint64_t sum = 0x9e3779b97f4a7c15;  // a number that is in no memory by chance
    for (std::int64_t at = 0; at < bytes; at += 8) {
        std::uint64_t word = 0;
        std::memcpy(&word, static_cast<const char*>(data) + at, static_cast<std::size_t>(bytes - at < 8 ? bytes - at : 8));
        sum += word * static_cast<std::uint64_t>(2 * at + 1);  // odd: any change of one word changes the sum
    }
    return sum;
}

inline void seal_saved(void* data, std::int64_t n, Dtype dtype) noexcept {
    const std::uint64_t sum = sum_of_saved(data, n, dtype);
    std::memcpy(static_cast<char*>(data) + seal_of_saved(n, dtype), &sum, sizeof sum);
}

inline bool is_sealed(const void* data, std::int64_t n, Dtype dtype) noexcept {
    std::uint64_t sum;
    std::memcpy(&sum, static_cast<const char*>(data) + seal_of_saved(n, dtype), sizeof sum);
    return sum == sum_of_saved(data, n, dtype);
}

}  // namespace fastbn::torch
