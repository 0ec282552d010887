"""The two ways that a call may take: straight to a kernel's door, or through the checks of Python."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import fastbn
from fastbn import dispatch, functional, norms

# Other functions have something behind them, too.
DIRECT = [name for name in fastbn.__all__ if type(getattr(fastbn, name)).__name__ == "Direct"]


def take_the_checked_way(patch: pytest.MonkeyPatch) -> None:
    """Let no call of a user's take the direct path."""
    for name in DIRECT:
        checked = getattr(fastbn, name).__wrapped__
        for module in (fastbn, functional, norms):
            patch.setattr(module, name, checked, raising=False)
    if fastbn.core.library is not None:
        patch.setattr(fastbn.FrozenBatchNorm, "__call__", fastbn.FrozenBatchNorm.__dict__["__call__"].__wrapped__)


@contextmanager
def pinned_by_environment(name: str) -> Iterator[None]:
    """As if FASTBN_KERNEL had been set when fastbn was imported."""
    forget = fastbn.core.library.cache_clear if fastbn.core.library is not None else lambda: None
    before = dispatch._from_environment
    dispatch._from_environment = name
    forget()
    try:
        yield
    finally:
        dispatch._from_environment = before
        forget()


def is_direct(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a call never reaches the function behind the direct path, which then may refuse it."""
    code = getattr(function, "__wrapped__", function).__code__
    reached = []

    def watch(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code is code:
            reached.append(frame)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        function(*args, **kwargs)
    except (TypeError, ValueError):
        assert reached, "only the checked way may refuse"
    finally:
        sys.setprofile(before)
    return not reached
