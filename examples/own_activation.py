"""Functions of one's own inside the kernel: mish, and swish with a learned scale.

Run with ``python examples/own_activation.py``; it needs Numba (``pip install '.[numba]'``).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

import fastbn

# Unlike math.exp, these become vector instructions; like(z, 1) is 1 in the type of z, where 1 would make it float64.
from fastbn.kernels.numba_math import exp, like, sigmoid


@numba.njit
def mish(z: float) -> Any:
    """The mish of z, ``z * tanh(log(1 + exp(z)))``, with one exponential: Misra, "Mish", 2019."""
    e = exp(like(z, 20) if z > 20 else z)  # beyond 20 the quotient is 1
    n = e * (e + like(z, 2))
    return z * (n / (n + like(z, 2)))


@numba.njit
def mish_derivative(z: float) -> Any:
    """The derivative of mish."""
    w = like(z, 20) if z > 20 else z
    e = exp(w)
    n = e * (e + like(z, 2))
    d = like(z, 1) / (n + like(z, 2))
    return d * (n + like(z, 4) * w * (e * e + e) * d)


def swish(scale: float) -> fastbn.Activation:
    """Return ``z * sigmoid(scale * z)`` with a scale that was learned; another scale is another function to compile."""
    s = np.float32(scale)

    @numba.njit
    def value(z: float) -> Any:
        return z * sigmoid(s * z)

    @numba.njit
    def derivative(z: float) -> Any:
        return sigmoid(s * z) * (like(z, 1) + s * z * sigmoid(-s * z))

    return fastbn.Activation(value, derivative)


def main() -> None:
    """Normalize with both, and take a gradient."""
    x = np.random.default_rng(0).standard_normal((8, 16, 20, 20)).astype(np.float32)
    for name, activation in (("mish", fastbn.Activation(mish, mish_derivative)), ("swish", swish(1.5))):
        y, saved = fastbn.batch_norm_forward(x, activation=activation)
        gradients = fastbn.batch_norm_backward(np.ones_like(x), x, saved)
        print(f"{name}: mean output {y.mean():.4f}, mean derivative {np.sum(np.asarray(gradients.dbias)) / x.size:.4f}")


if __name__ == "__main__":
    main()
