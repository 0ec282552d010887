"""The functions that may follow a normalization: their names, and what a kernel is told of them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from math import inf, isfinite
from typing import Any, NamedTuple

import numpy as np

from fastbn.shown import short

Array = np.ndarray[Any, Any]


class Builtin(NamedTuple):
    """One of the functions that every kernel knows.

    Attributes
    ----------
    name : str
    parameter : float
        The slope of leaky_relu below zero; 0 for the others.
    code : int
        Its number in the compiled kernels.
    """

    name: str
    parameter: float
    code: int

    @property
    def custom(self) -> bool:
        """Whether it is a function of the user's."""
        return False

    @property
    def costly(self) -> bool:
        """Whether it takes much longer than reading the number."""
        return self.name not in ("relu", "relu6", "leaky_relu", "hardswish")

    @property
    def invertible(self) -> bool:
        """Whether the input can be had from the output."""
        return self.name == "leaky_relu" and self.parameter > 0

    @property
    def argument(self) -> tuple[str, float] | str:
        """What `lookup` makes it of."""
        return (self.name, self.parameter) if self.name == "leaky_relu" else self.name


def _is_compiled(function: object) -> bool:
    """Whether numba.njit made a function; not numba.cuda.jit, nor numba.vectorize. Numba is not imported for the question."""
    registry = sys.modules.get("numba.core.registry")
    return registry is not None and isinstance(function, registry.CPUDispatcher)


class Activation:
    """Your own activation, which Numba compiles into its kernels.

    Parameters
    ----------
    forward : function compiled by numba.njit
        A function from one float, in the type of the arithmetic, to one float.
    derivative : function compiled by numba.njit, optional
        Its derivative; the backward needs it.

    Raises
    ------
    TypeError
        If a function is not compiled by Numba.

    Examples
    --------
    >>> import fastbn
    >>> import numba
    >>> square = fastbn.Activation(numba.njit(lambda z: z * z), numba.njit(lambda z: z + z))
    >>> x = np.array([[1.0], [4.0]])
    >>> fastbn.batch_norm_elemt(x, [2.0], [1.0], activation=square)
    array([[1.],
           [4.]])
    """

    custom = costly = True
    invertible = False
    parameter = 0.0

    def __init__(self, forward: Any, derivative: Any = None):
        for name, function in {"forward": forward, "derivative": derivative}.items():
            if _is_compiled(function) or (name == "derivative" and function is None):
                continue
            raise TypeError(f"{name} must be a function compiled by numba.njit, got {short(function)}{_why_not_compiled()}")
        self.forward = forward
        self.derivative = derivative

    def __repr__(self) -> str:
        name, slope = (getattr(f, "__name__", None) for f in (self.forward, self.derivative))
        return f"Activation({name}, {slope})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Activation) and (other.forward, other.derivative) == (self.forward, self.derivative)

    def __hash__(self) -> int:
        return hash((self.forward, self.derivative))


NAMES = ("relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh")
BUILTINS = {name: Builtin(name, 0.01 if name == "leaky_relu" else 0.0, code) for code, name in enumerate(NAMES, 1)}


class Epilogue(NamedTuple):
    """What comes after the normalization, as a kernel is told.

    Attributes
    ----------
    activation : Builtin, Activation or None
    residual : ndarray of shape (outer, channels, inner), optional
        Added before the activation.
    scale, shift : ndarray of shape (channels,), optional
        For gradients: the parameters of the forward, ``z = (x - mean) * scale + shift + residual``.
    dresidual : ndarray of shape (outer, channels, inner), optional
        For gradients: where to write that of the residual.
    from_output : bool
        For gradients: x is the forward's output, and the activation is undone first.
    """

    activation: Builtin | Activation | None
    residual: Array | None = None
    scale: Array | None = None
    shift: Array | None = None
    dresidual: Array | None = None
    from_output: bool = False


