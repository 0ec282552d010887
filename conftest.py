"""Doctests whose example needs an extra run where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

# Modules that cannot be imported have no examples to run; tests/test_numba.py says that Numba is missing.
collect_ignore = [] if find_spec("numba") else ["fastbn/kernels/numba.py", "fastbn/kernels/numba_math.py"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip an example that imports Numba where there is none."""
    needed = isinstance(item, pytest.DoctestItem) and item.dtest is not None and "import numba" in (item.dtest.docstring or "")
    if needed and find_spec("numba") is None:
        pytest.skip("numba is not installed (pip install 'fastbn[numba]')")
