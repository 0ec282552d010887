"""Fixtures: every kernel that can run here, and every dtype it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest

import fastbn
from fastbn.dispatch import TABLE, Kernel
from fastbn.dtypes import DTYPES

hypothesis.settings.register_profile(
    "fastbn",
    derandomize=True,
    deadline=None,
    max_examples=30,
    # The pin is the same for all examples of a test.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("fastbn")


@pytest.fixture(params=[kernel for kernel in TABLE if not kernel.unusable()], ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Every kernel that can run here, pinned. `test_dispatch` shows which others there are, and why they cannot."""
    with fastbn.use_kernel(request.param.name):
        yield request.param


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, kernel: Kernel) -> np.dtype[Any]:
    """Every dtype that the kernel takes; `indirect` parametrization chooses some of them."""
    if reason := kernel.declines(request.param):
        pytest.skip(f"{kernel.name}: {reason}")
    if request.param == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(request.param)
