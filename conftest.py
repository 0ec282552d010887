"""Doctests whose example needs an optional package run where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

# Modules that cannot be imported have no examples to run; tests/test_numba.py says that Numba is missing.
collect_ignore = [] if find_spec("numba") else ["fastbn/kernels/numba.py", "fastbn/kernels/numba_math.py"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip an example that imports an optional package where there is none."""
    text = item.dtest.docstring or "" if isinstance(item, pytest.DoctestItem) and item.dtest is not None else ""
    for package, command in {"numba": "pip install 'fastbn[numba]'", "threadpoolctl": "pip install threadpoolctl"}.items():
        if f"import {package}" in text and find_spec(package) is None:
            pytest.skip(f"{package} is not installed ({command})")
