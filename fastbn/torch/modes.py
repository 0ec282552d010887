"""The mode of torch in which a layer was called, for what is computed later: as if it had been at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

_autograd: Any = torch._C._autograd


class Mode(NamedTuple):
    """What changes the results of operations, or what is kept of them, from outside.

    Attributes
    ----------
    recorded : bool
        Whether autograd records.
    inference : bool
        Whether it is `torch.inference_mode`.
    hooks : tuple, optional
        For saved tensors.
    transformed : bool
        Whether `torch.func` transforms.
    """

    recorded: bool
    inference: bool = False
    hooks: Any = None
    transformed: bool = False


def saved_hooks() -> Any:
    """The hooks for saved tensors that hold, or None."""
    return _autograd._top_saved_tensors_default_hooks(True)


def mode() -> Mode:
    """The mode of now; of what torch.compile traces, as far as it can tell."""
    recorded = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return Mode(recorded)
    return Mode(recorded, torch.is_inference_mode_enabled(), saved_hooks(), torch._C._are_functorch_transforms_active())


def again(wanted: Mode) -> Any:
    """A context in which a mode holds that held before. No layer waits where torch.func transforms, so that is left."""
    return torch.set_grad_enabled(wanted.recorded) if torch.compiler.is_compiling() else _again(wanted)


@contextmanager
def _again(wanted: Mode) -> Iterator[None]:
    with ExitStack() as stack:
        if torch._C._are_functorch_transforms_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            left: Any = temporarily_clear_interpreter_stack  # it has no types
            stack.enter_context(left())
        if torch.is_inference_mode_enabled() != wanted.inference:
            stack.enter_context(torch.inference_mode(wanted.inference))
        stack.enter_context(torch.set_grad_enabled(wanted.recorded))
        stack.enter_context(_with_hooks(wanted.hooks))
        yield


@contextmanager
def _with_hooks(wanted: Any) -> Iterator[None]:
    inner = []
    while (top := saved_hooks()) not in (None, wanted):
        _autograd._pop_saved_tensors_default_hooks()
        inner.append(top)
    outer = () if top == wanted else (wanted,)
    for hooks in outer:
        _autograd._push_saved_tensors_default_hooks(*hooks)
    try:
        yield
    finally:
        for _ in outer:
            _autograd._pop_saved_tensors_default_hooks()
        for hooks in reversed(inner):
            _autograd._push_saved_tensors_default_hooks(*hooks)
