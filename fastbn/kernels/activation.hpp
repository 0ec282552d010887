// Activation functions and their derivatives, on registers of float or double. No loops over data, no calls of libm.
//
// All smooth ones rest on two functions. The exponential of y <= 0 never overflows, and is had as 2^n (1 + p), where p
// keeps its digits near y = 0: so tanh(z), from exp(-2|z|) - 1, does so too. The upper tail of the normal distribution
// is exp(-a^2 / 2) times a smooth function of a, and keeps its digits however small it is.
//
// Largest errors in float, with a fused multiply-add (tests/test_activations.py): exp, sigmoid, tanh and the normal
// distribution 2 units in the last place, the derivatives of sigmoid and tanh 2^-23. The polynomials are Chebyshev
// fits by mpmath's chebyfit, highest power first. NaN stays NaN.
#pragma once

namespace {

enum Kind : int { IDENTITY, RELU, RELU6, LEAKY_RELU, HARDSWISH, SIGMOID, SILU, TANH, GELU, GELU_TANH };

// A function of the normalized value; the parameter is the slope of leaky_relu.
struct Activation {
    int kind;
    double parameter;
};

template <class R> struct Constants;

template <> struct Constants<f32r> {
    using real = float;
    using integers = i32r;
    static constexpr int mantissa = 23;
    static constexpr float to_integer = 0x1.8p23f;  // leaves a sum's integer part in its lowest bits
    // Powers of two are built 2^64 too large, so that they stay normal numbers where the result does not.
    static constexpr int lifted = 64 << 23;
    static constexpr float lowered = 0x1p-64f, lowest = -110;
    static constexpr float log2e = 1.44269504f, ln2 = 0x1.63p-1f, ln2_rest = -2.12194440e-4f;
    // (exp(r) - 1 - r) / r^2, |r| <= ln(2) / 2
    static constexpr float exp[] = {0.001392618359f, 0.008363179053f, 0.04166655462f, 0.1666657699f, 0.5f};
    // exp(a^2 / 2) erfc(a / sqrt(2)) / 2 (a + 4) as a function of (a - 4) / (a + 4), 0 <= a <= 14.5
    static constexpr float tail[] = {-0.000122983157f, 0.0001948018511f, 0.001569313645f, -0.003523574056f, -0.007527212912f,
                                     0.06040646975f,   -0.1865230059f,   0.3871366798f,   -0.6078966061f,   0.7552851385f};
    static constexpr float farthest = 14.5f;
};

template <> struct Constants<f64r> {
    using real = double;
    using integers = i64r;
    static constexpr int mantissa = 52;
    static constexpr double to_integer = 0x1.8p52;
    static constexpr int64_t lifted = 200ll << 52;
    static constexpr double lowered = 0x1p-200, lowest = -760;
    static constexpr double log2e = 1.4426950408889634, ln2 = 0x1.62e42feep-1, ln2_rest = 0x1.a39ef35793c76p-33;
    static constexpr double exp[] = {2.51003854955103191e-8, 2.76200884454097482e-7, 2.75572684599970648e-6, 0.0000248015212959543751,
                                     0.000198412698630536169, 0.00138888889172137169, 0.00833333333333006183, 0.0416666666666241279,
                                     0.166666666666666675, 0.5};
    // 0 <= a <= 39
    static constexpr double tail[] = {-9.65342542022850467e-10, 7.26954547902668946e-11, 1.39240239935017101e-8, 1.45785933470364597e-8,
                                      -7.63808205349045035e-8, -1.54263205367710739e-7, 2.63682485764076251e-7, 1.01980485181351727e-6,
                                      -6.25132104047868019e-7, -5.91889273176323645e-6, 7.15005595921609866e-7, 0.0000351441811577609727,
                                      -1.90786653166135743e-6, -0.000231094818319376211, 0.000133344254019049116, 0.0016308184418903596,
                                      -0.00347969236224253334, -0.00754018896559305902, 0.0603965748906994641, -0.186521857959694163,
                                      0.387137400742218879, -0.607896641971891759, 0.75528513041575148};
    static constexpr double farthest = 39;
};

template <class R> using integers = typename Constants<R>::integers;

// A number in all lanes.
template <class R> inline R all(double value) { return (typename Constants<R>::real)value - R{}; }

template <class R, class C, int n> inline R polynomial(const C (&coefficients)[n], R x) {
    R sum = all<R>(coefficients[0]);
    for (int i = 1; i < n; ++i) sum = multiply_add(sum, x, all<R>(coefficients[i]));
    return sum;
}

template <class R> inline R magnitude(R z) { return (R)((integers<R>)z & ~(integers<R>)all<R>(-0.0)); }
template <class R> inline R with_sign(R a, R sign) { return (R)((integers<R>)a | ((integers<R>)sign & (integers<R>)all<R>(-0.0))); }

// 2^n and p, where 2^n (1 + p) = exp(y + rest), y <= 0 and the rest is tiny. 2^n is lifted.
template <class R> struct Exponential {
    R power, p;
};

template <class R> inline Exponential<R> exponential(R y, R rest) {
    using K = Constants<R>;
    y = choose(y < K::lowest, all<R>(K::lowest), y);
    const R shifted = multiply_add(y, all<R>(K::log2e), all<R>(K::to_integer));
    const R n = shifted - K::to_integer;
    const R high = multiply_add(n, all<R>(-K::ln2), y);
    const R low = multiply_add(n, all<R>(-K::ln2_rest), rest);
    const R r = high + low;
    const R power = (R)(((integers<R>)shifted << K::mantissa) + (integers<R>)all<R>(1) + K::lifted);
    return {power, high + multiply_add(r * r, polynomial(K::exp, r), low)};
}

template <class R> inline R exp_negative(R y, R rest) {
    const Exponential<R> e = exponential(y, rest);
    return multiply_add(e.power, e.p, e.power) * Constants<R>::lowered;
}

template <class R> inline R sigmoid(R z) {
    const R e = exp_negative(-magnitude(z), R{});
    return choose(z < 0, e, all<R>(1)) / (1 + e);
}

// The same at z, and at -z.
template <class R> struct Logistic {
    R at, opposite;
};

template <class R> inline Logistic<R> logistic(R z) {
    const R e = exp_negative(-magnitude(z), R{});
    const R large = 1 / (1 + e), small = e * large;
    return {choose(z < 0, small, large), choose(z < 0, large, small)};
}

template <class R> inline R hyperbolic_tangent(R z) {
    const R a = magnitude(z);
    const Exponential<R> x = exponential(a * -2, R{});
    const R power = x.power * Constants<R>::lowered;
    const R e = multiply_add(power, x.p, power);
    const R less = multiply_add(power, -x.p, 1 - power);  // 1 - e
    const auto large = a > all<R>(0.55);
    const R quotient = choose(large, 2 * e, less) / (1 + e);
    return with_sign(choose(large, 1 - quotient, quotient), z);
}

template <class R> inline R hyperbolic_tangent_slope(R z) {
    const R e = exp_negative(magnitude(z) * -2, R{});
    const R inverse = 1 / (1 + e);
    return 4 * e * inverse * inverse;
}

// The standard normal distribution up to z, and its density there.
template <class R> struct Normal {
    R below, density;
};

template <class R> inline Normal<R> normal(R z) {
    using K = Constants<R>;
    R a = magnitude(z);
    a = choose(a > K::farthest, all<R>(K::farthest), a);
    const R square = a * a, lost = multiply_add(a, a, -square);
    const R e = exp_negative(square * all<R>(-0.5), lost * all<R>(-0.5));
    const R inverse = 1 / (a + 4);
    const R tail = polynomial(K::tail, (a - 4) * inverse) * inverse * e;
    return {choose(z > 0, 1 - tail, tail), e * all<R>(0.3989422804014327)};
}

// gelu with a tanh in place of the error function is z logistic(2u), u = sqrt(2 / pi) (z + 0.044715 z^3).
template <class R> inline R twice_u(R z) { return z * multiply_add(z * z, all<R>(0.071354816272600249), all<R>(1.5957691216057307)); }
template <class R> inline R twice_u_slope(R z) { return multiply_add(z * z, all<R>(0.21406444881780075), all<R>(1.5957691216057307)); }

template <int kind, class R> inline R smooth(R z) {
    if (kind == SIGMOID) return sigmoid(z);
    if (kind == SILU) return z * sigmoid(z);
    if (kind == TANH) return hyperbolic_tangent(z);
    if (kind == GELU) return z * normal(z).below;
    return z * sigmoid(twice_u(z));
}

template <int kind, class R> inline R smooth_derivative(R z) {
    if (kind == TANH) return hyperbolic_tangent_slope(z);
    if (kind == GELU) {
        const Normal<R> n = normal(z);
        return multiply_add(z, n.density, n.below);
    }
    if (kind == GELU_TANH) {  // beyond 32 it is 0 or 1, and the square of z may overflow
        z = choose(z > 32, all<R>(32), choose(z < -32, all<R>(-32), z));
        const Logistic<R> s = logistic(twice_u(z));
        return s.at * multiply_add(z * twice_u_slope(z), s.opposite, all<R>(1));
    }
    const Logistic<R> s = logistic(z);
    if (kind == SIGMOID) return s.at * s.opposite;
    return s.at * multiply_add(z, s.opposite, all<R>(1));
}

template <int kind, bool derivative, class R, int n> inline void each(R (&r)[n]) {
    for (int i = 0; i < n; ++i) r[i] = derivative ? smooth_derivative<kind>(r[i]) : smooth<kind>(r[i]);
}

// A function, because it is long: what is inlined into the loops must leave them short for the simple activations.
template <bool derivative, class R, int n> __attribute__((noinline)) void apply_smooth(R (&r)[n], int kind) {
    switch (kind) {
        case SIGMOID: return each<SIGMOID, derivative>(r);
        case SILU: return each<SILU, derivative>(r);
        case TANH: return each<TANH, derivative>(r);
        case GELU: return each<GELU, derivative>(r);
        case GELU_TANH: return each<GELU_TANH, derivative>(r);
    }
}

}  // namespace
