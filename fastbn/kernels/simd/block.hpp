// The unit of all kernels is the Block: 128 bytes of arithmetic, 32 lanes of float or 16 of double, held in as many
// native registers as the ISA needs (2 on AVX-512, 4 on AVX2, 8 on SSE and NEON). No loops over data.
//
// So a sum is split over the same lanes, and gives the same bits, on every ISA with a fused multiply-add; and a block of
// accumulators hides the latency of the additions.
//
// The storage type T is float, double, bf16 or f16; arithmetic on the 16-bit types is float. Vectors of per-channel
// parameters are untyped here (void*), because Block<T> knows their type: that of the arithmetic.
#pragma once

#include "activation.hpp"
#include "storage.hpp"

namespace {

// What is not inlined passes blocks through memory, in pieces that are slow to read again as a whole.
#define INLINE __attribute__((always_inline))

// On SSE a block is half of all registers and goes through memory anyhow: for a part of one, for 16-bit elements, which are
// converted by integers, and for what is done once in a tile, a call is as good as its long code in every loop.
#if defined(__SSE2__) && !defined(__AVX__)
#define CALL_ON_SSE __attribute__((noinline))
#else
#define CALL_ON_SSE
#endif

#define FOR_REGISTERS _Pragma("GCC unroll 8") for (int i = 0; i < registers; ++i)

template <class T> struct Block {
    using C = arithmetic<T>;
    using R = typename Register<C>::type;
    static constexpr int registers = BLOCK / REGISTER;
    static constexpr ptrdiff_t lanes = REGISTER / sizeof(C);  // of one register

    R r[registers];

    static constexpr ptrdiff_t width() { return BLOCK / sizeof(C); }
    // Elements of a plane from which blocks in which planes meet are worth it: they have as much to join as a block has registers.
    static constexpr ptrdiff_t worth_joining() { return BLOCK * registers / 2 / (ptrdiff_t)sizeof(T); }
    static constexpr ptrdiff_t item() { return sizeof(C); }  // bytes of one number of a vector of channels

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

    INLINE static Block activation_forward(Block z, const Activation& f) {
        switch (f.kind) {
            case IDENTITY: break;
            case RELU: FOR_REGISTERS z.r[i] = max(R{}, z.r[i]); break;
            case RELU6: FOR_REGISTERS z.r[i] = max(R{}, min(all<R>(6), z.r[i])); break;
            case LEAKY_RELU: FOR_REGISTERS z.r[i] = select(z.r[i] > 0, z.r[i], z.r[i] * (C)f.parameter); break;
            case HARDSWISH: FOR_REGISTERS z.r[i] = z.r[i] * (ramp(z.r[i]) * all<R>(1.0 / 6)); break;
            default: z = smooth(z, f, false);
        }
        return z;
    }

    // dy times the derivative of the activation at z.
    INLINE static Block activation_backward(Block dy, Block z, const Activation& f) {
        switch (f.kind) {
            case IDENTITY: break;
            case RELU: FOR_REGISTERS dy.r[i] = select(z.r[i] <= 0, R{}, dy.r[i]); break;
            case RELU6: FOR_REGISTERS dy.r[i] = select((z.r[i] <= 0) | (z.r[i] >= 6), R{}, dy.r[i]); break;
            case LEAKY_RELU: FOR_REGISTERS dy.r[i] = select(z.r[i] > 0, dy.r[i], dy.r[i] * (C)f.parameter); break;
            case HARDSWISH:
                FOR_REGISTERS {
                    const R inside = dy.r[i] * multiply_add(z.r[i], all<R>(1.0 / 3), all<R>(0.5));
                    dy.r[i] = select(z.r[i] <= -3, R{}, select(z.r[i] >= 3, dy.r[i], inside));
                }
                break;
            default: dy = dy * smooth(z, f, true);
        }
        return dy;
    }

    // What leaky_relu made y of; identity stays as it is.
    INLINE static Block activation_inverse(Block y, const Activation& f) {
        if (f.kind == LEAKY_RELU) FOR_REGISTERS y.r[i] = select(y.r[i] > 0, y.r[i], y.r[i] / (C)f.parameter);
        return y;
    }

    static R ramp(R z) { return max(R{}, min(all<R>(6), z + 3)); }

    // The sum of all lanes, in double, over halves, quarters, ...: the same tree on every ISA.
    CALL_ON_SSE double total() const {
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
        if constexpr (std::is_same<T, f16>::value) return widened(p);
        Block a;
        FOR_REGISTERS a.r[i] = widen(p + i * lanes);
        return a;
    }

    void store(T* p) const {
        if constexpr (sizeof(T) < sizeof(C)) narrowed(*this).store(p);
        else FOR_REGISTERS narrow(p + i * lanes, r[i]);
    }

    // `p` starts a cache line.
    void stream(T* p) const {
        if constexpr (sizeof(T) < sizeof(C)) narrowed(*this).stream(p);
        else FOR_REGISTERS write_stream(p + i * lanes, r[i]);
    }

    CALL_ON_SSE static Block widened(const T* p) {
        Block a;
        FOR_REGISTERS a.r[i] = widen(p + i * lanes);
        return a;
    }

    struct Halves {
        f32r r[registers / 2];

        void store(T* p) const {
            for (int i = 0; i < registers / 2; ++i) write(p + 2 * i * lanes, r[i]);
        }
        void stream(T* p) const {
            for (int i = 0; i < registers / 2; ++i) write_stream(p + 2 * i * lanes, r[i]);
        }
    };

    CALL_ON_SSE static Halves narrowed(const Block& a) {
        Halves h;
        for (int i = 0; i < registers; i += 2) h.r[i / 2] = narrow_two(a.r[i], a.r[i + 1], T());
        return h;
    }

    // Ask for the lines of n elements that will be loaded soon, into the second-level cache.
    static void prefetch(const T* p, ptrdiff_t n) {
        for (ptrdiff_t i = 0; i < n; i += LINE / (ptrdiff_t)sizeof(T)) __builtin_prefetch(p + i, 0, 2);
    }

    // The same into the first.
    static void prefetch_near(const T* p, ptrdiff_t n) {
        for (ptrdiff_t i = 0; i < n; i += LINE / (ptrdiff_t)sizeof(T)) __builtin_prefetch(p + i, 0, 3);
    }

    // Ask for the lines of n elements that will be written soon.
    static void prefetch_written(T* p, ptrdiff_t n) {
        for (ptrdiff_t i = 0; i < n; i += LINE / (ptrdiff_t)sizeof(T)) __builtin_prefetch(p + i, 1, 3);
    }

    // The first n < width lanes from memory, the others from `fill`.
    CALL_ON_SSE static Block load_part(const T* p, ptrdiff_t n, Block fill) {
        FOR_REGISTERS {
            const ptrdiff_t left = n - i * lanes;
            if (left >= lanes) fill.r[i] = widen(p + i * lanes);
            else if (left > 0) fill.r[i] = blend_first(widen_part(p + i * lanes, left), fill.r[i], left);
        }
        return fill;
    }

    // All ones in the lanes from n on, zeros in those before.
    static Block behind(ptrdiff_t n) {
        static constexpr Counted<C> numbers;
        Block a;
        FOR_REGISTERS a.r[i] = (R)(read<R>(numbers.from_0 + i * lanes) >= (C)n);
        return a;
    }

    // Where a mask is all ones, b, which is the same in all lanes; and a elsewhere.
    INLINE static Block joined(Block a, Block b, Block mask) {
        FOR_REGISTERS a.r[i] = select_equal(mask.r[i], b.r[i], a.r[i]);
        return a;
    }

    // Some lanes of the block that ends at `end` from memory, though all of them can be read; the others from `fill`.
    static Block load_end(const T* end, Block lanes_of_memory, Block fill) {
        FOR_REGISTERS fill.r[i] = select_bits(lanes_of_memory.r[i], widen(end - width() + i * lanes), fill.r[i]);
        return fill;
    }

    CALL_ON_SSE void store_part(T* p, ptrdiff_t n) const {
        FOR_REGISTERS {
            const ptrdiff_t left = n - i * lanes;
            if (left >= lanes) narrow(p + i * lanes, r[i]);
            else if (left > 0) narrow_part(p + i * lanes, r[i], left);
        }
    }

    double first() const { return r[0][0]; }

    // One element, in double.
    CALL_ON_SSE static double element(const T* p) { return widen_part(p, 1)[0]; }

    static double rounded(double value) { return (C)value; }
    static constexpr double largest() { return std::numeric_limits<C>::max(); }

    // The pivot of a tile, from the sums of two halves of a sample: their mean, of equal elements exactly that; rounded to
    // an element and about a hundredth of the deviation, by adding a number whose last bit is that, and taking it away.
    static constexpr C coarse = sizeof(C) == 8 ? 0x1p45 : 0x1p16;
    template <class V> static V pivot(V early, V late, V element, C share) {
        const V large = (early - late) * coarse;
        return element + (((early + late) * share - element + large) - large);
    }
    static Block pivot(Block early, Block late, Block element, double share) {
        FOR_REGISTERS early.r[i] = pivot<R>(early.r[i], late.r[i], element.r[i], (C)share);
        return early;
    }
    static Block minimum(Block a, Block b) {
        FOR_REGISTERS a.r[i] = min(a.r[i], b.r[i]);
        return a;
    }
    // Of a sample of eight.
    CALL_ON_SSE static double pivot_at(const T* p, const ptrdiff_t* at) {
        C e[8];
        for (int i = 0; i < 8; ++i) e[i] = widen_part(p + at[i], 1)[0];
        const auto least = [](C a, C b) { return a < b ? a : b; };
        return pivot<C>((e[0] + e[1]) + (e[2] + e[3]), (e[4] + e[5]) + (e[6] + e[7]), least(least(e[0], e[2]), least(e[4], e[6])), 0.125);
    }

    // Whether a sum of products kept its digits: it is finite, and far from where products underflow, or it is exactly zero,
    // and so is another sum. Around a small pivot that sum may be zero because tiny terms, whose squares are zero, cancel.
    static constexpr double tiny = sizeof(C) == 8 ? 1e-250 : 1e-25, small = sizeof(C) == 8 ? 1e-145 : 1e-14;
    CALL_ON_SSE static bool in_range(double dot, double other, double pivot) {
        return std::isfinite(dot) && (std::fabs(dot) >= tiny || (dot == 0 && other == 0 && std::fabs(pivot) >= small));
    }
    // In all lanes.
    CALL_ON_SSE static bool in_range(Block dot, Block other, Block pivot) {
        auto fine = dot.r[0] == dot.r[0];
        FOR_REGISTERS {
            const R size = max(-dot.r[i], dot.r[i]);
            const R far = max(-pivot.r[i], pivot.r[i]);
            fine &= (size <= std::numeric_limits<C>::max())
                & ((size >= (C)tiny) | ((size == 0) & (other.r[i] == 0) & (far >= (C)small)));
        }
        return !any(~fine);
    }

    // Whether sum^2 is within an allowance of the squares, in all lanes.
    CALL_ON_SSE static bool is_near(Block sum, Block dot, double allowance) {
        auto near = dot.r[0] == dot.r[0];
        FOR_REGISTERS near &= sum.r[i] * sum.r[i] <= dot.r[i] * (C)allowance;
        return !any(~near);
    }

    // The first n <= width lanes, in double.
    CALL_ON_SSE void put_double(double* p, ptrdiff_t n) const {
        f64r t[2 * registers];
        widen_lanes(r, t);
        if (n == width()) std::memcpy(p, t, sizeof(double) * width());  // of constant size: stores, not a call
        else std::memcpy(p, t, sizeof(double) * n);
    }

    // Elements up to the next cache line, at most n.
    CALL_ON_SSE static ptrdiff_t to_line(const T* p, ptrdiff_t n) {
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
    CALL_ON_SSE static Block get_first(const void* p, ptrdiff_t j, ptrdiff_t n) {
        Block a = get(p, j), mask = behind(n);
        FOR_REGISTERS a.r[i] = select_bits(mask.r[i], R{}, a.r[i]);
        return a;
    }

    void put(void* p, ptrdiff_t j) const {
        C* q = static_cast<C*>(p) + j;
        FOR_REGISTERS narrow(q + i * lanes, r[i]);
    }

    static double value(const void* p, ptrdiff_t j) { return static_cast<const C*>(p)[j]; }
    static void set_value(void* p, ptrdiff_t j, double v) { static_cast<C*>(p)[j] = (C)v; }
};

}  // namespace
