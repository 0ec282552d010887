"""Switch ATen's normalizations to fastbn and back, and count the calls.

The state belongs to the process. The first `enable` registers the kernels; a `disable` withdraws them if no other Python
thread exists. In between, a flag in C decides. If another thread exists, it may be on its way to a kernel, so the kernel
must not be withdrawn: it stays, and passes all calls on.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from fastbn import dispatch
from fastbn.torch.graph import all_norms, dtype_name, size, unseen

OLDEST = (2, 10)
_lock = threading.RLock()
_asked = False  # by `enable`
_blocks = 0  # of `enabled` that have not ended
_quiet = False  # torch has warned of the first override of a process


def _door() -> Any:
    """The compiled part."""
    try:
        import fastbn.torch._door as door
    except ImportError as error:
        raise RuntimeError(
            f"fastbn.torch needs fastbn's compiled part, which this installation lacks ({error}): reinstall fastbn with a C++ compiler; "
            "`python -m fastbn` says what runs"
        ) from error
    return door


def _check_version() -> None:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(f"fastbn.torch.enable() needs PyTorch {oldest} or newer, this is {torch.__version__}: pip install -U torch")


def _attach(door: Any) -> None:
    """Bring the kernels to the door."""
    kernel = dispatch.select("float32")
    table = getattr(kernel.module(), "kernels", None)
    if table is None:
        reasons = "; ".join(dispatch.passed_over("float32"))
        raise RuntimeError(f"fastbn.torch needs fastbn's compiled kernels, but {kernel.name!r} would run ({reasons})")
    if missing := door.attach(table):
        raise RuntimeError(
            f"this build of PyTorch {torch.__version__} lacks {missing}: fastbn.torch needs the stable C interface of the builds "
            "that `pip install torch` brings"
        )


def _use_up_the_warning() -> None:
    """Have torch say where nobody hears it that a kernel is overridden, which it says once in a process."""
    global _quiet
    if _quiet:
        return
    library: Any = torch.library.Library  # it has no types
    # An operator that only torch's own tests call. Where there is none of this name, torch's warning is heard.
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        override = library("aten", "IMPL")
        override.impl("_test_optional_intlist", lambda values, addends: values, "CPU")
        override._destroy()
    _quiet = True


def ready() -> Any:
    """The compiled part, with its kernels."""
    door = _door()
    _check_version()
    _attach(door)
    return door


def _switch(on: bool) -> None:
    """Make the door take calls, or leave them to torch."""
    if not on and "fastbn.torch._door" not in sys.modules:
        return  # nothing was ever enabled
    door = _door()
    if on == door.is_on():
        return
    if not on:
        door.stop(len(sys._current_frames()) == 1)
        return
    ready()
    _use_up_the_warning()
    if not door.start():
        raise RuntimeError(f"PyTorch {torch.__version__} did not let fastbn register its kernels")


def _apply() -> None:
    """Make the door do what is asked for."""
    _switch(_asked or _blocks > 0)


@contextmanager
def either() -> Iterator[Callable[[bool], None]]:
    """Choose freely whether fastbn is enabled; after the block is what is asked for, again."""

    def choose(on: bool) -> None:
        with _lock:
            _switch(on)

    try:
        yield choose
    finally:
        with _lock:
            _apply()


def enable() -> None:
    """Run ATen's batch, layer and group norm on the CPU with fastbn's kernels, in the whole process, until `disable`.

    This applies to every model and call: `torch.nn.BatchNorm2d` and its siblings, `LayerNorm`, `GroupNorm`, instance norm, the
    functions behind them; in training, inference and backward. Calls that fastbn does not take run as before; `report` counts
    them. The kernels run on torch's own threads (`torch.set_num_threads`). You may call it again, from any thread.

    Raises
    ------
    RuntimeError
        If this PyTorch is older than 2.10 or built without its stable C interface, or fastbn has no compiled kernel here.

    See Also
    --------
    enabled : the same for a block.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.enable()
    >>> torch.nn.BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    >>> fastbn.torch.disable()
    """
    global _asked
    with _lock:
        before, _asked = _asked, True
        try:
            _apply()
        except BaseException:
            _asked = before
            raise


def disable() -> None:
    """Give ATen's normalizations back to torch: undo `enable`. Blocks of `enabled` stay in force until they end.

    If no other Python thread exists, torch calls its own kernels directly, as if fastbn had never been enabled. Otherwise the
    calls still go to fastbn, which passes them on.

    Examples
    --------
    >>> import fastbn.torch
    >>> fastbn.torch.disable()
    >>> fastbn.torch.is_enabled()
    False
    """
    global _asked
    with _lock:
        _asked = False
        _apply()


@contextmanager
def enabled() -> Iterator[None]:
    """Do the same as `enable` for a ``with`` block, in the whole process; blocks may overlap.

    Raises
    ------
    RuntimeError
        As `enable`.

    Examples
    --------
    >>> import fastbn.torch
    >>> with fastbn.torch.enabled():
    ...     fastbn.torch.is_enabled()
    True
    """
    global _blocks
    with _lock:
        _blocks += 1
        try:
            _apply()
        except BaseException:
            _blocks -= 1
            raise
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            _apply()


def is_enabled() -> bool:
    """Whether fastbn runs ATen's normalizations.

    Returns
    -------
    bool

    Examples
    --------
    >>> import fastbn.torch
    >>> fastbn.torch.is_enabled()
    False
    """
    return _asked or _blocks > 0


class Report(NamedTuple):
    """Who computed the calls since the last reset.

    Attributes
    ----------
    taken : dict
        (operation, dtype, order of memory) -> number of calls that fastbn computed.
    declined : dict
        (operation, reason) -> number of calls that were left to torch.
    """

    taken: dict[tuple[str, str, str], int]
    declined: dict[tuple[str, str], int]

    def __str__(self) -> str:
        """A line for each count, under a header; where there are none, whether fastbn is enabled."""
        lines = [f"{count:>10}  {', '.join(key)}" for key, count in self.taken.items()]
        lines += [f"{count:>10}  {operation}, left to torch: {reason}" for (operation, reason), count in self.declined.items()]
        if not lines:
            return "no calls" if is_enabled() else "no calls: fastbn is not enabled, fastbn.torch.enable() does it"
        return "\n".join([f"{'calls':>10}  what fastbn computed, or why it did not", *lines])


def report(*, reset: bool = False) -> Report:
    """Count what fastbn computed and what it left to torch.

    Parameters
    ----------
    reset : bool
        Start again from 0.

    Returns
    -------
    Report
        Printed, it is a table.

    Raises
    ------
    RuntimeError
        If fastbn was built without a compiler.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> _ = fastbn.torch.report(reset=True)
    >>> with fastbn.torch.enabled():
    ...     _ = torch.nn.BatchNorm1d(3)(torch.ones(2, 3))
    >>> print(fastbn.torch.report())
         calls  what fastbn computed, or why it did not
             1  forward, float32, contiguous
    """
    door = _door()
    found = Report(*door.counts())
    if reset:
        door.reset()
    return found


def explain(x: torch.Tensor | torch.nn.Module) -> str:
    """Say what `enable` does for a tensor, or for each normalization layer of a model.

    Parameters
    ----------
    x : Tensor or Module
        An input of batch norm, or a model.

    Returns
    -------
    str
        One line for a tensor, or one for each normalization layer of a model: whether fastbn takes it, or why not.

    Raises
    ------
    TypeError
        If x is neither a Tensor nor a Module.
    RuntimeError
        If x has a layer norm or group norm, and `enable` would fail here.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> print(fastbn.torch.explain(torch.ones(8, 64, 56, 56)))
    taken: float32, contiguous, 8 x 64 x 3136 (outer x channels x inner)
    >>> print(fastbn.torch.explain(torch.nn.Sequential(torch.nn.BatchNorm2d(3))))
    0: BatchNorm2d(3): taken, float32
    """
    if isinstance(x, torch.Tensor):
        return _explain_tensor(x)
    if not isinstance(x, torch.nn.Module):
        raise TypeError(f"x must be a torch.Tensor or a torch.nn.Module, got {type(x).__name__}")
    lines = [f"{path or 'the model'}: {_explain_layer(layer)}" for path, layer in all_norms(x)]
    lines += [f"{path or 'the model'}: {what}, taken as those of layers; RMS norm is left to torch" for path, what in unseen(x).items()]
    if lines and any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in x.modules()):
        lines.append("compiled: torch.compile makes code of its own of what it compiles, and asks fastbn for what `convert` changed only")
    return "\n".join(lines) or "the model has no normalization layers"


def _explain_tensor(x: torch.Tensor) -> str:
    door = _door()
    if x.device.type != "cpu":
        return f"left to torch: it lies on {x.device}"
    if x.is_nested:
        return "left to torch: it is nested"
    if x.layout != torch.strided:
        return f"left to torch: its layout is {dtype_name(x.layout)}"
    if dtype_name(x.dtype) not in door.DTYPES:
        return f"left to torch: its dtype is {dtype_name(x.dtype)}"
    if not 2 <= x.dim() <= 16:
        return f"left to torch: it has {x.dim()} dimensions"
    if x.numel() == 0:
        return "left to torch: it is empty"
    order = door.order(x.shape, x.stride())
    channels, images = x.shape[1], x.shape[0]
    pixels = x.numel() // (channels * images)
    dims = (images * pixels, channels, 1) if order.startswith("channels last") else (images, channels, pixels)
    copied = {"other": "copied to a contiguous one first", "channels last with gaps": "copied to channels last first"}.get(order, order)
    return f"taken: {dtype_name(x.dtype)}, {copied}, {dims[0]} x {dims[1]} x {dims[2]} (outer x channels x inner)"


def _explain_layer(layer: Any) -> str:
    groups = f"{layer.num_groups}, " if isinstance(layer, torch.nn.GroupNorm) else ""
    name = f"{type(layer).__name__}({groups}{size(layer)})"
    if isinstance(layer, torch.nn.SyncBatchNorm):
        return f"{name}: left to torch, which synchronizes it"
    if isinstance(layer, torch.nn.RMSNorm):
        return f"{name}: left to torch, whose operator of it has no backward on the CPU; `convert` takes it"
    if isinstance(layer, (torch.nn.LayerNorm, torch.nn.GroupNorm)) and not ready().takes_parts():
        return f"{name}: left to torch: PyTorch {torch.__version__} lacks the functions that fastbn would leave calls to"
    tensors = [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if t.is_floating_point()]
    if any(torch.nn.parameter.is_lazy(t) for t in tensors):
        return f"{name}: unknown before its first call"
    if devices := {str(t.device) for t in tensors if t.device.type != "cpu"}:
        return f"{name}: left to torch: it lies on {' and '.join(sorted(devices))}"
    dtypes = sorted({dtype_name(t.dtype) for t in tensors})
    if len(dtypes) > 1 or not set(dtypes) <= set(_door().DTYPES):
        return f"{name}: left to torch: its parameters are {' and '.join(dtypes)}"
    return f"{name}: taken" + (f", {dtypes[0]}" if dtypes else "")
