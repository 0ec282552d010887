"""What torch's functions do when they meet what stands for the input or the output of a normalization (deferred.py)."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from fastbn.torch.deferred import Input, Pending, deferred
from fastbn.torch.operators import IDENTITY, Arguments
from fastbn.torch.parts import Parts
from fastbn.torch.standing import RULES

F = torch.nn.functional


def _batch_norm(
    input: Any, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,  # noqa: A002
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if not isinstance(input, Input):
        return None
    steps = input.steps
    a = Arguments(input.x, None, weight, bias, running_mean, running_var, training, momentum, eps, IDENTITY, steps.from_output)
    if not a.is_usual():
        return None
    return deferred(a, steps, input.visit)


def _parts(input: Any, weight: Any, bias: Any, parts: Any, eps: Any, kind: str) -> Any:  # noqa: A002
    if not isinstance(input, Input) or input.steps.sum or not input.steps.activation:
        return None
    a = Parts(input.x, weight, bias, parts, eps, kind)
    return deferred(a, input.steps, input.visit) if a.is_usual() else None


def _group_norm(input: Any, num_groups: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: Any = 1e-5) -> Any:  # noqa: A002
    return _parts(input, weight, bias, num_groups, eps, "group_norm")


def _layer_norm(input: Any, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: Any = 1e-5) -> Any:  # noqa: A002
    return _parts(input, weight, bias, normalized_shape, eps, "layer_norm")


def _rms_norm(input: Any, normalized_shape: Any, weight: Tensor | None = None, eps: Any = None) -> Any:  # noqa: A002
    return _parts(input, weight, None, normalized_shape, eps, "rms_norm")


def _rule(name: str, in_place: bool = False) -> Callable[..., Any]:
    """Of an activation without a parameter."""

    def rule(input: Any = None, inplace: bool = False, **others: Any) -> Any:  # noqa: A002
        return input.activated(name, 0.0, in_place or inplace) if isinstance(input, Pending) and not others else None

    return rule


def _leaky_relu(input: Any = None, negative_slope: Any = 0.01, inplace: bool = False, **others: Any) -> Any:  # noqa: A002
    if not isinstance(input, Pending) or type(negative_slope) is not float or not -inf < negative_slope < inf or others:
        return None
    return input.activated("leaky_relu", negative_slope, inplace)


def _leaky_relu_(input: Any = None, negative_slope: Any = 0.01, **others: Any) -> Any:  # noqa: A002
    return _leaky_relu(input, negative_slope, True, **others)


def _hardtanh(input: Any = None, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False, **others: Any) -> Any:  # noqa: A002
    """Which `torch.nn.ReLU6` is."""
    is_relu6 = isinstance(input, Pending) and type(min_val) in (int, float) and (min_val, max_val) == (0, 6) and not others
    return input.activated("relu6", 0.0, inplace) if is_relu6 else None


def _hardtanh_(input: Any = None, min_val: Any = -1.0, max_val: Any = 1.0, **others: Any) -> Any:  # noqa: A002
    return _hardtanh(input, min_val, max_val, True, **others)


def _gelu(input: Any = None, *, approximate: str = "none", **others: Any) -> Any:  # noqa: A002
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return input.activated(name, 0.0, False) if isinstance(input, Pending) and name and not others else None


def _add(input: Any = None, other: Any = None, *, alpha: Any = 1, **others: Any) -> Any:  # noqa: A002
    if type(alpha) is not int or alpha != 1 or others:
        return None
    found = input.plus(other, False) if isinstance(input, Pending) else None
    if found is None and isinstance(other, Pending) and other.has_order_of(input):
        return other.plus(input, False)
    return found


def _add_(input: Any = None, other: Any = None, *, alpha: Any = 1, **others: Any) -> Any:  # noqa: A002
    if type(alpha) is not int or alpha != 1 or others or not isinstance(input, Pending):
        return None
    return input.plus(other, True)


_RULES: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu_,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh_,
    F.gelu: _gelu,
    F.relu6: _rule("relu6"),
    F.hardswish: _rule("hardswish"),
    F.silu: _rule("silu"),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _rule("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _rule("relu", in_place=True)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid), _rule("sigmoid")),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), _rule("sigmoid", in_place=True)),
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh), _rule("tanh")),
    **dict.fromkeys((torch.tanh_, Tensor.tanh_), _rule("tanh", in_place=True)),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_),
}
RULES.update(_RULES)
