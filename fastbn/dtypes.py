"""The element types fastbn computes with: how each is stored, and in what it is computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class DType(NamedTuple):
    """One row of the table of element types.

    Attributes
    ----------
    name : str
        Short name, the last part of a kernel's name (``normalize_ncsp_f32``).
    compute : numpy.dtype
        Type of the arithmetic, of the parameters and of the statistics.
    """

    name: str
    compute: np.dtype[Any]


DTYPES = {
    "float32": DType("f32", np.dtype(np.float32)),
    "float64": DType("f64", np.dtype(np.float64)),
    "float16": DType("f16", np.dtype(np.float32)),
    # ml_dtypes' type is found by its name, so that nothing has to import ml_dtypes.
    "bfloat16": DType("bf16", np.dtype(np.float32)),
}


def lookup(dtype: np.dtype[Any]) -> DType | None:
    """Row of the table for a NumPy dtype, or None where fastbn does not compute with it."""
    return DTYPES.get(dtype.name) if dtype.isnative else None
