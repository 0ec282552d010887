"""The mode that fastbn's own arithmetic in NumPy runs in: the default one and without a warning, whatever is the caller's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np

try:
    from fastbn.kernels import _pool
except ImportError:  # built without a compiler: the caller's mode is all there is
    _pool = None

P = ParamSpec("P")
R = TypeVar("R")


def default_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function round to nearest, keep subnormal numbers and be silent, as the kernels do; then restore the mode."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if _pool is None:
            with np.errstate(all="ignore"):
                return function(*args, **kwargs)
        before = _pool.set_float_mode()
        try:
            with np.errstate(all="ignore"):
                return function(*args, **kwargs)
        finally:
            _pool.set_float_mode(before)

    return run
