"""The element types fastbn computes with: how each is stored, and in what it is computed."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from fastbn.shown import short


class DType(NamedTuple):
    """One row of the table of element types.

    Attributes
    ----------
    storage : str
        Name of the NumPy dtype.
    name : str
        Short name, the last part of a kernel's name (``normalize_ncsp_f32``).
    compute : numpy.dtype
        Type of the arithmetic, of the parameters and of the statistics.
    step : float
        From 1 to the next number.
    """

    storage: str
    name: str
    compute: np.dtype[Any]
    step: float

    @property
    def compute_step(self) -> float:
        """From 1 to the next number of the arithmetic."""
        return DTYPES[self.compute.name].step


_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = {
    row.storage: row
    for row in (
        DType("float32", "f32", _F32, 2.0**-23),
        DType("float64", "f64", _F64, 2.0**-52),
        DType("float16", "f16", _F32, 2.0**-10),
        # ml_dtypes' type is found by its name, so that nothing has to import ml_dtypes.
        DType("bfloat16", "bf16", _F32, 2.0**-7),
    )
}

# A dtype's name takes longer to find than a small call. Strangers may choose the dtype: so many are remembered, and no more.
_rows: dict[np.dtype[Any], DType | None] = {}
_MOST = 64


def lookup(dtype: np.dtype[Any]) -> DType | None:
    """Row of the table for a NumPy dtype, or None where fastbn does not compute with it."""
    try:
        return _rows[dtype]
    except KeyError:
        row = DTYPES.get(dtype.name) if dtype.isnative else None
        if row is not None or len(_rows) < _MOST:
            _rows[dtype] = row
        return row


def resolve(dtype: Any) -> np.dtype[Any]:
    """The NumPy dtype that a user means.

    Raises
    ------
    TypeError
        If it is none of the table, or "bfloat16" and ml_dtypes is not installed.
    """
    try:
        if isinstance(dtype, str) and dtype == "bfloat16":
            dtype = import_module("ml_dtypes").bfloat16
        found: np.dtype[Any] = np.dtype(dtype)
    except ImportError:
        raise TypeError("dtype bfloat16 needs ml_dtypes, which is not installed (pip install ml_dtypes)") from None
    except (TypeError, ValueError, SyntaxError):
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {short(dtype)}") from None
    if dtype is None or lookup(found) is None:  # NumPy takes None for float64
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)} in native byte order, got {None if dtype is None else str(found)}")
    return found
