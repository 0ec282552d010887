"""Modules of kernels offer what `fastbn.kernels.protocol` says."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from fastbn import core
from fastbn.composed import ComposedKernel
from fastbn.dispatch import TABLE, Kernel
from fastbn.kernels import protocol

HERE = [kernel for kernel in TABLE if not kernel.unusable()]


def _parameters(function: Any) -> dict[str, bool]:
    """Names, and whether an argument may be left out."""
    given = inspect.signature(function).parameters.values()
    return {p.name: p.default is not p.empty for p in given if p.name != "self"}


def _methods(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


@pytest.mark.parametrize("kernel", HERE, ids=lambda k: k.name)
@pytest.mark.parametrize("operation", _methods(protocol.Operations))
def test_every_module_has_the_four_operations(kernel: Kernel, operation: str) -> None:
    module: Any = kernel.module()
    assert _parameters(getattr(module, operation)) == _parameters(getattr(protocol.Operations, operation))


@pytest.mark.parametrize("kernel", HERE, ids=lambda k: k.name)
@pytest.mark.parametrize("call", _methods(protocol.WholeCalls))
def test_whole_calls_are_a_modules_own_or_composed(kernel: Kernel, call: str) -> None:
    found = _parameters(getattr(core.whole(kernel), call))
    wanted = _parameters(getattr(protocol.WholeCalls, call))
    assert list(found)[: len(wanted)] == list(wanted)
    assert all(found[name] == wanted[name] for name in wanted)
    assert all(left_out for name, left_out in found.items() if name not in wanted)


def test_there_are_four_operations() -> None:
    assert _methods(protocol.Operations) == ["stats", "normalize", "grad_sums", "grad_input"]
    assert {*_methods(protocol.Operations), *_methods(protocol.WholeCalls)} <= set(dir(ComposedKernel(HERE[-1].module())))
