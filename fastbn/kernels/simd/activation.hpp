// Activation functions and their derivatives, on registers of float or double. No loops over data, no calls of libm.
//
// All smooth ones rest on the exponential, had as 2^n times a polynomial. Where its argument may be of either sign, it
// may overflow to infinity, and the quotient it stands in becomes zero; the logistic function is 1 / (1 + exp(-z)).
// The upper tail of the normal distribution is exp(-a^2 / 2) times a smooth function of a, and keeps its digits
// however small it is.
//
// Largest errors in float, with a fused multiply-add (tests/test_activations.py): exp 1 unit in the last place, tanh 2,
// sigmoid 2.5; the normal distribution and the derivatives 2^-22, and 70 units in the far tail of the former. Results
// that are not normal numbers may be zero. The polynomials are minimax fits by Remez' algorithm, highest power first.
// NaN stays NaN.
#pragma once

#include "call.hpp"
#include "storage.hpp"

namespace {

using namespace fastbn;

template <class R> struct Constants;

template <> struct Constants<f32r> {
    using real = float;
    using integers = i32r;
    static constexpr int mantissa = 23;
    static constexpr float to_integer = 0x1.8p23f;  // leaves a sum's integer part in its lowest bits
    static constexpr float log2e = 1.44269504f, ln2 = 0x1.63p-1f, ln2_rest = -2.12194440e-4f;
    // (exp(r) - 1 - r) / r^2, |r| <= ln(2) / 2
    static constexpr float exp[] = {0.001392618359f, 0.008363179053f, 0.04166655462f, 0.1666657699f, 0.5f};
    // Powers of two are built 2^lift too large or too small, so that they are normal numbers where the result is not.
    static constexpr int lift = 64;
    static constexpr float invisible = -43, infinite = 105;  // exp of one adds nothing to 1, of the other overflows
    static constexpr float normal = 87;                      // exp of this and of minus this are normal numbers
    static constexpr float cubic = 9.9f;                     // twice_u of this is less than that
    // exp(a^2 / 2) erfc(a / sqrt(2)) / 2 as a function of 1 / (a + away), 0 <= a <= farthest
    static constexpr float away = 2.5f, farthest = 14.5f;
    static constexpr float tail[] = {-59.84916412f, 121.4393785f, -90.50677862f, 24.22179507f, -0.4160088515f, 2.465544544f,
                                     0.9744885417f, 0.3997229579f, -1.128226201e-5f};
    // (tanh(z) - z) / z^3 as a function of z^2, |z| <= 0.55
    static constexpr float tanh[] = {0.01645882439f, -0.05268418942f, 0.1332094282f, -0.3333295754f};
};

template <> struct Constants<f64r> {
    using real = double;
    using integers = i64r;
    static constexpr int mantissa = 52;
    static constexpr double to_integer = 0x1.8p52;
    static constexpr double log2e = 1.4426950408889634, ln2 = 0x1.62e42feep-1, ln2_rest = 0x1.a39ef35793c76p-33;
    static constexpr double exp[] = {2.51003854955103191e-8, 2.76200884454097482e-7, 2.75572684599970648e-6, 0.0000248015212959543751,
                                     0.000198412698630536169, 0.00138888889172137169, 0.00833333333333006183, 0.0416666666666241279,
                                     0.166666666666666675, 0.5};
    static constexpr int lift = 200;
    static constexpr double invisible = -138, infinite = 760, normal = 708, cubic = 20;
    static constexpr double away = 5, farthest = 39;
    static constexpr double tail[] = {177228922434.430446, -258175995057.198531, 100732191853.464288, 53288898810.9455956,
                                     -76206087905.5615547, 40195965529.8549161, -13032011920.2173319, 2992057856.08137674,
                                     -523389786.043756779, 70117754.1400311323, -7475940.49368412648, 714902.215066671208,
                                     -15121.869397162694, 12484.8492669301017, 2826.87839785332644, 781.764581677786985,
                                     190.590075327198209, 43.8858135426754342, 9.57458188872135859, 1.99471174561392262,
                                     0.3989422781930687, 6.55707863990674412e-12};
    static constexpr double tanh[] = {-0.0000195210760556898191, 0.0000833601484991822946, -0.000233412784711560477, 0.000588457071869495536,
                                      -0.00145554598993423335, 0.00359209253353869926, -0.00886323265290322698, 0.0218694883891120469,
                                      -0.053968253963879028, 0.133333333333268342, -0.333333333333332997};
};

template <class R> using integers = typename Constants<R>::integers;

// A number in all lanes.
template <class R> inline R all(double value) { return (typename Constants<R>::real)value - R{}; }

template <class R, class C, int n> inline R polynomial(const C (&coefficients)[n], R x, double times = 1) {
    R sum = all<R>(coefficients[0] * times);
    for (int i = 1; i < n; ++i) sum = multiply_add(sum, x, all<R>(coefficients[i] * times));
    return sum;
}

template <class R> inline R magnitude(R z) { return (R)((integers<R>)z & ~(integers<R>)all<R>(-0.0)); }
template <class R> inline R with_sign(R a, R sign) { return (R)((integers<R>)a | ((integers<R>)sign & (integers<R>)all<R>(-0.0))); }
template <class R> inline R within(double bound, R z) { return min(all<R>(bound), max(all<R>(-bound), z)); }

// exp(y) as a product of 2^(n + lift) and 2^-lift (1 + y - n ln(2) + ...), where 2^(n + lift) is a normal number.
template <int lift, class R> inline R exponential(R y) {
    using K = Constants<R>;
    const double scale = __builtin_ldexp(1, -lift);
    const R shifted = multiply_add(y, all<R>(K::log2e), all<R>(K::to_integer));
    const R n = shifted - K::to_integer;
    const R r = multiply_add(n, all<R>(-K::ln2_rest), multiply_add(n, all<R>(-K::ln2), y));
    const R p = multiply_add(multiply_add(polynomial(K::exp, r, scale), r, all<R>(scale)), r, all<R>(scale));
    return p * (R)(((integers<R>)shifted << K::mantissa) + (integers<R>)all<R>(1 / scale));
}

// 1 + exp(-z): infinite where the exponential overflows.
template <class R> inline R one_and_exp(R z) {
    using K = Constants<R>;
    return 1 + exponential<-K::lift>(min(all<R>(K::infinite), max(all<R>(K::invisible), -z)));
}

// The logistic function of z, and of -z.
template <class R> struct Logistic {
    R at, opposite;
};

template <class R> inline Logistic<R> logistic(R z) {
    const R e = exponential<0>(within(Constants<R>::normal, -z));
    const R at = 1 / (1 + e);
    return {at, e * at};
}

template <class R> inline R hyperbolic_tangent(R z) {
    const R a = magnitude(z), square = a * a;
    const R small = multiply_add(a * square, polynomial(Constants<R>::tanh, square), a);
    return with_sign(select(a > all<R>(0.55), 1 - 2 / one_and_exp(a * -2), small), z);
}

// The standard normal distribution up to z, and its density there.
template <class R> struct Normal {
    R below, density;
};

template <class R> inline Normal<R> normal(R z) {
    using K = Constants<R>;
    const R a = min(all<R>(K::farthest), magnitude(z));
    const R e = exponential<K::lift>(a * a * all<R>(-0.5));
    const R tail = polynomial(K::tail, 1 / (a + K::away)) * e;
    return {select(z > 0, 1 - tail, tail), e * all<R>(0.3989422804014327)};
}

// gelu with a tanh in place of the error function is z logistic(2u), u = sqrt(2 / pi) (z + 0.044715 z^3).
template <class R> inline R twice_u(R z) { return z * multiply_add(z * z, all<R>(0.071354816272600249), all<R>(1.5957691216057307)); }
template <class R> inline R twice_u_slope(R z) { return multiply_add(z * z, all<R>(0.21406444881780075), all<R>(1.5957691216057307)); }

template <int kind, class R> inline R smooth(R z) {
    if constexpr (kind == SIGMOID) return 1 / one_and_exp(z);
    else if constexpr (kind == SILU) return z / one_and_exp(z);
    else if constexpr (kind == TANH) return hyperbolic_tangent(z);
    else if constexpr (kind == GELU) return z * normal(z).below;
    else {
        static_assert(kind == GELU_TANH, "a smooth activation has a formula here, and its derivative below");
        return z / one_and_exp(twice_u(z));
    }
}

template <int kind, class R> inline R smooth_derivative(R z) {
    using K = Constants<R>;
    if (kind == GELU) {
        const Normal<R> n = normal(z);
        return multiply_add(z, n.density, n.below);
    }
    // Far from zero these are 0 or 1, and stay so. At infinity those of the products of z are none, as in PyTorch.
    const R one = multiply_add(z, all<R>(0), all<R>(1));
    if (kind == GELU_TANH) {
        z = within(K::cubic, z);
        const Logistic<R> s = logistic(twice_u(z));
        return s.at * multiply_add(z * twice_u_slope(z), s.opposite, one);
    }
    z = within(K::normal, kind == TANH ? z * 2 : z);
    const Logistic<R> s = logistic(z);
    if (kind == TANH) return 4 * s.at * s.opposite;
    if (kind == SIGMOID) return s.at * s.opposite;
    return s.at * multiply_add(z, s.opposite, one);
}

template <int kind, bool derivative, class R> inline void each(R* r, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; ++i) r[i] = derivative ? smooth_derivative<kind>(r[i]) : smooth<kind>(r[i]);
}

// A function, because it is long: what is inlined into the loops must leave them short for the simple activations.
// It takes many registers at once, because it loads twenty constants first.
template <bool derivative, class R> __attribute__((noinline)) void apply_smooth(R* r, ptrdiff_t n, int kind) {
    switch (kind) {
        case SIGMOID: return each<SIGMOID, derivative>(r, n);
        case SILU: return each<SILU, derivative>(r, n);
        case TANH: return each<TANH, derivative>(r, n);
        case GELU: return each<GELU, derivative>(r, n);
        case GELU_TANH: return each<GELU_TANH, derivative>(r, n);
    }
}

}  // namespace
