"""Activation functions for the Numba kernels, of one number: what LLVM turns into vector instructions.

The exponential of y <= 0 never overflows, and is had as 2^n (1 + p), where p keeps its digits near y = 0: so tanh(z), from
exp(-2|z|) - 1, does so too. The upper tail of the normal distribution is exp(-a^2 / 2) times a smooth function of a, and
keeps its digits however small it is. The polynomials are Chebyshev fits. A function takes the normalized value and a
parameter, and stays in the type of the value: a plain constant would make float32 arithmetic float64, hence `like`.
`like`, `exp`, `sigmoid` and `tanh` are there for functions of the user's as well, because a call of the C library's would not become
vector instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from fastbn.kernels.numba_passes import FUNCTION

_compiled: Callable[[Callable[..., Any]], Any] = njit(nogil=True, **FUNCTION, fastmath={"contract"})


_POWERS = {32: (23, 127, 64), 64: (52, 1023, 200)}  # bits of the mantissa, what is added to an exponent, and what more


def _cast(typingctx: Any, x: Any, c: Any) -> Any:
    """Convert a real number to the type of x; of an array Numba would take the first element."""
    if not isinstance(types.unliteral(c), (types.Integer, types.Float, types.Boolean, types.Optional)):
        raise TypingError(f"it must give one real number, not {c}")
    return x(x, c), lambda context, builder, signature, arguments: context.cast(builder, arguments[1], c, x)


def _power(typingctx: Any, shifted: Any) -> Any:
    """2^n as a lifted number, where n stands in the lowest bits of `shifted`."""
    mantissa, bias, lift = _POWERS[shifted.bitwidth]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(shifted.bitwidth)
        n = builder.shl(builder.bitcast(arguments[0], word), word(mantissa))
        return builder.bitcast(builder.add(n, word(bias + lift << mantissa)), arguments[0].type)

    return shifted(shifted), generate


like: Any = intrinsic(_cast)  # like(z, c): the constant c in the type of z
_two_to: Any = intrinsic(_power)

# Highest power first: (exp(r) - 1 - r) / r^2, |r| <= ln(2) / 2; and exp(a^2 / 2) erfc(a / sqrt(2)) / 2 (a + 4) as a
# function of (a - 4) / (a + 4), 0 <= a <= 14.5 or 39.
_EXP = {
    32: (0.001392618359, 0.008363179053, 0.04166655462, 0.1666657699, 0.5),
    64: (
        2.51003854955103191e-8, 2.76200884454097482e-7, 2.75572684599970648e-6, 0.0000248015212959543751, 0.000198412698630536169,
        0.00138888889172137169, 0.00833333333333006183, 0.0416666666666241279, 0.166666666666666675, 0.5,
    ),
}  # fmt: skip
_TAIL = {
    32: (
        -0.000122983157, 0.0001948018511, 0.001569313645, -0.003523574056, -0.007527212912, 0.06040646975, -0.1865230059,
        0.3871366798, -0.6078966061, 0.7552851385,
    ),
    64: (
        -9.65342542022850467e-10, 7.26954547902668946e-11, 1.39240239935017101e-8, 1.45785933470364597e-8, -7.63808205349045035e-8,
        -1.54263205367710739e-7, 2.63682485764076251e-7, 1.01980485181351727e-6, -6.25132104047868019e-7, -5.91889273176323645e-6,
        7.15005595921609866e-7, 0.0000351441811577609727, -1.90786653166135743e-6, -0.000231094818319376211, 0.000133344254019049116,
        0.0016308184418903596, -0.00347969236224253334, -0.00754018896559305902, 0.0603965748906994641, -0.186521857959694163,
        0.387137400742218879, -0.607896641971891759, 0.75528513041575148,
    ),
}  # fmt: skip
# To round to an integer; what makes lifted powers of two ordinary ones; the smallest argument of the exponential; ln(2)
# in two parts; where the normal distribution ends.
_FORMAT = {
    32: (1.5 * 2.0**23, 2.0**-64, -110.0, 0.693359375, -2.12194440e-4, 14.5),
    64: (1.5 * 2.0**52, 2.0**-200, -760.0, float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"), 39.0),
}


def _polynomial(coefficients: tuple[float, ...], bits: int) -> Any:
    """Compile a polynomial, written out, for one type."""
    number = np.float32 if bits == 32 else np.float64
    names = {f"c{i}": number(c) for i, c in enumerate(coefficients)}
    text = "c0"
    for name in list(names)[1:]:
        text = f"({text}) * x + {name}"
    return _compiled(eval(f"lambda x: {text}", names))  # noqa: S307  nothing but the names above


def _by_type(functions: dict[int, Any]) -> Any:
    """Make one function of two: for float32, and for float64."""

    def function(x: float) -> Any:
        raise NotImplementedError

    def choose(x: Any) -> Callable[[Any], Any]:
        chosen = functions[x.bitwidth]
        return lambda x: chosen(x)

    overload(function, strict=False)(choose)
    return function


def _constant(values: tuple[float, ...], bits: int) -> Any:
    numbers = tuple((np.float32 if bits == 32 else np.float64)(value) for value in values)
    return _compiled(lambda x: numbers)


_lift = _by_type({bits: _constant((lift,), bits) for bits, (_, _, lift) in _POWERS.items()})
_constants = _by_type({bits: _constant(_FORMAT[bits], bits) for bits in (32, 64)})
_exp_polynomial = _by_type({bits: _polynomial(_EXP[bits], bits) for bits in (32, 64)})
_tail_polynomial = _by_type({bits: _polynomial(_TAIL[bits], bits) for bits in (32, 64)})


@_compiled
def _exponential(y: float) -> Any:
    """A power of two 2^n and p, where 2^n (1 + p) is exp(y), y <= 0, and what makes 2^n an ordinary number."""
    magic, lowered, lowest, ln2, ln2_rest, _ = _constants(y)
    y = lowest if y < lowest else y
    shifted = y * like(y, 1.4426950408889634) + magic
    n = shifted - magic
    high = y - n * ln2
    low = -(n * ln2_rest)
    r = high + low
    return _two_to(shifted), high + (r * r * _exp_polynomial(r) + low), lowered


@_compiled
def _exp_negative(y: float) -> Any:
    power, p, lowered = _exponential(y)
    return (power * p + power) * lowered


@_compiled
def sigmoid(z: float) -> Any:
    """The logistic function.

    Parameters
    ----------
    z : float
        float32 or float64.

    Returns
    -------
    float
        In the type of z, to 3 units in the last place.

    Examples
    --------
    >>> sigmoid(0.0)
    0.5
    """
    e = _exp_negative(-abs(z))
    one = like(z, 1)
    return (e if z < 0 else one) / (one + e)


@_compiled
def exp(z: float) -> Any:
    """The exponential function.

    Parameters
    ----------
    z : float
        float32 or float64.

    Returns
    -------
    float
        In the type of z, to 2 units in the last place.

    Examples
    --------
    >>> exp(0.0)
    1.0
    """
    magic, lowered, lowest, ln2, ln2_rest, _ = _constants(z)
    y = lowest if z < lowest else -lowest if z > -lowest else z
    one, lift = like(z, 1), _lift(z)[0]
    shifted = y * like(y, 1.4426950408889634) + magic
    n = shifted - magic
    r = y - n * ln2 - n * ln2_rest
    large = y > 0  # its power of two may be none; that of the others is lifted
    power = _two_to(shifted - lift - lift if large else shifted)
    return power * (r * (r * _exp_polynomial(r) + one) + one) * (one / lowered if large else lowered)


@_compiled
def tanh(z: float) -> Any:
    """The hyperbolic tangent.

    Parameters
    ----------
    z : float
        float32 or float64.

    Returns
    -------
    float
        In the type of z, to 3 units in the last place.

    Examples
    --------
    >>> tanh(0.0)
    0.0
    """
    power, p, lowered = _exponential(abs(z) * like(z, -2))
    power = power * lowered
    one = like(z, 1)
    e = power * p + power
    large = abs(z) > like(z, 0.55)
    quotient = (like(z, 2) * e if large else (one - power) - power * p) / (one + e)
    t = one - quotient if large else quotient
    return -t if z < 0 else (t if z > 0 else z)


@_compiled
def _normal(z: float) -> Any:
    """The standard normal distribution up to z, and its density there."""
    a, farthest = abs(z), _constants(z)[-1]
    a = farthest if a > farthest else a
    e = _exp_negative(a * a * like(z, -0.5))
    inverse = like(z, 1) / (a + like(z, 4))
    tail = _tail_polynomial((a - like(z, 4)) * inverse) * inverse * e
    return like(z, 1) - tail if z > 0 else tail, e * like(z, 0.3989422804014327)


@_compiled
def _twice_u(z: float) -> Any:
    return z * (z * z * like(z, 0.07135481627260025) + like(z, 1.5957691216057307))


# ---- The activations, of the normalized value and a parameter, and their derivatives ----


@_compiled
def _relu(z: float, _: float) -> Any:
    return like(z, 0) if z < 0 else z


@_compiled
def _relu_slope(z: float, _: float) -> Any:
    return like(z, 0) if z <= 0 else like(z, 1)


@_compiled
def _relu6(z: float, _: float) -> Any:
    return like(z, 0) if z < 0 else like(z, 6) if z > 6 else z


@_compiled
def _relu6_slope(z: float, _: float) -> Any:
    return like(z, 0) if (z <= 0) | (z >= 6) else like(z, 1)


@_compiled
def _leaky_relu(z: float, slope: float) -> Any:
    return z if z > 0 else z * like(z, slope)


@_compiled
def _leaky_relu_slope(z: float, slope: float) -> Any:
    return like(z, 1) if z > 0 else like(z, slope)


@_compiled
def _hardswish(z: float, _: float) -> Any:
    return z * (_relu6(z + like(z, 3), 0.0) * like(z, 1 / 6))


@_compiled
def _hardswish_slope(z: float, _: float) -> Any:
    return like(z, 0) if z <= -3 else like(z, 1) if z >= 3 else z * like(z, 1 / 3) + like(z, 0.5)


@_compiled
def _sigmoid(z: float, _: float) -> Any:
    return sigmoid(z)


@_compiled
def _sigmoid_slope(z: float, _: float) -> Any:
    return sigmoid(z) * sigmoid(-z)


@_compiled
def _silu(z: float, _: float) -> Any:
    return z * sigmoid(z)


@_compiled
def _silu_slope(z: float, _: float) -> Any:
    return sigmoid(z) * (like(z, 1) + z * sigmoid(-z))


@_compiled
def _tanh(z: float, _: float) -> Any:
    return tanh(z)


@_compiled
def _tanh_slope(z: float, _: float) -> Any:
    return like(z, 4) * sigmoid(z + z) * sigmoid(-z - z)


@_compiled
def _gelu(z: float, _: float) -> Any:
    return z * _normal(z)[0]


@_compiled
def _gelu_slope(z: float, _: float) -> Any:
    below, density = _normal(z)
    return z * density + below


@_compiled
def _gelu_tanh(z: float, _: float) -> Any:
    return z * sigmoid(_twice_u(z))


@_compiled
def _gelu_tanh_slope(z: float, _: float) -> Any:
    edge = like(z, 32)  # beyond it the slope is 0 or 1, and the square of z may overflow; at infinity it is none, as in PyTorch
    one = z * like(z, 0) + like(z, 1)
    z = edge if z > edge else -edge if z < -edge else z
    u = _twice_u(z)
    return sigmoid(u) * (one + z * (z * z * like(z, 0.21406444881780075) + like(z, 1.5957691216057307)) * sigmoid(-u))


FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "relu": (_relu, _relu_slope),
    "relu6": (_relu6, _relu6_slope),
    "leaky_relu": (_leaky_relu, _leaky_relu_slope),
    "hardswish": (_hardswish, _hardswish_slope),
    "sigmoid": (_sigmoid, _sigmoid_slope),
    "silu": (_silu, _silu_slope),
    "tanh": (_tanh, _tanh_slope),
    "gelu": (_gelu, _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
}
FLAT = ("relu", "relu6", "hardswish")  # where these are flat no gradient passes, not even an infinite one
