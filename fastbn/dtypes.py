"""The element types fastbn computes with: how each is stored, and in what it is computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


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
    """

    storage: str
    name: str
    compute: np.dtype[Any]


_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = {
    row.storage: row
    for row in (
        DType("float32", "f32", _F32),
        DType("float64", "f64", _F64),
        DType("float16", "f16", _F32),
        # ml_dtypes' type is found by its name, so that nothing has to import ml_dtypes.
        DType("bfloat16", "bf16", _F32),
    )
}

_rows: dict[np.dtype[Any], DType | None] = {}  # a dtype's name takes longer to find than a small call


def lookup(dtype: np.dtype[Any]) -> DType | None:
    """Row of the table for a NumPy dtype, or None where fastbn does not compute with it."""
    try:
        return _rows[dtype]
    except KeyError:
        return _rows.setdefault(dtype, DTYPES.get(dtype.name) if dtype.isnative else None)