_EXPECTED = "activation must be None, a name, a tuple of a name and a parameter, a function compiled by numba.njit, or a fastbn.Activation"
_PARAMETERS = "activation takes a parameter as ('leaky_relu', slope), ('gelu', 'tanh') or ('gelu', 'none')"
_ALIASES = {"swish": "silu", "logistic": "sigmoid", "expit": "sigmoid", "hardsilu": "hardswish", "lrelu": "leaky_relu"}


def lookup(activation: object) -> Builtin | Activation:
    """The activation that a user means.

    Parameters
    ----------
    activation : str, tuple, Activation, function or Builtin
        A name of `NAMES`, ``("leaky_relu", slope)``, ``("gelu", "tanh")``, which is "gelu_tanh", or a function
        compiled by Numba.

    Returns
    -------
    Builtin or Activation

    Raises
    ------
    TypeError, ValueError
        If there is no such activation, or a function is not compiled by Numba.
    """
    if type(activation) is str and activation in BUILTINS:
        return BUILTINS[activation]
    if is_found(activation):
        return activation  # type: ignore[return-value]
    if callable(activation):
        if _is_compiled(activation):
            return Activation(activation)
        raise TypeError(f"{_EXPECTED}, got {short(activation)}{_hint(activation) or _why_not_compiled()}")
    name, *parameters = activation if isinstance(activation, tuple) and activation else (activation,)
    if not isinstance(name, str):
        raise TypeError(f"{_EXPECTED}, got {short(activation)}{_hint(name)}")
    if name not in BUILTINS:
        raise ValueError(f"activation must be one of {', '.join(NAMES)} or None, got {short(name)}{_hint(name)}")
    if not parameters:
        return BUILTINS[name]
    if name not in ("leaky_relu", "gelu") or len(parameters) > 1:
        raise ValueError(f"{_PARAMETERS}, got {short(activation)}")
    (parameter,) = parameters
    if name == "leaky_relu":
        return BUILTINS[name]._replace(parameter=_slope(parameter))
    if not isinstance(parameter, str):
        raise TypeError(f"{_PARAMETERS}, got {short(activation)}")
    if parameter not in ("none", "tanh"):
        raise ValueError(f"{_PARAMETERS}, got {short(activation)}")
    return BUILTINS["gelu" if parameter == "none" else "gelu_tanh"]


def is_found(activation: object) -> bool:
    """Whether something is what `lookup` returns, as the `activation` of what a forward saved."""
    if not isinstance(activation, Builtin):
        return isinstance(activation, Activation)
    own = BUILTINS.get(activation.name) if isinstance(activation.name, str) else None
    slope = activation.parameter
    return own is not None and type(slope) is float and isfinite(slope) and activation == own._replace(parameter=slope)


def _slope(value: Any) -> float:
    """Check the slope of leaky_relu: any finite number."""
    if isinstance(value, (bool, np.timedelta64)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"activation: the slope of leaky_relu must be a number, got {short(value)}")
    try:
        slope = float(value)
    except OverflowError:
        slope = inf
    if not isfinite(slope):
        raise ValueError(f"activation: the slope of leaky_relu must be a finite float64, got {value if isinstance(value, float) else inf}")
    return slope


def _why_not_compiled() -> str:
    """Why nothing can be compiled, where that is so."""
    if not find_spec("numba"):
        return "; Numba, which compiles functions, is not installed (pip install numba)"
    disabled = getattr(sys.modules.get("numba.core.config"), "DISABLE_JIT", 0)
    return "; NUMBA_DISABLE_JIT is set, with which numba.njit compiles nothing" if disabled else ""


def _hint(meant: object) -> str:
    """The name that was meant by the function, module or class of another library, or by another spelling."""
    words = [meant] if isinstance(meant, str) else [getattr(meant, "__name__", None), type(meant).__name__]
    names = {name.replace("_", ""): name for name in NAMES} | _ALIASES
    for word in words:
        if isinstance(word, str) and (name := names.get(word.lower().replace("_", "").replace("-", ""))):
            return f'; did you mean "{name}"?'
    return ""
